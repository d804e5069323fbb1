"""From records to batches: images, a question, written steps and an answer, at any stage of the curriculum.

    records -> TokenizedRecords (integers, checked once) -> StageDataset (composed lazily) -> ReasoningCollator

At stage `s` the first `s` steps are gone and `s * c_thought` thoughts stand in their place:

    question <|start-latent|> <|latent|> x (s * c_thought) <|end-latent|> step_{s+1} ... step_n ### answer <|im_end|>

Only what follows the block is a label. The rules are those of the original program (facebookresearch/coconut, commit
27273cb); where it trains and asks with different numbers of thoughts, we ask as we train. This file knows no model.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as HubDataset
from datasets import DatasetDict, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from PIL import Image
from transformers.utils import logging

from .configuration_multicoco import IMAGE_CONTEXT_TOKEN, LATENT_TOKEN
from .processing_multicoco import (
    IMAGE_PLACEHOLDER,
    RESERVED_TOKENS,
    MultiCoCoProcessor,
    expand_image_tokens,
    open_image,
    thought_block,
)


logger = logging.get_logger(__name__)

ANSWER_MARK = "### "
END_OF_TURN = "<|im_end|>"
CHAT_TOKENS = ("<|im_start|>", END_OF_TURN)  # in a record's text they would end or open a turn
MIXES = ("none", "linear", "uniform")
TRAINING_MODES = ("coconut", "cot", "no_cot", "no_thoughts", "pause", "pause_loop")
FIELDS = ("id", "images", "question", "choices", "steps", "rationales", "answer", "answers", "extra")


@dataclass
class CurriculumArguments:
    """How written reasoning steps give way to continuous thoughts. Defaults are the paper's for GSM8k."""

    mode: str = field(
        default="coconut",
        metadata={
            "help": "coconut: thoughts replace steps, stage by stage. cot: written steps only. no_cot: answer only. "
            "no_thoughts: steps vanish stage by stage and nothing replaces them. pause: as coconut, but the latent "
            "token is a learned constant. pause_loop: the same in the passes of coconut.",
            "choices": list(TRAINING_MODES),
        },
    )
    c_thought: int = field(default=2, metadata={"help": "Continuous thoughts that replace one written step."})
    max_latent_stage: int = field(default=3, metadata={"help": "Stages that replace one more step each."})
    final_stage: bool = field(
        default=True,
        metadata={
            "help": "One more stage without any written step, for records of more than `max_latent_stage` steps."
        },
    )
    pad_latent_to_max: bool = field(
        default=True,
        metadata={"help": "In the final stage give every record the full budget, also with fewer steps than stages."},
    )
    epochs_per_stage: int = field(default=3, metadata={"help": "Epochs before the next step is replaced."})
    epochs_stage_0: int | None = field(
        default=None, metadata={"help": "Epochs of written reasoning first; `epochs_per_stage` if not given."}
    )
    mix: str = field(
        default="none",
        metadata={
            "help": "Stage of a sample: none: the scheduled one. linear: any stage up to it, later ones more often "
            "(i + 1). uniform: the original program's, any number of the record's own steps, at stage 0 too.",
            "choices": list(MIXES),
        },
    )
    mix_prob: float = field(
        default=1.0, metadata={"help": "Probability that a sample is mixed rather than scheduled."}
    )
    reset_optimizer_every: str = field(
        default="stage",
        metadata={
            "help": "Clear Adam's moments at every new stage (the paper), epoch (its program), or never.",
            "choices": ["stage", "epoch", "never"],
        },
    )
    restart_schedule: bool = field(
        default=False,
        metadata={"help": "Start the learning rate again at every stage: warm-up, then cosine down to a tenth."},
    )

    def __post_init__(self):
        for name, options in (
            ("mode", TRAINING_MODES),
            ("mix", MIXES),
            ("reset_optimizer_every", ("stage", "epoch", "never")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"`--{name}` must be one of {', '.join(options)}, got {getattr(self, name)!r}.")
        for name, least in (("c_thought", 1), ("max_latent_stage", 0), ("epochs_per_stage", 1), ("epochs_stage_0", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`--{name}` must be at least {least}, got {value}.")
        if not 0 <= self.mix_prob <= 1:
            raise ValueError(f"`--mix_prob` must be between 0 and 1, got {self.mix_prob}.")

    @property
    def last_stage(self) -> int:
        if self.mode in ("cot", "no_cot"):
            return 0
        return self.max_latent_stage + (1 if self.final_stage else 0)

    @property
    def first_epochs(self) -> int:
        return self.epochs_per_stage if self.epochs_stage_0 is None else self.epochs_stage_0

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole schedule. The modes without stages get as many, so that all train equally long."""
        return self.first_epochs + (self.max_latent_stage + (1 if self.final_stage else 0)) * self.epochs_per_stage

    def stage(self, epoch: int) -> int:
        """The scheduled stage of an epoch (from 0); a pure function, so that a resumed run finds it by itself."""
        if epoch < self.first_epochs:
            return 0
        return min(1 + (epoch - self.first_epochs) // self.epochs_per_stage, self.last_stage)

    def budget(self, num_steps: int, stage: int) -> tuple[int, int]:
        """Thoughts, and written steps that are gone, for a record of `num_steps` steps at `stage`."""
        if self.mode == "cot":
            return 0, 0
        if self.mode == "no_cot":
            return 0, num_steps
        replaced, gone = stage, min(stage, num_steps)
        if stage > self.max_latent_stage:
            replaced = self.max_latent_stage if self.pad_latent_to_max else min(num_steps, self.max_latent_stage)
            gone = num_steps
        return (0 if self.mode == "no_thoughts" else replaced * self.c_thought), gone

    @property
    def has_block(self) -> bool:
        """Whether the two markers of a thought block are written; the controls without thoughts have none."""
        return self.mode in ("coconut", "pause", "pause_loop")

    def num_thoughts(self, stage: int) -> int | None:
        """The budget at inference after `stage`: what a checkpoint's configuration holds. `None`: no block."""
        return self.budget(self.max_latent_stage + 1, stage)[0] if self.has_block else None


def draw_stage(curriculum: CurriculumArguments, stage: int, num_steps: int, key: tuple[int, int, int]) -> int:
    """The stage of one sample. `key` (seed, epoch, index) makes the draw the same on every rank, worker and resume."""
    if curriculum.mix == "none" or curriculum.last_stage == 0:
        return stage
    generator = np.random.default_rng(key)
    if generator.random() >= curriculum.mix_prob:
        return stage
    if curriculum.mix == "uniform":
        most = num_steps if curriculum.final_stage else min(num_steps, curriculum.max_latent_stage)
        return int(generator.integers(most + 1))  # beyond `max_latent_stage` is the form of the final stage
    weights = np.arange(1, stage + 2)
    return int(generator.choice(stage + 1, p=weights / weights.sum()))


def draw_rationale(num_rationales: int, key: tuple[int, int, int]) -> int:
    """Which of several alternative lists of steps is used. `key` is (seed, epoch, index), as in [`draw_stage`]."""
    if num_rationales < 2:
        return 0
    return int(np.random.default_rng((*key, 1)).integers(num_rationales))  # 1: another stream than the stage's


def compose(
    question: Sequence[int],
    steps: Sequence[Sequence[int]],
    answer: Sequence[int],
    num_thoughts: int,
    num_gone: int,
    block_ids: tuple[int | None, int, int | None] | None,
) -> tuple[list[int], list[int]]:
    """
    `input_ids` and `labels` of one sample from its pieces.

    Args:
        question, steps, answer (`Sequence[int]`): Token ids of the pieces.
        num_thoughts (`int`): Latent tokens in the block.
        num_gone (`int`): Written steps left out, from the first.
        block_ids (`tuple`, *optional*): Ids of start marker, latent, end marker; a marker that is `None` is left out.
            `None` for no block.
    """
    prompt = list(question)
    if block_ids is not None:
        start, latent, end = block_ids
        prompt += [token for token in (start, *[latent] * num_thoughts, end) if token is not None]
    body = [token for step in steps[num_gone:] for token in step] + list(answer)
    return prompt + body, [-100] * len(prompt) + body


# --- records -----------------------------------------------------------------------------------------------------


def load_records(
    source: str | os.PathLike | Sequence[Mapping[str, Any]] | HubDataset | DatasetDict,
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
    _list_defects(defects)
    if not records:
        raise ValueError(f"{name} has no usable record. Check the path, the split and the list of defects, if any.")
    return records


def _list_defects(defects: Sequence[ValueError]):
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


# --- batches -----------------------------------------------------------------------------------------------------


@dataclass
class TokenizedRecord:
    """Token ids of the pieces of a record; the question with one visual token per image."""

    record: Mapping[str, Any]
    question: list[int]
    rationales: list[list[list[int]]]  # alternative lists of steps, at least one, which may be empty
    answer: list[int]
    wholes: list[list[int]] | None  # the same text, tokenized in one go, for each alternative
    num_patches_list: list[int] | None = None


class StageDataset(torch.utils.data.Dataset):
    """
    Tokenized records, composed at the stage that [`~StageDataset.set_stage`] says.

    Everything is tokenized and checked once, when the object is made. Stage and epoch lie in shared memory, so that
    data loader workers see a change whether they persist or not. The length is the same at every stage.

    Args:
        records (`list[dict]`): From [`load_records`].
        processor ([`MultiCoCoProcessor`]): Gives the prompt, the tokens and the number of tiles.
        curriculum ([`CurriculumArguments`]): The rules.
        seed (`int`, defaults to 42): Seed of the mixing, and of the choice among alternative rationales.
        max_length (`int`, *optional*): Longest sequence allowed, at any stage.
        skip_bad_records (`bool`, defaults to `False`): List and leave out records with a defect.

    Raises:
        ValueError: a record is too long, an image cannot be read, or pieces tokenize differently from the whole.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        processor: MultiCoCoProcessor,
        curriculum: CurriculumArguments,
        seed: int = 42,
        max_length: int | None = None,
        skip_bad_records: bool = False,
    ):
        self.curriculum, self.seed = curriculum, seed
        self.num_image_token = processor.num_image_token
        tokenizer = processor.tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN)
        start, latent, end = tokenizer(thought_block(1), add_special_tokens=False)["input_ids"]
        self.block_ids = (start, latent, end) if curriculum.has_block else None
        self._clock = torch.zeros(2, dtype=torch.long).share_memory_()  # stage, epoch
        self.rows, defects = [], []
        for row in _tokenize(records, processor):
            try:
                self._check(row, processor, max_length)
                self.rows.append(row)
            except ValueError as error:
                if not skip_bad_records:
                    raise
                defects.append(error)
        _list_defects(defects)
        if not self.rows:
            raise ValueError("No usable record is left. Check `records`, and the list of defects, if any.")
        self.records = [row.record for row in self.rows]

    def _check(self, row: TokenizedRecord, processor, max_length):
        row.num_patches_list = _count_tiles(row.record, processor)
        pieces = [[*row.question, *(t for step in steps for t in step), *row.answer] for steps in row.rationales]
        if pieces != row.wholes:
            raise ValueError(
                f"Record {row.record['id']!r}: `steps` and `answer` tokenize differently in pieces and as a whole, so "
                "the model would be trained on other tokens than it writes. Strip unusual characters at their ends."
            )
        row.wholes = None  # only for this check
        if max_length is not None:
            length = max(
                len(self._compose(row, steps, stage)[0])
                for steps in row.rationales
                for stage in range(self.curriculum.last_stage + 1)
            )
            if length > max_length:
                raise ValueError(
                    f"Record {row.record['id']!r}: `question`, `steps` and `answer` are {length} tokens, more than "
                    f"`max_length` {max_length}. Raise it, lower `max_patches`, or shorten the record; nothing is "
                    "truncated."
                )

    @property
    def stage(self) -> int:
        return int(self._clock[0])

    @property
    def epoch(self) -> int:
        return int(self._clock[1])

    def set_stage(self, stage: int, epoch: int = 0):
        """Composes all records at `stage` from now on; `epoch` only changes the draws."""
        self._clock[0], self._clock[1] = stage, epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if not row.answer:
            raise ValueError(
                f"Record {row.record['id']!r}: `answer` is missing, so it can be asked but not trained on. Add the "
                "answer, or leave the record out."
            )
        stage, epoch = self._clock.tolist()
        key = (self.seed, epoch, index)
        steps = row.rationales[draw_rationale(len(row.rationales), key)]
        input_ids, labels = self._compose(row, steps, draw_stage(self.curriculum, stage, len(steps), key))
        return {"input_ids": input_ids, "labels": labels, **self._images(row)}

    def prompt(self, index: int, stage: int | None = None) -> dict[str, Any]:
        """
        What a record is asked with after `stage`: as many thoughts as it was trained with, nothing after them. If
        its alternative rationales were trained with different numbers, the most.
        """
        row = self.rows[index]
        num_steps = max(map(len, row.rationales))
        num_thoughts, _ = self.curriculum.budget(num_steps, self.stage if stage is None else stage)
        input_ids, _ = compose(self._question(row), [], [], num_thoughts, 0, self.block_ids)
        return {"input_ids": input_ids, **self._images(row)}

    def max_new_tokens(self) -> int:
        """Tokens of the longest written steps and answer."""
        return max(sum(map(len, steps)) + len(row.answer) for row in self.rows for steps in row.rationales)

    def _compose(self, row: TokenizedRecord, steps: list[list[int]], stage: int) -> tuple[list[int], list[int]]:
        num_thoughts, num_gone = self.curriculum.budget(len(steps), stage)
        return compose(self._question(row), steps, row.answer, num_thoughts, num_gone, self.block_ids)

    def _question(self, row: TokenizedRecord) -> list[int]:
        """The prompt with its image runs, from one visual token per image to all of them."""
        runs = iter(row.num_patches_list)
        tokens = []
        for token in row.question:
            tokens += [token] * (self.num_image_token * next(runs) if token == self.image_token_id else 1)
        return tokens

    def _images(self, row: TokenizedRecord) -> dict[str, Any]:
        return {"images": row.record["images"], "num_patches_list": row.num_patches_list}


def _count_tiles(record, processor) -> list[int]:
    counts = []
    for index, image in enumerate(record["images"]):
        try:
            if isinstance(image, str):
                with Image.open(image) as file:  # the header, not the pixels
                    width, height = file.size
            else:
                width, height = open_image(_load(image), 0, index).size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = image if isinstance(image, str) else f"number {index}"
            raise ValueError(
                f"Record {record['id']!r}: `images` {name} cannot be read: {error}. Mend the file, or leave it out."
            ) from error
        counts.append(processor.image_processor.get_number_of_image_patches(height, width, processor.images_kwargs))
    return counts


def _load(image):
    return image.open() if isinstance(image, DatasetImage) else image


def _tokenize(records, processor) -> Iterable[TokenizedRecord]:
    conversations = [[{"role": "user", "content": question_text(record)}] for record in records]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True, num_thoughts=None)
    prompts = [
        expand_image_tokens(prompt, [1] * len(record["images"]), 1)
        for prompt, record in zip(prompts, records, strict=True)
    ]
    rationales = [
        [[step + "\n" for step in steps] for steps in record.get("rationales", [record["steps"]])]
        for record in records
    ]
    answers = ["" if record["answer"] is None else ANSWER_MARK + record["answer"] + END_OF_TURN for record in records]

    def encode(texts):
        return iter(processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])

    wholes = encode(
        [
            "".join([prompt, *steps, answer])
            for prompt, alternatives, answer in zip(prompts, rationales, answers, strict=True)
            for steps in alternatives
        ]
    )
    flat_steps = encode([step for alternatives in rationales for steps in alternatives for step in steps])
    prompts, answers = encode(prompts), encode(answers)
    for record, alternatives in zip(records, rationales, strict=True):
        step_ids = [[next(flat_steps) for _ in steps] for steps in alternatives]
        yield TokenizedRecord(record, next(prompts), step_ids, next(answers), [next(wholes) for _ in alternatives])


class ReasoningCollator:
    """
    Pads a batch so that the first thoughts of all samples stand in one column: `n` thoughts take `n + 1` passes.

    Samples with thoughts are padded on the left up to that column, then all on the right:

        question question <start> <latent> <latent> <end> answer answer
        pad      question <start> <latent> <latent> <end> answer pad
        question answer   answer  pad      ...

    Args:
        processor ([`MultiCoCoProcessor`]): Opens and cuts the images of the batch.

    Returns, when called: `input_ids`, `attention_mask`, `labels` of shape `(batch_size, sequence_length)`, and with
    images `pixel_values` `(sum of tiles, 3, height, width)` and `num_patches_list`.
    """

    def __init__(self, processor: MultiCoCoProcessor):
        self.processor = processor
        self.pad_token_id = processor.tokenizer.pad_token_id
        self.latent_token_id = processor.tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
        self.image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        firsts = [
            ids.index(self.latent_token_id) if self.latent_token_id in ids else None
            for ids in (list(feature["input_ids"]) for feature in features)
        ]
        column = max((first for first in firsts if first is not None), default=0)
        lefts = [0 if first is None else column - first for first in firsts]
        return {**self._pad(features, lefts), **self._pixels(features)}

    def prompts(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The same for prompts to generate from: padded on the left."""
        longest = max(len(feature["input_ids"]) for feature in features)
        lefts = [longest - len(feature["input_ids"]) for feature in features]
        return {**self._pad(features, lefts), **self._pixels(features)}

    def _pad(self, features, lefts) -> dict[str, torch.Tensor]:
        width = max(left + len(feature["input_ids"]) for left, feature in zip(lefts, features, strict=True))

        def padded(values, left, fill):
            return [fill] * left + list(values) + [fill] * (width - left - len(values))

        pairs = list(zip(features, lefts, strict=True))
        batch = {
            "input_ids": torch.tensor([padded(item["input_ids"], left, self.pad_token_id) for item, left in pairs]),
            "attention_mask": torch.tensor([padded([1] * len(item["input_ids"]), left, 0) for item, left in pairs]),
        }
        if all("labels" in feature for feature in features):
            batch["labels"] = torch.tensor([padded(item["labels"], left, -100) for item, left in pairs])
        return batch

    def _pixels(self, features) -> dict[str, Any]:
        expected = [count for feature in features for count in feature.get("num_patches_list", [])]
        for sample, feature in enumerate(features):
            self._check_images(sample, feature)
        if not expected:
            return {}
        images = [
            open_image(_load(image), sample, index)
            for sample, feature in enumerate(features)
            for index, image in enumerate(feature.get("images", []))
        ]
        tiles = self.processor.image_processor(images, return_tensors="pt", **self.processor.images_kwargs)
        num_patches_list = [int(count) for count in tiles["num_patches"]]
        if num_patches_list != expected:
            raise ValueError(
                f"`images` of this batch give {num_patches_list} tiles, but gave {expected} when they were counted. "
                "Has a file changed since the start? Run again."
            )
        return {"pixel_values": tiles["pixel_values"], "num_patches_list": num_patches_list}

    def _check_images(self, sample: int, feature: Mapping[str, Any]):
        visual = [place for place, token in enumerate(feature["input_ids"]) if token == self.image_token_id]
        if not visual:
            return
        if "images" not in feature or "num_patches_list" not in feature:
            raise ValueError(
                f"Sample {sample}: `images` or `num_patches_list` is missing, but the text has images. Set "
                "`remove_unused_columns=False` in TrainingArguments."
            )
        wanted = self.processor.num_image_token * sum(feature["num_patches_list"])
        if len(visual) != wanted:
            raise ValueError(
                f"Sample {sample}: {len(visual)} visual tokens, but `num_patches_list` {feature['num_patches_list']} "
                f"needs {wanted}. Take both from the same StageDataset."
            )
        if self.latent_token_id in feature["input_ids"][: visual[-1]]:
            raise ValueError(f"Sample {sample}: a thought stands before an image. Put the images into the question.")
