r"""What thoughts cost in training: forward and backward with 6 thoughts against native InternVL over the same tokens.

    python benchmarks/passes.py                                                # CPU, about 3 minutes on 2 idle cores
    python benchmarks/passes.py --num_thoughts 24 --sweeps 3                   # and all thoughts at once, in 3 sweeps
    python benchmarks/passes.py --quick                                        # does it run? No figure to quote.
    python benchmarks/passes.py --device cuda --shape internvl3-1b --dtype bfloat16

All rows have the same weights (random), images, ids, labels and positions; to native InternVL a latent token is an
ordinary word. A step is forward and backward; gradients start as `None`; there is no optimizer. Rows take turns in
every repetition, and a ratio is the median of the ratios within a repetition, so a drift of the machine cancels.
"""

import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import HfArgumentParser, InternVLConfig, InternVLForConditionalGeneration, set_seed
from transformers.utils import logging

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration


MIB = 2**20
IGNORED = -100


@dataclass
class Shape:
    """Sizes of a model and of its batches."""

    text: dict
    vision: dict
    tiles: int
    batch_size: int  # of a training step
    generate_batch_size: int
    text_length: int  # ordinary tokens before and after the image, at least
    answer_length: int
    max_new_tokens: int


def sizes(width: int, inner: int, layers: int, heads: int, **others) -> dict:
    """The part of a configuration that a language model and a tower both have."""
    return dict(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, **others
    )


# `cpu` has the proportions of Qwen2.5 (few key/value heads, an MLP five times as wide). Its tower is small next to
# InternViT, which takes most of a real step and costs both sides the same: that would only hide the passes.
SHAPES = {
    "tiny": Shape(
        text=sizes(64, 320, 2, 4, vocab_size=256),
        vision=sizes(32, 128, 1, 2, image_size=56),
        tiles=2,
        batch_size=2,
        generate_batch_size=2,
        text_length=4,
        answer_length=4,
        max_new_tokens=3,
    ),
    "cpu": Shape(
        text=sizes(512, 2560, 3, 8, vocab_size=8192),
        vision=sizes(64, 256, 1, 2, image_size=448),
        tiles=2,
        batch_size=8,
        generate_batch_size=16,
        text_length=8,
        answer_length=24,
        max_new_tokens=32,
    ),
    "internvl3-1b": Shape(
        text=sizes(896, 4864, 24, 14, vocab_size=151674),
        vision=sizes(1024, 4096, 24, 16, image_size=448),
        tiles=7,
        batch_size=8,
        generate_batch_size=16,
        text_length=16,
        answer_length=64,
        max_new_tokens=32,
    ),
}


@dataclass
class BenchmarkArguments:
    """What is measured, and where."""

    shape: str = field(default="cpu", metadata={"help": "Sizes.", "choices": sorted(SHAPES)})
    device: str = field(default="cpu", metadata={"help": "`cpu` or `cuda`."})
    dtype: str = field(
        default="float32", metadata={"help": "Weights and activations.", "choices": ["float32", "bfloat16"]}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention of both models."})
    num_thoughts: int = field(default=6, metadata={"help": "Thoughts per sample."})
    sweeps: int | None = field(default=None, metadata={"help": "Adds a row with all thoughts at once, in so many."})
    batch_size: int | None = field(default=None, metadata={"help": "Samples per batch; by default the shape's."})
    tiles: int | None = field(default=None, metadata={"help": "Image tiles per sample; by default the shape's."})
    repetitions: int = field(default=5, metadata={"help": "Timed repetitions of each row."})
    quick: bool = field(default=False, metadata={"help": "The `tiny` shape, once: shows only that the script runs."})

    def __post_init__(self):
        if self.quick:
            self.shape, self.repetitions = "tiny", 1
            torch.set_num_threads(1)  # tiny tensors: two threads on a busy machine wait for each other
        if self.repetitions < 1 or self.num_thoughts < 1 or (self.sweeps is not None and self.sweeps < 1):
            raise ValueError(
                f"`--repetitions`, `--num_thoughts` and `--sweeps` must be at least 1, got {self.repetitions}, "
                f"{self.num_thoughts} and {self.sweeps}."
            )
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"`--device {self.device}` needs a CUDA device, and torch sees none. Use `--device cpu`.")


@dataclass
class Row:
    """One line of the table, measured against another one."""

    name: str
    run: Callable[[], object]
    against: str | None = None
    time_goal: float | None = None
    memory_goal: float | None = None
    scale: float = 1.0  # of the time, where fewer samples are run
    milliseconds: list[float] = field(default_factory=list)
    peak: int | None = None  # bytes above the weights


