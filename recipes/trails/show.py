"""Draws a board with what a trained model says about it: after continuous thoughts, and what these say, if they can be
read; else in written steps.

    python recipes/trails/show.py --model out/trails-coconut --data data/trails/val.jsonl --output out/board.png

Numbers of generated tokens count the end of the turn, as the tables do.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from multicoco import (
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    load_records,
    question_text,
)
from multicoco.recipes.trails.prepare import CELL_PIXELS


def answer(
    model: MultiCoCoForConditionalGeneration, processor: MultiCoCoProcessor, record: dict, num_thoughts: int
) -> tuple[str, int]:
    """What is written on one line, and the number of new tokens, the end of the turn among them."""
    inputs = prompt_of(processor, record, num_thoughts)
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    return processor.tokenizer.decode(tokens, skip_special_tokens=True).replace("\n", "  →  "), len(tokens)


def read(
    model: MultiCoCoForConditionalGeneration, processor: MultiCoCoProcessor, record: dict, num_thoughts: int
) -> list[str]:
    """What each group of thoughts says, given alone."""
    inputs = prompt_of(processor, record, num_thoughts)
    thoughts = model.generate(**inputs, max_new_tokens=1, return_thoughts=True)["thoughts"]
    texts = processor.tokenizer.batch_decode(model.read_thoughts(thoughts)[0], skip_special_tokens=True)
    return [text.strip() for text in texts]


def prompt_of(processor: MultiCoCoProcessor, record: dict, num_thoughts: int) -> dict:
    """The inputs of a question with so many thoughts."""
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": question_text(record)}], num_thoughts=num_thoughts, add_generation_prompt=True
    )
    return processor(images=record["images"], text=prompt, return_tensors="pt")


@torch.no_grad()
def draw_answers(
    model: MultiCoCoForConditionalGeneration, processor: MultiCoCoProcessor, record: dict, path: str | Path
) -> None:
    """The board at the left; the question, what thoughts say or is written, and the latent answer at the right."""
    num_thoughts = model.config.num_thoughts
    if model.config.step_loss_weight:
        above = "each thought, read alone", "  ".join(read(model, processor, record, num_thoughts))
    else:
        written, num_written = answer(model, processor, record, 0)
        above = f"written reasoning, {num_written} generated tokens", written
    latent, num_latent = answer(model, processor, record, num_thoughts)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    board, text = figure.subplots(1, 2, width_ratios=(1, 1.6))
    with Image.open(record["images"][0]) as image:
        board.imshow(image, interpolation="nearest")
    size = image.width // CELL_PIXELS
    centres = [CELL_PIXELS * (cell + 0.5) - 0.5 for cell in range(size)]
    board.set_xticks(centres, [chr(ord("A") + cell) for cell in range(size)])
    board.set_yticks(centres, [str(cell + 1) for cell in range(size)])
    board.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
    board.spines[:].set_visible(False)

    text.axis("off")
    small, code = {"color": "0.4", "fontsize": 9}, {"family": "monospace"}
    lines = [
        (0.95, record["question"], {}),
        (0.72, above[0], small),
        (0.61, above[1], code),
        (0.39, f"{num_thoughts} continuous thoughts, {num_latent} generated tokens", small),
        (0.28, "● " * num_thoughts + " " + latent, code),
        (0.06, f"right answer: {record['answer']}", small),
    ]
    for height, line, style in lines:
        text.text(0, height, line, transform=text.transAxes, va="center", **({"fontsize": 11} | style))
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(
        description="Draw a board with what a trained model thinks of it, or writes, and answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="out/trails-coconut", help="Folder of the trained model.")
    parser.add_argument("--data", default="data/trails/val.jsonl", help="Records.")
    parser.add_argument("--index", type=int, default=0, help="Which record, from 0.")
    parser.add_argument("--output", default="out/board.png", help="Picture to write.")
    args = parser.parse_args()
    records = load_records(args.data)
    if not 0 <= args.index < len(records):
        raise ValueError(f"`--index` must be between 0 and {len(records) - 1}, got {args.index}.")
    model = MultiCoCoForConditionalGeneration.from_pretrained(args.model).eval()
    draw_answers(model, MultiCoCoProcessor.from_pretrained(args.model), records[args.index], args.output)
    print(f"{args.output}: drawn")


if __name__ == "__main__":
    main()
