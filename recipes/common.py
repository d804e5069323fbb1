"""What the recipes share: rationales to steps, rows that are left out, images, and a folder that appears whole."""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from multicoco import load_records


# --- steps -------------------------------------------------------------------------------------------------------

# A full stop behind one of these, or behind a single letter or number at the start of a step, ends no sentence.
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "vs", "etc", "e.g", "i.e", "fig", "no", "approx", "u.s", "a.m", "p.m"}
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*\s+")
LIST_MARK = re.compile(r"(?:step\s*)?[(]?(?:\d{1,2}|[a-z])[.)]\s*", re.IGNORECASE)
CLAUSE_START = re.compile(
    r"(?<=[;:])\s+|(?<=,)\s+|\s+(?=(?:because|since|therefore|thus|which means|but|while|although)\s)", re.IGNORECASE
)
LEAST_WORDS = 3  # of a clause; "red, white, and blue" is none


def split_sentences(text: str) -> list[str]:
    """
    The lines and sentences of a text. Nothing is lost: joined by spaces, they are the text with single spaces.

    A mark as "2." or "(b)" stays with the sentence it numbers.
    """
    pieces = []
    for line in text.splitlines():
        start = 0
        for end in SENTENCE_END.finditer(line):
            sentence = line[start : end.start()]
            last_word = sentence.split()[-1].strip("\"'([").lower() if sentence.split() else ""
            is_short = last_word in ABBREVIATIONS or (len(last_word) == 1 and last_word.isalpha())
            if (line[end.start()] == "." and is_short) or LIST_MARK.fullmatch(line[start : end.end()].strip()):
                continue
            pieces.append(line[start : end.end()])
            start = end.end()
        pieces.append(line[start:])
    pieces = [" ".join(piece.split()) for piece in pieces]
    return [piece for piece in pieces if piece]


def split_clauses(sentence: str) -> list[str]:
    """The clauses of a sentence, each of at least three words. Nothing is lost."""
    clauses = []
    for piece in CLAUSE_START.split(" ".join(sentence.split())):
        if clauses and min(len(clauses[-1].split()), len(piece.split())) < LEAST_WORDS:
            clauses[-1] += " " + piece
        else:
            clauses.append(piece)
    return clauses


def merge_steps(steps: list[str], max_steps: int) -> list[str]:
    """At most `max_steps` steps: the shortest pair of neighbours is joined, again and again."""
    steps = list(steps)
    while len(steps) > max_steps:
        pairs = [len(step) + len(after) for step, after in zip(steps, steps[1:], strict=False)]
        place = pairs.index(min(pairs))
        steps[place : place + 2] = [f"{steps[place]} {steps[place + 1]}"]
    return steps


def to_steps(text: str, max_steps: int) -> list[str]:
    """A rationale as at most `max_steps` steps: its sentences, or the clauses of a single one."""
    sentences = split_sentences(text)
    if len(sentences) == 1:
        sentences = split_clauses(sentences[0])
    return merge_steps(sentences, max_steps)


# --- rows --------------------------------------------------------------------------------------------------------


class LeftOut(Exception):
    """Why a row becomes no record; the reason in the same words for all rows that share it."""


def read_split(source: str, split: str) -> Dataset:
    """A split of a data set on the Hub, or of a folder with its parquet files; images stay undecoded."""
    dataset = load_dataset(source, split=split)
    for name, feature in dataset.features.items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(name, ImageFeature(decode=False))
    return dataset


def image_bytes(image: Mapping[str, Any] | None) -> bytes:
    """The file of an image of [`read_split`]; nothing where a row has none."""
    return (image or {}).get("bytes") or b""


def carve(groups: Iterable[str], count: int, seed: int) -> set[str]:
    """
    Groups (an image each, say) that together hold at least `count` rows, drawn by `seed`: the dev split.

    A group goes over as a whole, so that no image is in both splits.
    """
    sizes = collections.Counter(groups)
    if count >= sizes.total():
        raise ValueError(f"{count} of {sizes.total()} rows cannot be carved off. Lower `num_dev` (or `num_val`).")
    names = sorted(sizes)
    chosen, held = set(), 0
    for index in np.random.default_rng(seed).permutation(len(names)):
        if held >= count:
            break
        chosen.add(names[index])
        held += sizes[names[index]]
    return chosen


