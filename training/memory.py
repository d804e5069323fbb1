"""What a training step needs in memory, from shapes alone: no weight is made and no file but `config.json` is read.

The formula stands term by term in docs/memory.md. Here are its four ideas: what the weights are (`_Weights`), what a
forward leaves for the backward (`_segments`), what the wrappers buffer (`_buffers`), and the peak (`_peak`). This
file knows no Trainer and measures nothing; `benchmarks/memory.py` does.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..configuration_multicoco import CONSTANT_FEEDBACKS, MultiCoCoConfig
from ..curriculum import CurriculumArguments
from ..data_multicoco import RecordShape, StageDataset
from ..modeling_multicoco import MultiCoCoForConditionalGeneration


MAX_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of `stage3_max_live_parameters` and `stage3_max_reuse_distance`
SUB_GROUP = 10**9  # DeepSpeed's default of `sub_group_size`: parameters that ZeRO-3 updates at a time
PARTS = tuple("weights gradients optimizer casts vision language key_values logits pending working buffers".split())


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
        step_tokens (`int`, defaults to 0): With a step loss, thoughts and texts of all groups, as they are fed.
        step_labels (`int`, defaults to 0): Tokens of these texts.
    """

    samples: int
    tiles: int
    text_tokens: int
    label_tokens: int
    thoughts: int
    padded: bool = False
    step_tokens: int = 0
    step_labels: int = 0

    def __post_init__(self):
        least_of = {"samples": 1, "text_tokens": 1, "label_tokens": 1}
        for name in ("samples", "tiles", "text_tokens", "label_tokens", "thoughts", "step_tokens", "step_labels"):
            least = least_of.get(name, 0)
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