def make_config(text: dict, vision: dict, **kwargs) -> MultiCoCoConfig:
    """InternVL3's, with thought tokens, for a language model and a tower of these sizes."""
    size = text["vocab_size"]
    common = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, max_position_embeddings=32768)
    common |= dict(num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return MultiCoCoConfig(
        text_config=dict(model_type="qwen2", **(common | text)),
        vision_config=dict(patch_size=14, attention_bias=True, use_mean_pooling=True) | vision,
        image_token_id=size - 1,
        image_seq_length=(vision["image_size"] // 14) ** 2 // 4,
        end_latent_id=size - 2,
        latent_token_id=size - 3,
        start_latent_id=size - 4,
        tie_word_embeddings=False,
        **kwargs,
    )


def make_models(args: BenchmarkArguments):
    """Native InternVL and multicoco with the same random weights."""
    shape = SHAPES[args.shape]
    config = make_config(shape.text, shape.vision, num_thoughts=args.num_thoughts)
    set_seed(0)
    with torch.device(args.device):
        native = InternVLForConditionalGeneration(InternVLConfig(**config.to_dict()))
        model = MultiCoCoForConditionalGeneration(config)
    for each in (native, model):
        each.to(getattr(torch, args.dtype))
        each.set_attn_implementation(args.attn_implementation)
    model.load_state_dict(native.state_dict(), strict=True)
    return native, model


def make_batch(args: BenchmarkArguments, config: MultiCoCoConfig, batch_size: int, with_answer: bool) -> dict:
    """
    Samples of text, `<img>` tiles `</img>`, question, thoughts and perhaps an answer. Their lengths differ by a few
    tokens; the thoughts stand at the same columns, as the collator has it: padding left, and right after the answers.
    """
    shape = SHAPES[args.shape]
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(0, config.start_latent_id - 2, (count,), generator=generator).tolist()  # noqa: E731
    num_tiles = shape.tiles if args.tiles is None else args.tiles
    image = [config.start_latent_id - 2, *[config.image_token_id] * (config.num_image_token * num_tiles)]
    thoughts = [config.start_latent_id, *[config.latent_token_id] * args.num_thoughts, config.end_latent_id]
    spread = min(4, shape.text_length)
    ids, mask, labels = [], [], []
    for sample in range(batch_size):
        prompt = draw(shape.text_length + sample % spread)
        prompt += [*image, config.start_latent_id - 1, *draw(shape.text_length), *thoughts]
        answer = draw(shape.answer_length - sample % spread) if with_answer else []
        left = spread - 1 - sample % spread if batch_size > 1 else 0
        right = sample % spread if with_answer else 0
        ids.append([0] * left + prompt + answer + [0] * right)
        mask.append([0] * left + [1] * len(prompt + answer) + [0] * right)
        labels.append([IGNORED] * (left + len(prompt)) + answer + [IGNORED] * right)
    vision = config.vision_config
    attention_mask = torch.tensor(mask)
    pixel_values = torch.randn(
        (batch_size * num_tiles, vision.num_channels, *vision.image_size), generator=generator
    ).to(getattr(torch, args.dtype))
    batch = {
        "input_ids": torch.tensor(ids),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=-1) - 1).clamp(min=0),  # native InternVL's default ignores the mask
        "labels": torch.tensor(labels),
        "pixel_values": pixel_values,
    }
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    batch["num_patches_list"] = [num_tiles] * batch_size
    return batch


def native_loss(native, batch, at_labels_only=False):
    """The plain supervised step of native InternVL, with logits everywhere, or only where they are read."""
    inputs = {name: value for name, value in batch.items() if name != "num_patches_list"}
    if not at_labels_only:
        return native(**inputs, use_cache=False).loss
    labels = inputs.pop("labels")
    return loss_at_labels(native, native.model(**inputs, use_cache=False).last_hidden_state, labels)


def loss_at_labels(model, hidden_states, labels) -> torch.Tensor:
    """The mean loss of hidden states `(B, T, D)`, with logits only where a label is."""
    rows, positions = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    logits = model.lm_head(hidden_states[rows, positions])
    return nn.functional.cross_entropy(logits.float(), labels[rows, positions + 1])


def run_prefix(model, embeds, attention_mask) -> torch.Tensor:
    """Last hidden states `(B, T, D)` of one run without a cache."""
    return model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=-1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state


