"""What a training step needs in memory, from shapes alone: no weight is made and no file but `config.json` is read."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..configuration_multicoco import MultiCoCoConfig
from ..data_multicoco import StageDataset
from ..modeling_multicoco import MultiCoCoForConditionalGeneration


MAX_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of `stage3_max_live_parameters` and `stage3_max_reuse_distance`
SUB_GROUP = 10**9  # DeepSpeed's default of `sub_group_size`: parameters that ZeRO-3 updates at a time
PARTS = ("weights", "gradients", "optimizer", "casts", "vision", "language", "key_values", "logits", "pending")
PARTS += ("working", "buffers")


@dataclass
class BatchShape:
    """
    Shape of one micro batch on one device. All numbers but the first are per sample, padding included.

    Args:
        samples (`int`): Samples.
        tiles (`int`): Image tiles.
        text_tokens (`int`): Tokens of the prompt that are neither visual nor latent; the two markers count here.
        label_tokens (`int`): Tokens after the thoughts: written steps, answer, end of turn.
        thoughts (`int`): Latent tokens.
        padded (`bool`, defaults to `False`): Whether any sample is shorter than the others, so that masks are made.
    """

    samples: int
    tiles: int
    text_tokens: int
    label_tokens: int
    thoughts: int
    padded: bool = False

    def __post_init__(self):
        for name, least in (("samples", 1), ("tiles", 0), ("text_tokens", 1), ("label_tokens", 1), ("thoughts", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` is {value!r}, expected an integer of at least {least}. Correct the shape.")


@dataclass
class MemoryEstimate:
    """
    Bytes on one device. The parts are what each kind needs at its own largest moment; `peak` is the most that is alive
    at once, which is less than their sum when activations go while gradients come.
    """

    weights: int
    gradients: int
    optimizer: int  # moments of AdamW, and DeepSpeed's float32 copies of the weights
    casts: int  # bfloat16 copies of weights that autocast makes
    vision: int  # activations of tower and projector
    language: int  # activations of the language model
    key_values: int  # keys and values that passes leave to later passes, their gradients, and the joined ones
    logits: int  # at label positions
    pending: int  # gradients that wait in autograd for earlier passes, beside `gradients`
    working: int  # of the layer that is at work: its recomputed activations, gradients of activations
    buffers: int  # of DistributedDataParallel or DeepSpeed: buckets, gathered weights
    peak: int
    host: int = 0  # in the memory of the host, with offload
    num_parameters: int = 0  # of the model, without adapters
    num_trainable: int = 0

    @property
    def total(self) -> int:
        """Sum of the parts: an upper bound of `peak`, reached when gradients of earlier micro batches are kept."""
        return sum(getattr(self, name) for name in PARTS)


@dataclass
class _Segment:
    """A stretch of the forward: what it leaves for the backward, and which weights get their gradient there."""

    part: str
    saved: int
    working: int = 0
    group: str | None = None
    gradient: int = 0  # of `group`, which exists from the last segment of the group on (backward runs in reverse)
    cast: int = 0  # copies of the weights, released with the saved tensors
    key_values: int = 0  # its part of `saved`
    passed_on: int = 0  # gradients of its keys and values, which later passes make and it uses


def estimate_memory(
    config: MultiCoCoConfig,
    batch: BatchShape,
    bf16: bool = False,
    zero_stage: int | None = None,
    offload: bool = False,
    num_devices: int = 1,
    activation_checkpointing: bool = False,
    accumulate: bool = False,
    lora_rank: int = 0,
    freeze_backbone: bool = False,
    freeze_llm: bool = False,
    freeze_mlp: bool = False,
) -> MemoryEstimate:
    r"""
    Memory of one training step of `train.py`, on each device.

    The formula, in bytes. `w`: a weight. `s`: an element of the residual stream and of what norms return. `a`: an
    element that a matrix product takes or returns. `f(k)`: copies of the input of `k` products, `k` under autocast
    (each product casts for itself), else 1.

    | run | w | s | a | gradient | AdamW |
    | --- | --- | --- | --- | --- | --- |
    | float32 | 4 | 4 | 4 | 4 | 8: two moments |
    | `--bf16` without DeepSpeed (float32 weights, autocast) | 4 | 4 | 2 | 4 | 8 |
    | `--bf16` with DeepSpeed | 2 | 2 | 2 | 2 | 12: two moments, float32 weight |
    | DeepSpeed without `--bf16` | 4 | 4 | 4 | 4 | 12 |

    **Weights, gradients, optimizer.** `P` parameters, `Q` of them trained, `N` devices: weights `w P`, over `N` in
    ZeRO-3; gradients of `Q`, over `N` in ZeRO-2 and 3; optimizer of `Q`, over `N` in ZeRO-1, 2 and 3. With LoRA of
    rank `r`, `Q` is `r (in + out)` for each of the seven products of a layer and copies of embeddings and head
    (`modules_to_save`); both are added to `P`. Offload: all of these lie in the memory of the host, `w P / N` and 16
    for each of `Q / N` (moments, float32 weight and gradient).

    **Pending gradients.** With thoughts, a weight of the language model is used in every pass, and autograd hands its
    gradient over only when the backward of the first, longest pass has reached its layer. Until then it is whole, `w`
    (2 under autocast) for each trained weight of the layers, on every device, *also in ZeRO-2, ZeRO-3 and offload*,
    which cannot cut what they have not been given. Without ZeRO it becomes the gradient itself and counts once,
    unless gradients of an earlier micro batch are kept.

    **Casts.** Autocast: 2 for each weight of a product. Cached and shared by the passes if it is trained; a frozen one
    is cast in every pass, and each copy is kept for the backward. With checkpointing only one forward holds them.

    **Saved for the backward**, as `tests/test_memory.py` counts it by `saved_tensors_hooks`. A tower layer, for each
    patch (width `D`, MLP `I`, heads `H`):

        2 (s D + 8)                 inputs of the two layer norms, their means and deviations
                                    (RMS norm, 6B: 2 ((4 + s) D + 4) as below, and for query and key 2 ((4 + a) D + 4))
        a D (f(3) + 1)              inputs of query, key, value; of fc1
        4 a D + 4 H                 query, key, value, result; log-sum-exp of each head
        2 a I + 2 a D               before and after the activation; products before the two layer scales

    A language layer, for each token of a pass of `c` tokens per sample that sees `S` keys (query width `A`, key width
    `K`, heads `H`):

        2 ((4 + s) D + 4)           float32 inputs of the two norms, normalised states, inverse deviations
        a D (f(3) + f(2))           inputs of query, key, value; of gate, up
        2 a A + 4 H                 query, result; log-sum-exp
        2 a K S / c                 keys and values, also the past ones that were joined. `A` in place of `K` where a
                                    mask is given and c > 1: grouped heads are then repeated
        a S                         the mask as numbers, where one is given
        4 a I                       gate, its activation, up, their product

    A frozen language model saves no `s D`, `a D f` and only 3 of the `4 a I`; a frozen tower saves nothing. LoRA adds
    `a r` for each product. Outside the layers: pixels `a`, cosines and sines `2 s` of the head's width and the final
    norm `(4 + s) D + 4` for each token; for each visual token the projector's `4 D s + 8 + 4 D a + 2 a D_text`.

    A mask is given with padding in the batch, and to the pass behind the last thought. Passes also hold their own keys
    and values, `(s + a) K` for each token, unless these are the saved ones (first pass, no mask, no autocast). Their
    gradients, as much, wait from the last pass to the first.

    **Activation checkpointing.** Each layer keeps its input, `s D`; keys and values of a pass stay. One layer at a
    time has all of the above again (`working`).

    **Logits**, `L` labels, vocabulary `V`: `12 V L` in the backward (log-probabilities, their gradient, that of the
    logits, all float32), and the input of the head, `a D L`.

    **Working**: in the backward of the MLP of a layer, gradients of `2 I + 2 D` (language) or `I + 2 D` (tower) for
    each token beyond what it releases; with passes also one weight gradient that is about to be added.

    **Buffers**: DistributedDataParallel keeps its buckets, as large as the gradients. ZeRO: a bucket of `D_text^2`
    gradients, and the largest single gradient if that is larger; ZeRO-3 also gathered weights: at most 10^9
    (`stage3_max_live_parameters`) and at least the largest one.

    **Peak**: the backward is walked in reverse; gradients come when the last pass of their layer is walked (so with
    thoughts all of the language model's are there before the activations of the long first pass go), saved tensors
    go. The update comes after it: no activations, but the gradient in float32 for DeepSpeed's partition (ZeRO-1 and
    2: and a flat copy; ZeRO-3: at most 10^9 parameters at a time).

    Not in it: the CUDA context and libraries (about 1 GB), fragmentation of the allocator, buffers of NCCL.

    Args:
        config ([`MultiCoCoConfig`]): The model.
        batch ([`BatchShape`]): The micro batch of one device.
        bf16 (`bool`, defaults to `False`): `--bf16`.
        zero_stage (`int`, *optional*): DeepSpeed's ZeRO stage, 1 to 3; `None` without DeepSpeed.
        offload (`bool`, defaults to `False`): Weights, gradients and optimizer on the host (`zero3_offload.json`).
        num_devices (`int`, defaults to 1): Devices of the run.
        activation_checkpointing (`bool`, defaults to `False`): `--activation_checkpointing`.
        accumulate (`bool`, defaults to `False`): More than one micro batch per update.
        lora_rank (`int`, defaults to 0): `--lora_rank`.
        freeze_backbone, freeze_llm, freeze_mlp (`bool`, defaults to `False`): The flags of these names.

    Raises:
        ValueError: a setting out of range, or a language model other than Qwen2, Qwen3 or Llama.

    Example:

    ```python
    >>> from multicoco import MultiCoCoConfig
    >>> from multicoco.training.memory import BatchShape, estimate_memory

    >>> config = MultiCoCoConfig.from_pretrained("OpenGVLab/InternVL3-1B")  # doctest: +SKIP
    >>> batch = BatchShape(samples=1, tiles=13, text_tokens=300, label_tokens=60, thoughts=6)
    >>> estimate_memory(config, batch, bf16=True, zero_stage=2).peak / 2**30  # doctest: +SKIP
    ```"""
    text, vision = config.text_config, config.vision_config
    if zero_stage not in (None, 1, 2, 3):
        raise ValueError(f"`zero_stage` is {zero_stage!r}, expected 1, 2 or 3, or None without DeepSpeed.")
    if offload and zero_stage != 3:
        raise ValueError(f"`offload` needs `zero_stage` 3, got {zero_stage}. Use ds_configs/zero3_offload.json.")
    for name, value, least in (("num_devices", num_devices, 1), ("lora_rank", lora_rank, 0)):
        if value < least:
            raise ValueError(f"`{name}` is {value}, expected at least {least}.")
    if text.model_type not in ("qwen2", "qwen3", "llama"):
        raise ValueError(
            f"`text_config.model_type` is {text.model_type!r}, but the formula knows what layers of qwen2, qwen3 and "
            "llama keep. Leave out the estimate."
        )
    if lora_rank:
        freeze_backbone = freeze_mlp = True
    autocast = bf16 and zero_stage is None
    weight = 2 if bf16 and zero_stage else 4
    stream, act = weight, 2 if bf16 else 4

    # Parameters.
    with torch.device("meta"):
        model = MultiCoCoForConditionalGeneration(config)
    tower, projector, decoder = model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model
    layer, vision_layer = _count(decoder.layers[0]), _count(tower.encoder.layer[0])
    patching = _count(tower) - vision_layer * vision.num_hidden_layers
    embedding = _count(decoder.embed_tokens)
    head = 0 if config.tie_word_embeddings else _count(model.lm_head)
    num_parameters = _count(decoder) + head + _count(tower) + _count(projector)
    adapters = sum(
        lora_rank * (part.in_features + part.out_features)
        for part in decoder.layers[0].modules()
        if isinstance(part, nn.Linear)
    )
    num_layers = text.num_hidden_layers
    trained = {
        "patching": 0 if freeze_backbone else patching,
        "vision_layer": 0 if freeze_backbone else vision_layer,
        "projector": 0 if freeze_mlp else _count(projector),
        "layer": adapters if lora_rank else 0 if freeze_llm else layer,
        "embedding": embedding if lora_rank or not freeze_llm else 0,
        "norm": 0 if lora_rank or freeze_llm else _count(decoder.norm),
        "head": head if lora_rank or not freeze_llm else 0,
    }
    num_trainable = sum(trained.values())
    num_trainable += trained["layer"] * (num_layers - 1) + trained["vision_layer"] * (vision.num_hidden_layers - 1)
    num_all = num_parameters + (num_trainable if lora_rank else 0)
    if not num_trainable:
        raise ValueError("All parts are frozen, so nothing is trained. Leave out one of the `freeze_` flags.")
    partition = -(-num_trainable // num_devices)
    weights = weight * num_all // (num_devices if zero_stage == 3 else 1)
    gradients = weight * (partition if zero_stage in (2, 3) else num_trainable)
    optimizer = (12 if zero_stage else 8) * (partition if zero_stage else num_trainable)

    # What a forward leaves.
    llm_trained, llm_products = not (freeze_llm or lora_rank), not freeze_llm or lora_rank > 0
    tower_grad, features_grad = not freeze_backbone, not (freeze_backbone and freeze_mlp)
    width, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    query, key = heads * head_dim, text.num_key_value_heads * head_dim
    embeds_grad = bool(trained["embedding"]) or features_grad
    visual = batch.tiles * config.num_image_token
    length = visual + batch.text_tokens + batch.thoughts + batch.label_tokens
    chunks = [length]
    if batch.thoughts and config.thought_feedback != "latent_one_pass":
        chunks = [visual + batch.text_tokens, *[1] * (batch.thoughts - 1), 1 + batch.label_tokens]
    num_passes = len(chunks)

    per_norm = 4 * width + 4 + (stream * width if llm_trained else 0)
    per_token = 2 * per_norm + _token_bytes(text, act, autocast, llm_trained, llm_products) + 7 * act * lora_rank
    layer_cast = 2 * _products(decoder.layers[0]) if autocast else 0
    adapter_cast = 2 * adapters if autocast else 0

    segments, patches = [], batch.samples * batch.tiles * (tower.embeddings.patch_embeddings.num_patches + 1)
    vision_width, vision_inner = vision.hidden_size, vision.intermediate_size
    per_patch = _patch_bytes(vision, stream, act, autocast)
    vision_input, vision_layer_saved = stream * vision_width * patches, per_patch * patches
    vision_work = act * (vision_inner + 2 * vision_width) * patches
    pixels = batch.samples * batch.tiles * vision.num_channels * vision.image_size[0] * vision.image_size[1]
    vision_cast = 2 * _products(tower.encoder.layer[0]) if autocast else 0
    if batch.tiles:
        if tower_grad:
            saved = vision_input if activation_checkpointing else vision_layer_saved
            work = vision_work + (vision_layer_saved + vision_cast if activation_checkpointing else 0)
            cast = 0 if activation_checkpointing else vision_cast
            segments.append(
                _Segment("vision", act * pixels * (act < 4), vision_input, "patching", trained["patching"])
            )
            for index in range(vision.num_hidden_layers):
                group = f"vision{index}"
                segments.append(_Segment("vision", saved, work, group, trained["vision_layer"], cast))
        else:
            segments.append(_Segment("vision", 0, vision_work + 2 * vision_input + vision_cast))
        joined = int(vision_width / config.downsample_ratio**2)
        saved = batch.samples * visual * (stream * joined + 8 + 2 * act * width + act * joined) * features_grad
        work = batch.samples * visual * stream * 2 * joined
        cast = 2 * _products(projector) if autocast and features_grad else 0
        segments.append(_Segment("vision", saved, work, "projector", trained["projector"], cast))
    embeds = batch.samples * length * stream * width
    segments.append(_Segment("language", 0, embeds, "embedding", trained["embedding"]))
    past = 0
    for number, chunk in enumerate(chunks):
        seen, tokens = past + chunk, batch.samples * chunk
        masked = batch.padded or (number > 0 and chunk > 1)
        keys = batch.samples * 2 * act * seen * (query if masked and chunk > 1 else key)
        keys += batch.samples * act * chunk * seen if masked else 0
        own = tokens * (stream + act) * key if num_passes > 1 else 0
        if number == 0 and not masked and not activation_checkpointing:
            own = tokens * stream * key if autocast and own else 0  # otherwise they are the saved ones
        full = tokens * per_token + keys
        has_grad = embeds_grad or llm_products or number > 0
        work = act * (2 * inner + 2 * width) * tokens + (max(weight, act) * width * inner if num_passes > 1 else 0)
        if activation_checkpointing:
            saved, work = tokens * stream * width + own, work + full + layer_cast + adapter_cast
            cast, keys_part = 0, own
        else:
            saved, keys_part = full + own, own + (keys if num_passes > 1 else 0)
            cast = layer_cast if number == 0 or not llm_trained else 0
            cast += adapter_cast if number == 0 else 0
        passed_on = tokens * (stream + act) * key if num_passes > 1 and number == 0 else 0
        if not has_grad:
            saved = cast = keys_part = 0
        for index in range(num_layers):
            group = f"layer{index}"
            segments.append(
                _Segment("language", saved, work, group, trained["layer"], cast, keys_part, passed_on=passed_on)
            )
        segments.append(_Segment("language", tokens * (per_norm + 2 * stream * head_dim), 0, "norm", trained["norm"]))
        past = seen
    labels = batch.samples * batch.label_tokens
    logits = labels * (12 * text.vocab_size + act * width)
    cast = 2 * _products(model.lm_head) if autocast else 0
    segments.append(_Segment("logits", logits, 2 * embeds, "head", trained["head"], cast))

    # Buffers of the wrappers.
    biggest = max(part.numel() for part in model.parameters())
    buffers = host = 0
    if zero_stage is None:
        buffers = weight * num_trainable if num_devices > 1 else 0
    else:
        buffers = weight * max(width**2, biggest if trained["embedding"] and zero_stage > 1 else 0)
    if zero_stage == 3:
        buffers += weight * max(min(num_all, MAX_LIVE_PARAMETERS), biggest)

    update = gradients
    if zero_stage:
        update += weight * partition if zero_stage < 3 else 0
        update += 4 * (partition if zero_stage < 3 else min(partition, SUB_GROUP))
    if offload:
        host = weight * num_all // num_devices + 16 * partition
        weights = gradients = optimizer = update = 0
    # A gradient that passes share is complete, and leaves autograd, only when the first pass has been walked.
    pending_rate = 0 if num_passes == 1 else 2 if autocast else weight
    moved = not (accumulate or autocast or zero_stage in (2, 3))  # what was pending becomes the gradient as it is
    step = _walk(segments, 0 if accumulate else gradients / num_trainable, pending_rate, moved)
    step += gradients if accumulate else 0
    pending = 0 if moved else pending_rate * (trained["layer"] * num_layers + trained["norm"])
    casts = sum(segment.cast for segment in segments)
    if autocast and activation_checkpointing:  # autocast keeps its copies until the forward ends
        cached = [(tower, tower_grad), (projector, not freeze_mlp), (decoder, llm_trained), (model.lm_head, True)]
        casts = sum(2 * _products(module) for module, is_trained in cached if is_trained)
        step = max(step, sum(segment.saved for segment in segments) + casts)
    passed_on = sum(segment.passed_on for segment in segments)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        casts=casts,
        vision=sum(segment.saved for segment in segments if segment.part == "vision"),
        language=sum(segment.saved - segment.key_values for segment in segments if segment.part == "language"),
        key_values=sum(segment.key_values for segment in segments) + passed_on,
        logits=logits,
        pending=pending,
        working=max(segment.working for segment in segments),
        buffers=buffers,
        peak=weights + optimizer + buffers + max(step, update),
        host=host,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
    )


def _patch_bytes(vision, stream: int, act: int, autocast: bool) -> int:
    """What a layer of the tower saves for each patch."""
    width, copies = vision.hidden_size, 3 if autocast else 1
    norms = 2 * ((4 + stream) * width + 4 if vision.norm_type == "rms_norm" else stream * width + 8)
    attention = act * width * (copies + 4) + 4 * vision.num_attention_heads
    attention += 2 * ((4 + act) * width + 4) if vision.use_qk_norm else 0
    mlp = act * width + 2 * act * vision.intermediate_size
    return norms + attention + mlp + 2 * act * width


def _token_bytes(text, act: int, autocast: bool, norms_trained: bool, products_trained: bool) -> int:
    """What a layer of the language model saves for each token, beside its two norms, keys, values and masks."""
    width, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or width // heads
    saved = 2 * act * heads * head_dim + 4 * heads + (4 if products_trained else 3) * act * text.intermediate_size
    if products_trained:
        saved += act * width * (3 + 2 if autocast else 2)
    if text.model_type == "qwen3":  # norms of query and key
        num_normed = heads + text.num_key_value_heads
        saved += ((4 + (act if norms_trained else 0)) * head_dim + 4) * num_normed
    return saved


def worst_batches(dataset: StageDataset, batch_size: int) -> list[BatchShape]:
    """
    For each stage the shape of the batch of the `batch_size` longest records, padded as the collator does; where
    stages are mixed, with the most thoughts and the most labels that a record may be drawn with.
    """
    curriculum, rows = dataset.curriculum, dataset.tokenized
    markers = 2 if curriculum.has_block else 0
    batches = []
    for stage in range(curriculum.last_stage + 1):
        lengths = []
        for row in rows:
            thoughts, labels = [], []
            for steps in row.rationales:  # one of these is drawn
                drawn = [stage]
                if curriculum.mix != "none" and curriculum.last_stage:
                    drawn += range((len(steps) if curriculum.mix == "uniform" else stage) + 1)
                for each in drawn:
                    num_thoughts, num_gone = curriculum.counts(len(steps), each)
                    thoughts.append(num_thoughts)
                    labels.append(sum(map(len, steps[num_gone:])) + len(row.answer))
            text = len(row.question) - len(row.num_patches_list) + markers
            lengths.append((sum(row.num_patches_list), text, max(labels), max(thoughts)))
        visual = dataset.num_image_token
        lengths.sort(key=lambda length: length[0] * visual + sum(length[1:]), reverse=True)
        longest = lengths[:batch_size]
        tiles = math.ceil(sum(length[0] for length in longest) / len(longest))
        batches.append(
            BatchShape(
                samples=batch_size,
                tiles=tiles,
                text_tokens=max(1, max(length[0] * visual + length[1] for length in longest) - tiles * visual),
                label_tokens=max(length[2] for length in longest),
                thoughts=max(length[3] for length in longest),
                padded=batch_size > 1,
            )
        )
    return batches


def _walk(segments: list[_Segment], rate: float, pending_rate: int, moved: bool) -> int:
    """
    The most that activations and gradients take together in the backward. `rate` is bytes per gradient that is kept
    from this backward on, `pending_rate` per gradient that still waits for earlier passes.
    """
    first, last = {}, {}
    for index, segment in enumerate(segments):
        first.setdefault(segment.group, index)
        last[segment.group] = index
    alive = sum(segment.saved + segment.cast for segment in segments)
    peak = 0
    for index, segment in reversed(list(enumerate(segments))):
        is_first, is_last = first[segment.group] == index, last[segment.group] == index
        pending = 0 if is_first and is_last else pending_rate * segment.gradient
        if is_last:
            alive += pending + segments[first[segment.group]].passed_on
        if is_first:
            alive += rate * segment.gradient - (pending if moved else 0)
        peak = max(peak, alive + segment.working)
        alive -= segment.saved + segment.cast
        if is_first:
            alive -= segment.passed_on + (0 if moved else pending)
    return int(peak)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _products(module: nn.Module) -> int:
    """Weights of the matrix products and convolutions in a module: what autocast copies."""
    parts = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    return sum(part.weight.numel() for part in parts)
