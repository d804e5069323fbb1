"""From files and data sets to checked records. Knows files and texts, no tokens and no model. Read it downwards:

source -> sets of rows -> the table `_CHECKS` makes a record of each row, or says what is wrong with it -> [`Records`]

What comes from files is checked once and kept in Arrow files, which all processes of a machine read: [`make_table`].
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset as HubDataset
from datasets import Image as ImageFeature
from PIL import Image

from .configuration_multicoco import IMAGE_PLACEHOLDER, TURN_END_TOKEN, TURN_START_TOKEN
from .curriculum import ANSWER_MARK
from .processing_multicoco import RESERVED_TOKENS
from .sources import (
    BATCH,
    Lines,
    Source,
    find_sources,
    fingerprint_of,
    list_defects,
    make_table,
    split_defects,
    state_of,
)


CHAT_TOKENS = (TURN_START_TOKEN, TURN_END_TOKEN)  # in a record's text they would end or open a turn
FIELDS = ("id", "images", "history", "question", "choices", "steps", "rationales", "answer", "answers", "extra")
STEPS_FROM = {
    "none": "answers are taken as they are",
    "think": "the lines between <think> and </think> are steps, what follows is the answer",
    "lines": "all lines but the last are steps",
}
_HALF = re.compile("[\ud800-\udfff]")
MAY_TURN_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # names of what holds an orientation
TURNED = (5, 6, 7, 8)  # values of EXIF's orientation that swap width and height


def load_records(
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    needs_steps: bool = True,
    allow_outside: bool = False,
    skip_bad_records: bool = False,
    needs_answer: bool = True,
    steps_from: str = "none",
    image_folder: str | os.PathLike | None = None,
    weights: Sequence[float] | None = None,
    num_proc: int | None = None,
    overwrite_cache: bool = False,
) -> "Records":
    """
    Reads and checks records `{"id", "images", "history", "question", "choices", "steps", "answer", "answers",
    "extra"}`.

    Several people's explanations of one answer are alternatives, not more steps: `"rationales"`, a list of lists of
    steps, takes the place of `"steps"`, and [`StageDataset`] draws one per sample and epoch; `"steps"` is then the
    first of them. `"history"` is the list of earlier turns, `[question, answer]` each, as of InternVL's `chat`.
    `"extra"` is an object of anything else that a metric or a table needs; it is passed on as it is.

    A row may have InternVL's `"conversations"` instead: each answer in it becomes a record, with the turns before it.

    Args:
        source: A `.jsonl`, `.json` or `.parquet` file, several of one set by a glob (`"data/*.jsonl"`), a folder or
            Hub name that `datasets.load_dataset` reads, InternVL's own `.json` of several sets, a data set, or
            records: a list or generator of dictionaries. Or a list of files, folders and names, each a set: the ids
            are then `"set:id"`. Images of a file are paths relative to it; those of a data set are read when needed.
        columns (`Mapping[str, str]`, *optional*): Names of the fields in the source, as `{"steps": "rationale"}`.
        split (`str`, defaults to `"train"`): Split of a folder or Hub data set.
        needs_steps (`bool`, defaults to `True`): Whether a record without written steps is a defect.
        allow_outside (`bool`, defaults to `False`): Allow image paths outside the folder of the file.
        skip_bad_records (`bool`, defaults to `False`): List and leave out records with a defect.
        needs_answer (`bool`, defaults to `True`): Whether a record without an answer is a defect. Without one it has
            `None` there, and can be asked but not trained on.
        steps_from (`str`, defaults to `"none"`): What of an answer in `"conversations"` are steps, see `STEPS_FROM`.
        image_folder (`str`, *optional*): What image paths are relative to, in place of the folder of the file.
        weights (`Sequence[float]`, *optional*): How often an epoch of [`StageDataset`] goes through each set; if not
            given, once, or the `repeat_time` of InternVL's file of sets.
        num_proc (`int`, *optional*): Processes that check. By default one for every 5,000 rows, at most one a core.
        overwrite_cache (`bool`, defaults to `False`): Check again what was checked before.

    Raises:
        ValueError: at the first defect: the id of the record, the field, what came and how to mend it.
    """
    columns = dict(columns or {})
    if unknown := [name for name in columns if name not in (*FIELDS, "conversations")]:
        raise ValueError(f"`columns` maps {unknown}, which are no fields of a record. The fields are {FIELDS}.")
    if steps_from not in STEPS_FROM:
        raise ValueError(f"`steps_from` must be one of {', '.join(STEPS_FROM)}, got {steps_from!r}.")
    sources = find_sources(source, split, image_folder)
    _weigh(sources, weights)
    sets: list[RecordSet] = []
    kept, defects = [], []
    for found in sources:
        wanted = _Wanted(found.folder, allow_outside, needs_steps, needs_answer, steps_from)
        where = f"{found.name}: " if len(sources) > 1 else ""
        try:
            one, good, bad = _check_set(found, columns, wanted, skip_bad_records, num_proc, overwrite_cache)
        except ValueError as error:
            if not where:
                raise
            raise ValueError(f"{where}{error}") from error
        one.prefix = f"{found.name}:" if where else ""
        kept.append(good + sum(len(each.rows) for each in sets))
        sets.append(one)
        defects += [where + defect for defect in bad]
    list_defects(defects)
    records = Records(sets, np.concatenate(kept))
    if not len(records):
        names = ", ".join(f"`{found.name}`" for found in sources)
        raise ValueError(f"{names} has no usable record. Check the path, the split and the list of defects, if any.")
    return records


def _weigh(sources: Sequence[Source], weights: Sequence[float] | None) -> None:
    if weights is not None and len(weights) != len(sources):
        raise ValueError(f"`weights` has {len(weights)} numbers for {len(sources)} sets. Give one for each.")
    given = [found.weight for found in sources] if weights is None else weights
    for found, weight in zip(sources, given, strict=True):
        found.weight = weight
        if not 0 < weight < float("inf"):
            raise ValueError(f"`weights`: that of {found.name} is {weight}, expected a number above 0. Correct it.")


def question_text(record: Mapping[str, Any]) -> str:
    """
    The user's turn of a record: its images first if the question does not place them, then its choices if any.

    Raises:
        ValueError: the record has earlier turns, which [`turns`] gives.
    """
    if record.get("history"):
        raise ValueError(f"Record {record['id']!r}: has `history`, earlier turns. Take all of them, `turns(record)`.")
    return turns(record)[0]["content"]


def turns(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """
    A record as messages of a chat template, up to the question that is to be answered. Images come first if no
    question places them. Earlier answers stand there as the model writes them without steps.
    """
    history, question = record.get("history") or [], record["question"]
    if record["choices"]:
        question += "\nChoices: " + ", ".join(record["choices"])
    messages = []
    for asked, answer in history:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": ANSWER_MARK + answer})
    messages.append({"role": "user", "content": question})
    if not any(IMAGE_PLACEHOLDER in message["content"] for message in messages):
        messages[0]["content"] = f"{IMAGE_PLACEHOLDER}\n" * len(record["images"]) + messages[0]["content"]
    return messages


# --- checked records ---------------------------------------------------------------------------------------------


class DatasetImage:
    """An image of a `datasets` data set, read when it is opened."""

    def __init__(self, dataset: HubDataset, row: int, column: str, index: int | None):
        self.dataset, self.row, self.column, self.index = dataset, row, column, index

    def open(self) -> Any:
        """The image as the data set decodes it; `None` where the row has none."""
        value = self._stored()  # of several in a row this one alone
        feature = self.dataset.features[self.column]
        mode = (feature if self.index is None else feature.feature).mode
        return None if value is None else ImageFeature(mode=mode).decode_example(value)

    def size(self) -> tuple[int, int]:
        """
        Width and height of what [`~DatasetImage.open`] gives, of which only the header is read.

        Raises:
            OSError: it is none, or cannot be read.
        """
        value = self._stored()
        if value is None:
            raise OSError("there is none")
        file = _file_of(value)
        if value["bytes"] is None and file is None:
            return self.open().size  # somewhere that only `datasets` reads
        with Image.open(file or BytesIO(value["bytes"])) as image:
            width, height = image.size
            if image.format == "PNG":  # whose pixels would be decoded to look behind them for what turns it
                content = value["bytes"] if file is None else Path(file).read_bytes()
                if not any(mark in content for mark in MAY_TURN_PNG):
                    return width, height
            return (height, width) if image.getexif().get(0x0112) in TURNED else (width, height)

    def file(self) -> str | None:
        """The path of the file that it is read from; `None` if the data set has its bytes."""
        return _file_of(self._stored())

    def _stored(self) -> Any:
        cell = self.dataset.with_format("arrow")[self.row][self.column][0]
        return (cell if self.index is None else cell[self.index]).as_py()


def _file_of(value: Mapping[str, Any] | None) -> str | None:
    if value is None or value["bytes"] is not None or not os.path.isfile(value["path"] or ""):
        return None
    return value["path"]


@dataclass
class RecordSet:
    """
    Records that belong together: checked dictionaries, or a table that [`load_records`] has made.

    Args:
        rows (`list[dict]` or `datasets.Dataset`): The records.
        name (`str`, *optional*): What they are called in messages.
        images (`datasets.Dataset`, *optional*): Where the pictures of a data set are read.
        weight (`float`, defaults to 1): How often an epoch goes through them.
        prefix (`str`, *optional*): Stands before each id.
        fingerprint (`str`, *optional*): The same for the same content; what comes from Python has none.
    """

    rows: Any
    name: str = "records"
    images: HubDataset | None = None
    weight: float = 1.0
    prefix: str = ""
    fingerprint: str | None = None

    def record(self, index: int) -> dict[str, Any]:
        """The checked record at this place."""
        if isinstance(self.rows, list):
            record = self.rows[index]
        else:
            row = self.rows[index]  # a `pyarrow.Table` of one row, whose texts are read only when they are asked for
            record = json.loads(row["record"][0].as_py()) | {"images": self._images_of(row)}
        return {**record, "id": f"{self.prefix}{record['id']}"} if self.prefix else record

    def images_of(self, index: int) -> list[Any]:
        """Its images, without reading its texts."""
        return self.rows[index]["images"] if isinstance(self.rows, list) else self._images_of(self.rows[index])

    def _images_of(self, row: pa.Table) -> list[Any]:
        paths = row["paths"][0].as_py()
        if self.images is None or (paths and paths[0] is not None):
            return paths
        column = self.images.column_names[0]
        is_list = not isinstance(self.images.features[column], ImageFeature)
        number = row["row"][0].as_py()
        return [DatasetImage(self.images, number, column, index if is_list else None) for index in range(len(paths))]


class Records(Sequence):
    """
    Checked records, each made when it is asked for; a slice is [`Records`] again.

    Args:
        sets (`Sequence[RecordSet]`): What they are taken from.
        order (`np.ndarray` of shape `(number of records,)`, *optional*): Their places in the sets, one behind the
            other; all, in order, if not given.
    """

    def __init__(self, sets: Sequence[RecordSet], order: np.ndarray | None = None):
        self.sets = list(sets)
        self._starts = np.cumsum([0, *(len(one.rows) for one in self.sets)])
        self._order = np.arange(self._starts[-1]) if order is None else order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> "Records": ...

    def __getitem__(self, index: int | slice) -> "dict[str, Any] | Records":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        one, place = self._find(index)
        return one.record(place)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def images_of(self, index: int) -> list[Any]:
        """The images of a record, without reading its texts."""
        one, place = self._find(index)
        return one.images_of(place)

    def are_paths(self, index: int) -> bool:
        """Whether all images of a record are paths, as those from JSON files are."""
        one, _ = self._find(index)
        return one.images is None and not isinstance(one.rows, list)

    def select(self, indices: np.ndarray) -> "Records":
        """The records with these indices, in this order."""
        return Records(self.sets, self._order[indices])

    def each_once(self) -> "Records":
        """The same records, of sets without weights: whoever asks them asks each once."""
        return Records([replace(one, weight=1.0) for one in self.sets], self._order)

    def by_set(self) -> list[tuple[np.ndarray, float]]:
        """For each set the indices of its records, and its weight."""
        owners = np.searchsorted(self._starts, self._order, side="right") - 1
        return [(np.flatnonzero(owners == number), one.weight) for number, one in enumerate(self.sets)]

    @property
    def fingerprint(self) -> str | None:
        """The same for the same records; `None` for what comes from Python."""
        parts = [(one.fingerprint, one.prefix) for one in self.sets]
        if not all(known for known, _ in parts):
            return None
        return fingerprint_of(parts, hashlib.sha256(self._order.tobytes()).hexdigest())

    def _find(self, index: int) -> tuple[RecordSet, int]:
        place = int(self._order[index])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return self.sets[number], place - int(self._starts[number])


# --- rows -> a table of records ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What `load_records` was told to accept."""

    folder: Path | None
    allow_outside: bool
    needs_steps: bool
    needs_answer: bool
    steps_from: str = "none"


