"""Where thoughts may stand, who sees what, and the cache of their passes. Knows masks, keys and values, no model.

Shapes: B batch, T tokens, D hidden size.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .compat import attention_of
from .configuration_multicoco import END_LATENT_TOKEN, LATENT_TOKEN, START_LATENT_TOKEN


ANSWER_SEES = ("all", "no_image", "thoughts_only")


def check_thoughts(
    latent_mask: torch.BoolTensor,
    attention_mask: torch.Tensor | None,
    image_mask: torch.BoolTensor,
    samples: torch.LongTensor | None = None,
):
    """
    Checks that every thought has a state before it and comes after the images of its sample. All tensors on the host,
    of shape `(batch_size, sequence_length)`; `samples` numbers the samples of a packed row.

    Raises:
        ValueError: naming the sample and the position.
    """
    if not latent_mask.any():
        return
    if attention_mask is not None and attention_mask.max() > 1:
        raise ValueError(
            "`attention_mask` numbers samples, expected 1 for real tokens. Tell packed samples by `position_ids` that "
            "start again."
        )
    real = torch.ones_like(latent_mask) if attention_mask is None else attention_mask.bool()
    samples = torch.zeros_like(latent_mask, dtype=torch.long) if samples is None else samples
    has_previous = torch.zeros_like(latent_mask)
    has_previous[:, 1:] = real[:, :-1] & real[:, 1:] & (samples[:, :-1] == samples[:, 1:])
    later_image = torch.zeros_like(latent_mask)
    for sample in range(int(samples.max()) + 1):
        inside = samples == sample
        later_image |= inside & ((image_mask & inside).flip(1).cumsum(1).flip(1) > 0)
    for wrong, reason in (
        (latent_mask & ~real, "stands in the padding. Give `attention_mask` 1 there, or pad with another token."),
        (
            latent_mask & ~has_previous,
            "is the first token of its sample, so there is no state to feed. Put text first.",
        ),
        (latent_mask & later_image, "stands before or inside an image. Put all images before the thoughts."),
    ):
        if wrong.any():
            sample, position = wrong.nonzero()[0].tolist()
            raise ValueError(f"Sample {sample}: {LATENT_TOKEN} at position {position} of `input_ids` {reason}")


def packed_samples(position_ids, attention_mask, tokens: torch.Tensor) -> torch.LongTensor | None:
    """
    The number of the sample at each position `(batch_size, sequence_length)`, on the host, of rows whose positions
    start again within their real tokens (transformers' sign of packed rows); `None` if none does.
    """
    if position_ids.dim() != 2:
        return None
    restarts = torch.diff(position_ids, dim=1) < 1
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            return None
        real = attention_mask[:, -position_ids.shape[1] :].bool()
        restarts = restarts & real[:, :-1] & real[:, 1:]  # what stands in the padding means nothing
    restarts = restarts.cpu()
    if not restarts.any():
        return None
    return nn.functional.pad(restarts.long().cumsum(dim=1), (1, 0)).expand(len(tokens), -1)


def holds_tokens(past_key_values: Cache | None) -> bool:
    return past_key_values is not None and int(past_key_values.get_seq_length()) > 0


def causal_masks(config, **arguments):
    """The mask of a pass; by kind, if layers of the language model see only a window."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return create_causal_mask(config=config, **arguments)
    return {
        "full_attention": create_causal_mask(config=config, **arguments),
        "sliding_attention": create_sliding_window_causal_mask(config=config, **arguments),
    }


def pad_mask(mask: torch.BoolTensor, length: int) -> torch.BoolTensor:
    """A mask (B, t) of a prompt as one of the whole sequence (B, T): False for what follows."""
    return nn.functional.pad(mask, (0, max(0, length - mask.shape[1])))


def hidden_from_answer(config, answer_sees: str, input_ids: torch.LongTensor | None, latent_mask):
    """
    Which positions follow the thoughts, and which ones those may not see; both (B, T).

    Raises:
        ValueError: a rule that is not known, or a sample without a thought block.
    """
    if answer_sees not in ANSWER_SEES:
        raise ValueError(f"`answer_sees` must be one of {', '.join(ANSWER_SEES)}, got {answer_sees!r}.")
    if input_ids is None or latent_mask is None:
        raise ValueError(f"`answer_sees={answer_sees!r}` needs `input_ids` of a model with thought tokens.")
    block = latent_mask | (input_ids == config.start_latent_id)
    if not block.any(dim=1).all():
        raise ValueError(
            f"`answer_sees={answer_sees!r}` needs a thought block in every sample, also if it holds no thought: "
            f"write {START_LATENT_TOKEN}{END_LATENT_TOKEN} (`num_thoughts=0`)."
        )
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    after = positions > (positions * block).amax(dim=1, keepdim=True)
    hidden = input_ids == config.image_token_id if answer_sees == "no_image" else ~after & ~latent_mask
    return after, hidden


def answer_visibility(config, answer_sees: str, input_ids: torch.LongTensor | None, latent_mask):
    """The rule of `answer_sees` as a mask function of transformers: `(batch, head, query, key) -> allowed`."""
    length = None if latent_mask is None else latent_mask.shape[1]
    after, hidden = hidden_from_answer(
        config, answer_sees, None if input_ids is None else input_ids[:, :length], latent_mask
    )
    after, hidden = ~pad_mask(~after, input_ids.shape[1]), pad_mask(hidden, input_ids.shape[1])
    implementation = attention_of(config.text_config)
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"`answer_sees={answer_sees!r}` needs attention masks, which {implementation} does not take. Load the "
            "model with `attn_implementation='sdpa'`."
        )
    last = input_ids.shape[1] - 1  # a static cache has keys beyond the prompt
    return lambda batch, head, query, key: ~(after[batch, query] & hidden[batch, key.clamp(max=last)])


