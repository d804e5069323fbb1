"""From records to batches, at any stage of the curriculum. Knows tokens and tiles, no model. Read it downwards:

records -> TokenizedRecords (integers, checked once) -> StageDataset (composed lazily) -> ReasoningCollator
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .configuration_multicoco import IMAGE_CONTEXT_TOKEN, LATENT_TOKEN, TURN_END_TOKEN, thought_block
from .curriculum import ANSWER_MARK, CurriculumArguments, compose, draw_rationale, draw_stage
from .processing_multicoco import MultiCoCoProcessor, expand_image_tokens, open_image
from .records import DatasetImage, list_defects, question_text


# --- records -> tokens -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizedRecord:
    """Token ids of the pieces of a record; the question with one visual token per image."""

    record: Mapping[str, Any]
    question: list[int]
    rationales: list[list[list[int]]]  # alternative lists of steps, at least one, which may be empty
    answer: list[int]
    num_patches_list: list[int]


def _tokenize(
    records: Sequence[Mapping[str, Any]], processor: MultiCoCoProcessor
) -> Iterator[tuple[Mapping[str, Any], tuple[list, list, list], list[list[int]]]]:
    """
    Each record with the token ids of its pieces (question, rationales, answer), and with those of the same text
    tokenized in one go, for each of the rationales.
    """
    conversations = [[{"role": "user", "content": question_text(record)}] for record in records]
    prompts = processor.apply_chat_template(conversations, add_generation_prompt=True, num_thoughts=None)
    questions, rationales, answers, wholes = [], [], [], []
    for prompt, record in zip(prompts, records, strict=True):
        questions.append(expand_image_tokens(prompt, [1] * len(record["images"]), 1))
        alternatives = record.get("rationales", [record["steps"]])
        rationales.append([[step + "\n" for step in steps] for steps in alternatives])
        answers.append("" if record["answer"] is None else ANSWER_MARK + record["answer"] + TURN_END_TOKEN)
        wholes += ["".join([questions[-1], *steps, answers[-1]]) for steps in rationales[-1]]

    def encode(texts):
        return iter(processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])

    whole_ids = encode(wholes)
    step_ids = encode([step for alternatives in rationales for steps in alternatives for step in steps])
    for record, question, alternatives, answer in zip(
        records, encode(questions), rationales, encode(answers), strict=True
    ):
        pieces = question, [[next(step_ids) for _ in steps] for steps in alternatives], answer
        yield record, pieces, [next(whole_ids) for _ in alternatives]


def _count_tiles(record: Mapping[str, Any], processor: MultiCoCoProcessor) -> list[int]:
    """Tiles of each image of a record; of a file only the header is read."""
    counts = []
    for index, image in enumerate(record["images"]):
        try:
            if isinstance(image, str):
                with Image.open(image) as file:
                    width, height = file.size
            else:
                width, height = open_image(_loaded(image), 0, index).size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            name = image if isinstance(image, str) else f"number {index}"
            raise ValueError(
                f"Record {record['id']!r}: `images` {name} cannot be read: {error}. Mend the file, or leave it out."
            ) from error
        counts.append(processor.image_processor.get_number_of_image_patches(height, width, processor.images_kwargs))
    return counts


def _loaded(image: Any) -> Any:
    return image.open() if isinstance(image, DatasetImage) else image


def _check_pieces(row: TokenizedRecord, wholes: list[list[int]]) -> None:
    pieces = [[*row.question, *(t for step in steps for t in step), *row.answer] for steps in row.rationales]
    if pieces != wholes:
        raise ValueError(
            f"Record {row.record['id']!r}: `steps` and `answer` tokenize differently in pieces and as a whole, so "
            "the model would be trained on other tokens than it writes. Strip unusual characters at their ends."
        )


# --- tokens -> samples -------------------------------------------------------------------------------------------


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
        *,
        seed: int = 42,
        max_length: int | None = None,
        skip_bad_records: bool = False,
    ):
        self.curriculum, self.seed = curriculum, seed
        self.num_image_token = processor.num_image_token
        tokenizer = processor.tokenizer
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN)
        start, latent, end = tokenizer(thought_block(1), add_special_tokens=False)["input_ids"]
        self.block_ids = start, latent, end
        self._clock = torch.zeros(2, dtype=torch.long).share_memory_()  # stage, epoch
        self.tokenized, defects = [], []
        for record, pieces, wholes in _tokenize(records, processor):
            try:
                row = TokenizedRecord(record, *pieces, _count_tiles(record, processor))
                _check_pieces(row, wholes)
                if max_length is not None:
                    self._check_length(row, max_length)
                self.tokenized.append(row)
            except ValueError as error:
                if not skip_bad_records:
                    raise
                defects.append(error)
        list_defects(defects)
        if not self.tokenized:
            raise ValueError("No usable record is left. Check `records`, and the list of defects, if any.")
        self.records = [row.record for row in self.tokenized]

    def _check_length(self, row: TokenizedRecord, max_length: int) -> None:
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
        """The stage that records are composed at."""
        return int(self._clock[0])

    @property
    def epoch(self) -> int:
        """The epoch that draws are made for."""
        return int(self._clock[1])

    def set_stage(self, stage: int, epoch: int = 0) -> None:
        """Composes all records at `stage` from now on; `epoch` only changes the draws."""
        self._clock[0], self._clock[1] = stage, epoch

    def __len__(self) -> int:
        return len(self.tokenized)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.tokenized[index]
        if not row.answer:
            raise ValueError(
                f"Record {row.record['id']!r}: `answer` is missing, so it can be asked but not trained on. Add the "
                "answer, or leave the record out."
            )
        stage, epoch = self._clock.tolist()
        key = (self.seed, epoch, index)
        steps = row.rationales[draw_rationale(len(row.rationales), key)]
        input_ids, labels = self._compose(row, steps, draw_stage(self.curriculum, stage, len(steps), key))
        return {"input_ids": input_ids, "labels": labels, **self._images_of(row)}

    def _compose(self, row: TokenizedRecord, steps: list[list[int]], stage: int) -> tuple[list[int], list[int]]:
        num_thoughts, num_gone = self.curriculum.counts(len(steps), stage)
        asked = num_thoughts if self.curriculum.has_block else None
        return compose(self._whole_question(row), steps[num_gone:], row.answer, asked, self.block_ids)

    def num_thoughts(self, index: int, stage: int) -> int | None:
        """
        The thoughts that a record was trained with at `stage`; `None` without a block. If its alternative rationales
        were trained with different numbers, the most.
        """
        num_steps = max(map(len, self.tokenized[index].rationales))
        return self.curriculum.counts(num_steps, stage)[0] if self.curriculum.has_block else None

    def prompt(self, index: int, num_thoughts: int | None) -> dict[str, Any]:
        """A record as it is asked: with this many thoughts and nothing after them; `None` is no block."""
        row = self.tokenized[index]
        input_ids, _ = compose(self._whole_question(row), [], [], num_thoughts, self.block_ids)
        return {"input_ids": input_ids, **self._images_of(row)}

    def answered(self, index: int, num_thoughts: int | None) -> dict[str, Any]:
        """A record as [`~StageDataset.prompt`] asks it, with its answer at once, whose tokens are the labels."""
        row = self.tokenized[index]
        input_ids, labels = compose(self._whole_question(row), [], row.answer, num_thoughts, self.block_ids)
        return {"input_ids": input_ids, "labels": labels, **self._images_of(row)}

    def max_new_tokens(self) -> int:
        """Tokens of the longest written steps and answer."""
        return max(sum(map(len, steps)) + len(row.answer) for row in self.tokenized for steps in row.rationales)

    def _whole_question(self, row: TokenizedRecord) -> list[int]:
        """The prompt with its image runs, from one visual token per image to all of them."""
        runs = iter(row.num_patches_list)
        tokens = []
        for token in row.question:
            tokens += [token] * (self.num_image_token * next(runs) if token == self.image_token_id else 1)
        return tokens

    def _images_of(self, row: TokenizedRecord) -> dict[str, Any]:
        return {"images": row.record["images"], "num_patches_list": row.num_patches_list}


# --- samples -> batches ------------------------------------------------------------------------------------------


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

    Returns, when called: `input_ids`, `attention_mask`, `labels` of shape `(batch_size, sequence_length)`, and with
    images `pixel_values` `(sum of tiles, 3, height, width)` and `num_patches_list`.
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


def _name(feature: Mapping[str, Any], sample: int) -> str:
    """A sample for an error: its record, or without an `id` its place in the batch."""
    return f"Record {feature['id']!r}" if "id" in feature else f"Sample {sample}"