_RECORD_SCHEMA = pa.schema(
    {
        "row": pa.int64(),  # of the source
        "id": pa.string(),  # JSON, as the record
        "record": pa.string(),  # all but its images
        "paths": pa.list_(pa.string()),  # one for each image; null for one that only the source has
        "defect": pa.string(),
    }
)


@dataclass
class _CheckRows:
    """Rows of the table of a set, or the defects that they have."""

    rows: Lines | HubDataset  # of a data set without its images
    images: tuple[str, np.ndarray] | None  # the name of the column of images, and how many each row has
    columns: Mapping[str, str]
    wanted: _Wanted

    def __call__(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        for number, row in zip(numbers, self._read(numbers), strict=True):
            try:
                found = _check_row(row, number, self.columns, self.wanted)
                yield from [_to_row(record, number) for record in found]  # all of them, or none
            except ValueError as error:
                yield {"row": number, "defect": str(error)}

    def _read(self, numbers: Sequence[int]) -> Iterable[Any]:
        if isinstance(self.rows, Lines):
            return self.rows.read(numbers)
        texts: list[dict] = [{} for _ in numbers]
        if self.rows.column_names:
            values = self.rows[list(numbers) if len(numbers) == 1 else range(numbers[0], numbers[-1] + 1)]
            texts = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        if self.images is not None:
            column, counts = self.images
            for row, count in zip(texts, counts[list(numbers)].tolist(), strict=True):
                row[column] = [DatasetImage(self.rows, 0, column, None)] * count  # counted, not read
        return texts


def _to_row(record: dict[str, Any], number: int) -> dict[str, Any]:
    images = record.pop("images")
    if lost := [type(image).__name__ for image in images if not isinstance(image, (str, DatasetImage))]:
        raise ValueError(
            f"Record {record['id']!r}: `images` holds a {lost[0]}, which the data set does not know for a picture. "
            "Cast the column, `dataset.cast_column(name, datasets.Image())`."
        )
    return {
        "row": number,
        "id": json.dumps(record["id"]),
        "record": _to_json(record),
        "paths": [image if isinstance(image, str) else None for image in images],
    }


def _to_json(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record)
    except TypeError as error:
        raise ValueError(
            f"Record {record['id']!r}: `extra` {error}, expected what JSON can hold. Turn it into text or numbers."
        ) from error


def _check_set(
    source: Source,
    columns: Mapping[str, str],
    wanted: _Wanted,
    skip_bad_records: bool,
    num_proc: int | None,
    overwrite_cache: bool,
) -> tuple[RecordSet, np.ndarray, list[str]]:
    """The set, the places of its good records, and the defects of the others."""
    images: HubDataset | None = None
    files: Sequence[str | Path]
    origin: Any
    if isinstance(source.rows, list):
        _check_columns(source.rows, columns)
        return _check_list(source.rows, source, columns, wanted, skip_bad_records)
    if isinstance(source.rows, Lines):
        _check_columns(source.rows.read(range(len(source.rows))), columns)
    if isinstance(source.rows, HubDataset):
        check, images = _check_dataset(source.rows, columns, wanted)
        files = [file["filename"] for file in source.rows.cache_files]
        origin = source.rows._fingerprint, [state_of(file) for file in files]  # the first says how they were made
    else:
        check, origin = _CheckRows(source.rows, None, columns, wanted), source.rows.digest
        files = source.rows.files
    fingerprint = fingerprint_of(origin, files, columns, vars(wanted))
    table, good, defects = make_table(
        check,
        len(source.rows),
        _RECORD_SCHEMA,
        fingerprint=fingerprint,
        num_proc=num_proc,
        skip_bad_records=skip_bad_records,
        overwrite_cache=overwrite_cache,
        split=_split_rows,
        desc=f"Checking {source.name}",
    )
    return RecordSet(table, source.name, images, source.weight, fingerprint=fingerprint), good, defects


def _check_columns(rows: Iterable[Any], columns: Mapping[str, str]) -> None:
    """Each column that a field is mapped to stands in some row; as a rule in the first."""
    missing = set(columns.values())
    for row in rows if missing else ():
        if isinstance(row, Mapping) and not (missing := missing - row.keys()):
            return
    if missing:
        raise ValueError(f"`columns` names {sorted(missing)}, but no row has them. Correct the names.")


def _check_list(
    rows: list, source: Source, columns: Mapping[str, str], wanted: _Wanted, skip_bad_records: bool
) -> tuple[RecordSet, np.ndarray, list[str]]:
    records: list[dict[str, Any]] = []
    defects: list[str] = []
    seen: set[str | int] = set()
    for number, row in enumerate(rows):
        try:
            found = list(_check_row(row, number, columns, wanted))  # all of them, or none
            _add_ids([record["id"] for record in found], seen)
            records += found
        except ValueError as error:
            if not skip_bad_records:
                raise
            defects.append(str(error))
    return RecordSet(records, source.name, weight=source.weight), np.arange(len(records)), defects


def _split_rows(table: HubDataset) -> tuple[np.ndarray, list[str]]:
    """As [`split_defects`], but a row with an id that stands before it is a defect too, with all its records."""
    ids = table.data.column("id").drop_null()
    if pc.count_distinct(ids).as_py() == len(ids):
        return split_defects(table)
    rows, names, texts = (table.data.column(name).to_pylist() for name in ("row", "id", "defect"))
    good: list[int] = []
    defects: list[str] = []
    seen: set[str | int] = set()
    for _, group in itertools.groupby(range(len(rows)), key=rows.__getitem__):
        places = list(group)
        try:
            if texts[places[0]] is not None:
                raise ValueError(texts[places[0]])
            _add_ids([json.loads(names[place]) for place in places], seen)
            good += places
        except ValueError as error:
            defects.append(str(error))
    return np.array(good, dtype=np.int64), defects


def _add_ids(names: list[str | int], seen: set[str | int]) -> None:
    for place, name in enumerate(names):
        if name in seen or name in names[:place]:
            raise ValueError(f"Record {name!r}: `id` stands twice. Give every record its own.")
    seen.update(names)


def _check_dataset(
    dataset: HubDataset, columns: Mapping[str, str], wanted: _Wanted
) -> tuple[_CheckRows, HubDataset | None]:
    """Without its column of images, if it has one: how many each row has is known without reading them."""
    if missing := [name for name in columns.values() if name not in dataset.column_names]:
        raise ValueError(f"`columns` names {missing}, but the data set has {dataset.column_names}. Correct the names.")
    if dataset.format["type"] == "custom":
        raise ValueError(
            "The data set has a transform of its own, which would be left out. Apply it with `map`, or take it off "
            "with `reset_format`."
        )
    dataset = dataset.with_format(None)
    column = columns.get("images", "images" if "images" in dataset.column_names else "image")
    feature = dataset.features.get(column)
    is_list = not isinstance(feature, ImageFeature)
    if not isinstance(getattr(feature, "feature", None) if is_list else feature, ImageFeature):
        return _CheckRows(dataset, None, columns, wanted), None
    images = dataset.select_columns([column])
    counts = [np.zeros(0, dtype=np.int64)]
    for batch in images.with_format("arrow").iter(batch_size=BATCH):  # by batches: a selection copies what it gives
        cells = batch[column]
        lengths = pc.fill_null(pc.list_value_length(cells), 0) if is_list else pc.cast(pc.is_valid(cells), pa.int64())
        counts.append(lengths.to_numpy())
    check = _CheckRows(dataset.remove_columns([column]), (column, np.concatenate(counts)), columns, wanted)
    return check, images


# --- a row -> its records ----------------------------------------------------------------------------------------


def _check_row(row: Any, number: int, columns: Mapping[str, str], wanted: _Wanted) -> Iterator[dict[str, Any]]:
    """The record of a row, or those of the turns of a conversation."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, Mapping):
        raise ValueError(f"Record {number}: is a {type(row).__name__}, expected an object with fields {FIELDS}.")
    own_name = "image" if row.get("images") is None else "images"  # `image` is the Hub's usual name
    image_column = columns.get("images", own_name)
    record = {name: row.get(columns.get(name, name)) for name in FIELDS} | {"images": row.get(image_column)}
    record["id"] = number if record["id"] is None else record["id"]
    if isinstance(record["id"], bool) or not isinstance(record["id"], (str, int)):
        raise ValueError(
            f"Record {number}: `id` is {record['id']!r:.100}, expected a string or an integer. Change it."
        )
    if "images" not in columns and row.get("image") is not None and row.get("images") is not None:
        raise ValueError(f"Record {record['id']!r}: has `image` and `images`, expected one of them. Leave one out.")
    conversation = row.get(columns.get("conversations", "conversations"))
    if conversation is not None and row.get("video") is not None:
        raise ValueError(f"Record {record['id']!r}: has a `video`, expected `image`. Give its frames as images.")
    for each in [record] if conversation is None else _records_of(conversation, record, wanted):
        where = f"Record {each['id']!r}"
        for name, check in _CHECKS:
            each[name] = check(each, name, where, wanted)
        optional = ("rationales", "extra", "history")
        yield {name: value for name, value in each.items() if name not in optional or value}


def _records_of(conversation: Any, record: dict[str, Any], wanted: _Wanted) -> Iterator[dict[str, Any]]:
    """
    Of InternVL's `[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]` a record for each answer.
    Images are dealt out by the placeholders of the questions; without any they stand before the first.
    """
    where = f"Record {record['id']!r}"
    if both := [name for name in ("question", "answer", "steps", "rationales", "history") if record[name] is not None]:
        raise ValueError(f"{where}: has `conversations` and `{both[0]}`, expected one of them. Leave one out.")
    if not isinstance(conversation, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in conversation):
        raise ValueError(f"{where}: `conversations` is {conversation!r:.100}, expected a list of turns. Change it.")
    speakers = [turn.get("from") for turn in conversation]
    if not speakers or speakers != (["human", "gpt"] * len(speakers))[: len(speakers)]:
        raise ValueError(
            f"{where}: `conversations` has turns from {speakers!r:.100}, expected 'human' and 'gpt' in turn. Leave "
            "out others; a system message is the configuration's `system_message`."
        )
    if len(speakers) % 2 and wanted.needs_answer:
        raise ValueError(f"{where}: `conversations` ends with a question. Add its answer, or leave the question out.")
    images = [] if record["images"] is None else record["images"]
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    values = [_text({"value": turn.get("value")}, "value", where, wanted) for turn in conversation]
    asked = values[::2]
    counts = [question.count(IMAGE_PLACEHOLDER) for question in asked]
    if sum(counts) not in (0, len(images)):
        raise ValueError(
            f"{where}: `conversations` has {sum(counts)} {IMAGE_PLACEHOLDER} for {len(images)} images. Write one per "
            "image, or none to put the images first."
        )
    counts = counts if sum(counts) else [len(images)] + [0] * len(asked)
    history: list[list[str]] = []
    for turn, question in enumerate(asked):
        answer = values[2 * turn + 1] if 2 * turn + 1 < len(values) else None
        steps, last = ([], None) if answer is None else _split_answer(answer, where, wanted.steps_from)
        yield {
            **record,
            "id": record["id"] if len(asked) == 1 else f"{record['id']}:{turn + 1}",
            "images": images[: sum(counts[: turn + 1])],
            "history": [list(pair) for pair in history],
            "question": question,
            "steps": steps,
            "answer": last,
        }
        history.append([question, last or ""])


def _split_answer(text: str, where: str, steps_from: str) -> tuple[list[str], str]:
    """Steps and answer of what `gpt` says, see `STEPS_FROM`."""
    if steps_from == "think" and ("<think>" in text or "</think>" in text):
        found = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", text, flags=re.DOTALL)
        if found is None or "think>" in found[1] + found[2]:
            raise ValueError(
                f"{where}: `conversations` has an answer {text!r:.100} that is not <think>, steps, </think>, answer. "
                "Close the marks, or leave them out."
            )
        return _lines(found[1]), found[2]
    if steps_from == "lines":
        *steps, text = _lines(text)
        return steps, text
    return [], text


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


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
    if value and record["steps"] and list(record["steps"]) != list(value[0]):  # of a checked record they are the first
        raise ValueError(
            f"{where}: has both `steps` and `rationales`, expected one. Put the steps among the `rationales` if they "
            "are one more alternative."
        )
    return [[step.strip() for step in steps] for steps in value]


def _extra(record: dict, name: str, where: str, wanted: _Wanted) -> dict:
    if record[name] is not None and not isinstance(record[name], Mapping):
        raise ValueError(f"{where}: `extra` is {record[name]!r:.100}, expected an object. Give its values names.")
    return dict(record[name] or {})


def _history(record: dict, name: str, where: str, wanted: _Wanted) -> list[list[str]]:
    value = [] if record[name] is None else record[name]
    if not isinstance(value, (list, tuple)) or not all(_are_texts(turn) and len(turn) == 2 for turn in value):
        raise ValueError(
            f"{where}: `history` is {value!r:.100}, expected a list of earlier turns, [question, answer] of non-empty "
            "strings. Fill them in."
        )
    return [[text.strip() for text in turn] for turn in value]


def _first_steps(record: dict, name: str, where: str, wanted: _Wanted) -> list[str]:
    """The first of the alternatives, if there are any."""
    steps = record["rationales"][0] if record["rationales"] else [step.strip() for step in record["steps"]]
    if wanted.needs_steps and not steps:
        raise ValueError(
            f"{where}: `steps` is empty, expected at least one written step to learn from. Write the steps, or train "
            "with `--mode no_cot`; `--without_steps` says what a record without steps gets among others, "
            "`--steps_from` where the steps of a conversation are."
        )
    return steps


def _unreserved(record: dict, name: str, where: str, wanted: _Wanted) -> Any:
    """The field as it is, without a token that only the program may write; `steps` stands for all alternatives."""
    tokens = RESERVED_TOKENS + CHAT_TOKENS + (() if name in ("question", "history") else (IMAGE_PLACEHOLDER,))
    for text in _flat(record["rationales"] or record["steps"] if name == "steps" else record[name]):
        for token in tokens:
            if token in text:
                raise ValueError(f"{where}: `{name}` contains {token}, which is reserved. Remove or rephrase it.")
        if not _is_unicode(text):
            raise ValueError(f"{where}: `{name}` {text!r:.100} holds half a character. Write it as UTF-8.")
    return record[name]


def _images(record: dict, name: str, where: str, wanted: _Wanted) -> list[Any]:
    images = [] if record[name] is None else record[name]
    images = images if isinstance(images, (list, tuple)) else [images]
    return [_image(image, where, wanted) for image in images]


def _image(image: Any, where: str, wanted: _Wanted) -> Any:
    """The absolute path of a file, links as they are; an image of any other kind as it is."""
    if isinstance(image, (DatasetImage, Image.Image, bytes)):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise ValueError(
            f"{where}: `images` holds a {type(image).__name__}, expected a path, a PIL image or bytes. "
            "Change it, or leave it out."
        )
    if not _is_unicode(str(image)) or "\0" in str(image):
        raise ValueError(f"{where}: `images` names {str(image)!r:.200}, which is no path. Rename the file.")
    given = wanted.folder / image if wanted.folder is not None else Path(image).absolute()
    path = given.resolve()
    if wanted.folder is not None and not wanted.allow_outside and not path.is_relative_to(wanted.folder):
        raise ValueError(
            f"{where}: `images` leaves the folder of the data: {image}. Move the image, or pass `--allow_outside`."
        )
    if not os.path.isfile(path):  # unlike `Path.is_file` also False for a name that is too long
        raise ValueError(
            f"{where}: `images` names {path!s:.200}, which does not exist. Paths are relative to the file of records."
        )
    return str(path if ".." in given.parts else given)  # a link may lead elsewhere when the table is read again


def _placed(record: dict, name: str, where: str, wanted: _Wanted) -> str:
    num_images = len(record["images"])
    if any(IMAGE_PLACEHOLDER in answer for _, answer in record["history"]):
        raise ValueError(
            f"{where}: `history` has {IMAGE_PLACEHOLDER} in an answer. Images stand in questions: move it."
        )
    placed = sum(text.count(IMAGE_PLACEHOLDER) for text in (*_flat(record["history"]), record[name]))
    if placed not in (0, num_images):
        raise ValueError(
            f"{where}: `question` has {placed} {IMAGE_PLACEHOLDER} for {num_images} `images`. Write one per image, "
            "or none to put the images first."
        )
    return record[name]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_unicode(text: str) -> bool:
    """Whether it can be written to a file: JSON can also hold halves of characters beyond 16 bits."""
    return text.isascii() or _HALF.search(text) is None


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
    ("history", _history),
    ("steps", _first_steps),
    ("question", _unreserved),
    ("answer", _unreserved),
    ("steps", _unreserved),
    ("choices", _unreserved),
    ("history", _unreserved),
    ("images", _images),
    ("question", _placed),
)