def recompute_thoughts(model, batch) -> torch.Tensor:
    """Input embeddings `(B, T, D)` with the thoughts filled in: the whole prefix runs again for each of them."""
    embeds = model.fuse(batch["input_ids"], batch["pixel_values"])
    is_latent = batch["input_ids"] == model.config.latent_token_id
    for column in is_latent.any(dim=0).nonzero().flatten().tolist():
        thought = run_prefix(model, embeds[:, :column], batch["attention_mask"][:, :column])[:, -1:]
        embeds = torch.cat([embeds[:, :column], thought, embeds[:, column + 1 :]], dim=1)
    return embeds


def recomputed_loss(model, batch):
    """The definition without a cache, all of it with gradients."""
    states = run_prefix(model, recompute_thoughts(model, batch), batch["attention_mask"])
    return loss_at_labels(model, states, batch["labels"])


def swept_loss(model, batch, num_sweeps: int) -> torch.Tensor:
    """The loss with all thoughts computed together, in sweeps."""
    model.config.thought_sweeps = num_sweeps
    try:
        return model(**batch).loss
    finally:
        model.config.thought_sweeps = None


def make_step(model, loss_fn, checkpointing=False) -> Callable[[], None]:
    """One forward and backward, with the model in the state that it needs."""

    def step():
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        else:
            model.activation_checkpointing_disable()
        try:
            loss_fn().backward()
        finally:
            model.zero_grad(set_to_none=True)

    return step


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - start) * 1000


def peak_memory(run: Callable[[], object], device: str) -> int:
    """
    Most bytes that are alive at once in `run`, above those before it: activations, gradients, buffers of kernels.

    On CPU from each allocation and release that torch's profiler sees, so the figure is exact, the same in every run,
    and free of what the C allocator keeps back (buffers inside the BLAS are not seen); on CUDA from torch's allocator.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would report each start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in changes), initial=0))


def measure(rows: list[Row], repetitions: int, device: str) -> None:
    """Warms every row up, takes its peak memory, then times all in turns; a row that does not fit stays empty."""
    for row in rows:
        try:
            if device.startswith("cuda"):
                row.run()  # libraries take their workspaces in the first call
            row.peak = peak_memory(row.run, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    fitting = [row for row in rows if row.peak is not None]
    for repetition in range(repetitions):
        for row in fitting if repetition % 2 == 0 else fitting[::-1]:
            row.milliseconds.append(row.scale * milliseconds(row.run, device))


def time_ratio(row: Row, other: Row) -> float:
    return statistics.median(a / b for a, b in zip(row.milliseconds, other.milliseconds, strict=True))


def verdict(ratio: float, goal: float | None) -> str:
    return "" if goal is None else f"<= {goal:.2f} {'met' if ratio <= goal else 'missed'}"


def cells(row: Row, rows: list[Row]) -> list[str]:
    """Name, median, fastest, time ratio and verdict, peak, memory ratio and verdict."""
    if row.peak is None:
        return [row.name, "no memory"]
    line = [row.name, f"{statistics.median(row.milliseconds):.0f}", f"{min(row.milliseconds):.0f}"]
    other = next((other for other in rows if other.name == row.against), None)
    if other is None or other.peak is None:
        return [*line, "", "", f"{row.peak / MIB:.1f}", "", ""]
    ratio, memory = time_ratio(row, other), row.peak / other.peak
    line += [f"{ratio:.3f}", verdict(ratio, row.time_goal)]
    return [*line, f"{row.peak / MIB:.1f}", f"{memory:.3f}", verdict(memory, row.memory_goal)]


HEADER = ["median ms", "min ms", "ratio", "goal", "peak MiB", "ratio", "goal"]


def print_table(header: list[str], lines: list[list[str]]) -> None:
    lines = [line + [""] * (len(header) - len(line)) for line in lines]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    for line in [header, ["-" * width for width in widths], *lines]:
        cells = [line[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        ]
        print("  ".join(cells).rstrip())


def matmul_flops(args: BenchmarkArguments, num_tokens: int) -> float:
    """FLOP per second of a plain matrix product of the shape of the MLP's: what this machine gives right now."""
    text = SHAPES[args.shape].text
    width, inner = text["hidden_size"], text["intermediate_size"]
    a = torch.randn(num_tokens, width, device=args.device, dtype=getattr(torch, args.dtype))
    b = torch.randn(width, inner, device=args.device, dtype=getattr(torch, args.dtype))
    out = a @ b
    calls = 10 if args.device.startswith("cuda") else 1  # so that a launch does not count

    def run():
        for _ in range(calls):
            torch.mm(a, b, out=out)

    run()
    seconds = statistics.median(milliseconds(run, args.device) for _ in range(9)) / 1000 / calls
    return 2 * num_tokens * width * inner / seconds


