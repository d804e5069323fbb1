"""Makes records of A-OKVQA, from the official release or from the Hub's copy of it.

    python recipes/aokvqa/prepare.py --aokvqa_dir datasets/aokvqa --coco_dir datasets/coco --output_dir data/aokvqa
    python recipes/aokvqa/prepare.py --hub HuggingFaceM4/A-OKVQA --output_dir data/aokvqa

Writes train, dev (carved from train, so that val stays for the end), val and test, each as multiple choice and, as
`*_direct`, without the choices. The rationales are several people's explanations: alternatives, never one chain.
"""

import ast
import collections
import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from multicoco.recipes.common import (
    LeftOut,
    Output,
    carve,
    image_bytes,
    make_parser,
    new_folder,
    read_split,
    to_steps,
)


SPLITS = ("train", "val", "test")


class OfficialRelease:
    """`aokvqa_v1p0_{split}.json` and the images of COCO 2017, `{split}2017/000000123456.jpg`."""

    def __init__(self, aokvqa_dir: str | Path, coco_dir: str | Path):
        self.aokvqa_dir, self.coco_dir = Path(aokvqa_dir), Path(coco_dir)

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The questions of a split."""
        path = self.aokvqa_dir / f"aokvqa_v1p0_{split}.json"
        if not path.is_file():
            raise ValueError(f"`aokvqa_dir` has no {path.name}. Unpack aokvqa_v1p0.tar.gz there, or choose `splits`.")
        return json.loads(path.read_text(encoding="utf-8"))

    def group(self, row: Mapping[str, Any]) -> str:
        """What names the image of a row."""
        return str(row["image_id"])

    def image(self, output: Output, row: Mapping[str, Any], split: str, number: int) -> str:
        """Puts the image of a row into the output; returns its path there."""
        name = f"{split}2017/{row['image_id']:012}.jpg"
        return output.link(name, self.coco_dir / name)


class HubCopy:
    """`HuggingFaceM4/A-OKVQA`, or a folder with its parquet files. It has no image ids: equal bytes are one image."""

    def __init__(self, hub: str):
        self.hub = hub

    def rows(self, split: str) -> Dataset:
        """The questions of a split, with undecoded images."""
        return read_split(self.hub, {"val": "validation"}.get(split, split))

    def group(self, row: Mapping[str, Any]) -> str:
        """What names the image of a row."""
        return hashlib.sha256(image_bytes(row["image"])).hexdigest()

    def image(self, output: Output, row: Mapping[str, Any], split: str, number: int) -> str:
        """Puts the image of a row into the output; returns its path there."""
        return output.image(f"{split}/{number:06d}", row["image"])


def read_answers(value: Any) -> list[str]:
    """`direct_answers`: a list, or (on the Hub) the text of one."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
    if value is not None and not (isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)):
        raise LeftOut("`direct_answers` is neither a list nor the text of one")
    return list(value or [])


def make_record(row: Mapping[str, Any], image: str, max_steps: int) -> dict[str, Any]:
    """The multiple-choice record of a row; one of the test split has no answer and no rationales."""
    choices, index = row["choices"], row.get("correct_choice_idx")
    if index is not None and not 0 <= index < len(choices):
        raise LeftOut("`correct_choice_idx` is none of the choices")
    rationales = [to_steps(text, max_steps) for text in row.get("rationales") or []]
    record = {"id": row["question_id"], "images": [image], "question": row["question"], "choices": choices}
    if any(rationales):
        record["rationales"] = [steps for steps in rationales if steps]
    if index is not None:
        record["answer"] = choices[index]
    return record | {
        "answers": read_answers(row.get("direct_answers")),
        "extra": {"correct_choice_idx": index, "difficult_direct_answer": row.get("difficult_direct_answer")},
    }


def without_choices(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record for direct answers: no choices in the question, and the answer that most people gave."""
    direct = {name: value for name, value in record.items() if name not in ("choices", "answer")}
    if record["answers"]:
        direct["answer"] = collections.Counter(record["answers"]).most_common(1)[0][0]  # of equals the first
    direct["extra"] = record["extra"] | {"choices": record["choices"]}
    return direct


def prepare(
    output_dir: str | Path,
    aokvqa_dir: str | Path | None = None,
    coco_dir: str | Path | None = None,
    hub: str | None = None,
    splits: tuple[str, ...] = SPLITS,
    num_dev: int = 1000,
    max_steps: int = 3,
    seed: int = 0,
) -> str:
    """
    Makes the whole data set and returns the summary. It appears under its name only when it is complete.

    Raises:
        ValueError: an argument is out of range, the folder holds something else, or a split has no usable row.
    """
    if (hub is None) == (aokvqa_dir is None) or (aokvqa_dir is None) != (coco_dir is None):
        raise ValueError("Give either `aokvqa_dir` and `coco_dir` (the official release) or `hub`.")
    for name, value, least in (("num_dev", num_dev, 1), ("max_steps", max_steps, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    source = HubCopy(hub) if hub is not None else OfficialRelease(aokvqa_dir, coco_dir)
    settings = {"data_set": "aokvqa", "source": hub or aokvqa_dir, "num_dev": num_dev, "max_steps": max_steps}
    with new_folder(output_dir, settings | {"seed": seed}) as output:
        for split in splits:
            rows = source.rows(split)
            parts = [split] * len(rows)
            if split == "train":
                groups = [source.group(row) for row in rows]
                dev = carve(groups, num_dev, seed)
                parts = ["dev" if group in dev else "train" for group in groups]

            def convert(row, number, split=split):
                return make_record(row, source.image(output, row, split, number), max_steps)

            for part in ("train", "dev") if split == "train" else (split,):
                needs = {"needs_steps": part == "train", "needs_answer": part != "test"}
                records = output.write(part, rows, convert, id_field="question_id", parts=parts, **needs)
                direct = (without_choices(record) for record in records)
                output.write(f"{part}_direct", direct, lambda record, _: record, id_field="id", **needs)
    return output.summary()


def main() -> None:
    """Makes the data set that the flags describe, and prints what it holds."""
    parser = make_parser("Make records of A-OKVQA.", "data/aokvqa")
    parser.add_argument("--aokvqa_dir", help="Folder with aokvqa_v1p0_train.json, _val.json and _test.json.")
    parser.add_argument("--coco_dir", help="Folder with train2017/, val2017/ and test2017/ of COCO.")
    parser.add_argument("--hub", help="Instead of both: HuggingFaceM4/A-OKVQA, or a folder with its parquet files.")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="Splits to read.")
    parser.add_argument("--num_dev", type=int, default=1000, help="Questions to carve from train, whole images.")
    parser.add_argument("--max_steps", type=int, default=3, help="Steps of a rationale at most: `max_latent_stage`.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed carves another dev split.")
    args = parser.parse_args()
    print(prepare(**vars(args)))


if __name__ == "__main__":
    main()
