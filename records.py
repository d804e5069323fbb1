"""From files and data sets to checked records. Knows files and texts, no tokens and no model.

records -> TokenizedRecords (integers, checked once) -> StageDataset (composed lazily) -> ReasoningCollator
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset as HubDataset
from datasets import DatasetDict, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from PIL import Image
from transformers.utils import logging

from .configuration_multicoco import IMAGE_PLACEHOLDER, TURN_END_TOKEN, TURN_START_TOKEN
from .processing_multicoco import RESERVED_TOKENS


logger = logging.get_logger(__name__)


CHAT_TOKENS = (TURN_START_TOKEN, TURN_END_TOKEN)  # in a record's text they would end or open a turn
FIELDS = ("id", "images", "question", "choices", "steps", "rationales", "answer", "answers", "extra")


def load_records(
    source: str | os.PathLike | Sequence[Mapping[str, Any]] | HubDataset | DatasetDict,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    needs_steps: bool = True,
    allow_outside: bool = False,
    skip_bad_records: bool = False,
    needs_answer: bool = True,
) -> list[dict[str, Any]]:
    """
    Reads and checks records `{"id", "images", "question", "choices", "steps", "answer", "answers", "extra"}`.

    Several people's explanations of one answer are alternatives, not more steps: `"rationales"`, a list of lists of
    steps, takes the place of `"steps"`, and [`StageDataset`] draws one per sample and epoch; `"steps"` is then the
    first of them. `"extra"` is an object of anything else that a metric or a table needs; it is passed on as it is.

    Args:
        source: A `.jsonl` or `.json` file, a folder or Hub name that `datasets.load_dataset` reads, a data set, or a
            list of records. Images of a file are paths relative to it; those of a data set are read when needed.
        columns (`Mapping[str, str]`, *optional*): Names of the fields in the source, as `{"steps": "rationale"}`.
        split (`str`, defaults to `"train"`): Split of a folder or Hub data set.
        needs_steps (`bool`, defaults to `True`): Whether a record without written steps is a defect.
        allow_outside (`bool`, defaults to `False`): Allow image paths outside the folder of the file.
        skip_bad_records (`bool`, defaults to `False`): List and leave out records with a defect.
        needs_answer (`bool`, defaults to `True`): Whether a record without an answer is a defect. Without one it has
            `None` there, and can be asked but not trained on.

    Raises:
        ValueError: at the first defect: the id of the record, the field, what came and how to mend it.
    """
    columns = dict(columns or {})
    if unknown := [name for name in columns if name not in FIELDS]:
        raise ValueError(f"`columns` maps {unknown}, which are no fields of a record. The fields are {FIELDS}.")
    rows, folder, name = source, None, f"a {type(source).__name__}"
    if isinstance(source, (str, os.PathLike)):
        name = f"`{source}`"
        if Path(source).suffix in (".json", ".jsonl"):
            rows, folder = _read_json(Path(source)), Path(source).parent.resolve()
        else:
            rows = _load_dataset(str(source), split)
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ValueError(
                f"The data set has the splits {list(rows)}, not {split!r}. Choose one of them by `split`."
            )
        rows = rows[split]
    if isinstance(rows, HubDataset):
        rows = _read_dataset(rows, columns)
    records, defects, seen = [], [], set()
    for number, row in enumerate(rows):
        try:
            record = _check_record(row, columns, number, folder, needs_steps, allow_outside, needs_answer)
            if record["id"] in seen:
                raise ValueError(f"Record {record['id']!r}: `id` stands twice. Give every record its own.")
        except ValueError as error:
            if not skip_bad_records:
                raise
            defects.append(error)
            continue
        seen.add(record["id"])
        records.append(record)
    list_defects(defects)
    if not records:
        raise ValueError(f"{name} has no usable record. Check the path, the split and the list of defects, if any.")
    return records


def list_defects(defects: Sequence[ValueError]):
    if defects:
        logger.warning(f"{len(defects)} records were left out:\n  " + "\n  ".join(map(str, defects)))


def question_text(record: Mapping[str, Any]) -> str:
    """The user's turn of a record: its images first if the question does not place them, then its choices if any."""
    question = record["question"]
    if IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n" * len(record["images"]) + question
    if record["choices"]:
        question += "\nChoices: " + ", ".join(record["choices"])
    return question


def _read_json(path: Path) -> list:
    """Rows of a file; in place of a line that is not JSON its error, so that it can be skipped as any bad record."""
    if not path.is_file():
        raise ValueError(f"`{path}` does not exist, expected a .json or .jsonl file of records. Check the path.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if path.suffix == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{path}` is not valid JSON ({error}). Mend it, or name it .jsonl.") from error
        if not isinstance(rows, list):
            raise ValueError(
                f"`{path}` holds a {type(rows).__name__}, expected a list of records. Put [ and ] around them."
            )
        return rows
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # `splitlines` would also cut at U+2028 in a string
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                rows.append(ValueError(f"`{path}`, line {number}: not valid JSON ({error}). Write one record a line."))
    return rows


def _load_dataset(source: str, split: str) -> HubDataset:
    try:
        return load_dataset(source, split=split)
    except (OSError, ValueError, DatasetsError) as error:  # not found, no connection, no such split, broken files
        raise ValueError(
            f"`{source}`, split {split!r}: cannot be read as records: {error}. Give a .json or .jsonl file, a folder "
            "of images with a metadata.jsonl, or the name of a data set."
        ) from error


class DatasetImage:
    """An image of a `datasets` data set, read when it is opened."""

    def __init__(self, dataset: HubDataset, row: int, column: str, index: int | None):
        self.dataset, self.row, self.column, self.index = dataset, row, column, index

    def open(self):
        value = self.dataset[self.row][self.column]
        return value if self.index is None else value[self.index]


