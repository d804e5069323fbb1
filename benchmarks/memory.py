r"""Memory of a training step: by the formula of docs/memory.md, beside what a step on CPU really takes.

    python benchmarks/memory.py             # estimate, measured, ratio; tiny models; half a minute on 2 idle cores
    python benchmarks/memory.py --table     # by formula: InternVL3 1B to 78B on 1, 8 and 64 GPUs, as Markdown

A measured step is that of `train.py`: the model as its `load_model` makes it, forward, backward, AdamW's update. The
peak is what weights and moments take, plus the most that torch's profiler sees alive above them (see
`passes.py`). With `--table` no weight is made and nothing is measured.
"""

import contextlib
import tempfile
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.utils import logging

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration
from multicoco.benchmarks import passes
from multicoco.benchmarks.passes import IGNORED, MIB, peak_memory, print_table, sizes
from multicoco.training.arguments import ModelArguments
from multicoco.training.loading import load_model
from multicoco.training.memory import BatchShape, MemoryEstimate, estimate_memory


GIB = 2**30


@dataclass
class MemoryArguments:
    """What is printed."""

    table: bool = field(default=False, metadata={"help": "Estimate the real InternVL3 shapes; measure nothing."})


# --- tiny models, measured ---------------------------------------------------------------------------------------


@dataclass
class Case:
    """A tiny configuration and the flags of `train.py`."""

    text: dict = field(default_factory=dict)
    vision: dict = field(default_factory=dict)
    batch: BatchShape = field(default_factory=lambda: BatchShape(2, 2, 40, 24, 6))
    bf16: bool = False
    activation_checkpointing: bool = False
    accumulate: bool = False
    flags: dict = field(default_factory=dict)  # of `ModelArguments`


WIDE = sizes(192, 768, 6, 6)  # weights weigh more
NO_THOUGHTS = BatchShape(2, 2, 40, 24, 0)
STEP_LOSS = BatchShape(2, 2, 40, 24, 6, step_tokens=3 * (2 + 10 - 1), step_labels=3 * 10)  # 3 groups, 10 tokens each
CASES = {
    "plain": Case(batch=NO_THOUGHTS),
    "6 thoughts": Case(),
    "6 thoughts, padded": Case(batch=BatchShape(3, 2, 40, 24, 6, padded=True)),
    "checkpointing": Case(batch=NO_THOUGHTS, activation_checkpointing=True),
    "6 thoughts, checkpointing": Case(activation_checkpointing=True),
    "6 thoughts, step loss": Case(batch=STEP_LOSS),
    "6 thoughts, step loss, checkpointing": Case(batch=STEP_LOSS, activation_checkpointing=True),
    "LoRA": Case(batch=NO_THOUGHTS, flags=dict(lora_rank=8)),
    "LoRA, 6 thoughts, checkpointing": Case(activation_checkpointing=True, flags=dict(lora_rank=8)),
    "frozen tower, 6 thoughts": Case(flags=dict(freeze_backbone=True)),
    "frozen language model": Case(batch=NO_THOUGHTS, flags=dict(freeze_llm=True)),
    "--bf16": Case(batch=NO_THOUGHTS, bf16=True),
    "--bf16, 6 thoughts": Case(bf16=True),
    "--bf16, LoRA, 6 thoughts": Case(bf16=True, flags=dict(lora_rank=8)),
    "--bf16, 6 thoughts, checkpointing": Case(bf16=True, activation_checkpointing=True),
    "mostly weights, 6 thoughts": Case(text=WIDE, batch=BatchShape(1, 1, 8, 8, 6)),
    "mostly weights, accumulating": Case(text=WIDE, batch=BatchShape(1, 1, 8, 8, 6), accumulate=True),
    "many labels": Case(text=dict(vocab_size=8192), batch=BatchShape(4, 1, 16, 96, 2)),
    "tower of the 6B kind": Case(
        vision=dict(norm_type="rms_norm", use_qk_norm=True, num_hidden_layers=4), batch=BatchShape(2, 4, 16, 16, 2)
    ),
}


