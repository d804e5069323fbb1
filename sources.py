"""From files and data sets to numbered rows, and to tables that are made of them once. Knows no record, no token.

A source is what a user names: files, a data set, or Python objects. A table is what a check makes of its rows, kept in
Arrow files that all processes of a machine read: [`make_table`].
"""

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
from datasets import Dataset as HubDataset
from datasets import DatasetDict, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.utils import WeakFileLock
from transformers.utils import logging

from .compat import world_size


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is


COMPLETE = "files.json"  # names the files of a table that was written to its end, with their sizes
BATCH = 500  # rows that are checked at a time
ROWS_OF_A_PROCESS = 5000  # fewer are not worth one more process
# A change of any of these files makes all tables anew.
CODE = ("configuration_multicoco", "processing_multicoco", "curriculum", "sources", "records", "data_multicoco")


# --- sources -> sets of rows -------------------------------------------------------------------------------------


@dataclass
class Source:
    """A set as it comes: places in files, a data set, or Python objects; nothing of it is checked."""

    name: str
    rows: "Lines | HubDataset | list"
    folder: Path | None = None  # what its image paths are relative to
    weight: float = 1.0
    files: Sequence[Path] = ()  # that its rows stand in


@dataclass
class Lines:
    """Rows of JSON files: where each stands. `number` of them, in arrays."""

    files: list[Path]
    spans: np.ndarray  # (number, 4): file, line, first byte, byte behind the last
    digest: str  # of all files' content
    states: list[list[int]]  # of the files before they were scanned, see `state_of`

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, numbers: Sequence[int]) -> Iterator[Any]:
        """These rows; in the place of one that is not JSON its error, so that it can be skipped as any bad record."""
        for file, spans in itertools.groupby(self.spans[numbers].tolist(), key=lambda span: span[0]):
            with open(self.files[file], "rb") as stream:
                if state_of(self.files[file]) != self.states[file]:  # or other rows would be kept under its digest
                    raise ValueError(f"`{self.files[file]}` has changed while it was read. Start again.")
                for _, line, start, stop in spans:
                    stream.seek(start)
                    try:
                        yield json.loads(stream.read(stop - start).decode())
                    except (ValueError, RecursionError) as error:
                        yield ValueError(
                            f"`{self.files[file]}`, line {line}: not valid JSON ({error}). Write one record a line."
                        )


def find_sources(source: Any, split: str, image_folder: str | os.PathLike | None) -> list[Source]:
    """
    The sets that `source` of `load_records` names.

    Raises:
        ValueError: it cannot be read, or is none of what can.
    """
    if isinstance(source, (str, os.PathLike)):
        return _open_source(os.fspath(source), split, image_folder)
    if isinstance(source, DatasetDict):
        if split not in source:
            raise ValueError(
                f"The data set has the splits {list(source)}, not {split!r}. Choose one of them by `split`."
            )
        source = source[split]
    if isinstance(source, HubDataset):
        return [Source("a Dataset", source, _folder(image_folder))]
    if isinstance(source, (datasets.IterableDataset, Mapping)) or not isinstance(source, Iterable):
        raise ValueError(
            f"`source` is a {type(source).__name__}, expected files, a data set with a length, or records. A "
            "curriculum must know the length of an epoch: load the data set without `streaming`."
        )
    rows = list(source)
    if rows and all(isinstance(row, (str, os.PathLike)) for row in rows):
        return _open_sources([os.fspath(row) for row in rows], split, image_folder)
    return [Source(f"a {type(source).__name__}", rows, _folder(image_folder))]


def _open_sources(words: Sequence[str], split: str, image_folder: str | os.PathLike | None) -> list[Source]:
    """The sets of all words, none of them twice: they would count twice, and share the names in the ids."""
    places = [os.path.realpath(word) if os.path.exists(word) else word for word in words]
    for word, place in zip(words, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"`source` names {word} twice. Name it once, and give it a weight of 2.")
    sets = [found for word in words for found in _open_source(word, split, image_folder)]
    owners: dict[Path, str] = {}
    for found in sets:
        if [one.name for one in sets].count(found.name) > 1:
            raise ValueError(f"`source` has two sets with the name {found.name}. Rename one: ids begin with it.")
        for file in found.files:
            if owners.setdefault(file.resolve(), found.name) != found.name and len(words) > 1:
                raise ValueError(
                    f"`source` reads {file} for {owners[file.resolve()]} and again for {found.name}. Name it once, "
                    "and give it a weight of 2."
                )
    return sets