class Output:
    """
    The data set as it is being written: records, images, and what was left out, split by split.

    Args:
        folder (`Path`): Where it is written, for now.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.counts: dict[str, int] = {}
        self.left_out: list[dict[str, Any]] = []

    def write(
        self,
        split: str,
        rows: Iterable[Any],
        convert: Callable[[Any, int], dict[str, Any]],
        *,
        needs_steps: bool = True,
        needs_answer: bool = True,
        id_field: str | None = None,
        parts: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """
        Writes `{split}.jsonl` and returns its records.

        Args:
            convert (`Callable`): From a row and its number to its record; raises [`LeftOut`].
            needs_steps, needs_answer (`bool`): As in `load_records`, which must accept every record.
            id_field (`str`, *optional*): The field that names a row that is left out; by default its number.
            parts (`Sequence[str]`, *optional*): The split that each row belongs to; by default all to this one.
        """
        records: dict[str, dict[str, Any]] = {}
        with open(self.folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for number, row in enumerate(rows):
                if parts is not None and parts[number] != split:
                    continue
                try:
                    record = convert(row, number)
                    if record["id"] in records:
                        raise LeftOut("its id stands twice")
                    self._check(record, needs_steps=needs_steps, needs_answer=needs_answer)
                except LeftOut as reason:
                    name = str(number if id_field is None else row.get(id_field))
                    self.left_out.append({"split": split, "row": name, "reason": str(reason)})
                    continue
                records[record["id"]] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.counts[split] = len(records)
        if not records:
            raise ValueError(f"The split `{split}` has no usable row. {self.summary()}")
        return list(records.values())

    def _check(self, record: dict[str, Any], **needs: bool) -> None:
        images = [str(self.folder / image) for image in record["images"]]
        try:
            load_records([{**record, "images": images}], **needs)
        except ValueError as error:
            reason = str(error).removeprefix(f"Record {record['id']!r}: ")
            raise LeftOut(f"no valid record: {reason}") from error

    def image(self, name: str, image: Mapping[str, Any] | None) -> str:
        """Writes the Hub's image as it came, under `name` with the ending of its format; returns its relative path."""
        content = image_bytes(image)
        if not content:
            raise LeftOut("no image")
        ending = _image_format(io.BytesIO(content))
        path = self.folder / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path.relative_to(self.folder).as_posix()

    def link(self, name: str, source: Path) -> str:
        """The same for a file: a hard link, which takes no space, or a copy where that cannot be."""
        if not source.is_file():
            raise LeftOut(f"image not found in {source.parent}")
        path = self.folder / name
        if not path.exists():
            _image_format(source)
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), path)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, path)
        return name

    def summary(self) -> str:
        """Records by split, and the rows that were left out by reason, with the first few of each."""
        lines = [f"{split:12}{count:>8} records" for split, count in self.counts.items()]
        reasons = collections.defaultdict(list)
        for item in self.left_out:
            reasons[item["split"], item["reason"]].append(item["row"])
        for (split, reason), rows in sorted(reasons.items()):
            names = ", ".join(rows[:3]) + (", ..." if len(rows) > 3 else "")
            lines.append(f"{split:12}{len(rows):>8} left out: {reason} ({names})")
        return "\n".join(lines)


def _image_format(file) -> str:
    try:
        with Image.open(file) as image:
            image.load()  # all of it: a file that is cut off would stop the training in the middle
            return {"JPEG": "jpg"}.get(image.format, image.format.lower())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise LeftOut("image cannot be read") from error


@contextlib.contextmanager
def new_folder(output_dir: str | Path, settings: dict[str, Any]) -> Iterator[Output]:
    """
    A folder that appears under its name only when it is complete; one that the same recipe made before is replaced.

    Beside the records it holds `settings.json`, with the counts, and `left_out.jsonl`, with every row left out.

    Raises:
        ValueError: the folder holds something else.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        marker = output_dir / "settings.json"
        if not marker.is_file() or json.loads(marker.read_text()).get("data_set") != settings["data_set"]:
            raise ValueError(
                f"`output_dir` {output_dir} holds files that this recipe did not make. Choose another folder."
            )
    partial = output_dir.with_name(output_dir.name + ".partial")  # what an interrupted run leaves
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    output = Output(partial)
    yield output
    settings = {**settings, "records": output.counts}
    (partial / "settings.json").write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in output.left_out]
    (partial / "left_out.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(output_dir, ignore_errors=True)
    os.replace(partial, output_dir)


def prepare_hub(
    output_dir: str | Path,
    data_set: str,
    hub: str,
    max_steps: int,
    convert: Callable[[Output, str, Any, int], dict[str, Any]],
    **write: Any,
) -> str:
    """
    Makes a data set of the Hub with its own three splits and returns the summary.

    Args:
        convert (`Callable`): From the output, the split, a row and its number to its record; raises [`LeftOut`].
        write: What else [`Output.write`] takes.
    """
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, got {max_steps}.")
    with new_folder(output_dir, {"data_set": data_set, "source": hub, "max_steps": max_steps}) as output:
        for split, hub_split in (("train", "train"), ("val", "validation"), ("test", "test")):  # ours, theirs
            to_record = functools.partial(convert, output, split)
            output.write(split, read_split(hub, hub_split), to_record, needs_steps=split == "train", **write)
    return output.summary()


def make_parser(description: str, output_dir: str) -> argparse.ArgumentParser:
    """The parser of a recipe, with `--output_dir`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", default=output_dir, help="Folder to make; one of this recipe is replaced.")
    return parser
