"""Makes records of Coconut's own JSON (GSM8k, ProsQA, ProntoQA): text only, with the steps as they are.

    python recipes/text_json/prepare.py --train prosqa_train.json --val prosqa_valid.json --test prosqa_test.json \
        --output_dir data/prosqa

A file is a list of `{"question", "steps", "answer"}`; other fields (ProsQA's graph) are not used.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from multicoco.recipes.common import LeftOut, make_parser, new_folder


def make_record(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The record of a row, under a name of ours."""
    if missing := [field for field in ("question", "steps", "answer") if field not in row]:
        raise LeftOut(f"no field {', '.join(missing)}")
    return {
        "id": name,
        "images": [],
        "question": row["question"],
        "steps": row["steps"],
        "answer": row["answer"],
    }


def prepare(output_dir: str | Path, train: str | Path, val: str | Path, test: str | Path | None = None) -> str:
    """Makes the whole data set and returns the summary. It appears under its name only when it is complete."""
    files = {split: Path(path) for split, path in (("train", train), ("val", val), ("test", test)) if path is not None}
    with new_folder(output_dir, {"data_set": "text_json", "source": files}) as output:
        for split, path in files.items():
            try:
                rows = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ValueError(f"`{split}` {path} cannot be read as JSON: {error}. Check the path.") from error
            if not isinstance(rows, list):
                raise ValueError(f"`{split}` {path} holds a {type(rows).__name__}, expected a list of problems.")

            def convert(row, number, split=split):
                return make_record(row, f"{split}-{number:06d}")

            output.write(split, rows, convert, needs_steps=split == "train")
    return output.summary()


def main() -> None:
    """Makes the data set that the flags describe, and prints what it holds."""
    parser = make_parser("Make records of Coconut's JSON.", "data/text_json")
    parser.add_argument("--train", required=True, help="JSON file to train on.")
    parser.add_argument("--val", required=True, help="JSON file to watch.")
    parser.add_argument("--test", help="JSON file to keep for the end.")
    print(prepare(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
