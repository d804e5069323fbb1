"""A look at the thoughts themselves: lens, geometry, attention."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..compat import attention_of
from .diagnosis import Diagnosis


COLLAPSED_SHARE, COLLAPSED_COSINE = 0.01, 0.99


def read_lens(diagnosis: Diagnosis, top: int = 5) -> list[list[list[int]]]:
    """
    The `top` tokens that `lm_head` reads from the state that makes each thought: for each sample, for each index.

    Where states are fed back, this state is the thought. A model with constant thoughts has such states too, and they
    may hold steps just as well: they are what a control has to show.
    """
    model, count, found = diagnosis.subject.model, diagnosis.num_thoughts, []
    for start in range(0, len(diagnosis.records), diagnosis.arguments.batch_size):
        rows = list(range(start, min(start + diagnosis.arguments.batch_size, len(diagnosis.records))))
        batch = diagnosis.prompts(rows, count)
        if any(diagnosis.tiles[row] for row in rows):
            features = BaseModelOutputWithPooling(pooler_output=diagnosis.encode(rows, "own"))
            batch["mm_encoder_outputs"] = {"image": features}
        with torch.no_grad():  # every prompt ends in start marker, thoughts and end marker
            logits = model(**batch, logits_to_keep=count + 2).logits[:, :count]  # (rows, n, V)
        found += logits.topk(top, dim=-1).indices.tolist()
    return found


def first_tokens(diagnosis: Diagnosis) -> list[list[int]]:
    """For each sample the first token of each written step (of the first rationale, where there are several)."""
    return [[step[0] for step in row.rationales[0]] for row in diagnosis.dataset.tokenized]


def lens_hits(lens, steps, c_thought: int, index: int, seed: int) -> dict[str, dict[int, list[bool]]]:
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


def measure_geometry(diagnosis: Diagnosis, num_prompts: int = 64) -> dict[str, Any]:
    """Norms of what the language model is fed; cosines, spread and effective rank of thoughts."""
    thoughts = diagnosis.thoughts["intact"].double()  # (N, n, D)
    rows = list(range(min(num_prompts, len(diagnosis.records))))
    model, batch = diagnosis.subject.model, diagnosis.prompts(rows, diagnosis.num_thoughts)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
    is_image = ids == model.config.image_token_id
    norms = {"text": text[real & ~is_image & (ids != model.config.latent_token_id)].double().norm(dim=-1)}
    if any(diagnosis.tiles[row] for row in rows):
        size = diagnosis.arguments.batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        parts = [part for part in parts if any(diagnosis.tiles[row] for row in part)]
        images = [diagnosis.encode(part, "own").double().flatten(0, 1).norm(dim=-1) for part in parts]
        norms["image"] = torch.cat(images)
    norms |= {f"thought {index + 1}": thoughts[:, index].norm(dim=-1) for index in range(thoughts.shape[1])}
    units = thoughts / thoughts.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    count = len(units)
    # The mean of all pairs of different samples, from the sum of the unit vectors.
    across = (units.sum(dim=0).square().sum(dim=-1) - units.square().sum(dim=(0, 2))) / (count * (count - 1))
    within = (units[:, 1:] * units[:, :-1]).sum(dim=-1).mean(dim=0)  # (n - 1,)
    spread = (thoughts - thoughts.mean(dim=0)).square().sum(dim=(0, 2)) / thoughts.square().sum(dim=(0, 2)).clamp(
        min=1e-300
    )
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


def measure_attention(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """
    Attention of some samples, one at a time: mean over layers and heads, from the position that makes each thought
    and, last, from the one that writes the answer's first token.

    Returns for each sample `shares`, one row a query: image, question (all other text), thoughts; and `picture`, one
    row a query: weights of the visual tokens of the first image's last tile (its thumbnail, if it has several).
    """
    model, arguments = diagnosis.subject.model, diagnosis.arguments
    before = attention_of(model.config)
    model.set_attn_implementation("eager")
    hooks = [  # before they are recorded: the weights of all heads of a long prompt would be tens of gigabytes
        layer.self_attn.register_forward_hook(_mean_over_heads, prepend=True)
        for layer in model.model.language_model.layers
    ]
    found = []
    for row in range(min(max(arguments.num_attention, arguments.num_drawn), len(diagnosis.records))):
        batch = diagnosis.prompts([row], diagnosis.num_thoughts)
        if diagnosis.tiles[row]:
            features = BaseModelOutputWithPooling(pooler_output=diagnosis.encode([row], "own"))
            batch["mm_encoder_outputs"] = {"image": features}
        with torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions  # a (1, 1, T, T) for each layer
        weights = torch.stack([layer[0, 0].double() for layer in attentions]).mean(dim=0).cpu()  # (T, T)
        ids = batch["input_ids"][0].cpu()
        latents, image = ids == model.config.latent_token_id, ids == model.config.image_token_id
        queries = [*(latents.nonzero().flatten() - 1).tolist(), len(ids) - 1]
        shares = [
            [float(weights[query][group].sum()) for group in (image, ~image & ~latents, latents)] for query in queries
        ]
        sample = {"shares": shares, "picture": []}
        if diagnosis.tiles[row] and row < arguments.num_drawn:
            size = diagnosis.dataset.num_image_token
            last = image.nonzero().flatten()[: size * diagnosis.tiles[row][0]][-size:]
            sample["picture"] = weights[queries][:, last].tolist()
        found.append(sample)
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation(before)
    return found


def _mean_over_heads(module, args, output):
    hidden_states, weights = output
    return hidden_states, weights.mean(dim=1, keepdim=True)


def examine(diagnosis: Diagnosis) -> dict[str, Any]:
    """What is read from a model that thinks, beside the answers of its experiments."""
    if not diagnosis.num_thoughts:
        return {}
    found = {
        "lens": diagnosis.kept("lens", lambda: read_lens(diagnosis)),
        "geometry": diagnosis.kept("geometry", lambda: measure_geometry(diagnosis)),
    }
    arguments = diagnosis.arguments
    if diagnosis.second:
        found["attention"] = diagnosis.kept(
            "attention",
            lambda: measure_attention(diagnosis),
            num_drawn=arguments.num_drawn,
            num_attention=arguments.num_attention,
        )
    return found
