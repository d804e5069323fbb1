"""Chat about pictures in the terminal. Answers appear as they are written, and the conversation is kept.

    python examples/chat.py --model OpenGVLab/InternVL3-1B --image street.jpg
    python examples/chat.py --model out --image left.jpg right.jpg --num_thoughts 4
    python examples/chat.py --model out --image board.png --show_thoughts       # trained with --step_loss_weight

An empty line or Ctrl-D ends it.
"""

import argparse
from typing import Any

import torch
from transformers import TextStreamer

from multicoco import OWN, MultiCoCoProcessor, load_checkpoint


def read_groups(model: Any, processor: MultiCoCoProcessor, thoughts: torch.Tensor | None) -> list[str]:
    """What each group of thoughts (1, n, D) reads as; thoughts behind the last whole group are not read."""
    if thoughts is None:
        return []
    whole = thoughts.shape[1] // model.config.c_thought * model.config.c_thought
    tokens = model.read_thoughts(thoughts[:, :whole], do_sample=False, num_beams=1) if whole else [[]]
    return [processor.decode(group, skip_special_tokens=True).strip() for group in tokens[0]]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Chats until there is no more to read; returns the messages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub name.")
    parser.add_argument("--image", nargs="*", default=[], help="Pictures that the conversation is about.")
    parser.add_argument(
        "--num_thoughts", type=int, help="Thoughts before each answer; the checkpoint's own by default."
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer.")
    parser.add_argument("--show_thoughts", action="store_true", help="Print what each group of thoughts reads as.")
    args = parser.parse_args(arguments)

    processor = MultiCoCoProcessor.from_pretrained(args.model)
    model = load_checkpoint(args.model, dtype="auto", device_map="auto")
    if args.show_thoughts and (model.config.mode != "coconut" or not model.config.step_loss_weight):
        parser.error(
            f"--show_thoughts: the thoughts of {args.model} cannot be read: its mode is {model.config.mode} and its "
            f"`step_loss_weight` {model.config.step_loss_weight:g}. Give a checkpoint of mode coconut that was "
            "trained with `--step_loss_weight 1`, or leave the flag out."
        )
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
        output = model.generate(
            **inputs, max_new_tokens=args.max_new_tokens, streamer=streamer, return_thoughts=args.show_thoughts
        )
        if args.show_thoughts:
            for number, text in enumerate(read_groups(model, processor, output.thoughts), start=1):
                print(f"[thought {number}] {text}")
            output = output.sequences
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer.strip()})


if __name__ == "__main__":
    main()
