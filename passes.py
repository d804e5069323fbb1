"""Where thoughts may stand, who sees what, and the passes that compute them, with their cache.

Knows a language model that takes embeddings, masks, keys and values; no images, no text, no head.

Shapes: B batch, T tokens, D hidden size.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .compat import attention_of, is_2d
from .configuration_multicoco import (
    CONSTANT_FEEDBACKS,
    END_LATENT_TOKEN,
    LATENT_TOKEN,
    START_LATENT_TOKEN,
    MultiCoCoConfig,
    is_int,
)


ANSWER_SEES = ("all", "no_image", "thoughts_only")
REENTRANT = (
    "Activation checkpointing is reentrant, expected non-reentrant: with thoughts its gradients are wrong. Set "
    "`activation_checkpointing_kwargs={'use_reentrant': False}` (transformers' default)."
)
# A mask function of transformers: `(batch, head, query, key) -> allowed`.
Visible = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# `(thought (B, D), index) -> thought`, see `MultiCoCoForConditionalGeneration.forward`.
EditThoughts = Callable[[torch.Tensor, int], torch.Tensor]


def check_thoughts(
    latent_mask: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_mask: torch.Tensor,
    samples: torch.Tensor | None = None,
) -> None:
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


def packed_samples(
    position_ids: torch.Tensor, attention_mask: torch.Tensor | None, tokens: torch.Tensor
) -> torch.Tensor | None:
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


def holds_tokens(past_key_values: Cache | None) -> TypeGuard[Cache]:
    """Whether there is a cache that has keys already."""
    return past_key_values is not None and int(past_key_values.get_seq_length()) > 0


def has_flash(config: PreTrainedConfig) -> bool:
    """Whether a language model attends by flash attention, which takes no masks; its tower may do otherwise."""
    return "flash" in attention_of(config)


def causal_masks(config: PreTrainedConfig, **arguments: Any) -> Any:
    """The mask of a pass; by kind, if layers of the language model see only a window."""
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return create_causal_mask(config=config, **arguments)
    return {
        "full_attention": create_causal_mask(config=config, **arguments),
        "sliding_attention": create_sliding_window_causal_mask(config=config, **arguments),
    }


def pad_mask(mask: torch.Tensor, length: int) -> torch.Tensor:
    """A mask (B, t) of a prompt as one of the whole sequence (B, T): False for what follows."""
    return nn.functional.pad(mask, (0, max(0, length - mask.shape[1])))


def hidden_from_answer(
    config: MultiCoCoConfig, answer_sees: str, input_ids: torch.Tensor | None, latent_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which positions follow the thoughts, and which ones those may not see; both (B, T). `latent_mask` may be that of
    the prompt alone.

    Raises:
        ValueError: a rule that is not known, or a sample without a thought block.
    """
    if answer_sees not in ANSWER_SEES:
        raise ValueError(f"`answer_sees` must be one of {', '.join(ANSWER_SEES)}, got {answer_sees!r}.")
    if input_ids is None or latent_mask is None:
        raise ValueError(f"`answer_sees={answer_sees!r}` needs `input_ids` of a model with thought tokens.")
    length, prompt = input_ids.shape[1], input_ids[:, : latent_mask.shape[1]]
    block = pad_mask(latent_mask | (prompt == config.start_latent_id), length)
    if not block.any(dim=1).all():
        raise ValueError(
            f"`answer_sees={answer_sees!r}` needs a thought block in every sample, also if it holds no thought: "
            f"write {START_LATENT_TOKEN}{END_LATENT_TOKEN} (`num_thoughts=0`)."
        )
    positions = torch.arange(length, device=input_ids.device)
    after = positions > (positions * block).amax(dim=1, keepdim=True)
    if answer_sees == "no_image":
        return after, pad_mask(prompt == config.image_token_id, length)
    return after, ~after & ~pad_mask(latent_mask, length)