@dataclass(kw_only=True)
class _Run:
    """The flags of a run, checked, and what follows from them alone: bytes of an element, what is trained."""

    bf16: bool
    zero_stage: int | None
    offload: bool
    num_devices: int
    activation_checkpointing: bool
    accumulate: bool
    lora_rank: int
    tower_trained: bool
    decoder_trained: bool  # of the language model, beside adapters
    projector_trained: bool

    def __post_init__(self):
        if self.zero_stage not in (None, 1, 2, 3):
            raise ValueError(f"`zero_stage` is {self.zero_stage!r}, expected 1, 2 or 3, or None without DeepSpeed.")
        if self.offload and self.zero_stage != 3:
            raise ValueError(
                f"`offload` needs `zero_stage` 3, got {self.zero_stage}. Use ds_configs/zero3_offload.json."
            )
        for name, least in (("num_devices", 1), ("lora_rank", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least {least}.")
        self.autocast = self.bf16 and self.zero_stage is None
        self.weight = 2 if self.bf16 and self.zero_stage else 4  # bytes: `w`, `s` and the gradient of the formula
        self.act = 2 if self.bf16 else 4  # bytes: `a`, and a gradient that autograd still holds
        self.decoder_learns = self.decoder_trained or self.lora_rank > 0
        # Whether a gradient that waited for earlier passes is kept as it is: neither added, cast nor cut.
        self.hands_over = not (self.accumulate or self.autocast or self.zero_stage in (2, 3))

    def cast(self, num_weights: int) -> int:
        """Bytes of the copies that autocast makes."""
        return 2 * num_weights if self.autocast else 0


def estimate_memory(
    config: MultiCoCoConfig,
    batch: BatchShape,
    *,
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
    Memory of one training step of `train.py`, on each device, by the formula of docs/memory.md.

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
    run = _Run(
        bf16=bf16,
        zero_stage=zero_stage,
        offload=offload,
        num_devices=num_devices,
        activation_checkpointing=activation_checkpointing,
        accumulate=accumulate,
        lora_rank=lora_rank,
        tower_trained=not (freeze_backbone or lora_rank),
        decoder_trained=not (freeze_llm or lora_rank),
        projector_trained=not (freeze_mlp or lora_rank),
    )
    if config.text_config.model_type not in ("qwen2", "qwen3", "llama"):
        raise ValueError(
            f"`text_config.model_type` is {config.text_config.model_type!r}, but the formula knows what layers of "
            "qwen2, qwen3 and llama keep. Leave out the estimate."
        )
    return _estimate(config, batch, run)


def _estimate(config: MultiCoCoConfig, batch: BatchShape, run: _Run) -> MemoryEstimate:
    weights, chunks = _Weights(config, run), _chunks(config, batch)
    segments = _segments(config, batch, chunks, run, weights)
    buffers = _buffers(config.text_config.hidden_size, run, weights)
    casts = sum(segment.cast for segment in segments)
    if run.activation_checkpointing:  # layers keep none, but autocast does until the forward ends
        casts = weights.cached_casts(run)
    layer, norm = weights.parts["layer"], weights.parts["norm"]
    shared = layer.trained * layer.count + norm.trained if len(chunks) > 1 or batch.step_tokens else 0
    kept = dict.fromkeys(("vision", "language", "logits"), 0)
    for segment in segments:
        kept[segment.part] += segment.saved - segment.key_values
    return MemoryEstimate(
        **kept,
        weights=weights.weights,
        gradients=weights.gradients,
        optimizer=weights.optimizer,
        casts=casts,
        key_values=sum(segment.key_values + segment.passed_on for segment in segments),
        pending=0 if run.hands_over else run.act * shared,
        working=max(segment.working for segment in segments),
        buffers=buffers,
        peak=weights.weights + weights.optimizer + buffers + _peak(segments, casts, run, weights),
        host=weights.host,
        num_parameters=weights.num_parameters,
        num_trainable=weights.num_trainable,
    )


_Row = tuple[int, int, int, int, int, int, int]  # what `_longest` returns


def worst_batches(dataset: StageDataset, batch_size: int) -> list[BatchShape]:
    """
    For each stage the shape of the batch of the `batch_size` longest records, padded as the collator does; where
    stages are mixed, with the most thoughts and the most labels that a record may be drawn with.

    Args:
        dataset ([`StageDataset`]): The training data.
        batch_size (`int`): Samples of a micro batch.
    """
    visual, stages = dataset.num_image_token, range(dataset.curriculum.last_stage + 1)
    longest: list[list[_Row]] = [[] for _ in stages]  # of each stage, the longest so far
    for shape in dataset.shapes():
        for stage, rows in zip(stages, longest, strict=True):
            rows.append(_longest(shape, stage, dataset.curriculum))
            if len(rows) > 2 * batch_size:
                rows[:] = _first(rows, batch_size, visual)
    batches = []
    for rows in longest:
        tiles, texts, labels, thoughts, groups, lengths, step_labels = zip(
            *_first(rows, batch_size, visual), strict=True
        )
        step_tokens = max(groups) * (dataset.curriculum.c_thought + max(lengths) - 1)
        mean = math.ceil(sum(tiles) / len(tiles))
        prompt = max(count * visual + text for count, text in zip(tiles, texts, strict=True))
        batches.append(
            BatchShape(
                samples=batch_size,
                tiles=mean,
                text_tokens=max(1, prompt - mean * visual),
                label_tokens=max(labels),
                thoughts=max(thoughts),
                padded=batch_size > 1,
                step_tokens=step_tokens,
                step_labels=max(step_labels),
            )
        )
    return batches


def _first(rows: list[_Row], count: int, visual: int) -> list[_Row]:
    """Those with the most tokens to feed, with the texts of their groups."""
    return sorted(rows, key=lambda row: row[0] * visual + sum(row[1:4]) + row[4] * row[5], reverse=True)[:count]


def _longest(shape: RecordShape, stage: int, curriculum: CurriculumArguments) -> _Row:
    """
    At `stage`: tiles, text tokens, and the most labels and thoughts it may be drawn with; with a step loss, of its
    groups the number, the longest text and the tokens of all texts, at most.
    """
    labels, thoughts, texts = [], [], []
    for steps in shape.rationales:  # one of these is drawn
        drawn = [stage]
        if curriculum.mix != "none" and curriculum.last_stage:
            drawn += range((len(steps) if curriculum.mix == "uniform" else stage) + 1)
        for each in drawn:
            num_thoughts, num_gone = curriculum.counts(len(steps), each)
            thoughts.append(num_thoughts)
            if curriculum.decodes_steps:
                num_groups = num_thoughts // curriculum.c_thought
                ends = [length + 1 for length in steps[:num_groups]]  # each with the end of its turn
                texts.append([*ends, *[shape.answer] * (num_groups - len(ends))])
            labels.append(sum(steps[num_gone:]) + shape.answer)
    markers = 2 if curriculum.has_block else 0
    text = shape.question - len(shape.num_patches_list) + markers
    groups = max(map(len, texts), default=0)
    length, step_labels = max((max(each, default=1) for each in texts), default=1), max(map(sum, texts), default=0)
    return sum(shape.num_patches_list), text, max(labels), max(thoughts), groups, length, step_labels


# --- what the weights are ----------------------------------------------------------------------------------------


class _Part:
    """Modules of one kind. The numbers are those of one of `count`."""

    def __init__(self, *modules: nn.Module, trained: bool, count: int = 1, adapters: int = 0):
        parts = [part for module in modules for part in module.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
        self.products = sum(part.weight.numel() for part in parts)  # what autocast copies
        self.parameters = sum(weight.numel() for module in modules for weight in module.parameters())
        self.trained = adapters or (self.parameters if trained else 0)  # with LoRA those of its adapters
        self.count = count


class _Weights:
    """Parameters by kind of module, and the bytes that weights, gradients and optimizer take on each device."""

    def __init__(self, config: MultiCoCoConfig, run: _Run):
        with torch.device("meta"):
            model = MultiCoCoForConditionalGeneration(config)
        tower, decoder = model.model.vision_tower, model.model.language_model
        tower_layers, layers = tower.encoder.layer, decoder.layers
        others = [part for part in tower.children() if part is not tower.encoder]
        products = [part for part in layers[0].modules() if isinstance(part, nn.Linear)]
        adapters = run.lora_rank * sum(part.in_features + part.out_features for part in products)
        untied = not config.tie_word_embeddings
        self.parts = {
            "patching": _Part(*others, trained=run.tower_trained),
            "tower layer": _Part(tower_layers[0], trained=run.tower_trained, count=len(tower_layers)),
            "projector": _Part(model.model.multi_modal_projector, trained=run.projector_trained),
            "embedding": _Part(decoder.embed_tokens, trained=run.decoder_learns),
            "layer": _Part(layers[0], trained=run.decoder_trained, count=len(layers), adapters=adapters),
            "norm": _Part(decoder.norm, trained=run.decoder_trained),
            "head": _Part(model.lm_head, trained=untied and run.decoder_learns, count=int(untied)),
        }
        self.largest = max(weight.numel() for weight in model.parameters())
        self.num_parameters = sum(part.parameters * part.count for part in self.parts.values())
        self.num_trainable = sum(part.trained * part.count for part in self.parts.values())
        if not self.num_trainable:
            raise ValueError("All parts are frozen, so nothing is trained. Leave out one of the `freeze_` flags.")
        self.num_all = self.num_parameters + (self.num_trainable if run.lora_rank else 0)  # with adapters
        self.partition = -(-self.num_trainable // run.num_devices)  # what ZeRO leaves to a device
        self.weights = run.weight * self.num_all // (run.num_devices if run.zero_stage == 3 else 1)
        self.gradients = run.weight * (self.partition if run.zero_stage in (2, 3) else self.num_trainable)
        self.optimizer = 12 * self.partition if run.zero_stage else 8 * self.num_trainable
        self.host = 0
        if run.offload:
            self.host = run.weight * self.num_all // run.num_devices + 16 * self.partition
            self.weights = self.gradients = self.optimizer = 0

    def cached_casts(self, run: _Run) -> int:
        """The copies that autocast makes once and keeps until the forward ends: of trained weights, and the head's."""
        parts = [] if run.lora_rank else [part for name, part in self.parts.items() if part.trained and name != "head"]
        return run.cast(sum(part.products * part.count for part in parts) + self.parts["head"].products)


# --- what a forward leaves for the backward ----------------------------------------------------------------------


@dataclass(frozen=True)
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


def _chunks(config: MultiCoCoConfig, batch: BatchShape) -> list[int]:
    """Tokens of each pass of the language model, per sample, padded as the collator does."""
    prefix, suffix = batch.tiles * config.num_image_token + batch.text_tokens, batch.label_tokens
    if not batch.thoughts or config.thought_feedback == "latent_one_pass":
        return [prefix + batch.thoughts + suffix]
    if config.thought_sweeps is not None:
        num_sweeps = min(config.thought_sweeps, batch.thoughts - 1)
        num_sweeps = 0 if config.thought_feedback in CONSTANT_FEEDBACKS else num_sweeps
        return [prefix, *[batch.thoughts - 1] * num_sweeps, batch.thoughts + suffix]
    return [prefix, *[1] * (batch.thoughts - 1), 1 + suffix]


def _segments(
    config: MultiCoCoConfig, batch: BatchShape, chunks: list[int], run: _Run, weights: _Weights
) -> list[_Segment]:
    """The forward of tower, projector, language model and head, in this order."""
    text, parts = config.text_config, weights.parts
    segments = _vision_segments(config, batch, run, weights) if batch.tiles else []
    length = batch.tiles * config.num_image_token + batch.text_tokens + batch.thoughts + batch.label_tokens
    embeds = batch.samples * length * run.weight * text.hidden_size
    segments.append(_Segment("language", 0, embeds, "embedding", parts["embedding"].trained))
    norm = _rms_norm_bytes(text.hidden_size, run.weight if run.decoder_trained else 0)
    norm += 2 * run.weight * _head_dim(text)  # cosines and sines, which all layers share
    for number, chunk in enumerate(chunks):
        # No pass sees the keys of a sweep.
        seen = [chunks[0], chunk] if number and config.thought_sweeps is not None else chunks
        layer = _layer_segment(text, batch, seen, min(number, len(seen) - 1), run, parts["layer"])
        segments += [dataclasses.replace(layer, group=f"layer {index}") for index in range(parts["layer"].count)]
        segments.append(_Segment("language", batch.samples * chunk * norm, 0, "norm", parts["norm"].trained))
    logits = batch.samples * batch.label_tokens * (12 * text.vocab_size + run.act * text.hidden_size)
    cast = run.cast(parts["head"].products)
    segments.append(_Segment("logits", logits, 2 * embeds, "head", parts["head"].trained, cast))
    if batch.step_tokens:  # one more pass, which sees no other, and its logits
        alone = dataclasses.replace(batch, padded=False)
        layer = _layer_segment(text, alone, [batch.step_tokens], 0, run, parts["layer"])
        segments += [dataclasses.replace(layer, group=f"layer {index}") for index in range(parts["layer"].count)]
        saved = batch.samples * batch.step_tokens * norm
        segments.append(_Segment("language", saved, 0, "norm", parts["norm"].trained))
        logits = batch.samples * batch.step_labels * (12 * text.vocab_size + run.act * text.hidden_size)
        segments.append(_Segment("logits", logits, 0, "head", parts["head"].trained))
    return segments


def _vision_segments(config: MultiCoCoConfig, batch: BatchShape, run: _Run, weights: _Weights) -> list[_Segment]:
    vision, layer, projector = config.vision_config, weights.parts["tower layer"], weights.parts["projector"]
    tiles, width = batch.samples * batch.tiles, vision.hidden_size
    rows, columns = (size // side for size, side in zip(vision.image_size, vision.patch_size, strict=True))
    patches = tiles * (rows * columns + 1)
    stream = run.weight * width * patches
    saved, cast = _patch_bytes(vision, run) * patches, run.cast(layer.products)
    working = run.act * (vision.intermediate_size + 2 * width) * patches
    if run.tower_trained:
        pixels = tiles * vision.num_channels * math.prod(vision.image_size)
        copied = run.act * pixels if run.bf16 else 0  # float32 ones are the batch's own
        segments = [_Segment("vision", copied, stream, "patching", weights.parts["patching"].trained)]
        if run.activation_checkpointing:
            saved, working, cast = stream, working + saved + cast, 0
        for index in range(layer.count):
            segments.append(_Segment("vision", saved, working, f"tower layer {index}", layer.trained, cast))
    else:
        segments = [_Segment("vision", 0, working + 2 * stream + cast)]
    visual, joined = tiles * config.num_image_token, int(width / config.downsample_ratio**2)
    saved = visual * (run.weight * joined + 8 + run.act * (2 * config.text_config.hidden_size + joined))
    saved, cast = (saved, run.cast(projector.products)) if run.tower_trained or run.projector_trained else (0, 0)
    working = 2 * visual * run.weight * joined
    return [*segments, _Segment("vision", saved, working, "projector", projector.trained, cast)]


def _layer_segment(
    text: PreTrainedConfig, batch: BatchShape, chunks: list[int], number: int, run: _Run, layer: _Part
) -> _Segment:
    """One layer of the language model in pass `number`."""
    first, several, chunk, seen = number == 0, len(chunks) > 1, chunks[number], sum(chunks[: number + 1])
    tokens, width = batch.samples * chunk, text.hidden_size
    query, key = (heads * _head_dim(text) for heads in (text.num_attention_heads, text.num_key_value_heads))
    masked = batch.padded or (not first and chunk > 1)
    joined = batch.samples * 2 * run.act * seen * (query if masked and chunk > 1 else key)  # grouped heads, repeated
    joined += batch.samples * run.act * chunk * seen if masked else 0
    own = tokens * (run.weight + run.act) * key if several else 0
    passed_on = own if first else 0
    if first and not masked and not run.activation_checkpointing:
        own = tokens * run.weight * key if several and run.autocast else 0  # otherwise they are the saved ones
    saved = tokens * _token_bytes(text, run) + joined
    working = run.act * (2 * text.intermediate_size + 2 * width) * tokens
    working += run.weight * width * text.intermediate_size if several else 0
    layer_cast, adapter_cast = run.cast(layer.products), run.cast(layer.trained) if run.lora_rank else 0
    if run.activation_checkpointing:
        working += saved + layer_cast + adapter_cast
        saved, cast, key_values = tokens * run.weight * width + own, 0, own
    else:
        saved, key_values = saved + own, own + (joined if several else 0)
        cast = layer_cast if first or not run.decoder_trained else 0
        cast += adapter_cast if first else 0
    return _Segment("language", saved, working, "layer", layer.trained, cast, key_values, passed_on)


def _patch_bytes(vision: PreTrainedConfig, run: _Run) -> int:
    """What a layer of the tower saves for each patch."""
    width, copies = vision.hidden_size, 3 if run.autocast else 1
    saved = 2 * (_rms_norm_bytes(width, run.weight) if vision.norm_type == "rms_norm" else run.weight * width + 8)
    saved += 2 * _rms_norm_bytes(width, run.act) if vision.use_qk_norm else 0
    saved += 4 * vision.num_attention_heads
    return saved + run.act * ((copies + 1 + 4 + 2) * width + 2 * vision.intermediate_size)


def _token_bytes(text: PreTrainedConfig, run: _Run) -> int:
    """What a layer of the language model saves for each token, beside keys, values and masks."""
    width, heads, trained = text.hidden_size, text.num_attention_heads, run.decoder_trained
    saved = 2 * _rms_norm_bytes(width, run.weight if trained else 0) + 7 * run.act * run.lora_rank
    saved += 2 * run.act * heads * _head_dim(text) + 4 * heads
    saved += (4 if run.decoder_learns else 3) * run.act * text.intermediate_size
    if run.decoder_learns:
        saved += run.act * width * (3 + 2 if run.autocast else 2)
    if text.model_type == "qwen3":  # norms of query and key
        saved += _rms_norm_bytes(_head_dim(text), run.act if trained else 0) * (heads + text.num_key_value_heads)
    return saved


def _rms_norm_bytes(width: int, normalised: int) -> int:
    """What an RMS norm saves: its float32 input, `normalised` bytes for each normalised state, inverse deviation."""
    return (4 + normalised) * width + 4


def _head_dim(text: PreTrainedConfig) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


# --- what the wrappers buffer ------------------------------------------------------------------------------------


def _buffers(width: int, run: _Run, weights: _Weights) -> int:
    """Buckets of DistributedDataParallel or DeepSpeed, and the weights that ZeRO-3 gathers."""
    if run.zero_stage is None:
        return run.weight * weights.num_trainable if run.num_devices > 1 else 0
    whole_gradient = run.zero_stage > 1 and weights.parts["embedding"].trained
    buffers = run.weight * max(width**2, weights.largest if whole_gradient else 0)
    if run.zero_stage == 3:
        buffers += run.weight * max(min(weights.num_all, MAX_LIVE_PARAMETERS), weights.largest)
    return buffers


# --- the peak ----------------------------------------------------------------------------------------------------


def _peak(segments: list[_Segment], casts: int, run: _Run, weights: _Weights) -> int:
    """The most that activations, casts and gradients take together in a step: forward, backward, update."""
    forward = sum(segment.saved for segment in segments) + casts
    rate = 0 if run.accumulate else weights.gradients / weights.num_trainable
    backward = _walk(segments, rate, run) + (weights.gradients if run.accumulate else 0)
    update = weights.gradients
    if run.zero_stage == 3:
        update += 4 * min(weights.partition, SUB_GROUP)
    elif run.zero_stage:
        update += (run.weight + 4) * weights.partition
    return max(forward, backward, 0 if run.offload else update)


def _walk(segments: list[_Segment], rate: float, run: _Run) -> int:
    """
    The most that activations and gradients take together in the backward. `rate` is bytes per gradient that is kept
    from this backward on.
    """
    last = {segment.group: segment for segment in segments}
    first = {segment.group: segment for segment in reversed(segments)}
    alive: float = sum(segment.saved + segment.cast for segment in segments)
    peak = 0.0
    for segment in reversed(segments):
        is_first, is_last = segment is first[segment.group], segment is last[segment.group]
        # A gradient that passes share is complete, and leaves autograd, only when the first pass has been walked.
        pending = 0 if is_first and is_last else run.act * segment.gradient
        if is_last:
            alive += pending + first[segment.group].passed_on
        if is_first:
            alive += rate * segment.gradient - (pending if run.hands_over else 0)
        peak = max(peak, alive + segment.working)
        alive -= segment.saved + segment.cast
        if is_first:
            alive -= segment.passed_on + (0 if run.hands_over else pending)
    return int(peak)
