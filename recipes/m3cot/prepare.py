"""Makes records of M3CoT from the Hub (`LightChen2333/M3CoT`) or a folder with its parquet files.

    python recipes/m3cot/prepare.py --hub LightChen2333/M3CoT --output_dir data/m3cot

Its rationales are true chains, written to need several steps: their sentences are the steps.
"""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multicoco.recipes.common import LeftOut, make_parser, prepare_hub, to_steps


def make_record(row: Mapping[str, Any], image: str, max_steps: int) -> dict[str, Any]:
    """The record of a row; its answer is the choice that the letter names."""
    letter = (row["answer"] or "").strip()
    index = string.ascii_uppercase.find(letter) if len(letter) == 1 else -1
    if not 0 <= index < len(row["choices"]):
        raise LeftOut("`answer` is none of the choices' letters")
    context = (row["context"] or "").strip()
    return {
        "id": row["id"],
        "images": [image],
        "question": f"{context}\n{row['question']}" if context else row["question"],
        "choices": row["choices"],
        "steps": to_steps(row["rationale"] or "", max_steps),
        "answer": row["choices"][index],
        "extra": {name: row[name] for name in ("domain", "topic", "category", "image_id")},
    }


def prepare(output_dir: str | Path, hub: str = "LightChen2333/M3CoT", max_steps: int = 8) -> str:
    """Makes the whole data set and returns the summary. It appears under its name only when it is complete."""

    def convert(output, split, row, number):
        return make_record(row, output.image(f"{split}/{number:06d}", row["image"]), max_steps)

    return prepare_hub(output_dir, "m3cot", hub, max_steps, convert, id_field="id")


def main() -> None:
    """Makes the data set that the flags describe, and prints what it holds."""
    parser = make_parser("Make records of M3CoT.", "data/m3cot")
    parser.add_argument("--hub", default="LightChen2333/M3CoT", help="Hub name, or a folder with the parquet files.")
    parser.add_argument("--max_steps", type=int, default=8, help="Steps at most; neighbours are joined beyond.")
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
