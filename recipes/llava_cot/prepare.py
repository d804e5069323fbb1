"""Makes records of LLaVA-CoT-100k: `train.jsonl` and the unpacked `image.zip` of `Xkev/LLaVA-CoT-100k`.

    cat image.zip.part-* > image.zip && unzip image.zip
    python recipes/llava_cot/prepare.py --train_file train.jsonl --image_dir . --output_dir data/llava_cot

The summary is the first step, the caption the second, the sentences of the reasoning the others; the conclusion is the
answer. It has one split: dev and val are carved from it. Of a conversation with several turns the first is used.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from multicoco.recipes.common import LeftOut, carve, make_parser, merge_steps, new_folder, split_sentences, to_steps


TAGS = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
CONTENT = rf"((?:(?!</?(?:{'|'.join(TAGS)})>).)*)"  # no tag inside
SECTIONS = re.compile(r"\s*" + r"\s*".join(f"<{tag}>{CONTENT}</{tag}>" for tag in TAGS) + r"\s*", re.DOTALL)
IMAGE_MARK = "<image>"


def read_turns(row: Any) -> Iterator[tuple[str, str]]:
    """Pairs of question and answer of a conversation."""
    turns = row.get("conversations") or []
    if [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
        raise LeftOut("its turns are not human, gpt, human, gpt")
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        yield human["value"].replace(IMAGE_MARK, "").strip(), gpt["value"]


def make_steps(summary: str, caption: str, reasoning: str, max_steps: int) -> list[str]:
    """Summary and caption stay whole while there is room for both and a step of reasoning."""
    heads = [" ".join(text.split()) for text in (summary, caption) if text.strip()]
    if max_steps <= len(heads):
        return merge_steps(heads + split_sentences(reasoning), max_steps)
    return heads + to_steps(reasoning, max_steps - len(heads))


def make_record(row: Mapping[str, Any], name: str, image: str, max_steps: int) -> dict[str, Any]:
    """The record of the first turn of a conversation."""
    question, answer = next(read_turns(row))
    sections = SECTIONS.fullmatch(answer)
    if sections is None:
        raise LeftOut(f"the answer is not made of {', '.join(f'<{tag}>' for tag in TAGS)}, once each, in this order")
    *reasons, conclusion = sections.groups()
    return {
        "id": name,
        "images": [image],
        "question": question,
        "steps": make_steps(*reasons, max_steps),
        "answer": " ".join(conclusion.split()),
        "extra": {"source": PurePosixPath(row["image"]).parts[0]},
    }


def prepare(
    output_dir: str | Path,
    train_file: str | Path,
    image_dir: str | Path,
    num_dev: int = 1000,
    num_val: int = 1000,
    max_steps: int = 6,
    seed: int = 0,
) -> str:
    """Makes the whole data set and returns the summary. It appears under its name only when it is complete."""
    for name, value, least in (("num_dev", num_dev, 1), ("num_val", num_val, 1), ("max_steps", max_steps, 1)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    try:
        lines = Path(train_file).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`train_file` {train_file} cannot be read as JSON lines: {error}. Check the path."
        ) from error
    settings = {"data_set": "llava_cot", "source": train_file, "num_dev": num_dev, "num_val": num_val, "seed": seed}
    with new_folder(output_dir, settings | {"max_steps": max_steps}) as output:
        groups = [row.get("image") or "" for row in rows]
        val = carve(groups, num_val, seed)
        dev = carve((group for group in groups if group not in val), num_dev, seed)
        part_of = dict.fromkeys(val, "val") | dict.fromkeys(dev, "dev")
        parts = [part_of.get(group, "train") for group in groups]
        later_turns = []

        def convert(row, number):
            num_turns = len(list(read_turns(row)))
            if not row.get("image"):
                raise LeftOut("no image")
            if PurePosixPath(row["image"]).is_absolute() or ".." in PurePosixPath(row["image"]).parts:
                raise LeftOut("the path of the image leaves `image_dir`")
            image = output.link(f"images/{row['image']}", Path(image_dir) / row["image"])
            record = make_record(row, f"{number:06d}-{row['id']}", image, max_steps)  # ids may stand twice
            later_turns.append(num_turns - 1)
            return record

        for split in ("train", "dev", "val"):
            output.write(split, rows, convert, id_field="id", parts=parts)
    unused = sum(later_turns)
    return output.summary() + (f"\n{'':12}{unused:>8} later turns of conversations are not used" if unused else "")


def main() -> None:
    """Makes the data set that the flags describe, and prints what it holds."""
    parser = make_parser("Make records of LLaVA-CoT-100k.", "data/llava_cot")
    parser.add_argument("--train_file", required=True, help="train.jsonl of the data set.")
    parser.add_argument("--image_dir", required=True, help="Folder in which image.zip was unpacked.")
    parser.add_argument("--num_dev", type=int, default=1000, help="Rows to watch during training, whole images.")
    parser.add_argument("--num_val", type=int, default=1000, help="Rows to keep for the end, whole images.")
    parser.add_argument("--max_steps", type=int, default=6, help="Steps at most; neighbours are joined beyond.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed carves other splits.")
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