def _folder(image_folder: str | os.PathLike | None, name: str = "`--image_folder`") -> Path | None:
    if image_folder is None:
        return None
    if not os.path.isdir(image_folder):
        raise ValueError(f"{name} {image_folder} is no folder. Check the path.")
    return Path(image_folder).resolve()


def _open_source(word: str, split: str, image_folder: str | os.PathLike | None) -> list[Source]:
    """The set, or the sets of InternVL's file of sets, that a word on the command line stands for."""
    paths = [word]
    if glob.has_magic(word) and not os.path.exists(word):
        paths = sorted(glob.glob(word, recursive=True))
        if not paths:
            raise ValueError(f"`{word}` matches no file. Check the pattern.")
        if len(set(map(os.path.realpath, paths))) < len(paths):
            raise ValueError(
                f"`{word}` matches a file twice, by a link. Its records would count twice: narrow it down."
            )
    kinds = {Path(path).suffix for path in paths}
    if kinds <= {".json", ".jsonl"}:
        files = [Path(path) for path in paths]
        if len(files) == 1 and (sets := _sets_of_internvl(files[0], image_folder)) is not None:
            return sets
        return [Source(word, _scan(files), _folder_of(files, word, image_folder), files=files)]
    if kinds == {".parquet"}:
        rows, files = _load_dataset("parquet", split, word, data_files={split: paths}), [Path(path) for path in paths]
        return [Source(word, rows, _folder_of(files, word, image_folder), files=files)]
    if len(paths) > 1:
        raise ValueError(f"`{word}` matches {sorted(kinds)}, expected .jsonl and .json, or .parquet. Narrow it down.")
    return [Source(word, _load_dataset(word, split, word), _folder(image_folder))]


def _folder_of(files: Sequence[Path], word: str, image_folder: str | os.PathLike | None) -> Path:
    """What the image paths in these files are relative to."""
    folders = {file.parent.resolve() for file in files}
    if len(folders) > 1 and image_folder is None:
        raise ValueError(f"`{word}` matches files in several folders. Give `--image_folder`, or each by itself.")
    return _folder(image_folder) or folders.pop()


def _sets_of_internvl(path: Path, image_folder: str | os.PathLike | None) -> list[Source] | None:
    """
    The sets of a file as InternVL's training script reads it, `{"name": {"root", "annotation", "repeat_time"}}`;
    `None` if it is another. Paths are relative to the working folder, as there. A set without `root` has its images
    where those of other files are.
    """
    content = path.read_bytes() if path.suffix == ".json" and path.is_file() else b""
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return None
    sets = _parse(path, content)
    names = [name for name, _ in json.loads(content.decode("utf-8-sig"), object_pairs_hook=list)]
    if twice := [name for name in sets if names.count(name) > 1]:
        raise ValueError(f"`{path}` has two sets with the name {twice[0]}. Rename one: the first would be left out.")
    if not sets or not all(isinstance(one, Mapping) and "annotation" in one for one in sets.values()):
        raise ValueError(
            f"`{path}` holds a dict, expected a list of records. Put [ and ] around them. (InternVL's file of sets "
            'has {"annotation": a .jsonl, "root": the folder of its images} for each name.)'
        )
    found = []
    for name, one in sets.items():
        if not str(one["annotation"]).endswith((".jsonl", ".json")):
            raise ValueError(f"`{path}`, {name!r}: `annotation` is {one['annotation']!r}, expected a .jsonl file.")
        file, weight = Path(one["annotation"]), one.get("repeat_time", 1)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ValueError(f"`{path}`, {name!r}: `repeat_time` is {weight!r}, expected a number.")
        if ignored := [switch for switch in ("data_augment", "max_dynamic_patch") if one.get(switch)]:
            logger.warning(f"`{path}`, {name!r}: {ignored} are not followed. Tiles are those of `--max_patches`.")
        root = _folder(one.get("root") or None, f"`{path}`, {name!r}: `root`")
        folder = root or _folder(image_folder) or file.parent.resolve()
        found.append(Source(name, _scan([file]), folder, float(weight), [file]))
    return found


