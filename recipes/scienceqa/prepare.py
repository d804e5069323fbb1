"""Makes records of ScienceQA from the Hub (`derek-thomas/ScienceQA`) or a folder with its parquet files.

    python recipes/scienceqa/prepare.py --hub derek-thomas/ScienceQA --output_dir data/scienceqa

The steps are the sentences of the solution, or of the lecture where there is no solution. More than half of the
questions have no image; they stay, as text only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multicoco.recipes.common import LeftOut, image_bytes, make_parser, prepare_hub, to_steps


TOPICS = ("task", "grade", "subject", "topic", "category", "skill")


def make_record(row: Mapping[str, Any], name: str, images: list[str], max_steps: int) -> dict[str, Any]:
    """The record of a row, with its hint before the question."""
    if not 0 <= row["answer"] < len(row["choices"]):
        raise LeftOut("`answer` is no index of the choices")
    hint = (row["hint"] or "").strip()
    rationale = (row["solution"] or "").strip() or row["lecture"] or ""
    return {
        "id": name,
        "images": images,
        "question": f"{hint}\n{row['question']}" if hint else row["question"],
        "choices": row["choices"],
        "steps": to_steps(rationale, max_steps),
        "answer": row["choices"][row["answer"]],
        "extra": {field: row[field] for field in TOPICS},
    }


def prepare(output_dir: str | Path, hub: str = "derek-thomas/ScienceQA", max_steps: int = 6) -> str:
    """Makes the whole data set and returns the summary. It appears under its name only when it is complete."""

    def convert(output, split, row, number):
        name = f"{number:06d}"
        images = [output.image(f"{split}/{name}", row["image"])] if image_bytes(row["image"]) else []
        return make_record(row, f"{split}-{name}", images, max_steps)

    return prepare_hub(output_dir, "scienceqa", hub, max_steps, convert)


def main() -> None:
    """Makes the data set that the flags describe, and prints what it holds."""
    parser = make_parser("Make records of ScienceQA.", "data/scienceqa")
    parser.add_argument(
        "--hub", default="derek-thomas/ScienceQA", help="Hub name, or a folder with the parquet files."
    )
    parser.add_argument("--max_steps", type=int, default=6, help="Steps at most; neighbours are joined beyond.")
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
