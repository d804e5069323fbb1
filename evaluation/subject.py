"""A checkpoint that is asked: how it is loaded, prompted and read. Knows no experiment and no score.

What is asked are the records of [`StageDataset`]; who asks gives their indices and a number of thoughts.
"""

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration_multicoco import STATE_FEEDBACKS, MultiCoCoConfig
from ..curriculum import CurriculumArguments, check_settings, final_answer, setting, written_tokens
from ..data_multicoco import ReasoningCollator, StageDataset
from ..records import Records, RecordSet, load_records
from .checkpoints import base_of, load_checkpoint
from .readings import check_function
from .settings import RecordArguments


CHOICES_BY = ("generation", "likelihood")


@dataclass(kw_only=True)
class AskArguments(RecordArguments):
    """How records are read and a checkpoint is loaded and asked: common to score.py and diagnose.py."""

    data: str = setting("Records: .jsonl, .json, .parquet, a glob of them, a folder, or a Hub data set.")
    metric: str = setting(
        "exact: what is written after the last '### ' is, letter by letter, the record's answer. Else "
        "FILE:RESULT, a metric in the form of `evaluate` and the name of its result, as "
        "metrics/answer_accuracy.py:numeric_match.",
        default="exact",
    )
    same_step: str | None = setting(
        "FILE:FUNCTION, (text, step) -> bool: whether what a group of thoughts reads as says what its step says, as "
        "recipes/trails/prepare.py:same_step. If not given, whether the two are equal letter by letter.",
        default=None,
    )
    max_new_tokens: int | None = setting(
        "Longest answer in tokens; the data's longest steps and answer if not given.", default=None
    )
    split: str = setting("Split of a folder or Hub data set.", default="validation")
    dtype: str = setting("float32, bfloat16, ...; the checkpoint's own if auto.", default="auto")
    use_cpu: bool = setting("Stay on the CPU where there is a GPU.", default=False)

    def __post_init__(self):
        check_settings(self, max_new_tokens=1)
        path, _, result = self.metric.rpartition(":")
        if self.metric != "exact" and not (result and os.path.isfile(path)):
            raise ValueError(
                f"`--metric` is {self.metric!r}, expected 'exact' or FILE:RESULT with an existing file, as "
                "metrics/answer_accuracy.py:numeric_match. Correct the path, or name the result."
            )
        check_function(self.same_step, "same_step")

    def read_data(self, *, needs_answer: bool = True) -> Records:
        """The records of `--data`, with or without written steps."""
        return self.read(self.data, split=self.split, needs_steps=False, needs_answer=needs_answer)