def _scan(files: Sequence[Path]) -> Lines:
    """Finds the rows of JSON files, and checks that these are text."""
    spans, digest = array("q"), hashlib.sha256()  # an array: a list of tuples is ten times as large
    states = [state_of(path) or [] for path in files]
    for number, path in enumerate(files):
        if not path.is_file():
            raise ValueError(f"`{path}` does not exist, expected a .json or .jsonl file of records. Check the path.")
        if path.suffix == ".json":
            content = path.read_bytes()
            digest.update(content)
            for span in _spans_of_list(path, content):
                spans.extend((number, *span))
            continue
        position = 0
        with open(path, "rb") as lines:  # binary: text would also be cut at other line ends, in strings too
            for count, line in enumerate(lines, start=1):
                digest.update(line)
                start, position = position, position + len(line)
                if count == 1 and line.startswith(b"\xef\xbb\xbf"):
                    start, line = start + 3, line[3:]
                if _decode(path, line).strip():
                    spans.extend((number, count, start, position))
    return Lines(list(files), np.array(spans).reshape(-1, 4), digest.hexdigest(), states)


def state_of(path: str | os.PathLike) -> list[int] | None:
    """Bytes and time of the last change of a file; `None` if it is gone."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return [state.st_size, state.st_mtime_ns]


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8 text ({error}). Save it as UTF-8.") from error


def _parse(path: Path, content: bytes) -> Any:
    text = _decode(path, content.removeprefix(b"\xef\xbb\xbf"))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is not valid JSON ({error}). Mend it, or name it .jsonl.") from error


def _spans_of_list(path: Path, content: bytes) -> Iterator[tuple[int, int, int]]:
    """Line, first byte and byte behind the last of each item of a JSON list."""
    rows = _parse(path, content)
    if not isinstance(rows, list):
        raise ValueError(
            f"`{path}` holds a {type(rows).__name__}, expected a list of records. Put [ and ] around them."
        )
    text = content.decode("utf-8-sig")
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    byte, line, behind = len(content) - len(text.encode()), 1, 0  # bytes of a byte order mark
    place = text.index("[") + 1
    for _ in rows:
        start = place + len(gap.match(text, place)[0])  # type: ignore[index]  # it matches nothing too
        byte += len(text[behind:start].encode())
        line += text.count("\n", behind, start)
        _, place = decoder.raw_decode(text, start)
        first, first_line = byte, line
        byte += len(text[start:place].encode())
        line += text.count("\n", start, place)
        behind = place
        yield first_line, first, byte


def _load_dataset(source: str, split: str, word: str, **kwargs: Any) -> HubDataset:
    try:
        return load_dataset(source, split=split, **kwargs)
    except (OSError, ValueError, DatasetsError) as error:  # not found, no connection, no such split, broken files
        raise ValueError(
            f"`{word}`, split {split!r}: cannot be read as records: {error}. Give a .json or .jsonl file, a folder "
            "of images with a metadata.jsonl, or the name of a data set."
        ) from error


# --- tables that are made once -----------------------------------------------------------------------------------


_STARTED = time.time()
_opened: set[Path] = set()  # tables that this process has made or read


@functools.lru_cache
def _code_version() -> str:
    digest = hashlib.sha256()
    for name in CODE:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return f"{digest.hexdigest()} {datasets.__version__} {transformers.__version__} {tokenizers.__version__}"


def fingerprint_of(*parts: Any) -> str:
    """A name for what is made of these by our code as it is now."""
    text = json.dumps([_code_version(), *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass
class _CheckBatch:
    """A function for `datasets.map`: some rows of the table. Nothing behind the first defect is of use to anybody."""

    check: Callable[[Sequence[int]], Iterable[dict[str, Any]]]
    schema: pa.Schema
    stop: Path | None  # holds the first number of a batch with a defect; `None`: to go on

    def __call__(self, numbers: Sequence[int]) -> pa.Table:
        rows: list[dict[str, Any]] = []
        if self.stop is not None and self.stop.is_file() and int(self.stop.read_text() or -1) in range(numbers[0]):
            return pa.Table.from_pylist(rows, self.schema)
        for row in self.check(numbers):
            rows.append(row)
            if self.stop is not None and row.get("defect") is not None:
                self.stop.write_text(str(numbers[0]))
                break
        return pa.Table.from_pylist(rows, self.schema)


def make_table(
    check: Callable[[Sequence[int]], Iterable[dict[str, Any]]],
    count: int,
    schema: pa.Schema,
    *,
    fingerprint: str | None,
    num_proc: int | None = None,
    skip_bad_records: bool = False,
    overwrite_cache: bool = False,
    is_stale: Callable[[HubDataset], bool] | None = None,
    split: Callable[[HubDataset], tuple[np.ndarray, list[str]]] | None = None,
    desc: str = "",
) -> tuple[HubDataset, np.ndarray, list[str]]:
    """
    The rows that `check` gives for the numbers from 0, in an Arrow table that is mapped from files in the cache of
    `datasets` (`HF_DATASETS_CACHE`): made by the first process that asks, while all others of the machine wait.

    Args:
        check (`Callable`): Gives the rows of ascending numbers, in order; one with a `"defect"` has no other values.
        count (`int`): How many numbers there are.
        schema (`pa.Schema`): The columns; `"row"` is the number that a row was made of.
        fingerprint (`str`, *optional*): Name of the content. Without one it is made in memory, for this process.
        num_proc (`int`, *optional*): Processes that share the work, as `datasets.map` starts them. By default one for
            every 5,000 numbers, at most one a core; this process alone for fewer.
        skip_bad_records (`bool`, defaults to `False`): Keep defects, which are checked again at each start, rather
            than stop at the first.
        overwrite_cache (`bool`, defaults to `False`): Make it anew.
        is_stale (`Callable`, *optional*): Whether something has changed that the fingerprint does not know.
        split (`Callable`, *optional*): Tells good rows from defects, in place of [`split_defects`].
        desc (`str`): What the progress bar says.

    Returns:
        The table, the indices of its good rows, and the defects of the others.

    Raises:
        ValueError: the first defect; or the cache cannot be written.
    """

    def checked(table: HubDataset) -> tuple[HubDataset, np.ndarray, list[str]]:
        good, defects = (split or split_defects)(table)
        if defects and not skip_bad_records:  # a table of an earlier start, that skipped them, may have some too
            raise ValueError(defects[0])
        return table, good, defects

    if num_proc is not None and num_proc < 1:
        raise ValueError(f"`--dataset_num_proc` must be at least 1, got {num_proc}.")
    if fingerprint is None or not count:
        batch = _CheckBatch(check, schema, None)
        parts = [batch(range(start, min(start + BATCH, count))) for start in range(0, count, BATCH)]
        return checked(HubDataset(pa.concat_tables([schema.empty_table(), *parts])).with_format("arrow"))
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "multicoco" / fingerprint

    def find() -> HubDataset | None:
        """The table, if it is whole and still true."""
        is_new = world_size() > 1 and folder not in _opened and _completed_at(folder) > _STARTED  # by another rank
        if overwrite_cache and not is_new:
            return None
        table = _open_table(folder)
        if table is None or not is_new and (_has_changed(table, check) or is_stale is not None and is_stale(table)):
            return None
        return table

    table = find()
    if table is None:
        with _lock(folder):
            table = find()  # another process may have made it while this one waited
            if table is None:
                work = _CheckBatch(check, schema, None if skip_bad_records else folder / "stop")
                table = _write_table(folder, work, count, num_proc, desc)
                checked(table)
                _complete(folder)
    _opened.add(folder)
    return checked(table)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """While it is held, no other process of the machine makes this table."""
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(WeakFileLock(f"{folder}.lock"))
        except OSError as error:
            raise _not_writable(folder, error) from error
        yield


def _not_writable(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"`HF_DATASETS_CACHE`: no folder can be made in {folder.parent.parent}: {error}. Set it to one that can be "
        "written."
    )


def _write_table(folder: Path, work: _CheckBatch, count: int, num_proc: int | None, desc: str) -> HubDataset:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
    except OSError as error:
        raise _not_writable(folder, error) from error
    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, count // ROWS_OF_A_PROCESS)
        num_proc = num_proc if num_proc > 1 else None  # in this process, where the tokenizer has threads of its own
    HubDataset.from_dict({"number": range(count)}).map(
        work,
        input_columns="number",
        remove_columns="number",
        batched=True,
        batch_size=BATCH,
        features=datasets.Features.from_arrow_schema(work.schema),
        num_proc=num_proc,
        cache_file_name=str(folder / "rows.arrow"),
        new_fingerprint=folder.name,
        desc=desc,
    )
    return _map_files(sorted(folder.glob("*.arrow")))


def _complete(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.arrow"))}
    (folder / "partial").write_text(json.dumps(sizes))
    os.replace(folder / "partial", folder / COMPLETE)


def _completed_at(folder: Path) -> float:
    try:
        return (folder / COMPLETE).stat().st_mtime
    except OSError:  # not yet, or nobody lets us see it
        return 0.0


def _map_files(paths: Sequence[Path]) -> HubDataset:
    return concatenate_datasets([HubDataset.from_file(str(path)) for path in paths]).with_format("arrow")


def _open_table(folder: Path) -> HubDataset | None:
    """The table, if it was written to its end and is so still: a disk that was full or a copy may have cut it."""
    try:
        sizes = json.loads((folder / COMPLETE).read_text())
        table = _map_files([folder / name for name in sizes])
        return table if all((folder / name).stat().st_size == size for name, size in sizes.items()) else None
    except (OSError, ValueError):  # never written, cut, or being written anew
        return None


class RowReader:
    """Single rows of a table, straight from its Arrow buffers: a sample needs them, and `datasets` takes its time."""

    def __init__(self, table: HubDataset):
        self.table = table
        columns = {name: table.data.column(name).chunks for name in table.column_names}
        self._starts = [0, *itertools.accumulate(len(chunk) for chunk in columns["row"])]
        self._chunks = columns
        self._integers = {  # views of what is mapped: for each chunk where each list begins, and all lists' values
            name: [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
            for name, chunks in columns.items()
            if table.data.schema.field(name).type == pa.list_(pa.int32())
        }

    def __reduce__(self) -> tuple:
        return RowReader, (self.table,)  # by the names of its files; the views would be copied

    def integers(self, column: str, row: int) -> list[int]:
        """A list of 32-bit integers."""
        chunk = bisect_right(self._starts, row) - 1
        offsets, values = self._integers[column][chunk]
        place = row - self._starts[chunk]
        return values[offsets[place] : offsets[place + 1]].tolist()

    def value(self, column: str, row: int) -> Any:
        """Whatever a column holds."""
        chunk = bisect_right(self._starts, row) - 1
        return self._chunks[column][chunk][row - self._starts[chunk]].as_py()


def split_defects(table: HubDataset) -> tuple[np.ndarray, list[str]]:
    """Indices of the rows without a defect, and the defects of the others."""
    column = table.data.column("defect")
    if column.null_count == len(column):
        return np.arange(len(column)), []
    return np.flatnonzero(column.is_null().to_numpy()), column.drop_null().to_pylist()


def _has_changed(table: HubDataset, check: Callable[[Sequence[int]], Iterable[dict[str, Any]]]) -> bool:
    """Whether a row that had a defect has none any more: a picture may have been mended."""
    good, defects = split_defects(table)
    if not defects:
        return False
    bad = np.setdiff1d(np.arange(len(table)), good)
    numbers = dict.fromkeys(table.data.column("row").take(pa.array(bad)).to_pylist())
    return any(all(row.get("defect") is None for row in check([number])) for number in numbers)


def list_defects(defects: Sequence[object]) -> None:
    """Warns of the records that were left out, each with its reason."""
    if defects:
        logger.warning(f"{len(defects)} records were left out:\n  " + "\n  ".join(map(str, defects)))