def answer_visibility(
    config: MultiCoCoConfig, answer_sees: str, input_ids: torch.Tensor | None, latent_mask: torch.Tensor | None
) -> Visible:
    """
    The rule of `answer_sees` as a mask function.

    Raises:
        ValueError: as [`hidden_from_answer`], or attention that takes no masks.
    """
    after, hidden = hidden_from_answer(config, answer_sees, input_ids, latent_mask)
    implementation = attention_of(config.text_config)
    if implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"`answer_sees={answer_sees!r}` needs attention masks, which {implementation} does not take. Load the "
            "model with `attn_implementation='sdpa'`."
        )
    last = hidden.shape[1] - 1  # a static cache has keys beyond the prompt
    return lambda batch, head, query, key: ~(after[batch, query] & hidden[batch, key.clamp(max=last)])


def packed_visibility(config: PreTrainedConfig, samples: torch.Tensor, *, has_thoughts: bool) -> Visible | None:
    """
    The rule of packed rows, `samples` (B, T) on their device: samples do not see each other. `None` for flash
    attention, which reads it from the positions.

    Raises:
        ValueError: thoughts, whose passes flash attention cannot keep apart.
    """
    if not has_flash(config):
        return lambda batch, head, query, key: samples[batch, query] == samples[batch, key]
    if has_thoughts:
        raise ValueError(
            "`position_ids` restart, so the rows are packed: thoughts need masks then, which flash attention does not "
            "take. Load the model with `attn_implementation='sdpa'`."
        )
    return None