class PassLayer(DynamicLayer):
    """Keys and values of one layer in one pass: reads those of earlier passes, and only *sets* its own."""

    def __init__(self, past: tuple = ()):
        super().__init__()
        self.past = past  # ((keys, values), ...) of earlier passes, each (B, kv_heads, chunk, head_dim)
        self.own = None
        self.has_grad = torch.is_grad_enabled()

    def update(self, key_states, value_states, *args, **kwargs):
        if self.has_grad and not torch.is_grad_enabled():  # ms-swift exchanges the function behind transformers' back
            raise ValueError(
                "Activation checkpointing is reentrant, expected non-reentrant: with thoughts its gradients are "
                "wrong. Set `activation_checkpointing_kwargs={'use_reentrant': False}` (transformers' default)."
            )
        if self.own is None:  # the forward; a replay in the backward computes the same and only reads
            self.own = (key_states, value_states)
        if not self.past:
            return key_states, value_states
        keys, values = zip(*self.past, (key_states, value_states), strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self):
        return sum(keys.shape[-2] for keys, _ in self.past)


class PassCache(Cache):
    """
    The cache of one training pass, which activation checkpointing may replay.

    A growing cache would append a second time when the backward pass recomputes a layer. Here each pass gets a cache
    of its own that reads a frozen past, so the replay sees what the forward saw. The joined keys are not kept.
    """

    def __init__(self, num_layers: int, previous: "PassCache | None" = None):
        if previous is None:
            super().__init__(layers=[PassLayer() for _ in range(num_layers)])
        else:
            super().__init__(layers=[PassLayer((*layer.past, layer.own)) for layer in previous.layers])


def join_hidden_states(outputs):
    """Hidden states of all passes, each layer's as (B, T, D)."""
    if len(outputs) == 1 or outputs[0].hidden_states is None:
        return outputs[0].hidden_states
    return tuple(torch.cat(layer, dim=1) for layer in zip(*(output.hidden_states for output in outputs), strict=True))


def join_attentions(outputs):
    """Attentions of all passes as (B, heads, T, T): a pass cannot see later keys, so their weight is 0."""
    if len(outputs) == 1 or not outputs[0].attentions:
        return outputs[0].attentions
    num_keys = outputs[-1].attentions[0].shape[-1]
    return tuple(
        torch.cat([nn.functional.pad(weights, (0, num_keys - weights.shape[-1])) for weights in layer], dim=2)
        for layer in zip(*(output.attentions for output in outputs), strict=True)
    )
