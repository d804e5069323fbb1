"""From records to batches, at any stage of the curriculum. Knows tokens and tiles, no model. Read it downwards:

records -> a table of token ids (checked once) -> StageDataset (composed lazily) -> ReasoningCollator
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset as HubDataset
from PIL import Image

from .configuration_multicoco import IMAGE_CONTEXT_TOKEN, LATENT_TOKEN, TURN_END_TOKEN, thought_block
from .curriculum import (
    ANSWER_MARK,
    CurriculumArguments,
    compose,
    draw_order,
    draw_rationale,
    draw_stage,
    draw_surplus,
    texts_of_groups,
)
from .processing_multicoco import MultiCoCoProcessor, expand_image_tokens, open_image
from .records import DatasetImage, Records, load_records, turns
from .sources import RowReader, fingerprint_of, list_defects, make_table, state_of


# --- records -> tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedRecord:
    """Token ids of the pieces of a record; the question with one visual token per image."""

    id: str | int
    question: list[int]
    rationales: list[list[list[int]]]  # alternative lists of steps, at least one, which may be empty
    answer: list[int]
    num_patches_list: list[int]
    images: list[Any]


@dataclass(frozen=True)
class RecordShape:
    """The lengths of the pieces of a record."""

    question: int
    rationales: list[list[int]]  # of each step
    answer: int
    num_patches_list: list[int]

    def prompt(self, num_image_token: int) -> int:
        """Tokens of its question, with those of its images."""
        return self.question + num_image_token * sum(self.num_patches_list) - len(self.num_patches_list)

    def longest(self, rules: CurriculumArguments, num_image_token: int) -> int:
        """Tokens of its longest sample, at any stage."""
        lengths, prompt = [], self.prompt(num_image_token)
        for steps in self.rationales:
            for stage in range(rules.last_stage + 1):
                num_thoughts, num_gone = rules.counts(len(steps), stage)
                markers = num_thoughts + 2 if rules.has_block else 0
                lengths.append(prompt + markers + sum(steps[num_gone:]) + self.answer)
        return max(lengths)


_TOKENS_SCHEMA = pa.schema(
    {
        "row": pa.int64(),  # of the records
        "id": pa.string(),  # JSON
        "ids": pa.list_(pa.int32()),  # question, the steps of all rationales, answer
        "lengths": pa.list_(pa.int32()),  # of question and answer; of each rationale how many steps, and theirs
        "num_patches_list": pa.list_(pa.int32()),
        "paths": pa.list_(pa.string()),  # of those images that are files, of a data set too
        "states": pa.list_(pa.list_(pa.int64())),  # of these files when their tiles were counted
        "defect": pa.string(),
    }
)


@dataclass
class _CheckRecords:
    """Rows of the table of tokens, or the defects that records have."""

    records: Records
    processor: MultiCoCoProcessor
    curriculum: CurriculumArguments
    max_length: int | None

    def __call__(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        sizes: dict[str, tuple[int, int]] = {}  # many records may be about one picture
        records = [self.records[number] for number in numbers]
        for number, record, (pieces, wholes) in zip(numbers, records, _tokenize(records, self.processor), strict=True):
            try:
                question, rationales, answer = pieces
                counts = _count_tiles(record, self.processor, sizes)
                if [[*question, *chain(*steps), *answer] for steps in rationales] != wholes:
                    raise ValueError(
                        f"Record {record['id']!r}: `steps` and `answer` tokenize differently in pieces and as a "
                        "whole, so the model would be trained on other tokens than it writes. Strip unusual "
                        "characters at their ends."
                    )
                lengths = [[len(step) for step in steps] for steps in rationales]
                self._check_length(record, RecordShape(len(question), lengths, len(answer), counts))
                paths = [path for image in record["images"] if (path := _path_of(image)) is not None]
                yield {
                    "row": number,
                    "id": json.dumps(record["id"]),
                    "ids": [*question, *chain(*chain(*rationales)), *answer],
                    "lengths": [len(question), len(answer), *chain(*([len(way), *way] for way in lengths))],
                    "num_patches_list": counts,
                    "paths": paths,
                    "states": [state_of(path) for path in paths],
                }
            except ValueError as error:
                yield {"row": number, "defect": str(error)}

    def _check_length(self, record: Mapping[str, Any], shape: RecordShape) -> None:
        if self.max_length is None:
            return
        length = shape.longest(self.curriculum, self.processor.num_image_token)
        if length > self.max_length:
            raise ValueError(
                f"Record {record['id']!r}: `question`, `steps` and `answer` are {length} tokens, more than "
                f"`max_length` {self.max_length}. Raise it, lower `max_patches`, or shorten the record; nothing is "
                "truncated."
            )


def _tokenize(
    records: Sequence[Mapping[str, Any]], processor: MultiCoCoProcessor
) -> Iterator[tuple[tuple[list, list, list], list[list[int]]]]:
    """
    For each record the token ids of its pieces (question, rationales, answer), and those of the same text tokenized
    in one go, for each of the rationales.
    """
    conversations = [turns(record) for record in records]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True, num_thoughts=None)
    questions, rationales, answers, wholes = [], [], [], []
    for prompt, record in zip(prompts, records, strict=True):
        questions.append(expand_image_tokens(prompt, [1] * len(record["images"]), 1))
        alternatives = record.get("rationales", [record["steps"]])
        rationales.append([[step + "\n" for step in steps] for steps in alternatives])
        answers.append("" if record["answer"] is None else ANSWER_MARK + record["answer"] + TURN_END_TOKEN)
        wholes += ["".join([questions[-1], *steps, answers[-1]]) for steps in rationales[-1]]

    def encode(texts: Sequence[str]) -> Iterator[list[int]]:
        if not texts:
            return iter(())
        processor.tokenizer(texts[0], add_special_tokens=False)  # which turns off what the call before it turned on
        backend = processor.tokenizer.backend_tokenizer  # ids alone take two thirds of the time
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    whole_ids = encode(wholes)
    step_ids = encode([step for alternatives in rationales for steps in alternatives for step in steps])
    for question, alternatives, answer in zip(encode(questions), rationales, encode(answers), strict=True):
        pieces = question, [[next(step_ids) for _ in steps] for steps in alternatives], answer
        yield pieces, [next(whole_ids) for _ in alternatives]


def _count_tiles(
    record: Mapping[str, Any], processor: MultiCoCoProcessor, sizes: dict[str, tuple[int, int]]
) -> list[int]:
    """Tiles of each image of a record, of which only the header is read; `sizes` are those of files known by now."""
    counts = []
    for index, image in enumerate(record["images"]):
        try:
            if isinstance(image, DatasetImage):
                width, height = image.size()
            elif not isinstance(image, str):
                width, height = open_image(image, 0, index).size
            elif image in sizes:
                width, height = sizes[image]
            else:
                with Image.open(image) as file:
                    width, height = sizes[image] = file.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = image if isinstance(image, str) else f"number {index}"
            raise ValueError(
                f"Record {record['id']!r}: `images` {name} cannot be read: {error}. Mend the file, or leave it out."
            ) from error
        counts.append(processor.image_processor.get_number_of_image_patches(height, width, processor.images_kwargs))
    return counts


def _parts_of(processor: MultiCoCoProcessor) -> list[Any]:
    """All that decides what a processor makes of a text and how many tiles of a picture."""
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    tokenizer.pop("padding"), tokenizer.pop("truncation")  # those of the last call
    images = processor.image_processor.to_dict() | processor.images_kwargs
    return [tokenizer, processor.chat_template, images, processor.num_image_token]


def _path_of(image: Any) -> str | None:
    return image.file() if isinstance(image, DatasetImage) else image if isinstance(image, str) else None


def _has_other_files(table: HubDataset) -> bool:
    """Whether a picture has changed since its tiles were counted, or is gone."""
    columns = table.data.column("paths").chunks, table.data.column("states").chunks
    for paths, states in zip(*columns, strict=True):
        known = dict(zip(paths.flatten().to_pylist(), states.flatten().to_pylist(), strict=True))
        if any(state_of(path) != state for path, state in known.items()):
            return True
    return False


def _has_steps(table: HubDataset) -> bool:
    """Whether any record has a written step: then there are more lengths than three a record."""
    chunks = table.data.column("lengths").chunks
    return any(len(chunk.flatten()) > 3 * (len(chunk) - chunk.null_count) for chunk in chunks)


class _Mixture:
    """
    Which record a sample is made of. An epoch goes `weight` times through each set: whole times in order, and for the
    rest on through the set in an order that is drawn anew each time all of it has been used.
    """

    def __init__(self, sets: Sequence[tuple[np.ndarray, float]], seed: int):
        self.sets, self.seed = [(indices, weight) for indices, weight in sets if len(indices)], seed
        self._ends = list(accumulate(max(1, round(weight * len(indices))) for indices, weight in self.sets))
        self.num_samples = self._ends[-1]
        self._orders: list[dict[int, np.ndarray]] = [{} for _ in self.sets]

    def __reduce__(self) -> tuple:
        return _Mixture, (self.sets, self.seed)  # orders are drawn again

    def _order(self, number: int, times: int) -> np.ndarray:
        """The order in which a set is gone through for this time; of each set two are kept, as an epoch needs."""
        known = self._orders[number]
        if times not in known:
            if len(known) > 1:
                known.pop(max(known, key=lambda other: abs(other - times)))
            known[times] = draw_order(len(self.sets[number][0]), (self.seed, number, times))
        return known[times]

    def record(self, sample: int, epoch: int) -> int:
        """The index of the record of this sample in this epoch."""
        sample = range(self.num_samples)[sample]  # from the end too, as of a list
        number = bisect_right(self._ends, sample)
        start, end = self._ends[number - 1] if number else 0, self._ends[number]
        indices, place, length = self.sets[number][0], sample - start, len(self.sets[number][0])
        rest = (end - start) % length
        if place >= end - start - rest:
            times, place = divmod(epoch * rest + place - (end - start - rest), length)
            place = int(self._order(number, times)[place])
        return int(indices[place % length])


# --- tokens -> samples -------------------------------------------------------------------------------------------


class StageDataset(torch.utils.data.Dataset):
    """
    Tokenized records, composed at the stage that [`~StageDataset.set_stage`] says.

    Everything is tokenized and checked once, when the object is made; records from files only where no process has
    done so before, see [`~sources.make_table`]. Stage and epoch lie in shared memory, so that data loader workers see
    a change whether they persist or not. The length is the same at every stage.

    Args:
        records: From [`load_records`]; or what it reads, which it then does with its defaults.
        processor ([`MultiCoCoProcessor`]): Gives the prompt, the tokens and the number of tiles.
        curriculum ([`CurriculumArguments`]): The rules.
        seed (`int`, defaults to 42): Seed of the mixing, and of the choice among alternative rationales.
        max_length (`int`, *optional*): Longest sequence allowed, at any stage.
        skip_bad_records (`bool`, defaults to `False`): List and leave out records with a defect.
        num_proc (`int`, *optional*): Processes that tokenize. By default one for every 5,000 records, at most one a
            core.
        overwrite_cache (`bool`, defaults to `False`): Tokenize again what was tokenized before.
        is_evaluated (`bool`, defaults to `False`): Compose samples as they are asked, and alike in all epochs, so that
            numbers can be compared: none is mixed, none has its thoughts drawn, and data without any written step has
            those of the stage.

    Raises:
        ValueError: a record has a defect, is too long, an image cannot be read, or pieces tokenize differently from
            the whole.
    """

    def __init__(
        self,
        records: Any,
        processor: MultiCoCoProcessor,
        curriculum: CurriculumArguments,
        *,
        seed: int = 42,
        max_length: int | None = None,
        skip_bad_records: bool = False,
        num_proc: int | None = None,
        overwrite_cache: bool = False,
        is_evaluated: bool = False,
    ):
        processor.check_tile_limits(processor.images_kwargs)
        self.curriculum, self.seed = curriculum, seed
        self.num_image_token = processor.num_image_token
        tokenizer = processor.tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN)
        start, latent, end = tokenizer(thought_block(1), add_special_tokens=False)["input_ids"]
        self.block_ids = start, latent, end
        self.end_of_turn_id = tokenizer.convert_tokens_to_ids(TURN_END_TOKEN)
        self._clock = torch.zeros(2, dtype=torch.long).share_memory_()  # stage, epoch
        how: dict[str, Any] = {
            "skip_bad_records": skip_bad_records,
            "num_proc": num_proc,
            "overwrite_cache": overwrite_cache,
        }
        if not isinstance(records, Records):
            records = load_records(records, needs_steps=curriculum.needs_steps, **how)
        limits = None if max_length is None else (max_length, vars(curriculum))
        known = records.fingerprint and fingerprint_of(records.fingerprint, _parts_of(processor), limits)
        table, self._places, defects = make_table(
            _CheckRecords(records, processor, curriculum, max_length),
            len(records),
            _TOKENS_SCHEMA,
            fingerprint=known,
            is_stale=_has_other_files,
            desc="Tokenizing",
            **how,
        )
        self._rows = RowReader(table)
        list_defects(defects)
        if not len(self._places):
            raise ValueError("No usable record is left. Check `records`, and the list of defects, if any.")
        self.records = records.select(self._places)
        self._has_steps, self._is_evaluated = _has_steps(table), is_evaluated
        if is_evaluated:
            rules = replace(curriculum, mix="none", draw_surplus=False)
            self.curriculum = rules if self._has_steps else replace(rules, without_steps="thoughts")
        self._mixture = _Mixture(self.records.by_set(), seed)

    @property
    def stage(self) -> int:
        """The stage that records are composed at."""
        return int(self._clock[0])

    @property
    def epoch(self) -> int:
        """The epoch that draws are made for."""
        return int(self._clock[1])

    def set_stage(self, stage: int, epoch: int = 0) -> None:
        """
        Composes all records at `stage` from now on; `epoch` only changes the draws.

        Raises:
            ValueError: no record has a written step, and those without get no thoughts.
        """
        rules = self.curriculum
        stages = [0] if rules.mix == "uniform" and rules.mix_prob == 1 else range(rules.last_stage + 1)
        has_thoughts = any(rules.counts(0, each)[0] for each in stages)
        if rules.num_thoughts(rules.last_stage) and not self._has_steps and not has_thoughts:
            raise ValueError(
                f"`steps` is empty in all records, so that `--without_steps {rules.without_steps}` and `--mix "
                f"{rules.mix}` would train no thought at any stage. Write steps, pass `--without_steps thoughts` (and "
                "another `--mix` than uniform), or train with `--mode no_cot`."
            )
        self._clock[0], self._clock[1] = stage, 0 if self._is_evaluated else epoch

    def __len__(self) -> int:
        return self._mixture.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.tokenized(index)
        if not row.answer:
            raise ValueError(
                f"Record {row.id!r}: `answer` is missing, so it can be asked but not trained on. Add the answer, or "
                "leave the record out."
            )
        number, num_thoughts, num_gone = self._draw(index, [len(steps) for steps in row.rationales])
        steps, rules = row.rationales[number], self.curriculum
        sample = self._sample(row, num_thoughts, steps[num_gone:], row.answer)
        if rules.decodes_steps:
            num_groups = (num_thoughts or 0) // rules.c_thought
            sample["step_ids"] = texts_of_groups(num_groups, steps, row.answer, self.end_of_turn_id)
        return sample

    def length(self, index: int) -> int:
        """Tokens of a sample, without reading them."""
        shape = self.shape(index)
        number, num_thoughts, num_gone = self._draw(index, [len(steps) for steps in shape.rationales])
        block = 0 if num_thoughts is None else num_thoughts + 2
        return shape.prompt(self.num_image_token) + block + sum(shape.rationales[number][num_gone:]) + shape.answer

    def _draw(self, index: int, num_steps: list[int]) -> tuple[int, int | None, int]:
        """Of a sample now: which of its rationales, the number of thoughts, and how many of the steps are gone."""
        stage, epoch = self._clock.tolist()
        key = (self.seed, epoch, range(len(self))[index])
        number = draw_rationale(len(num_steps), key)
        drawn = draw_stage(self.curriculum, stage, num_steps[number], key)
        num_thoughts, num_gone = self.curriculum.counts(num_steps[number], drawn)
        num_thoughts = draw_surplus(self.curriculum, drawn, num_steps[number], num_thoughts, key)
        return number, num_thoughts if self.curriculum.has_block else None, num_gone

    def num_thoughts(self, index: int, stage: int) -> int | None:
        """
        The thoughts that a record was trained with at `stage`; `None` without a block. If its alternative rationales
        were trained with different numbers, the most. Where no record has steps, as in data that is only asked, they
        may have been left out: it is then asked with the thoughts of the stage, whatever `without_steps` says.
        """
        rules = self.curriculum if self._has_steps else replace(self.curriculum, without_steps="thoughts")
        num_steps = max(map(len, self.shape(index).rationales))
        return rules.counts(num_steps, stage)[0] if rules.has_block else None

    def prompt(self, index: int, num_thoughts: int | None) -> dict[str, Any]:
        """A record as it is asked: with this many thoughts and nothing after them; `None` is no block."""
        sample = self._sample(self.tokenized(index), num_thoughts, [], [])
        del sample["labels"]
        return sample

    def answered(self, index: int, num_thoughts: int | None) -> dict[str, Any]:
        """A record as [`~StageDataset.prompt`] asks it, with its answer at once, whose tokens are the labels."""
        row = self.tokenized(index)
        return self._sample(row, num_thoughts, [], row.answer)

    def max_new_tokens(self) -> int:
        """Tokens of the longest written steps and answer."""
        return max(sum(steps) + shape.answer for shape in self.shapes() for steps in shape.rationales)

    def digest(self) -> str:
        """Hexadecimal digits that are the same for the same ids, tokens and tiles of all records, in this order."""
        columns, found = self._rows.table.data, hashlib.sha256(f"{len(self)}".encode())
        for chunk in columns.column("id").chunks:
            found.update("".join(f"{name}\n" for name in chunk.drop_null().to_pylist()).encode())
        for name in ("lengths", "num_patches_list", "ids"):
            for chunk in columns.column(name).chunks:
                found.update(chunk.flatten().to_numpy().tobytes())  # a record with a defect has none
        return found.hexdigest()

    def record_of(self, index: int) -> int:
        """The index in `records` of the record that this sample is made of, in this epoch."""
        return self._mixture.record(index, self.epoch)

    def tokenized(self, index: int) -> TokenizedRecord:
        """The token ids of this sample's record."""
        record = self.record_of(index)
        row, shape = int(self._places[record]), self._shape(record)
        ids = iter(self._rows.integers("ids", row))

        def piece(length: int) -> list[int]:
            return list(islice(ids, length))

        return TokenizedRecord(
            id=json.loads(self._rows.value("id", row)),
            question=piece(shape.question),
            rationales=[[piece(length) for length in steps] for steps in shape.rationales],
            answer=piece(shape.answer),
            num_patches_list=shape.num_patches_list,
            images=self._rows.value("paths", row)
            if self.records.are_paths(record)
            else self.records.images_of(record),
        )

    def shape(self, index: int) -> RecordShape:
        """The lengths of this sample's record, without reading its tokens."""
        return self._shape(self.record_of(index))

    def shapes(self) -> Iterator[RecordShape]:
        """The lengths of all records, also of those that no sample of this epoch is made of."""
        return map(self._shape, range(len(self.records)))

    def _shape(self, record: int) -> RecordShape:
        row = int(self._places[record])
        question, answer, *lengths = self._rows.integers("lengths", row)
        rationales, rest = [], iter(lengths)
        for num_steps in rest:
            rationales.append(list(islice(rest, num_steps)))
        return RecordShape(question, rationales, answer, self._rows.integers("num_patches_list", row))

    def _sample(
        self, row: TokenizedRecord, num_thoughts: int | None, steps: list[list[int]], answer: list[int]
    ) -> dict[str, Any]:
        input_ids, labels = compose(self._whole_question(row), steps, answer, num_thoughts, self.block_ids)
        images = {"images": row.images, "num_patches_list": row.num_patches_list}
        return {"id": row.id, "input_ids": input_ids, "labels": labels, **images}

    def _whole_question(self, row: TokenizedRecord) -> list[int]:
        """The prompt with its image runs, from one visual token per image to all of them."""
        runs = iter(row.num_patches_list)
        tokens = []
        for token in row.question:
            tokens += [token] * (self.num_image_token * next(runs) if token == self.image_token_id else 1)
        return tokens


