"""A look at the thoughts of a subject: lens, geometry, attention. Knows no experiment and no file."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..compat import attention_of
from .subject import Subject


COLLAPSED_SHARE, COLLAPSED_COSINE = 0.01, 0.99


@dataclass(frozen=True)
class Measurements:
    """
    What was read from a model that thinks, as plain numbers and texts.

    Args:
        lens (`list[list[list[int]]]`): From [`read_lens`].
        texts (`dict[int, str]`): Of tokens that the lens shows first.
        steps (`list[list[int]]`): From [`first_tokens`].
        geometry (`dict`): From [`measure_geometry`].
        attention, drawn (`list[dict]`): From [`measure_attention`], to average and to draw; empty for a control.
        readings (`list[list[str]]`, *optional*): What each group of each record's thoughts reads as, in the intact
            run; `None` where they were not trained to be read.
    """

    lens: list[list[list[int]]]
    texts: Mapping[int, str]
    steps: list[list[int]]
    geometry: Mapping[str, Any]
    attention: Sequence[Mapping[str, Any]]
    drawn: Sequence[Mapping[str, Any]]
    readings: list[list[str]] | None = None


def read_lens(subject: Subject, num_thoughts: int, batch_size: int, top: int = 5) -> list[list[list[int]]]:
    """
    The `top` tokens that `lm_head` reads from the state that makes each thought: for each sample, for each index.

    Where states are fed back, this state is the thought. A model with constant thoughts has such states too, and they
    may hold steps just as well: they are what a control has to show.
    """
    found = []
    for start in range(0, len(subject.records), batch_size):
        rows = range(start, min(start + batch_size, len(subject.records)))
        batch = subject.inputs(rows, num_thoughts, subject.encode(rows))
        with torch.no_grad():
            # Not logits of the whole model: by `thought_sweeps` those are of states one sweep later than thoughts.
            states = subject.model.model(**batch, use_cache=False, return_states=True).states  # (rows, n, D)
            logits = subject.model.lm_head(states)  # (rows, n, V)
        found += logits.topk(top, dim=-1).indices.tolist()
    return found


def texts_of(subject: Subject, lens: Sequence[Sequence[Sequence[int]]], top: int = 3) -> dict[int, str]:
    """The texts of the `top` tokens of every place of a lens."""
    tokens = {token for sample in lens for found in sample for token in found[:top]}
    return {token: subject.processor.tokenizer.decode([token]) for token in tokens}


def first_tokens(subject: Subject) -> list[list[int]]:
    """For each sample the first token of each written step (of the first rationale, where there are several)."""
    rows = map(subject.dataset.tokenized, range(len(subject.dataset)))
    return [[step[0] for step in row.rationales[0]] for row in rows]


def lens_hits(
    lens: Sequence[Sequence[Sequence[int]]], steps: Sequence[Sequence[int]], c_thought: int, index: int, seed: int
) -> dict[str, dict[int, bool]]:
    """
    Whether the lens reads, from the thought at `index`, the first token of the step that it replaced.

    Returns for `"top1"`, `"top5"` and `"chance"` a dictionary from sample to hit. Chance: the same lens against that
    step of another sample. Samples without that step are left out.
    """
    step = index // c_thought
    rows = [row for row, firsts in enumerate(steps) if step < len(firsts)]
    order = np.random.default_rng((seed, 2)).permutation(rows).tolist()
    others = dict(zip(order, order[1:] + order[:1], strict=True)) if len(rows) > 1 else {}  # a ring: none is its own
    return {
        "top1": {row: lens[row][index][0] == steps[row][step] for row in rows},
        "top5": {row: steps[row][step] in lens[row][index] for row in rows},
        "chance": {row: lens[row][index][0] == steps[others[row]][step] for row in rows if others},
    }


def effective_rank(vectors: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised squared singular values of centred `vectors` (count, D)."""
    vectors = vectors.double()
    values = torch.linalg.svdvals(vectors - vectors.mean(dim=0)).square()
    total = values.sum()
    if total <= 1e-12 * vectors.square().sum().clamp(min=1e-300):  # all the same, up to rounding
        return 1.0
    shares = values[values > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def measure_geometry(
    subject: Subject, thoughts: torch.Tensor, batch_size: int, num_prompts: int = 64
) -> dict[str, Any]:
    """
    Norms of what the language model is fed; cosines, spread and effective rank of thoughts.

    Args:
        thoughts (`torch.Tensor` of shape `(N, n, D)`): Of all records.
        num_prompts (`int`, defaults to 64): Records whose texts and pictures are measured.
    """
    thoughts = thoughts.double()
    rows = range(min(num_prompts, len(subject.records)))
    model, batch = subject.model, subject.inputs(rows, thoughts.shape[1])
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
    is_image = ids == model.config.image_token_id
    norms = {"text": text[real & ~is_image & (ids != model.config.latent_token_id)].double().norm(dim=-1)}
    encoded = [subject.encode(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    images = [part.double().flatten(0, 1).norm(dim=-1) for part in encoded if part is not None]
    if images:
        norms["image"] = torch.cat(images)
    norms |= {f"thought {index + 1}": thoughts[:, index].norm(dim=-1) for index in range(thoughts.shape[1])}
    units = thoughts / thoughts.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    count = len(units)
    # The mean of all pairs of different samples, from the sum of the unit vectors.
    across = (units.sum(dim=0).square().sum(dim=-1) - units.square().sum(dim=(0, 2))) / (count * (count - 1))
    within = (units[:, 1:] * units[:, :-1]).sum(dim=-1).mean(dim=0)  # (n - 1,)
    squares = thoughts.square().sum(dim=(0, 2)).clamp(min=1e-300)
    spread = (thoughts - thoughts.mean(dim=0)).square().sum(dim=(0, 2)) / squares
    return {
        "norms": {
            name: {
                "mean": float(values.mean()),
                "low": float(values.quantile(0.05)),
                "high": float(values.quantile(0.95)),
            }
            for name, values in norms.items()
        },
        "cosine_across_samples": across.tolist(),
        "cosine_with_next": within.tolist(),
        "spread": spread.tolist(),
        "effective_rank": [effective_rank(thoughts[:, index]) for index in range(thoughts.shape[1])],
        "effective_rank_of_all": effective_rank(thoughts.flatten(0, 1)),
    }


def collapse_warnings(geometry: Mapping[str, Any]) -> list[str]:
    """In words, what the rule of collapse finds."""
    same = [f"{index + 1}" for index, share in enumerate(geometry["spread"]) if share < COLLAPSED_SHARE]
    equal = [
        f"{index + 1} and {index + 2}"
        for index, cosine in enumerate(geometry["cosine_with_next"])
        if cosine > COLLAPSED_COSINE
    ]
    found = []
    if same:
        found.append(f"thought {', '.join(same)}: nearly the same vector for every sample")
    if equal:
        found.append(f"thoughts {', '.join(equal)}: nearly the same direction within a sample")
    return found


def measure_attention(subject: Subject, num_thoughts: int, num_samples: int, num_drawn: int) -> list[dict[str, Any]]:
    """
    Attention of some samples, one at a time: mean over layers and heads, from the position that makes each thought
    and, last, from the one that writes the answer's first token.

    Returns for each sample `shares`, one row a query: image, question (all other text), thoughts; and `picture`, one
    row a query: weights of the visual tokens of the first image's last tile (its thumbnail, if it has several), of
    the first `num_drawn` samples.
    """
    model, found = subject.model, []
    with _mean_attention(model):
        for row in range(min(num_samples, len(subject.records))):
            batch = subject.inputs([row], num_thoughts, subject.encode([row]))
            with torch.no_grad():
                attentions = model(**batch, output_attentions=True).attentions  # a (1, 1, T, T) for each layer
            weights = torch.stack([layer[0, 0].double() for layer in attentions]).mean(dim=0).cpu()  # (T, T)
            ids = batch["input_ids"][0].cpu()
            latents, image = ids == model.config.latent_token_id, ids == model.config.image_token_id
            queries = [*(latents.nonzero().flatten() - 1).tolist(), len(ids) - 1]
            groups = image, ~image & ~latents, latents
            shares = [[float(weights[query][group].sum()) for group in groups] for query in queries]
            picture = []
            if row < num_drawn and (tiles := batch.get("num_patches_list")):
                size = subject.dataset.num_image_token
                last = image.nonzero().flatten()[: size * tiles[0]][-size:]
                picture = weights[queries][:, last].tolist()
            found.append({"shares": shares, "picture": picture})
    return found


@contextlib.contextmanager
def _mean_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, layers give the mean of their heads' attention; afterwards the model is as it was, whatever happens."""
    with contextlib.ExitStack() as stack:
        stack.callback(model.set_attn_implementation, attention_of(model.config))
        model.set_attn_implementation("eager")
        for layer in model.model.language_model.layers:
            # Before they are recorded: the weights of all heads of a long prompt would be tens of gigabytes.
            stack.callback(layer.self_attn.register_forward_hook(_mean_over_heads, prepend=True).remove)
        yield


def _mean_over_heads(module, args, output):
    hidden_states, weights = output
    return hidden_states, weights.mean(dim=1, keepdim=True)