def num_weights(module: nn.Module) -> int:
    """Weights that take part in matrix products with every token."""
    products = (nn.Linear, nn.Conv2d)
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, products))


def forward_flops(model, num_tokens: int, num_logits: int, num_tiles: int) -> int:
    """2 FLOP for each weight and token of one forward; a backward costs twice as much. Attention is not counted."""
    vision, config = model.model.vision_tower, model.config
    patches = num_tiles * (config.num_image_token * 4 + 1)
    return 2 * (
        num_weights(model.model.language_model) * num_tokens
        + num_weights(model.lm_head) * num_logits
        + num_weights(vision) * patches
        + num_weights(model.model.multi_modal_projector) * num_tiles * config.num_image_token
    )


def describe(args: BenchmarkArguments, model, batch: dict, what: str) -> None:
    batch_size, length = batch["input_ids"].shape
    latents = (batch["input_ids"] == model.config.latent_token_id).any(dim=0).nonzero().flatten()
    name = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    count = lambda module: f"{sum(weight.numel() for weight in module.parameters()) / 1e6:.1f}M"  # noqa: E731
    image_tokens = int((batch["input_ids"][0] == model.config.image_token_id).sum())
    print(f"{what}: {name}, {args.dtype}, {args.attn_implementation}, torch {torch.__version__}, load {load}")
    print(
        f"shape {args.shape}: language model {count(model.model.language_model)} (width "
        f"{model.config.text_config.hidden_size}, {model.config.text_config.num_hidden_layers} layers), tower "
        f"{count(model.model.vision_tower)}, head {count(model.lm_head)}"
    )
    print(
        f"batch {batch_size} x {length} tokens: {int(latents[0])} before the thoughts ({image_tokens} of them image), "
        f"{args.num_thoughts} thoughts, {length - int(latents[-1]) - 1} after; {len(batch['pixel_values'])} tiles"
    )
    print()


def check_same_work(native, model, batch) -> None:
    """With the latents read as words, multicoco's loss must be native InternVL's, or the comparison means nothing."""
    feedback, model.config.thought_feedback = model.config.thought_feedback, "latent_one_pass"
    native.train(), model.train()
    with torch.no_grad():
        expected, loss = native_loss(native, batch), model(**batch).loss
    model.config.thought_feedback = feedback
    tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
    if not torch.allclose(loss, expected, rtol=tolerance):
        raise RuntimeError(f"The two models differ: native loss {float(expected)}, multicoco {float(loss)}.")