class Subject:
    """
    A checkpoint, and the records as it is asked them.

    Args:
        name (`str`): Folder or Hub name of the checkpoint; adapters are merged into their base.
        records (`list[dict]`): From [`load_records`].
        arguments ([`AskArguments`]): How it is loaded and asked.
        device (`torch.device`): Where the model runs.
        choices_by (`str`, defaults to `"generation"`): Or `"likelihood"`: the answer is the likeliest choice.
        attn_implementation (`str`, *optional*): transformers' choice if not given.
        flag (`str`, defaults to `"--model"`): What errors call the name.

    Raises:
        ValueError: the checkpoint cannot be read, or a record cannot be asked, see [`StageDataset`].
    """

    def __init__(
        self,
        name: str,
        records: Sequence[Mapping[str, Any]],
        arguments: AskArguments,
        device: torch.device,
        *,
        choices_by: str = "generation",
        attn_implementation: str | None = None,
        flag: str = "--model",
    ):
        try:
            self.config = MultiCoCoConfig.from_pretrained(name)
            base_of(name)  # raises if it cannot be loaded
            self.processor = arguments.load_processor(name)
        except OSError as error:
            raise ValueError(
                f"`{flag}` {name}: no checkpoint can be read there: {error}. Give the folder that train.py wrote, or "
                "the Hub name of a model."
            ) from error
        self.name, self.records, self.arguments, self.device = name, records, arguments, device
        self.choices_by, self.attn_implementation = choices_by, attn_implementation
        self.model: Any = None  # of several checkpoints only one is loaded at a time
        self.collator = ReasoningCollator(self.processor)
        if not isinstance(records, Records):
            records = load_records(records, needs_steps=False, needs_answer=False)
        records = records.each_once()  # an index is that of a record and of its sample
        if choices_by == "likelihood":  # every choice as the answer of a record without steps
            self.choices = [record["choices"] for record in records]
            self.first_rows = [0, *itertools.accumulate(map(len, self.choices))]
            asked = [
                {**record, "steps": [], "rationales": [[]], "answer": choice}
                for record in records
                for choice in record["choices"]
            ]
            records = Records([RecordSet(asked)])
        self.dataset = StageDataset(records, self.processor, CurriculumArguments())  # asked by number, not by stage
        self.max_new_tokens = arguments.max_new_tokens or self.dataset.max_new_tokens()

    def numbers_of_thoughts(self, asked: Sequence[int] | None) -> list[int | None]:
        """The numbers of thoughts to ask with: its own if none are wanted, and nothing else if it has no block."""
        own = self.config.num_thoughts
        return [own] if own is None or not asked else list(dict.fromkeys(asked))

    @property
    def feeds_states(self) -> bool:
        """Whether thoughts are states of the model, and not the constants of a control."""
        return self.config.thought_feedback in STATE_FEEDBACKS

    def can_read(self, num_thoughts: int | None) -> bool:
        """Whether so many thoughts can be read: it was trained for that, there is a group, and answers are written."""
        is_trained = self.config.step_loss_weight > 0 and self.choices_by == "generation"
        return is_trained and (num_thoughts or 0) >= self.config.c_thought

    def load(self) -> None:
        """Loads the model, if it is not there yet."""
        if self.model is not None:
            return
        kwargs: dict[str, Any] = {"attn_implementation": self.attn_implementation} if self.attn_implementation else {}
        model: Any = load_checkpoint(self.name, dtype=self.arguments.dtype, **kwargs)
        self.model = model.to(self.device).eval()

    def answer(self, indices: Sequence[int], num_thoughts: int | None) -> list[dict[str, Any]]:
        """Asks the records of these indices; one dictionary each with `prediction` and `new_tokens`, and more."""
        return self.ask(indices, num_thoughts)[0]

    def ask(
        self, indices: Sequence[int], num_thoughts: int | None
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """
        As [`~Subject.answer`], and on the host the thoughts `(rows, n, D)` that were fed, if they can be read. `None`
        for a control too: what it feeds are constants, [`~Subject.states`] are not.
        """
        if self.choices_by == "likelihood":
            with torch.no_grad():
                return self._choose(indices, num_thoughts), None
        return self.write(
            self._whole_inputs(indices, num_thoughts),
            return_thoughts=self.feeds_states and self.can_read(num_thoughts),
        )

    def states(self, indices: Sequence[int], num_thoughts: int) -> torch.Tensor:
        """What thoughts of these records are made of, or would be in a control: `(rows, n, D)`, without answering."""
        batch = self._whole_inputs(indices, num_thoughts)
        with torch.no_grad():
            return self.model.model(**batch, use_cache=False, return_states=True).states

    def read(self, indices: Sequence[int], num_thoughts: int, thoughts: torch.Tensor | None = None) -> list[list[str]]:
        """
        What each group of `config.c_thought` thoughts of these records reads as, greedily; thoughts behind the last
        whole group are not read.

        Args:
            thoughts (`torch.Tensor` of shape `(rows, n, D)`, *optional*): Those that were fed, where they are known;
                computed if not given.
        """
        thoughts = self.states(indices, num_thoughts) if thoughts is None else thoughts
        whole = thoughts[:, : num_thoughts // self.config.c_thought * self.config.c_thought].to(self.device)
        tokens = self.model.read_thoughts(
            whole, max_new_tokens=self.longest_text, do_sample=False, num_beams=1, num_return_sequences=1
        )
        return [[answer["text"].strip() for answer in self.read_answers(groups)] for groups in tokens]

    @functools.cached_property
    def longest_text(self) -> int:
        """Tokens that a group may read as at most: those of the longest step or answer of the data, at least 64."""
        lengths = (
            max(shape.answer, *(step + 1 for steps in shape.rationales for step in [0, *steps]))  # 1: end of turn
            for shape in self.dataset.shapes()
        )
        return max(64, *lengths)

    def inputs(
        self, indices: Sequence[int], num_thoughts: int | None, features: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """
        Prompts as the model takes them: ids and mask `(rows, T)`, padded on the left.

        Args:
            features (`torch.Tensor` of shape `(tiles, P, D)`, *optional*): What the pictures of the prompts look
                like, from [`~Subject.encode`].
        """
        prompts = [self.dataset.prompt(index, num_thoughts) for index in indices]
        batch = _to(self.collator.prompts(prompts, with_images=False), self.device)
        if features is not None:
            batch["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
            batch["num_patches_list"] = [count for prompt in prompts for count in prompt["num_patches_list"]]
        return batch

    def encode(
        self, indices: Sequence[int], edit_pixels: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """Visual features `(tiles, P, D)` of the pictures of these records; `None` if they have none."""
        pixels = self.collator.prompts([self.dataset.prompt(index, None) for index in indices]).get("pixel_values")
        if pixels is None:
            return None
        pixels = pixels if edit_pixels is None else edit_pixels(pixels)
        with torch.no_grad():
            return self.model.extract_feature(pixels.to(self.device, self.model.dtype))

    def write(
        self, batch: Mapping[str, Any], *, return_thoughts: bool = False, **kwargs: Any
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """Greedy answers to a batch of prompts, and on the host the thoughts `(rows, n, D)`, if wanted."""
        with torch.no_grad():
            output = self.model.generate(
                **batch,
                **kwargs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                return_thoughts=return_thoughts,
            )
        tokens, thoughts = (output.sequences, output.thoughts.cpu()) if return_thoughts else (output, None)
        return self.read_answers(tokens[:, batch["input_ids"].shape[1] :]), thoughts

    def _whole_inputs(self, indices: Sequence[int], num_thoughts: int | None) -> dict[str, Any]:
        """Prompts with their pictures."""
        return _to(self.collator.prompts([self.dataset.prompt(index, num_thoughts) for index in indices]), self.device)

    def read_answers(self, tokens: torch.Tensor) -> list[dict[str, Any]]:
        """From new tokens `(rows, number)` the text, its number of tokens, and what stands after the last `### `."""
        ends, pad = self.model.generation_config.eos_token_id, self.collator.pad_token_id
        answers = []
        for row in tokens.tolist():
            written = written_tokens(row, ends, pad)
            text = self.processor.tokenizer.decode(written, skip_special_tokens=True)
            answers.append({"prediction": final_answer(text), "text": text, "new_tokens": len(written)})
        return answers

    def _choose(self, indices: Sequence[int], num_thoughts: int | None) -> list[dict[str, Any]]:
        """The choice with the largest summed log-probability of its text, mark before and end of turn behind it."""
        rows = [self.first_rows[index] + place for index in indices for place in range(len(self.choices[index]))]
        batch = _to(self.collator([self.dataset.answered(row, num_thoughts) for row in rows]), self.device)
        labels = batch.pop("labels")[:, 1:]  # (B, T - 1): what the logits of each position are to predict
        first = int((labels != -100).any(dim=0).nonzero()[0])
        labels = labels[:, first:]  # (B, A): only where an answer is
        kept = labels.shape[1] + 1
        logits = self.model(**batch, use_cache=False, logits_to_keep=kept).logits[:, :-1]  # (B, A, V)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        log_probs = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)  # (B, A)
        sums = iter(log_probs.sum(dim=1).tolist())
        answers = []
        for index in indices:
            scores = [next(sums) for _ in self.choices[index]]
            prediction = self.choices[index][scores.index(max(scores))]
            answers.append({"prediction": prediction, "log_probs": scores, "new_tokens": 0})
        return answers


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
