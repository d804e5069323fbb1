"""Interventions on thoughts and pictures, and what they show: the experiments, figures and verdicts of diagnose.py.

A thought is replaced by `edit_thoughts`, inside the loop of passes. Two places are told apart:

- *inside the loop*: one thought is replaced, and all later thoughts and the answer follow from the replaced one.
- *after the loop*: all thoughts are first computed untouched and recorded. In a second run the recorded ones are fed,
  but for the one that is replaced: later thoughts stay what they were, only what follows reads the replaced one.

Where all thoughts are replaced by something that does not depend on them, the two are the same run. What is fed is
the input embedding of a thought's position; the layers above it still attend to prompt and picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


FORMAT = 1  # of experiments and their files: raise it when an experiment of the same name means something else
KINDS = {
    "zero": "zeros",
    "mean": "the data set's mean thought of that index",
    "noise": "noise of the thought's norm",
    "pause": "the embedding of <|latent|>",
    "swap": "the thought of a sample with another answer",
}


@dataclass(frozen=True)
class Experiment:
    """
    One way to ask every record.

    Args:
        name (`str`): Name in files and JSON.
        num_thoughts (`int`, *optional*): Latents in the prompt; `None` for no block.
        picture (`str`): `"own"`, `"grey"`, `"other"`: that of another record, or `"swap"`: that of the donor.
        feed (`str`, *optional*): The experiment whose recorded thoughts are fed in place of the computed ones.
        replace (`str`, *optional*): What thoughts are replaced by: a key of [`KINDS`], `"swap_same"` or `"decoy"`.
        index (`int`, *optional*): The only thought that is replaced; all if not given.
        answer_sees (`str`): As in [`MultiCoCoForConditionalGeneration.forward`].
        records (`bool`): Keep the thoughts that were fed.
    """

    name: str
    num_thoughts: int | None
    picture: str = "own"
    feed: str | None = None
    replace: str | None = None
    index: int | None = None
    answer_sees: str = "all"
    records: bool = False


def plan(
    num_thoughts: int | None, budgets: Sequence[int], has_images: bool, is_control: bool
) -> tuple[list[Experiment], list[Experiment]]:
    """The experiments that need nothing, and those that need thoughts and answers of the first."""
    count = num_thoughts or 0
    pictures = ("grey", "other") if has_images else ()
    first = [Experiment("intact", num_thoughts, records=count > 0)]
    first += [Experiment(f"{name}-both", num_thoughts, picture=name, records=count > 0) for name in pictures]
    if is_control:
        return first, []
    first += [Experiment(f"budget-{budget}", budget) for budget in budgets if budget != num_thoughts]
    if not count:
        return first, []
    sees = ("no_image", "thoughts_only") if has_images else ("thoughts_only",)
    first += [Experiment(f"sees-{name}", count, answer_sees=name) for name in sees]
    second = []
    for kind in KINDS:
        second.append(Experiment(f"{kind}-all", count, replace=kind))
        for index in range(count) if count > 1 else ():
            second.append(Experiment(f"{kind}-{index}-inside", count, replace=kind, index=index))
            if index < count - 1:  # nothing comes after the last thought: the two places are one
                second.append(Experiment(f"{kind}-{index}-after", count, feed="intact", replace=kind, index=index))
    second.append(Experiment("noise-all-after", count, feed="intact", replace="noise"))
    second.append(Experiment("swap_same-all", count, replace="swap_same"))
    for name in pictures:
        second.append(Experiment(f"{name}-thoughts", count, feed=f"{name}-both"))
        second.append(Experiment(f"{name}-answer", count, picture=name, feed="intact"))
    if has_images:
        second += [Experiment(f"{kind}-picture", count, picture="swap", replace=kind) for kind in ("swap", "decoy")]
    return first, second


def name_of(kind: str, index: int, place: str, count: int) -> str:
    """The experiment that replaces one of `count` thoughts, where some are the same run as another."""
    if count == 1:
        return f"{kind}-all"
    return f"{kind}-{index}-{'inside' if index == count - 1 else place}"


def choose_budgets(trained: int) -> list[int]:
    """0 to 2 more than trained; about ten of them."""
    return sorted({round(part * trained / 8) for part in range(9)} | {trained + 1, trained + 2})


def choose_donors(answers: Sequence[str], tiles: Sequence[list[int]], same: bool, rng) -> np.ndarray:
    """For each sample one with as many tiles whose answer is the same, or another; -1 where there is none."""
    _, codes = np.unique(np.asarray(answers, dtype=str), return_inverse=True)
    _, shapes = np.unique(np.asarray([str(counts) for counts in tiles]), return_inverse=True)
    donors = np.full(len(codes), -1)
    for sample, (code, shape) in enumerate(zip(codes, shapes, strict=True)):
        candidates = np.flatnonzero(((codes == code) == same) & (shapes == shape))
        candidates = candidates[candidates != sample]
        if len(candidates):
            donors[sample] = rng.choice(candidates)
    return donors


def choose_pictures(records: Sequence[Mapping[str, Any]], tiles: Sequence[list[int]], rng) -> np.ndarray:
    """For each sample another one with other pictures of as many tiles; -1 where there is none."""
    groups = {}
    for sample, counts in enumerate(tiles):
        if counts:
            groups.setdefault(tuple(counts), []).append(sample)
    others = np.full(len(records), -1)
    for members in groups.values():
        for sample in members:
            for candidate in rng.permutation(members)[:32].tolist():
                if candidate != sample and records[candidate]["images"] != records[sample]["images"]:
                    others[sample] = candidate
                    break
    return others