def main(args: BenchmarkArguments) -> None:
    native, model = make_models(args)
    batch_size = args.batch_size or SHAPES[args.shape].batch_size
    batch = make_batch(args, model.config, batch_size, with_answer=True)
    num_tokens = batch["input_ids"].numel()
    describe(args, model, batch, "training step")
    check_same_work(native, model, batch)

    plain, checkpointed = "native", "native, checkpointing"
    at_labels = ", logits at labels only"
    rows = [
        Row(plain, make_step(native, lambda: native_loss(native, batch))),
        Row(plain + at_labels, make_step(native, lambda: native_loss(native, batch, True)), plain),
        Row("multicoco", make_step(model, lambda: model(**batch).loss), plain, 1.10, 1.10),
        Row(checkpointed, make_step(native, lambda: native_loss(native, batch), True)),
        Row(checkpointed + at_labels, make_step(native, lambda: native_loss(native, batch, True), True), checkpointed),
        Row("multicoco, checkpointing", make_step(model, lambda: model(**batch).loss, True), checkpointed, 1.15, 1.10),
    ]
    if args.sweeps is not None:  # goals of 24 thoughts in 3 sweeps: many kernels less, or few tokens more
        run = make_step(model, lambda: swept_loss(model, batch, args.sweeps))
        against, goal = (plain + at_labels, 1.15) if batch_size > 1 else ("multicoco", 1 / 1.8)
        rows.append(Row(f"multicoco, {args.sweeps} sweeps", run, against, goal))
    measure(rows, args.repetitions, args.device)
    machine = matmul_flops(args, num_tokens)

    # As many times slower as there are passes: once, on fewer samples, beside native on the same ones.
    few = max(1, batch_size // 4)
    few_batch = make_batch(args, model.config, few, with_answer=True)
    few_native = Row(f"native, batch {few}", make_step(native, lambda: native_loss(native, few_batch)))
    recompute = f"full recompute without cache, batch {few}, once"
    few_rows = [
        few_native,
        Row(recompute, make_step(model, lambda: recomputed_loss(model, few_batch)), few_native.name),
    ]
    measure(few_rows, 1, args.device)

    num_logits = int((batch["labels"][:, 1:] != IGNORED).sum())
    flops = 3 * forward_flops(model, num_tokens, num_logits, len(batch["pixel_values"]))
    lines = []
    for row in rows + few_rows:
        line = cells(row, rows + few_rows)
        if row.milliseconds:
            speed = flops * (1 if row in rows else few / batch_size) / statistics.median(row.milliseconds) * 1000
            line += [f"{num_tokens * speed / flops:.0f}", f"{speed / 1e9:.0f}", f"{100 * speed / machine:.0f} %"]
        lines.append(line)
    print_table(["training step", *HEADER, "tokens/s", "GFLOP/s", "of matmul"], lines)

    _, strict, ours, _, strict_checkpointed, ours_checkpointed, *swept = rows
    print(
        f"\nRatios are to `native` of the same kind. The passes alone, against native{at_labels} (no goal): "
        f"{compare(ours, strict)}; with checkpointing {compare(ours_checkpointed, strict_checkpointed)}."
    )
    for row in swept:
        print(
            f"{row.name}, not {args.num_thoughts} passes one after another: {compare(row, ours)}; against "
            f"native{at_labels}: {compare(row, strict)}."
        )
    print(
        f"Floor: {flops / 1e9:.0f} GFLOP a step (6 x weights x tokens, logits at labels only, no recomputation), "
        f"{flops / machine * 1000:.0f} ms at the {machine / 1e9:.0f} GFLOP/s of a plain matrix product of the MLP's "
        "shape in this run."
    )
    print_step_loss(args, model, batch)
    print_method(args)


STEP_LOSS_GOALS = {10: 1.15, 30: 1.38}  # tokens of a text: of the time of a step without the step loss


def print_step_loss(args: BenchmarkArguments, model, batch: dict) -> None:
    """What it costs that each thought must be readable, beside the floor: the extra tokens through the weights."""
    batch_size, num_tokens = batch["input_ids"].shape[0], batch["input_ids"].numel()
    num_logits = int((batch["labels"][:, 1:] != IGNORED).sum())
    generator = torch.Generator().manual_seed(1)
    rows, floors = [Row("multicoco", make_step(model, lambda: model(**batch).loss))], [""]
    before = forward_flops(model, num_tokens, num_logits, len(batch["pixel_values"]))
    for length, goal in STEP_LOSS_GOALS.items():
        shape = (batch_size, args.num_thoughts, length)
        step_ids = torch.randint(0, model.config.start_latent_id - 2, shape, generator=generator).to(args.device)
        step = make_step(model, lambda inputs=batch | {"step_ids": step_ids}: model(**inputs).loss)
        rows.append(Row(f"{args.num_thoughts} groups of {length} tokens", step, "multicoco", goal))
        # A group's last token is not fed; with one thought, `length` positions and as many logits.
        num_extra = step_ids.numel()
        after = forward_flops(model, num_tokens + num_extra, num_logits + num_extra, len(batch["pixel_values"]))
        floors.append(f"{after / before:.3f}")
    model.config.c_thought, model.config.step_loss_weight = 1, 1.0
    measure(rows, args.repetitions, args.device)
    model.config.step_loss_weight = 0.0
    header = ["with the step loss", *HEADER, "floor"]
    lines = [cells(row, rows) for row in rows]
    print()
    print_table(header, [line + [""] * (8 - len(line)) + [floor] for line, floor in zip(lines, floors, strict=True)])


def compare(row: Row, other: Row) -> str:
    if row.peak is None or other.peak is None:
        return "out of memory"
    return f"{time_ratio(row, other):.3f}x time, {row.peak / other.peak:.3f}x memory"


def print_method(args: BenchmarkArguments) -> None:
    source = "torch.cuda" if args.device.startswith("cuda") else "torch.profiler"
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"Times: {args.repetitions} repetitions in turns after a warm-up. Peak: bytes alive at once above the weights "
        f"(with gradients, in training), from {source}. Load at the end: {load}."
    )
    if args.quick:
        print("--quick: the script runs; no figure of it means anything.")


if __name__ == "__main__":
    logging.set_verbosity_error()
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    main(arguments)