def _read_dataset(dataset: HubDataset, columns: Mapping[str, str]) -> Iterable[dict]:
    """Rows without decoded images: an image column gives [`DatasetImage`]s, any other is passed on as it is."""
    if missing := [name for name in columns.values() if name not in dataset.column_names]:
        raise ValueError(f"`columns` names {missing}, but the data set has {dataset.column_names}. Correct the names.")
    dataset = dataset.with_format(None)
    column = columns.get("images", "images" if "images" in dataset.column_names else "image")
    feature = dataset.features.get(column)
    is_list = not isinstance(feature, ImageFeature)
    if not isinstance(getattr(feature, "feature", None) if is_list else feature, ImageFeature):
        yield from dataset
        return
    images = dataset.select_columns([column])
    undecoded = images.with_format("arrow")
    texts = dataset.remove_columns([column]) if len(dataset.column_names) > 1 else [{}] * len(dataset)
    for number, row in enumerate(texts):
        cell = undecoded[number][column][0]
        indices = [] if not cell.is_valid else range(len(cell)) if is_list else [None]
        yield {**row, column: [DatasetImage(images, number, column, index) for index in indices]}


def _check_record(row, columns, number, folder, needs_steps, allow_outside, needs_answer) -> dict[str, Any]:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"Record {number}: is a {type(row).__name__}, expected an object with fields {FIELDS}.")
    image_column = columns.get("images", "images" if "images" in row else "image")  # `image` is the Hub's usual name
    row = {name: row.get(columns.get(name, name)) for name in FIELDS} | {"images": row.get(image_column)}
    record_id = number if row["id"] is None else row["id"]
    where = f"Record {record_id!r}"
    if isinstance(record_id, bool) or not isinstance(record_id, (str, int)):
        raise ValueError(f"Record {number}: `id` is {record_id!r:.100}, expected a string or an integer. Change it.")
    for name in ("question", "answer"):
        if name == "answer" and row[name] is None and not needs_answer:
            continue
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{where}: `{name}` is {row[name]!r:.100}, expected a non-empty string. Fill it in.")
    for name in ("steps", "choices", "answers"):
        value = row[name] if row[name] is not None else []
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item.strip() for item in value):
            raise ValueError(
                f"{where}: `{name}` is {value!r:.100}, expected a list of non-empty strings. Split or fill it in."
            )
    rationales = row["rationales"] if row["rationales"] is not None else []
    if not isinstance(rationales, (list, tuple)) or not all(
        isinstance(steps, (list, tuple)) and steps and all(isinstance(step, str) and step.strip() for step in steps)
        for steps in rationales
    ):
        raise ValueError(
            f"{where}: `rationales` is {rationales!r:.100}, expected a list of alternative lists of steps, each of "
            "non-empty strings. Split each explanation into its steps."
        )
    if rationales and row["steps"]:
        raise ValueError(
            f"{where}: has both `steps` and `rationales`, expected one. Put the steps among the `rationales` if they "
            "are one more alternative."
        )
    alternatives = [[step.strip() for step in steps] for steps in rationales or [row["steps"] or []]]
    if row["extra"] is not None and not isinstance(row["extra"], Mapping):
        raise ValueError(f"{where}: `extra` is {row['extra']!r:.100}, expected an object. Give its values names.")
    if needs_steps and not alternatives[0]:
        raise ValueError(
            f"{where}: `steps` is empty, expected at least one written step to learn from. Write the steps, or train "
            "with `--mode no_cot`."
        )
    texts = {name: [row[name]] if isinstance(row[name], str) else row[name] or [] for name in ("question", "answer")}
    texts |= {"steps": [step for steps in alternatives for step in steps], "choices": row["choices"] or []}
    for name in texts:
        for text in texts[name]:
            for token in RESERVED_TOKENS + CHAT_TOKENS + (() if name == "question" else (IMAGE_PLACEHOLDER,)):
                if token in text:
                    raise ValueError(f"{where}: `{name}` contains {token}, which is reserved. Remove or rephrase it.")
    images = row["images"] if row["images"] is not None else []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    images = [_check_image(image, where, folder, allow_outside) for image in images]
    placed = row["question"].count(IMAGE_PLACEHOLDER)
    if placed not in (0, len(images)):
        raise ValueError(
            f"{where}: `question` has {placed} {IMAGE_PLACEHOLDER} for {len(images)} `images`. Write one per image, "
            "or none to put the images first."
        )
    record = {
        "id": record_id,
        "images": images,
        "question": row["question"].strip(),
        "choices": list(row["choices"] or []),
        "steps": alternatives[0],
        "answer": row["answer"].strip() if row["answer"] is not None else None,
        "answers": list(row["answers"] or []),
    }
    if rationales:
        record["rationales"] = alternatives
    if row["extra"]:
        record["extra"] = dict(row["extra"])
    return record


def _check_image(image, where, folder, allow_outside):
    if isinstance(image, (DatasetImage, Image.Image, bytes)):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(
            f"{where}: `images` holds a {type(image).__name__}, expected a path, a PIL image or bytes. "
            "Change it, or leave it out."
        )
    path = (folder / image).resolve() if folder is not None else Path(image).resolve()
    if folder is not None and not allow_outside and not path.is_relative_to(folder):
        raise ValueError(
            f"{where}: `images` leaves the folder of the data: {image}. Move the image, or pass `--allow_outside`."
        )
    if not os.path.isfile(path):  # unlike `Path.is_file` also False for a name that is too long
        raise ValueError(
            f"{where}: `images` names {path!s:.200}, which does not exist. Paths are relative to the file of records."
        )
    return str(path)