class PassLayer(DynamicLayer):
    """Keys and values of one layer in one pass: reads those of earlier passes, and only *sets* its own."""

    def __init__(self, past: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()) -> None:
        super().__init__()
        self.past = past  # ((keys, values), ...) of earlier passes, each (B, kv_heads, chunk, head_dim)
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None
        self.has_grad = torch.is_grad_enabled()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The keys and values of all passes up to this one; takes those given as its own the first time.

        Raises:
            ValueError: called by reentrant checkpointing.
        """
        if self.has_grad and not torch.is_grad_enabled():  # ms-swift exchanges the function behind transformers' back
            raise ValueError(REENTRANT)
        if self.own is None:  # the forward; a replay in the backward computes the same and only reads
            self.own = (key_states, value_states)
        if not self.past:
            return key_states, value_states
        keys, values = zip(*self.past, (key_states, value_states), strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        """Tokens of earlier passes."""
        return sum(keys.shape[-2] for keys, _ in self.past)


class PassCache(Cache):
    """
    The cache of one training pass, which activation checkpointing may replay.

    A growing cache would append a second time when the backward pass recomputes a layer. Here each pass gets a cache
    of its own that reads a frozen past, so the replay sees what the forward saw. The joined keys are not kept.
    """

    def __init__(self, num_layers: int, previous: Cache | None = None) -> None:
        if previous is None:
            super().__init__(layers=[PassLayer() for _ in range(num_layers)])
        else:
            layers = cast(list[Any], previous.layers)
            super().__init__(layers=[PassLayer((*layer.past, layer.own)) for layer in layers])


def read_only(cache: Cache) -> Cache:
    """
    A cache that has the keys and values of another and keeps what a pass adds for itself.

    Raises:
        ValueError: a kind of cache of which that is not known.
    """
    if isinstance(cache, PassCache):
        return PassCache(len(cache.layers), previous=cache)
    layers = []
    for layer in cache.layers:
        twin = copy.copy(layer)  # these grow by new tensors
        if type(layer) in (StaticLayer, StaticSlidingWindowLayer):  # these write into their own
            vars(twin).update({name: each.clone() for name, each in vars(layer).items() if torch.is_tensor(each)})
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"`past_key_values` has a {type(layer).__name__}, and with `config.thought_sweeps` the layers of a "
                "cache must be dynamic or static: sweeps must leave nothing in it. Use a `DynamicCache`, or set "
                "`thought_sweeps` to None."
            )
        layers.append(twin)
    reader = copy.copy(cache)
    reader.layers = layers
    return reader


@dataclass
class Plan:
    """All that the host reads of a batch: checked and read before any compute, once."""

    columns: list[int]  # where some row has a thought; the sequence is cut before each, or before the first
    num_sweeps: int | None  # over all thoughts together, see `sweep_thoughts`; `None`: one after another
    numbers: torch.Tensor  # (B, T), on the host: 1 at a row's first thought, 2 at its second, 0 elsewhere; or empty
    num_surplus: int  # passes that other ranks make and this one does not need
    visible: Visible | None  # beside the causal rule
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


def count_sweeps(
    config: MultiCoCoConfig, columns: list[int], numbers: torch.Tensor, samples: torch.Tensor | None
) -> int | None:
    """
    The passes of [`sweep_thoughts`] that a batch takes; `None` for passes in sequence. They are
    `config.thought_sweeps`, or as many as make every thought exact if those are fewer, and one if first thoughts are
    scattered. `columns` and `numbers` are those of the [`Plan`], `samples` those of [`packed_samples`].

    Raises:
        ValueError: packed rows, or a number of sweeps that was set after the configuration was checked.
    """
    if config.thought_sweeps is None or not columns:
        return None
    if not is_int(config.thought_sweeps) or config.thought_sweeps < 1:
        raise ValueError(
            f"`config.thought_sweeps` must be an integer of at least 1, got {config.thought_sweeps!r}. None makes one "
            "pass after another."
        )
    if samples is not None:
        raise ValueError("`config.thought_sweeps` cannot be used with packed rows. Pad instead, or set it to None.")
    if config.thought_feedback in CONSTANT_FEEDBACKS:
        return 0  # what they would compute is not fed, so under ZeRO-3 their backward would be missing on some ranks
    return min(config.thought_sweeps, int(numbers.max()) - 1) + int(_are_scattered(columns, numbers))


def _are_scattered(columns: list[int], numbers: torch.Tensor) -> bool:
    """Whether the first thought of some row stands behind the first column."""
    return any(1 in numbers[:, column].tolist() for column in columns[1:])


@dataclass
class Passes:
    """The language model, with all that the passes of a batch share."""

    language_model: PreTrainedModel
    plan: Plan
    length: int  # of the sequence, T
    numbers: torch.Tensor  # those of the plan, on the device
    thought_feedback: str
    edit_thoughts: EditThoughts | None
    kwargs: dict[str, Any]

    def run(self, chunk: torch.Tensor, start: int, cache: Cache | None) -> Any:
        """The output for the embeddings (B, chunk, D) that stand from column `start` on."""
        plan, config, stop = self.plan, self.language_model.config, start + chunk.shape[1]
        mask: Any = plan.attention_mask
        if is_2d(mask):
            mask = mask[:, : mask.shape[1] - self.length + stop]  # it may begin with keys of an earlier turn
        # transformers asks the device whether a 2D mask has padding, once per pass; a mask made here does not wait.
        makes_mask = plan.visible is not None or (plan.columns and plan.attention_mask is not None)
        if makes_mask and not has_flash(config):
            mask = causal_masks(
                config=config,
                inputs_embeds=chunk,
                attention_mask=mask,
                past_key_values=cache,
                and_mask_function=plan.visible,
                allow_is_causal_skip=False,
            )
        return self.language_model(
            inputs_embeds=chunk,
            attention_mask=mask,
            position_ids=plan.position_ids[:, start:stop] if plan.position_ids is not None else None,
            past_key_values=cache,
            **self.kwargs,
        )

    def feed(self, embeds: torch.Tensor, states: torch.Tensor, start: int) -> torch.Tensor:
        """
        Embeddings (B, t, D), which stand from column `start` on, with thoughts where these belong; each is made of the
        state in its place in `states` (B, t, D), that of the position before.
        """
        numbers = self.numbers[:, start : start + embeds.shape[1]]  # (B, t)
        thoughts = thought_of(states, embeds, self.thought_feedback)
        if self.edit_thoughts is None:
            return torch.where(numbers[..., None] > 0, thoughts, embeds)
        columns = list(embeds.unbind(dim=1))
        for index, column in enumerate(columns):
            for number in sorted(set(self.plan.numbers[:, start + index].tolist()) - {0}):
                thought = self.edit_thoughts(thoughts[:, index], number - 1)
                rows = numbers[:, index, None] == number  # (B, 1)
                columns[index] = column = torch.where(rows, thought, column)
        return torch.stack(columns, dim=1)


def run_passes(
    language_model: PreTrainedModel,
    inputs_embeds: torch.Tensor,
    plan: Plan,
    thought_feedback: str,
    past_key_values: Cache | None,
    *,
    use_cache: bool,
    edit_thoughts: EditThoughts | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor], list[Any]]:
    """
    Coconut. Returns the last hidden states (B, T, D), the thoughts (B, num_thoughts, D), and of each pass, but for
    sweeps, the embeddings that were fed (B, chunk, D) and the output.
    """
    columns, length = plan.columns, inputs_embeds.shape[1]
    num_thoughts = int(plan.numbers.max()) if columns else 0
    numbers = plan.numbers.to(inputs_embeds.device, non_blocking=True) if columns else plan.numbers
    kwargs["use_cache"] = use_cache
    passes = Passes(language_model, plan, length, numbers, thought_feedback, edit_thoughts, kwargs)
    if columns and use_cache and past_key_values is None:
        past_key_values = DynamicCache(config=language_model.config)
    cuts = columns if plan.num_sweeps is None else columns[:1]

    cache = past_key_values
    fed: list[torch.Tensor] = []
    chunks: list[torch.Tensor] = []
    outputs: list[Any] = []
    states: list[torch.Tensor] = []
    for start, stop in zip([0, *cuts], [*cuts, length], strict=True):
        chunk = inputs_embeds[:, start:stop]  # (B, stop - start, D)
        if start > 0:
            state = states[-1][:, -1:].to(chunk.device)  # (B, 1, D); layers may be on other devices
            if plan.num_sweeps is None:
                fed.append(passes.feed(chunk[:, :1], state, start))
            else:
                fed.append(sweep_thoughts(passes, chunk, state, cast(Cache, cache)))
            chunk = torch.cat([fed[-1], chunk[:, fed[-1].shape[1] :]], dim=1)
        if columns and past_key_values is None:
            cache = PassCache(len(cast(nn.ModuleList, language_model.layers)), previous=cache)
        output = passes.run(chunk, start, cache)
        chunks.append(chunk)
        outputs.append(output)
        states.append(output.last_hidden_state)
    hidden_states = torch.cat(states, dim=1) if columns else states[0]  # (B, T, D)
    for _ in range(plan.num_surplus):
        surplus = language_model(inputs_embeds=inputs_embeds[:1, :1], use_cache=False).last_hidden_state
        hidden_states = hidden_states + 0.0 * surplus.sum()
    thoughts = None
    if columns:
        places = columns if plan.num_sweeps is None else slice(columns[0], columns[-1] + 1)
        numbers = plan.numbers[:, places].to(inputs_embeds.device, non_blocking=True)
        thoughts = gather_thoughts(torch.cat(fed, dim=1), numbers, num_thoughts)
    return hidden_states, thoughts, chunks, outputs


def sweep_thoughts(passes: Passes, chunk: torch.Tensor, state: torch.Tensor, prefix: Cache) -> torch.Tensor:
    """
    Parallel thoughts (PCCoT, arXiv 2506.18582). All columns from the first thought to the last run together, sweep
    after sweep. The first sweep is fed each row's first thought and then embeddings of `<|latent|>`; each later one
    the states of the sweep before, moved by one place. What stands between thoughts keeps its embedding.

    What follows from exact thoughts alone is exact: after t sweeps, the first t + 1 thoughts of every row.

    Args:
        passes ([`Passes`]): Of the batch.
        chunk (`torch.Tensor` of shape `(B, chunk, D)`): Embeddings from the first thought on.
        state (`torch.Tensor` of shape `(B, 1, D)`): That of the column before.
        prefix ([`~transformers.Cache`]): Keys and values of all before; stays as it is.

    Returns:
        `torch.Tensor` of shape `(B, t, D)`: What is to be fed from the first thought to the last.
    """
    plan = passes.plan
    first, last = plan.columns[0], plan.columns[-1]
    embeds = chunk[:, : last + 1 - first]  # (B, t, D)
    latents = embeds[:, 1:]  # (B, t - 1, D); any feedback makes an embedding of itself
    fed = passes.feed(embeds, torch.cat([state, latents], dim=1), first)
    finds_firsts = _are_scattered(plan.columns, plan.numbers)
    for sweep in range(plan.num_sweeps or 0):
        states = passes.run(fed[:, :-1], first, read_only(prefix)).last_hidden_state.to(embeds.device)
        if finds_firsts and sweep == 0:  # else a row would think otherwise beside others than alone
            is_first = passes.numbers[:, first + 1 : last + 1, None] == 1  # (B, t - 1, 1)
            states = torch.where(is_first, states, latents)
        fed = passes.feed(embeds, torch.cat([state, states], dim=1), first)
    return fed


def gather_thoughts(fed: torch.Tensor, numbers: torch.Tensor, num_thoughts: int) -> torch.Tensor:
    """
    The thoughts (B, num_thoughts, D) of each row in their order, then zeros, of what was fed (B, t, D) at columns in
    which `numbers` (B, t), as in the [`Plan`] but on the device, tells them apart.
    """
    order = (numbers == 0).long().argsort(dim=1, stable=True)[:, :num_thoughts]  # (B, num_thoughts), thoughts first
    thoughts = fed.gather(1, order[..., None].expand(-1, -1, fed.shape[-1]))
    return torch.where(numbers.gather(1, order)[..., None] > 0, thoughts, 0.0)


def thought_of(state: torch.Tensor, latent: torch.Tensor, thought_feedback: str) -> torch.Tensor:
    """
    The thoughts (..., D) that states (..., D) become where the embeddings `latent` (..., D) stand; for
    `thought_feedback` see [`MultiCoCoConfig`].
    """
    match thought_feedback:
        case "identity":
            return state
        case "rms_match":
            # Not the mean norm of all embeddings: under ZeRO-3 no rank has them, and this one can be learned.
            norm = state.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(state.dtype).tiny)
            return state * (latent.norm(dim=-1, keepdim=True) / norm)
        case "latent" | "latent_one_pass":
            return latent
    raise ValueError(
        f"`thought_feedback` {thought_feedback!r} has no rule. Write it here, beside its name in `FEEDBACKS`."
    )


def join_hidden_states(outputs: Sequence[Any]) -> Any:
    """Hidden states of all passes, each layer's as (B, T, D)."""
    if len(outputs) == 1 or outputs[0].hidden_states is None:
        return outputs[0].hidden_states
    return tuple(torch.cat(layer, dim=1) for layer in zip(*(output.hidden_states for output in outputs), strict=True))


def join_attentions(outputs: Sequence[Any]) -> Any:
    """Attentions of all passes as (B, heads, T, T): a pass cannot see later keys, so their weight is 0."""
    if len(outputs) == 1 or not outputs[0].attentions:
        return outputs[0].attentions
    num_keys = outputs[-1].attentions[0].shape[-1]
    return tuple(
        torch.cat([nn.functional.pad(weights, (0, num_keys - weights.shape[-1])) for weights in layer], dim=2)
        for layer in zip(*(output.attentions for output in outputs), strict=True)
    )