def make_config(text: dict | None = None, vision: dict | None = None, **kwargs) -> MultiCoCoConfig:
    """InternVL3's proportions, small: 112-pixel tiles of 16 visual tokens unless told otherwise."""
    text = sizes(128, 640, 3, 4, vocab_size=512) | (text or {})
    vision = sizes(64, 256, 2, 2, image_size=112) | (vision or {})
    return passes.make_config(text, vision, **kwargs)


def make_batch(config: MultiCoCoConfig, shape: BatchShape) -> dict:
    """A batch of this shape, as the collator makes it; with `padded` the last label of the first row is missing."""
    generator = torch.Generator().manual_seed(0)
    visual = config.num_image_token * shape.tiles
    draw = lambda count: torch.randint(0, config.start_latent_id, (shape.samples, count), generator=generator)  # noqa: E731
    full = lambda count, value: torch.full((shape.samples, count), value)  # noqa: E731
    ids = [full(visual, config.image_token_id), draw(shape.text_tokens)]
    ids += [full(shape.thoughts, config.latent_token_id), draw(shape.label_tokens)]
    input_ids = torch.cat(ids, dim=1)
    labels = input_ids.clone()
    labels[:, : -shape.label_tokens] = IGNORED
    attention_mask = torch.ones_like(input_ids)
    if shape.padded:
        attention_mask[0, -1], labels[0, -1] = 0, IGNORED
    size = config.vision_config.image_size
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if shape.tiles:
        batch["pixel_values"] = torch.randn(shape.samples * shape.tiles, 3, *size, generator=generator)
    if shape.step_labels:
        num_groups = shape.thoughts // config.c_thought
        batch["step_ids"] = draw(shape.step_labels).unflatten(1, (num_groups, -1))
    return batch


def measure(case: Case) -> tuple[int, MemoryEstimate]:
    """Peak bytes of the second step (AdamW has its moments then), and the estimate."""
    config = make_config(case.text, case.vision)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        MultiCoCoForConditionalGeneration(config).save_pretrained(folder)
        args = TrainingArguments(output_dir=f"{folder}/out", use_cpu=True, bf16=case.bf16, report_to="none")
        whole = {"lora_embeddings": "whole"} if "lora_rank" in case.flags else {}  # as the formula has it
        model = load_model(ModelArguments(folder, **case.flags, **whole), args, None)
    model.train()
    model.config.set_trained(step_loss_weight=float(case.batch.step_labels > 0))
    if case.activation_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    batch = make_batch(config, case.batch)

    def step():
        autocast = torch.autocast("cpu", torch.bfloat16) if case.bf16 else contextlib.nullcontext()
        with autocast:
            loss = model(**batch).loss
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=not case.accumulate)

    step()
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [weight.grad for weight in model.parameters() if weight.grad is not None]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    measured = sum(storages.values()) + peak_memory(step, "cpu")
    return measured, estimate(case, config)


def estimate(case: Case, config: MultiCoCoConfig) -> MemoryEstimate:
    settings = {name: getattr(case, name) for name in ("bf16", "activation_checkpointing", "accumulate")}
    return estimate_memory(config, case.batch, **settings, **case.flags)


def print_measured() -> None:
    lines = []
    for name, case in CASES.items():
        measured, expected = measure(case)
        parts = [expected.weights + expected.gradients + expected.optimizer, expected.total]
        values = [*parts, expected.peak, measured]
        lines.append([name, *(f"{value / MIB:.2f}" for value in values), f"{expected.peak / measured:.3f}"])
    header = ["training step, MiB", "weights, gradients, moments", "sum of parts", "estimate", "measured", "ratio"]
    print_table(header, lines)


# --- InternVL3, by formula ---------------------------------------------------------------------------------------


@dataclass
class InternVL3:
    """A member of the family: its language model is Qwen2.5's, its tower InternViT-300M or InternViT-6B."""

    published: float  # parameters, in 10^9, as its page on the Hub states
    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    large_tower: bool = False


