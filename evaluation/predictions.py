"""Predictions of a checkpoint in files that a killed run goes on with, and A-OKVQA's form of them. Knows no score."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from tqdm.auto import tqdm

from ..records import DatasetImage
from .checkpoints import base_of
from .metric import as_written
from .subject import Subject


# What decides how a checkpoint answers; other files of its folder may change without making its predictions stale.
MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*", "*.jinja")


@dataclass(frozen=True)
class Ranks:
    """Processes that share the records among them: their number, and which of them this one is."""

    number: int = 1
    index: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this one reads and writes the files."""
        return self.index == 0


def describe(subject: Subject, num_thoughts: int | None) -> dict[str, Any]:
    """All that the predictions depend on. Files of models and images go in by size and time, not by content."""
    arguments = subject.arguments
    folders = [Path(subject.name), *map(Path, filter(None, [base_of(subject.name)]))]  # adapters, and their base
    model_files = [path for folder in folders for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))]
    digest = hashlib.sha256()
    for record in subject.records:
        images = [_describe_image(image) for image in record["images"]]
        digest.update(json.dumps({**record, "images": images}, sort_keys=True).encode())
    return {
        "model": subject.name,
        "model_files": {path.name if path.parent == folders[0] else str(path): _stamp(path) for path in model_files},
        "model_commit": getattr(subject.config, "_commit_hash", None),
        "data": arguments.data,
        "data_digest": digest.hexdigest(),
        "num_thoughts": num_thoughts,
        "choices_by": subject.choices_by,
        "max_new_tokens": subject.max_new_tokens,
        "max_patches": arguments.max_patches,
        "dtype": arguments.dtype,
        "attn_implementation": subject.attn_implementation,
    }


def _describe_image(image: str | DatasetImage | Image.Image | bytes) -> list[Any]:
    if isinstance(image, str):
        return [image, *_stamp(image)]
    if isinstance(image, (Image.Image, bytes)):  # records from Python, which have no file
        content = image if isinstance(image, bytes) else f"{image.mode} {image.size}".encode() + image.tobytes()
        return [hashlib.sha256(content).hexdigest()]
    path = image.file()
    return [image.row, image.column, image.index, image.dataset._fingerprint if path is None else _stamp(path)]


def _stamp(path: str | Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def predictions_path(output_dir: str | Path, header: Mapping[str, Any]) -> Path:
    """Other settings have another file: they start anew, and what was predicted before stays."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    number = "no_block" if header["num_thoughts"] is None else header["num_thoughts"]
    return Path(output_dir) / "predictions" / f"{Path(header['model']).resolve().name}-{number}-{digest[:8]}.jsonl"


def read_predictions(path: Path, header: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """
    Predictions of an earlier run by the index of their record; the file is begun if it is not there.

    A line that a killed run left half-written is cut off, with all that follows it.
    """
    found = path.read_bytes() if path.is_file() else b""
    lines, kept = [], b""
    for line in found.split(b"\n")[:-1]:  # behind the last line break stands nothing, or half a line
        try:
            lines.append(json.loads(line))
        except ValueError:  # not JSON, or not even text
            break
        kept += line + b"\n"
    if not lines or lines[0] != header:
        lines, kept = [header], json.dumps(header).encode() + b"\n"
    if kept != found:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(kept)
        os.replace(partial, path)
    return {line["index"]: line for line in lines[1:]}


def predict(
    subject: Subject,
    num_thoughts: int | None,
    ranks: Ranks,
    output_dir: str | Path,
    batch_size: int,
) -> list[dict[str, Any]]:
    """
    The prediction of each record, in order; complete on the main process, which alone reads the file. Where thoughts
    can be read, `thoughts` is what each group of them reads as.

    All ranks share what is not in the file yet and ask equally often; surplus places repeat a record, uncounted. One
    alone waits for no other, whatever group it belongs to.
    """
    records, done, path, world = subject.records, {}, None, ranks.number
    if ranks.is_main:
        header = describe(subject, num_thoughts)
        path = predictions_path(output_dir, header)
        done = read_predictions(path, header)
    shared = [[index for index in range(len(records)) if index not in done]]
    if world > 1:
        broadcast_object_list(shared)
    todo = shared[0]
    if todo:
        subject.load()  # not while the clock runs
    share = -(-len(todo) // world)
    name = f"{subject.name}, {'no block' if num_thoughts is None else f'{num_thoughts} thoughts'}"
    progress = tqdm(total=len(records), initial=len(done), desc=name, disable=not ranks.is_main)
    for start in range(0, share, batch_size):
        places = [place * world + ranks.index for place in range(start, min(start + batch_size, share))]
        indices = [todo[place % len(todo)] for place in places]
        began = time.perf_counter()
        answers, thoughts = subject.ask(indices, num_thoughts)
        seconds = (time.perf_counter() - began) / len(indices)
        if num_thoughts is not None and subject.can_read(num_thoughts):  # not while the clock runs
            texts = subject.read(indices, num_thoughts, thoughts)
            answers = [{**answer, "thoughts": read} for answer, read in zip(answers, texts, strict=True)]
        lines = [
            {"index": index, "id": records[index]["id"], **answer, "seconds": seconds}
            for place, index, answer in zip(places, indices, answers, strict=True)
            if place < len(todo)
        ]
        if world > 1:
            lines = gather_object(lines)
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        done.update({line["index"]: line for line in lines})
        progress.update(len(lines))
    progress.close()
    return [done[index] for index in range(len(records)) if index in done]


def read_submission(path: str | Path) -> dict[str, dict[str, str]]:
    """
    A file in A-OKVQA's form, empty if there is none.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(path)
    try:
        answers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"`--predictions_to` {path} is there, but is not JSON ({error}). Name another.") from error
    if not isinstance(answers, dict) or not all(isinstance(value, dict) for value in answers.values()):
        raise ValueError(
            f"`--predictions_to` {path} is there, but is no file of predictions by question. Name another."
        )
    return answers


def write_submission(
    records: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]], path: str | Path
) -> None:
    """Adds to a file in A-OKVQA's form: multiple choice from records with choices, direct answers from the others."""
    answers = read_submission(path)
    for record, line in zip(records, predictions, strict=True):
        name = "multiple_choice" if record["choices"] else "direct_answer"
        answers.setdefault(str(record["id"]), {})[name] = as_written(record, line["prediction"])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(answers, indent=2), encoding="utf-8")
