"""The curriculum: which stage an epoch has, how many thoughts a stage, which words a sample. Pure: no tensor, no file.

At stage `s` the first `s` steps are gone and `s * c_thought` thoughts stand in their place:

    question <|start-latent|> <|latent|> x (s * c_thought) <|end-latent|> step_{s+1} ... step_n ### answer <|im_end|>

Only what follows the block is a label. The rules are those of the original program (facebookresearch/coconut, commit
27273cb); where it trains and asks with different numbers of thoughts, we ask as we train.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import numpy as np

from .configuration_multicoco import BLOCK_MODES, MODES


ANSWER_MARK = "### "
MIXES = ("none", "linear", "uniform")


def setting(help: str, *, default: Any = MISSING, choices: Iterable[str] | None = None) -> Any:
    """A field of a dataclass of flags, with what `--help` says of it and the values that it may have."""
    metadata = {"help": help} | ({} if choices is None else {"choices": list(choices)})
    return field(default=default, metadata=metadata)


def check_settings(settings: Any, **least: int) -> None:
    """
    Checks a dataclass made of [`setting`]s.

    Args:
        settings: The dataclass.
        least (`int`): For each field that has one its least value; a field that is `None` is not checked.

    Raises:
        ValueError: a value is none of its choices, or is too small.
    """
    for item in fields(settings):
        options, value = item.metadata.get("choices"), getattr(settings, item.name)
        if options and value not in options:
            raise ValueError(f"`--{item.name}` must be one of {', '.join(options)}, got {value!r}.")
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None and value < smallest:
            raise ValueError(f"`--{name}` must be at least {smallest}, got {value}.")


@dataclass
class CurriculumArguments:
    """How written reasoning steps give way to continuous thoughts. Defaults are the paper's for GSM8k."""

    mode: str = setting(
        "How it is trained. " + ". ".join(f"{mode}: {what}" for mode, what in MODES.items()) + ".",
        default="coconut",
        choices=MODES,
    )
    c_thought: int = setting("Continuous thoughts that replace one written step.", default=2)
    max_latent_stage: int = setting("Stages that replace one more step each.", default=3)
    first_latent_stage: int = setting(
        "The stage after stage 0; as large as the last one, all steps are replaced at once.", default=1
    )
    final_stage: bool = setting(
        "One more stage without any written step, for records of more than `max_latent_stage` steps.", default=True
    )
    pad_latent_to_max: bool = setting(
        "In the final stage give every record all thoughts, also with fewer steps than stages.", default=True
    )
    epochs_per_stage: int = setting("Epochs before the next step is replaced.", default=3)
    epochs_stage_0: int | None = setting(
        "Epochs of written reasoning first; `epochs_per_stage` if not given.", default=None
    )
    draw_surplus: bool = setting(
        "In the last stage draw how many thoughts of a sample are more than its steps have, at least those of one.",
        default=False,
    )
    step_loss_weight: float = setting(
        "Weight of the step loss: the thoughts of a step must be readable as that step, surplus ones as the answer. "
        "0: the paper's training.",
        default=0.0,
    )
    mix: str = setting(
        "Stage of a sample: none: the scheduled one. linear: any stage up to it, later ones more often "
        "(i + 1). uniform: the original program's, any number of the record's own steps, at stage 0 too.",
        default="none",
        choices=MIXES,
    )
    mix_prob: float = setting("Probability that a sample is mixed rather than scheduled.", default=1.0)
    without_steps: str = setting(
        "A record without written steps among others: refuse: an error. no_thoughts: it has none, at any stage. "
        "thoughts: it has those of the stage, as a record with fewer steps than the stage replaces.",
        default="refuse",
        choices=["refuse", "no_thoughts", "thoughts"],
    )
    reset_optimizer_every: str = setting(
        "Clear Adam's moments at every new stage (the paper), epoch (its program), or never.",
        default="stage",
        choices=["stage", "epoch", "never"],
    )
    restart_schedule: bool = setting(
        "Start the learning rate again at every stage: warm-up, then cosine down to a tenth.", default=False
    )

    def __post_init__(self):
        least = {"first_latent_stage": 1, "epochs_per_stage": 1, "epochs_stage_0": 0}
        check_settings(self, c_thought=1, max_latent_stage=0, **least)
        if self.first_latent_stage > max(1, self._most_stages):
            raise ValueError(
                f"`--first_latent_stage` must be at most {self._most_stages}, the last stage (`max_latent_stage`, and "
                f"one more with `final_stage`), got {self.first_latent_stage}."
            )
        if not 0 <= self.step_loss_weight < math.inf:
            raise ValueError(f"`--step_loss_weight` must be a number of at least 0, got {self.step_loss_weight}.")
        if self.draw_surplus and self.final_stage and not self.pad_latent_to_max:
            raise ValueError(
                "`--draw_surplus` is true, but `--pad_latent_to_max` false leaves no surplus thoughts in the final "
                "stage, so that none would be drawn. Drop `--draw_surplus`, or set `--pad_latent_to_max true` or "
                "`--final_stage false`."
            )
        if not 0 <= self.mix_prob <= 1:
            raise ValueError(f"`--mix_prob` must be between 0 and 1, got {self.mix_prob}.")

    @property
    def last_stage(self) -> int:
        """The stage that the schedule ends with; 0 for the modes without stages."""
        return 0 if self.mode in ("cot", "no_cot") else self._most_stages

    @property
    def _most_stages(self) -> int:
        return self.max_latent_stage + (1 if self.final_stage else 0)

    @property
    def first_epochs(self) -> int:
        """Epochs at stage 0."""
        return self.epochs_per_stage if self.epochs_stage_0 is None else self.epochs_stage_0

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole schedule. The modes without stages get as many, so that all train equally long."""
        return self.first_epochs + (self._most_stages - self.first_latent_stage + 1) * self.epochs_per_stage

    @property
    def starts(self) -> list[int]:
        """The epochs that the stages of the schedule begin with, 0 first. The modes without stages have the same."""
        later = range(self._most_stages - self.first_latent_stage + 1)
        return [0, *(self.first_epochs + self.epochs_per_stage * number for number in later)]

    def stage(self, epoch: int) -> int:
        """The scheduled stage of an epoch (from 0); a pure function, so that a resumed run finds it by itself."""
        if epoch < self.first_epochs:
            return 0
        later = (epoch - self.first_epochs) // self.epochs_per_stage
        return min(self.first_latent_stage + later, self.last_stage)

    def counts(self, num_steps: int, stage: int) -> tuple[int, int]:
        """Thoughts, and written steps that are gone, for a record of `num_steps` steps at `stage`."""
        if self.mode == "cot":
            return 0, 0
        if self.mode == "no_cot":
            return 0, num_steps
        if num_steps == 0 and self.without_steps == "no_thoughts":
            return 0, 0
        replaced, gone = stage, min(stage, num_steps)
        if stage > self.max_latent_stage:
            replaced = self.max_latent_stage if self.pad_latent_to_max else min(num_steps, self.max_latent_stage)
            gone = num_steps
        return (0 if self.mode == "no_thoughts" else replaced * self.c_thought), gone

    @property
    def needs_steps(self) -> bool:
        """Whether a record without written steps is a defect."""
        return self.mode != "no_cot" and self.without_steps == "refuse"

    @property
    def has_block(self) -> bool:
        """Whether the two markers of a thought block are written; the controls without thoughts have none."""
        return self.mode in BLOCK_MODES

    @property
    def decodes_steps(self) -> bool:
        """Whether the thoughts, or what they would have been, must be readable as their steps."""
        return self.has_block and self.step_loss_weight > 0

    def num_thoughts(self, stage: int) -> int | None:
        """The number of thoughts at inference after `stage`, as a configuration has it; `None`: no block."""
        return self.counts(self.max_latent_stage + 1, stage)[0] if self.has_block else None


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


def draw_surplus(
    curriculum: CurriculumArguments, stage: int, num_steps: int, num_thoughts: int, key: tuple[int, int, int]
) -> int:
    """
    The thoughts of one sample, of `num_thoughts` at most; fewer only in the last stage, where it has more groups than
    steps. It keeps at least one surplus group. `key` is (seed, epoch, index), as in [`draw_stage`].
    """
    num_groups = num_thoughts // curriculum.c_thought
    if not curriculum.draw_surplus or stage != curriculum.last_stage or num_groups <= num_steps:
        return num_thoughts
    generator = np.random.default_rng((*key, 3))  # 3: another stream than the others'
    return int(generator.integers(num_steps + 1, num_groups + 1)) * curriculum.c_thought


def texts_of_groups(
    num_groups: int, steps: Sequence[Sequence[int]], answer: Sequence[int], end_of_turn: int
) -> list[list[int]]:
    """
    The text that each group of thoughts stands for: the k-th for the k-th of all `steps`, those beyond for the
    `answer`. Each ends as a turn does, so that a model that writes it stops there.
    """
    return [[*steps[group], end_of_turn] if group < len(steps) else list(answer) for group in range(num_groups)]


def draw_order(count: int, key: tuple[int, int, int]) -> np.ndarray:
    """An order of so many things, `(count,)` indices. `key` is (seed, number of the set, how often it was used)."""
    return np.random.default_rng((*key, 2)).permutation(count)  # 2: another stream than the others'


def compose(
    question: Sequence[int],
    steps: Sequence[Sequence[int]],
    answer: Sequence[int],
    num_thoughts: int | None,
    block_ids: tuple[int | None, int, int | None],
) -> tuple[list[int], list[int]]:
    """
    `input_ids` and `labels` of one sample from its pieces.

    Args:
        question, answer (`Sequence[int]`): Token ids of the pieces.
        steps (`Sequence[Sequence[int]]`): Token ids of each step that is still written.
        num_thoughts (`int`, *optional*): Latent tokens in the block; `None` for no block.
        block_ids (`tuple`): Ids of start marker, latent, end marker; a marker that is `None` is left out.
    """
    prompt = list(question)
    if num_thoughts is not None:
        start, latent, end = block_ids
        prompt += [token for token in (start, *[latent] * num_thoughts, end) if token is not None]
    body = [token for step in steps for token in step] + list(answer)
    return prompt + body, [-100] * len(prompt) + body


def written_tokens(row: Sequence[int], ends: int | Sequence[int] | None, pad: int | None) -> list[int]:
    """
    What a model wrote of the new tokens of a row: all up to its first end token, and this. What follows is padding,
    also where both are one token.

    Args:
        row (`Sequence[int]`): New tokens, as `generate` pads them.
        ends (`int` or `Sequence[int]`, *optional*): The end tokens that it was generated with.
        pad (`int`, *optional*): Of a row that ended without one, these at its end are left out.
    """
    last = {ends} if isinstance(ends, int) else set(ends or ())
    length = next((place for place, token in enumerate(row, start=1) if token in last), None)
    if length is None:
        length = next((place for place in range(len(row), 0, -1) if row[place - 1] != pad), 0)
    return list(row[:length])


def final_answer(text: str) -> str:
    """The answer in a text that a model wrote: what stands after the last answer mark, without blanks at its ends."""
    return text.rsplit(ANSWER_MARK, 1)[-1].strip()