FAMILY = {
    "1B": InternVL3(0.94, 896, 4864, 24, 14, 2),
    "2B": InternVL3(2.09, 1536, 8960, 28, 12, 2),
    "8B": InternVL3(7.94, 3584, 18944, 28, 28, 4),
    "14B": InternVL3(15.1, 5120, 13824, 48, 40, 8),
    "38B": InternVL3(38.4, 5120, 27648, 64, 40, 8, large_tower=True),
    "78B": InternVL3(78.4, 8192, 29568, 80, 64, 8, large_tower=True),
}
TOWER_300M = sizes(1024, 4096, 24, 16)
TOWER_6B = sizes(3200, 12800, 45, 25, norm_type="rms_norm", use_qk_norm=True, attention_bias=False)
TABLE_BATCH = BatchShape(samples=1, tiles=13, text_tokens=300, label_tokens=60, thoughts=6)
RUNS = {
    "ZeRO-2": dict(zero_stage=2),
    "ZeRO-3": dict(zero_stage=3),
    "ZeRO-3 offload": dict(zero_stage=3, offload=True),
    "ZeRO-2, LoRA r=16": dict(zero_stage=2, lora_rank=16),
    "ZeRO-3, LoRA r=16": dict(zero_stage=3, lora_rank=16),
}
DEVICES = (1, 8, 64)
GPU = 80 * 10**9
OVERHEAD = 2 * GIB  # context, libraries and NCCL, which the formula leaves out


def make_internvl3(member: InternVL3) -> MultiCoCoConfig:
    """The configuration of an InternVL3, with thought tokens."""
    text = sizes(member.width, member.inner, member.layers, member.heads, vocab_size=151674 + 3)
    text["num_key_value_heads"] = member.key_heads
    return make_config(text, {"image_size": 448, **(TOWER_6B if member.large_tower else TOWER_300M)})


def estimate_family(config: MultiCoCoConfig, run: str, devices: int) -> MemoryEstimate:
    """One cell of the table: `run` is one of `RUNS`."""
    flags = dict(bf16=True, activation_checkpointing=True, num_devices=devices)
    return estimate_memory(config, TABLE_BATCH, **flags, **RUNS[run])


def format_cell(estimate: MemoryEstimate) -> str:
    """GB of the peak, in bold if it fits with the overhead."""
    size = f"{estimate.peak / 1e9:.1f}"
    return f"**{size}**" if estimate.peak + OVERHEAD <= GPU else size


def print_family() -> None:
    """A Markdown table: GB per GPU; in bold what fits with the overhead."""
    shape = TABLE_BATCH
    print(
        f"bf16, activation checkpointing, per GPU {shape.samples} x ({shape.tiles} tiles, {shape.text_tokens} text, "
        f"{shape.thoughts} thoughts, {shape.label_tokens} labels). GB (10^9 bytes) per GPU; **bold**: fits in 80 GB "
        f"with {OVERHEAD / 10**9:.1f} GB left for CUDA and NCCL.\n"
    )
    print(f"| InternVL3 | parameters, 10^9 (Hub) | GPUs | {' | '.join(RUNS)} | host memory per GPU, offload |")
    print(f"| --- | --- | --: | {'--: | ' * len(RUNS)}--: |")
    for name, member in FAMILY.items():
        config = make_internvl3(member)
        for devices in DEVICES:
            estimates = [estimate_family(config, run, devices) for run in RUNS]
            count = f"{estimates[0].num_parameters / 1e9:.2f} ({member.published:g})" if devices == 1 else ""
            host = max(each.host for each in estimates) / 1e9
            cells = " | ".join(map(format_cell, estimates))
            print(f"| {name if devices == 1 else ''} | {count} | {devices} | {cells} | {host:.0f} |")


def main(args: MemoryArguments) -> None:
    if args.table:
        print_family()
    else:
        print_measured()


if __name__ == "__main__":
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny tensors
    main(*HfArgumentParser(MemoryArguments, description=__doc__).parse_args_into_dataclasses())
