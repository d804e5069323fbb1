"""Interventions on thoughts and pictures: the experiments of diagnose.py, and their results. Knows no model, no score.

A thought is replaced by `edit_thoughts`, inside the loop of passes. Two places are told apart:

- *inside the loop*: one thought is replaced, and all later thoughts and the answer follow from the replaced one.
- *after the loop*: all thoughts are first computed untouched and recorded. In a second run the recorded ones are fed,
  but for the one that is replaced: later thoughts stay what they were, only what follows reads the replaced one.

Where all thoughts are replaced by something that does not depend on them, the two are the same run. What is fed is
the input embedding of a thought's position; the layers above it still attend to prompt and picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..configuration_multicoco import MultiCoCoConfig


FORMAT = 1  # of experiments and their files: raise it when an experiment of the same name means something else
# Each is a test of the verdict, for all thoughts and for each; what is only shown is named in [`plan`], replaced in
# `diagnosis.py` and labelled in `page.py`.
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


@dataclass
class Results:
    """
    What a checkpoint answered in each experiment, and with which thoughts: plain data that grows as it is asked.

    Args:
        name (`str`): Folder or Hub name of the checkpoint.
        config ([`MultiCoCoConfig`]): Its configuration.
        num_thoughts (`int`, *optional*): Thoughts that it is examined with; `None` for no block.
        records (`list[dict]`): What was asked; all that follows is in their order.
        tiles (`list[list[int]]`): Tiles of each picture of a record.
        seed (`int`): Seed of all that is drawn.
        experiments (`list[Experiment]`): In the order in which they are shown.
        lines (`dict[str, list[dict]]`): By experiment `prediction`, `text` and `new_tokens` of each record.
        thoughts (`dict[str, torch.Tensor]`): By experiment that records, `(N, n, D)` on the host.
        pictures (`np.ndarray` of shape `(N,)`): The record whose picture is given as another one; -1 for none.
        donors (`dict[str, np.ndarray]`): The record whose thoughts are given in `"swap"`, `"swap_same"` and
            `"decoy"`; -1 for none. Empty before [`~Results.draw`].
        mean, noise (`torch.Tensor` of shape `(n, D)` and `(N, n, D)`): What replaces thoughts; noise has norm 1.
            Not there before [`~Results.draw`].
    """

    name: str
    config: MultiCoCoConfig
    num_thoughts: int | None
    records: Sequence[Mapping[str, Any]]
    tiles: list[list[int]]
    seed: int
    experiments: list[Experiment]
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    thoughts: dict[str, torch.Tensor] = field(default_factory=dict)
    donors: dict[str, np.ndarray] = field(default_factory=dict)
    mean: torch.Tensor = field(init=False)
    noise: torch.Tensor = field(init=False)
    pictures: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.pictures = choose_pictures(self.records, self.tiles, np.random.default_rng((self.seed, 0)))

    def draw(self) -> None:
        """Chooses donors, mean and noise, now that the intact run is known."""
        thoughts = self.thoughts["intact"]
        answers = [line["prediction"] for line in self.lines["intact"]]
        rng = np.random.default_rng((self.seed, 1))
        # The decoy is drawn like the donor, but no thought of it is fed: how often answers agree by chance.
        for kind in ("swap", "decoy", "swap_same"):
            self.donors[kind] = choose_donors(answers, self.tiles, rng, same=kind == "swap_same")
        self.mean = thoughts.double().mean(dim=0).to(thoughts.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(thoughts.shape, generator=generator, dtype=torch.float64)
        self.noise = (noise / noise.norm(dim=-1, keepdim=True)).to(thoughts.dtype)

    def changed(self, experiment: Experiment) -> np.ndarray:
        """Which records an experiment changed `(N,)`: those with a donor, with another picture, with a picture."""
        changed = np.ones(len(self.records), dtype=bool)
        if experiment.replace in ("swap", "swap_same", "decoy"):
            changed &= self.donors[experiment.replace] >= 0
        if experiment.picture == "swap":
            changed &= self.donors["swap"] >= 0
        if "other" in (experiment.picture, (experiment.feed or "").removesuffix("-both")):
            changed &= self.pictures >= 0
        of_picture = experiment.picture != "own" or experiment.answer_sees == "no_image"
        if of_picture or experiment.feed in ("grey-both", "other-both"):
            changed &= np.array([bool(counts) for counts in self.tiles])
        return changed


def plan(num_thoughts: int | None, *, has_images: bool, is_control: bool) -> tuple[list[Experiment], list[Experiment]]:
    """The experiments that need nothing, and those that need thoughts and answers of the first."""
    count = num_thoughts or 0
    pictures = ("grey", "other") if has_images else ()
    first = [Experiment("intact", num_thoughts, records=count > 0)]
    first += [Experiment(f"{name}-both", num_thoughts, picture=name, records=count > 0) for name in pictures]
    if is_control:
        return first, []
    numbers = [] if num_thoughts is None else choose_numbers(num_thoughts)
    first += [Experiment(f"budget-{number}", number) for number in numbers if number != num_thoughts]
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


def choose_numbers(trained: int) -> list[int]:
    """Numbers of thoughts to ask with, from 0 to 2 more than trained; about ten of them."""
    return sorted({round(part * trained / 8) for part in range(9)} | {trained + 1, trained + 2})


def choose_donors(
    answers: Sequence[str], tiles: Sequence[list[int]], rng: np.random.Generator, *, same: bool
) -> np.ndarray:
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


def choose_pictures(
    records: Sequence[Mapping[str, Any]], tiles: Sequence[list[int]], rng: np.random.Generator
) -> np.ndarray:
    """For each sample another one with other pictures of as many tiles; -1 where there is none."""
    groups: dict[tuple[int, ...], list[int]] = {}
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
