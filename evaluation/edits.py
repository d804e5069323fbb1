"""The mean thought of what reads alike, which takes the place of a record's own: the read-edit experiment.

On other records the thoughts of each group that replaces a step are read. The thoughts that read as the same text have
a mean, and it is fed in the place of a record's own: the group then says another step, and nothing else is changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .subject import Subject


MOST_RECORDS, FEWEST_MEMBERS = 2000, 5  # that means are taken over; thoughts that make a mean


@dataclass(frozen=True)
class MeanThoughts:
    """
    For each group the texts that enough thoughts read as, and for each text their mean.

    Args:
        texts (`list[list[str]]`): By group, sorted.
        counts (`list[list[int]]`): Of how many thoughts each is the mean.
        means (`list[torch.Tensor]`): By group `(texts, c_thought, D)`.
    """

    texts: list[list[str]]
    counts: list[list[int]]
    means: list[torch.Tensor]


def choose_records(count: int, seed: int) -> np.ndarray:
    """Indices of at most `MOST_RECORDS` of so many records, in order."""
    chosen = np.random.default_rng((seed, 4)).permutation(count)[:MOST_RECORDS]
    return np.sort(chosen)


def mean_thoughts(subject: Subject, num_thoughts: int, batch_size: int) -> MeanThoughts:
    """Of the records of a loaded subject. A group counts where it stands for a step, by any of its rationales."""
    c_thought = subject.config.c_thought
    num_groups = num_thoughts // c_thought
    found: list[dict[str, tuple[int, torch.Tensor]]] = [{} for _ in range(num_groups)]
    for start in range(0, len(subject.records), batch_size):
        rows = range(start, min(start + batch_size, len(subject.records)))
        thoughts = subject.states(rows, num_thoughts)
        texts = subject.read(rows, num_thoughts, thoughts)
        groups = thoughts[:, : num_groups * c_thought].unflatten(1, (num_groups, c_thought)).cpu().double()
        for place, row in enumerate(rows):
            num_steps = max(map(len, subject.dataset.shape(row).rationales))
            for group in range(min(num_groups, num_steps)):
                text = texts[place][group]
                count, total = found[group].get(text, (0, torch.zeros_like(groups[place, group])))
                found[group][text] = count + 1, total + groups[place, group]
    names = [sorted(text for text, (count, _) in group.items() if count >= FEWEST_MEMBERS) for group in found]
    shape = (0, c_thought, subject.config.text_config.hidden_size)
    return MeanThoughts(
        texts=names,
        counts=[[group[text][0] for text in texts] for group, texts in zip(found, names, strict=True)],
        means=[
            torch.stack([group[text][1] / group[text][0] for text in texts]) if texts else torch.zeros(shape)
            for group, texts in zip(found, names, strict=True)
        ],
    )


def feed_group(means: torch.Tensor, chosen: Sequence[int], group: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """
    The function `(thought (rows, D), index) -> thought` that feeds means in the place of one group.

    Args:
        means (`torch.Tensor` of shape `(texts, c_thought, D)`): Of this group.
        chosen (`list[int]`): For each row which of the texts it is made to say.
    """
    given = means[list(chosen)]  # (rows, c_thought, D)
    first, c_thought = group * given.shape[1], given.shape[1]

    def edit_thoughts(thought: torch.Tensor, index: int) -> torch.Tensor:
        return given[:, index - first].to(thought) if first <= index < first + c_thought else thought

    return edit_thoughts
