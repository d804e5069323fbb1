"""From files and data sets to checked records. Knows files and texts, no tokens and no model.

A source gives rows; the table `_CHECKS` makes a record of each, or says what is wrong with it.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    folder, name = None, f"a {type(source).__name__}"
    rows: Any = source
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
    wanted = _Wanted(folder, allow_outside, needs_steps, needs_answer)
    records, defects, seen = [], [], set()
    for number, row in enumerate(rows):
        try:
            record = _check_record(row, number, columns, wanted)
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


def list_defects(defects: Sequence[ValueError]) -> None:
    """Warns of the records that were left out, each with its reason."""
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

    def open(self) -> Any:
        """The image as the data set decodes it; `None` where the row has none."""
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


@dataclass(frozen=True)
class _Wanted:
    """What `load_records` was told to accept."""

    folder: Path | None
    allow_outside: bool
    needs_steps: bool
    needs_answer: bool


def _check_record(row: Any, number: int, columns: Mapping[str, str], wanted: _Wanted) -> dict[str, Any]:
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"Record {number}: is a {type(row).__name__}, expected an object with fields {FIELDS}.")
    image_column = columns.get("images", "images" if "images" in row else "image")  # `image` is the Hub's usual name
    record = {name: row.get(columns.get(name, name)) for name in FIELDS} | {"images": row.get(image_column)}
    record["id"] = number if record["id"] is None else record["id"]
    if isinstance(record["id"], bool) or not isinstance(record["id"], (str, int)):
        raise ValueError(
            f"Record {number}: `id` is {record['id']!r:.100}, expected a string or an integer. Change it."
        )
    where = f"Record {record['id']!r}"
    for name, check in _CHECKS:
        record[name] = check(record, name, where, wanted)
    return {name: value for name, value in record.items() if name not in ("rationales", "extra") or value}


def _text(record: dict, name: str, where: str, wanted: _Wanted) -> str:
    if not _is_text(record[name]):
        raise ValueError(f"{where}: `{name}` is {record[name]!r:.100}, expected a non-empty string. Fill it in.")
    return record[name].strip()


def _answer(record: dict, name: str, where: str, wanted: _Wanted) -> str | None:
    return None if record[name] is None and not wanted.needs_answer else _text(record, name, where, wanted)


def _texts(record: dict, name: str, where: str, wanted: _Wanted) -> list[str]:
    value = [] if record[name] is None else record[name]
    if not _are_texts(value):
        raise ValueError(
            f"{where}: `{name}` is {value!r:.100}, expected a list of non-empty strings. Split or fill it in."
        )
    return list(value)


def _rationales(record: dict, name: str, where: str, wanted: _Wanted) -> list[list[str]]:
    value = [] if record[name] is None else record[name]
    if not isinstance(value, (list, tuple)) or not all(_are_texts(steps) and steps for steps in value):
        raise ValueError(
            f"{where}: `rationales` is {value!r:.100}, expected a list of alternative lists of steps, each of "
            "non-empty strings. Split each explanation into its steps."
        )
    if value and record["steps"]:
        raise ValueError(
            f"{where}: has both `steps` and `rationales`, expected one. Put the steps among the `rationales` if they "
            "are one more alternative."
        )
    return [[step.strip() for step in steps] for steps in value]


def _extra(record: dict, name: str, where: str, wanted: _Wanted) -> dict:
    if record[name] is not None and not isinstance(record[name], Mapping):
        raise ValueError(f"{where}: `extra` is {record[name]!r:.100}, expected an object. Give its values names.")
    return dict(record[name] or {})


def _first_steps(record: dict, name: str, where: str, wanted: _Wanted) -> list[str]:
    """The first of the alternatives, if there are any."""
    steps = record["rationales"][0] if record["rationales"] else [step.strip() for step in record["steps"]]
    if wanted.needs_steps and not steps:
        raise ValueError(
            f"{where}: `steps` is empty, expected at least one written step to learn from. Write the steps, or train "
            "with `--mode no_cot`."
        )
    return steps


def _unreserved(record: dict, name: str, where: str, wanted: _Wanted) -> Any:
    """The field as it is, without a token that only the program may write; `steps` stands for all alternatives."""
    tokens = RESERVED_TOKENS + CHAT_TOKENS + (() if name == "question" else (IMAGE_PLACEHOLDER,))
    for text in _flat(record["rationales"] or record["steps"] if name == "steps" else record[name]):
        for token in tokens:
            if token in text:
                raise ValueError(f"{where}: `{name}` contains {token}, which is reserved. Remove or rephrase it.")
    return record[name]


def _images(record: dict, name: str, where: str, wanted: _Wanted) -> list[Any]:
    images = [] if record[name] is None else record[name]
    images = images if isinstance(images, (list, tuple)) else [images]
    return [_image(image, where, wanted) for image in images]


def _image(image: Any, where: str, wanted: _Wanted) -> Any:
    """The absolute path of a file; an image of any other kind as it is."""
    if isinstance(image, (DatasetImage, Image.Image, bytes)):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(
            f"{where}: `images` holds a {type(image).__name__}, expected a path, a PIL image or bytes. "
            "Change it, or leave it out."
        )
    path = (wanted.folder / image if wanted.folder is not None else Path(image)).resolve()
    if wanted.folder is not None and not wanted.allow_outside and not path.is_relative_to(wanted.folder):
        raise ValueError(
            f"{where}: `images` leaves the folder of the data: {image}. Move the image, or pass `--allow_outside`."
        )
    if not os.path.isfile(path):  # unlike `Path.is_file` also False for a name that is too long
        raise ValueError(
            f"{where}: `images` names {path!s:.200}, which does not exist. Paths are relative to the file of records."
        )
    return str(path)


def _placed(record: dict, name: str, where: str, wanted: _Wanted) -> str:
    placed, num_images = record[name].count(IMAGE_PLACEHOLDER), len(record["images"])
    if placed not in (0, num_images):
        raise ValueError(
            f"{where}: `question` has {placed} {IMAGE_PLACEHOLDER} for {num_images} `images`. Write one per image, "
            "or none to put the images first."
        )
    return record[name]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _flat(value: Any) -> list[str]:
    """The strings in a string, a list or a list of lists; none in `None`."""
    return [value] if isinstance(value, str) else [text for item in value or () for text in _flat(item)]


# From top to bottom: each takes the record as far as it is checked and gives the value of its field. Of several
# defects the first is reported.
_CHECKS = (
    ("question", _text),
    ("answer", _answer),
    ("steps", _texts),
    ("choices", _texts),
    ("answers", _texts),
    ("rationales", _rationales),
    ("extra", _extra),
    ("steps", _first_steps),
    ("question", _unreserved),
    ("answer", _unreserved),
    ("steps", _unreserved),
    ("choices", _unreserved),
    ("images", _images),
    ("question", _placed),
)