# --- samples -> batches ------------------------------------------------------------------------------------------


def _loaded(image: Any) -> Any:
    return image.open() if isinstance(image, DatasetImage) else image


class ReasoningCollator:
    """
    Pads a batch so that the first thoughts of all samples stand in one column: `n` thoughts take `n + 1` passes.

    Samples with thoughts are padded on the left up to that column, then all on the right:

        question question <start> <latent> <latent> <end> answer answer
        pad      question <start> <latent> <latent> <end> answer pad
        question answer   answer  pad      ...

    Args:
        processor ([`MultiCoCoProcessor`]): Opens and cuts the images of the batch.
        normalize_on_device (`bool`, defaults to `False`): Leave the pixels of a batch bytes, a quarter of the size;
            [`MultiCoCoProcessor.normalize_pixels`], which `StageTrainer` calls, makes them numbers where the model is.
            Those of prompts are numbers in any case.

    Returns, when called: `input_ids`, `attention_mask`, `labels` of shape `(batch_size, sequence_length)`; with images
    `pixel_values` `(sum of tiles, 3, height, width)` and `num_patches_list`; and with a step loss `step_ids`
    `(batch_size, groups, length)`, what each group of thoughts stands for, also if no sample has a thought.
    """

    def __init__(self, processor: MultiCoCoProcessor, *, normalize_on_device: bool = False):
        self.processor, self.normalize_on_device = processor, normalize_on_device
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
        return {**self._padded(features, lefts), **self._pixels(features, as_bytes=self.normalize_on_device)}

    def prompts(self, features: Sequence[Mapping[str, Any]], *, with_images: bool = True) -> dict[str, Any]:
        """The same for prompts to generate from: padded on the left. Without images, ids and mask only."""
        longest = max(len(feature["input_ids"]) for feature in features)
        lefts = [longest - len(feature["input_ids"]) for feature in features]
        return {**self._padded(features, lefts), **(self._pixels(features) if with_images else {})}

    def _padded(self, features: Sequence[Mapping[str, Any]], lefts: Sequence[int]) -> dict[str, torch.Tensor]:
        width = max(left + len(feature["input_ids"]) for left, feature in zip(lefts, features, strict=True))

        def row(values, left, fill):
            return [fill] * left + list(values) + [fill] * (width - left - len(values))

        pairs = list(zip(features, lefts, strict=True))
        batch = {
            "input_ids": torch.tensor([row(item["input_ids"], left, self.pad_token_id) for item, left in pairs]),
            "attention_mask": torch.tensor([row([1] * len(item["input_ids"]), left, 0) for item, left in pairs]),
        }
        if all("labels" in feature for feature in features):
            batch["labels"] = torch.tensor([row(item["labels"], left, -100) for item, left in pairs])
        if any("step_ids" in feature for feature in features):
            batch["step_ids"] = _padded_texts(features)
        return batch

    def _pixels(self, features: Sequence[Mapping[str, Any]], *, as_bytes: bool = False) -> dict[str, Any]:
        for sample, feature in enumerate(features):
            self._check_images(sample, feature)
        if not any(len(feature.get("num_patches_list", ())) for feature in features):
            return {}
        images = [
            self._open(image, feature, sample, index)
            for sample, feature in enumerate(features)
            for index, image in enumerate(feature.get("images", []))
        ]
        settings = {**self.processor.images_kwargs, "return_tensors": "pt"}
        if as_bytes:
            settings |= {"do_rescale": False, "do_normalize": False}
        tiles = self.processor.image_processor(images, **settings)
        counts = iter(tiles["num_patches"].tolist())
        num_patches_list = []
        for sample, feature in enumerate(features):
            expected = [int(count) for count in feature.get("num_patches_list", ())]
            found = [next(counts) for _ in feature.get("images", [])]
            if found != expected:
                raise ValueError(
                    f"{_name(feature, sample)}: `images` give {found} tiles, but gave {expected} when they were "
                    "counted. Has a file changed since the start? Run again."
                )
            num_patches_list += found
        return {"pixel_values": tiles["pixel_values"], "num_patches_list": num_patches_list}

    def _open(self, image: Any, feature: Mapping[str, Any], sample: int, index: int) -> Image.Image:
        try:
            return self.processor.open_image(_loaded(image), sample, index)
        except Exception as error:  # decoders raise what they like, and a worker's traceback names no record
            if "id" not in feature and isinstance(error, ValueError):
                raise  # it names the sample
            name = image if isinstance(image, str) else f"number {index}"
            raise ValueError(
                f"{_name(feature, sample)}: `images` {name} cannot be read: {error}. Mend the file, or leave it out."
            ) from error

    def _check_images(self, sample: int, feature: Mapping[str, Any]) -> None:
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


def _padded_texts(features: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """The texts of all groups of all samples as one tensor (B, groups, length), filled up by -100."""
    for sample, feature in enumerate(features):
        if "step_ids" not in feature:
            raise ValueError(
                f"{_name(feature, sample)}: `step_ids` are missing, but others of the batch have them. Give all "
                "data sets the same `step_loss_weight`."
            )
    samples = [feature["step_ids"] for feature in features]
    length = max((len(text) for texts in samples for text in texts), default=0)
    padded = torch.full((len(samples), max(map(len, samples)), length), -100)
    for sample, texts in enumerate(samples):
        for group, text in enumerate(texts):
            padded[sample, group, : len(text)] = torch.tensor(text)
    return padded


def _name(feature: Mapping[str, Any], sample: int) -> str:
    """A sample for an error: its record, or without an `id` its place in the batch."""
    return f"Record {feature['id']!r}" if "id" in feature else f"Sample {sample}"
