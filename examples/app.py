"""A page in the browser: a picture, a question, a slider for the number of thoughts, and the answer.

    pip install -e '.[app]'
    python examples/app.py --model me/multicoco-1b

Move the slider and ask again to see what the thoughts are worth. Its middle is what the checkpoint was trained with.
Of a checkpoint that was trained with `--step_loss_weight` the page also shows what each group of thoughts reads as.
"""

import argparse

import gradio as gr
import torch
from PIL import Image

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor


def build(model_path: str, max_new_tokens: int = 512) -> gr.Blocks:
    """The page, with the checkpoint loaded; its function answers under the name `ask` too, for programs."""
    processor = MultiCoCoProcessor.from_pretrained(model_path)
    model = MultiCoCoForConditionalGeneration.from_pretrained(model_path, dtype="auto", device_map="auto")
    trained = processor.num_thoughts  # None: trained without a block of thoughts
    is_readable = model.config.mode == "coconut" and model.config.step_loss_weight > 0

    def ask(picture: Image.Image | None, question: str, num_thoughts: int | None) -> str | tuple[str, str]:
        if not (question or "").strip():
            raise gr.Error("Ask something: the question is empty.", print_exception=False)
        pictures = [] if picture is None else [{"type": "image", "image": picture}]
        messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": question.strip()}]}]
        try:
            inputs = processor.apply_chat_template(
                messages,
                num_thoughts=num_thoughts if trained is None else int(num_thoughts),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(model.device, model.dtype)
        except ValueError as error:  # what cannot be asked, in the processor's words
            raise gr.Error(str(error), print_exception=False) from error
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, return_thoughts=is_readable)
        tokens = output.sequences if is_readable else output
        answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return (answer, read(output.thoughts)) if is_readable else answer

    def read(thoughts: torch.Tensor | None) -> str:
        """A line for each group of thoughts; those behind the last whole group are not read."""
        whole = 0 if thoughts is None else thoughts.shape[1] // model.config.c_thought * model.config.c_thought
        if not whole:
            return ""
        tokens = model.read_thoughts(thoughts[:, :whole], do_sample=False, num_beams=1)[0]
        texts = [processor.decode(group, skip_special_tokens=True).strip() for group in tokens]
        return "\n".join(f"{number}: {text}" for number, text in enumerate(texts, start=1))

    with gr.Blocks(title="multicoco") as page:
        gr.Markdown("## Ask about a picture\nThe model thinks in continuous thoughts before its first word.")
        with gr.Row():
            picture = gr.Image(label="Picture", type="pil", image_mode="RGB", height=380)
            with gr.Column():
                question = gr.Textbox(label="Question", placeholder="How many cars are parked?")
                num_thoughts = gr.Slider(
                    0,
                    2 * trained if trained else 1,
                    value=trained,
                    step=1,
                    label="Thoughts",
                    info=f"Trained with {trained}.",
                    visible=trained is not None,
                )
                button = gr.Button("Ask", variant="primary")
                answer = gr.Textbox(label="Answer", lines=3, buttons=["copy"])
                shown = [answer, gr.Textbox(label="Thoughts read as", lines=3)] if is_readable else answer
        gr.on([button.click, question.submit], ask, [picture, question, num_thoughts], shown, api_name="ask")
    return page


def main(arguments: list[str] | None = None) -> None:
    """Starts the page, and serves it until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder that train.py wrote, or its name on the Hub.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for other machines too.")
    parser.add_argument("--port", type=int, default=7860, help="Port to listen on.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer.")
    args = parser.parse_args(arguments)

    build(args.model, args.max_new_tokens).launch(server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()
