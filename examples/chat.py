"""Chat about pictures in the terminal. Answers appear as they are written, and the conversation is kept.

    python examples/chat.py --model OpenGVLab/InternVL3-1B --image street.jpg
    python examples/chat.py --model out --image left.jpg right.jpg --num_thoughts 4

An empty line or Ctrl-D ends it.
"""

import argparse

from transformers import TextStreamer

from multicoco import OWN, MultiCoCoForConditionalGeneration, MultiCoCoProcessor


def main(arguments: list[str] | None = None) -> list[dict]:
    """Chats until there is no more to read; returns the messages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub name.")
    parser.add_argument("--image", nargs="*", default=[], help="Pictures that the conversation is about.")
    parser.add_argument(
        "--num_thoughts", type=int, help="Thoughts before each answer; the checkpoint's own by default."
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer.")
    args = parser.parse_args(arguments)

    processor = MultiCoCoProcessor.from_pretrained(args.model)
    model = MultiCoCoForConditionalGeneration.from_pretrained(args.model, dtype="auto", device_map="auto")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages, pictures = [], [{"type": "image", "path": path} for path in args.image]
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return messages
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": question}]})
        pictures = []  # they stay in the first message
        inputs = processor.apply_chat_template(
            messages,
            num_thoughts=OWN if args.num_thoughts is None else args.num_thoughts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, streamer=streamer)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.strip()})


if __name__ == "__main__":
    main()
