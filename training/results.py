"""What a run leaves to be read: settings, tables, pictures, the estimate of its memory. Trains nothing."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from transformers import TrainingArguments

from ..configuration_multicoco import MultiCoCoConfig, feedback_of
from ..curriculum import CurriculumArguments, final_answer
from ..data_multicoco import StageDataset
from ..evaluation.intervals import wilson_interval
from ..evaluation.metric import load_metric
from ..processing_multicoco import MultiCoCoProcessor
from ..trainer_callbacks import global_batch_size
from .arguments import ModelArguments, Settings
from .memory import PARTS, estimate_memory, worst_batches
from .trainer import SPEED, StageTrainer


def memory_table(
    model_args: ModelArguments, args: TrainingArguments, dataset: StageDataset, processor: MultiCoCoProcessor
) -> str:
    """Parts, sum and peak of the step that needs most memory: the longest records of the worst stage."""
    config = MultiCoCoConfig.from_pretrained(model_args.model_name_or_path)
    config.thought_feedback = feedback_of(dataset.curriculum.mode, config.thought_feedback)
    if model_args.thought_sweeps is not None:
        config.thought_sweeps = model_args.thought_sweeps or None
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(processor.tokenizer))
    deepspeed = getattr(args, "hf_deepspeed_config", None)
    offload = deepspeed and deepspeed.get_value("zero_optimization.offload_param.device") == "cpu"
    batches = worst_batches(dataset, args.per_device_train_batch_size)
    estimates = [
        estimate_memory(
            config,
            batch,
            bf16=args.bf16,
            zero_stage=deepspeed and deepspeed.get_value("zero_optimization.stage"),
            offload=bool(offload),
            num_devices=args.world_size,
            activation_checkpointing=bool(args.activation_checkpointing),
            accumulate=args.gradient_accumulation_steps > 1,
            lora_rank=model_args.lora_rank,
            freeze_backbone=model_args.freeze_backbone,
            freeze_llm=model_args.freeze_llm,
            freeze_mlp=model_args.freeze_mlp,
        )
        for batch in batches
    ]
    stage = max(range(len(estimates)), key=lambda stage: estimates[stage].peak)
    estimate, batch = estimates[stage], batches[stage]
    lines = [
        f"stage {stage}, {batch.samples} samples a device, each {batch.tiles} tiles, {batch.text_tokens} text "
        f"tokens, {batch.thoughts} thoughts and {batch.label_tokens} labels; {estimate.num_parameters / 1e6:.1f}M "
        f"parameters, {estimate.num_trainable / 1e6:.1f}M trained, {args.world_size} devices\n"
    ]
    values = {part: getattr(estimate, part) for part in PARTS}
    values |= {"sum of the parts": estimate.total, "peak": estimate.peak}
    if estimate.host:
        values["host, for each device"] = estimate.host
    lines += [f"{name:24}{value / 2**20:>12.1f} MiB" for name, value in values.items()]
    lines.append(
        "\nNot all parts are at their largest at once: the peak counts. CUDA and NCCL take one or two GiB more."
    )
    return "\n".join(lines)


def schedule_table(trainer: StageTrainer) -> str:
    """The stages that a run will go through, in steps, with their thoughts and learning rates."""
    plan, curriculum, args = trainer.plan(), trainer.curriculum, trainer.args
    lines = [
        f"{plan.max_steps} optimizer steps of {plan.batch_size} samples; an epoch of {len(trainer.train_dataset)} "
        f"samples has {plan.steps_per_epoch}\n",
        f"{'stage':>5}  {'thoughts':>8}  {'epochs':>9}  {'steps':>15}  learning rate at its first step, highest, last",
    ]
    for stage, first, stop in plan.stages:
        rates = [args.learning_rate * factor(step) for factor in plan.factors[:1] for step in range(first, stop)]
        told = ", ".join(f"{rate:.2e}" for rate in (rates[0], max(rates), rates[-1])) if rates else "set by the run"
        epochs = f"{first // plan.steps_per_epoch + 1} - {math.ceil(stop / plan.steps_per_epoch)}"
        thoughts, steps = curriculum.num_thoughts(stage) or 0, f"{first + 1} - {stop}"
        lines.append(f"{stage:>5}  {thoughts:>8}  {epochs:>9}  {steps:>15}  {told}")
    return "\n".join(lines)


def longest_sample(dataset: StageDataset) -> str:
    """How long the longest sample of any stage is."""
    longest = max(shape.longest(dataset.curriculum, dataset.num_image_token) for shape in dataset.shapes())
    return f"longest sample: {longest} tokens"


def make_judge(dataset: StageDataset, processor: MultiCoCoProcessor) -> Callable[[Sequence[int], int], bool]:
    """`(new tokens, index) -> right`: whether what the model writes as its answer is exactly the record's."""
    score = load_metric("exact")

    def is_correct(tokens: Sequence[int], index: int) -> bool:
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return score(dataset.records[dataset.record_of(index)], final_answer(text)) == 1

    return is_correct


def settings_table(settings: Settings) -> str:
    """Every setting that was given or that the curriculum is made of, and where it came from."""
    lines = [f"{'setting':32}{'value':44}from"]
    for group in settings[:4]:
        for item in dataclasses.fields(group):
            if item.name in settings.sources or isinstance(group, CurriculumArguments):
                value = getattr(group, item.name)
                value = str(getattr(value, "value", value))  # of an enumeration, what one would type
                lines.append(f"{item.name:32}{value[:42]:44}{settings.sources.get(item.name, 'default')}")
    return "\n".join(lines)


def write_settings(given: Settings, trainer: StageTrainer) -> None:
    """settings.json beside the model: what was trained on what and how, of which the model card is made."""
    args, state = trainer.args, trainer.state
    settings = {name: value for group in given[:3] for name, value in dataclasses.asdict(group).items()}
    settings |= {name: getattr(args, name) for name in ("learning_rate", "bf16", "seed")}
    settings |= {
        "samples": len(trainer.train_dataset),
        "epochs": state.epoch,
        "optimizer_steps": state.global_step,
        "global_batch_size": global_batch_size(args, state),
        "hub_model_id": trainer.hub_model_id,
    }
    (Path(str(args.output_dir)) / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def folder_note(output_dir: str | Path) -> str:
    """How large the folder of a run is, and what of it may be deleted."""
    sizes = {path: path.stat().st_size for path in Path(output_dir).rglob("*") if path.is_file()}
    checkpoints = sum(
        size for path, size in sizes.items() if path.relative_to(output_dir).parts[0].startswith("checkpoint-")
    )
    note = f"{output_dir} has {sum(sizes.values()) / 2**20:,.1f} MiB"
    if checkpoints:
        note += f", {checkpoints / 2**20:,.1f} of them in checkpoint-*, which only a resumed run needs"
    return note


def answers_of(log_history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a trainer's log, what was measured at the ends of stages."""
    return [entry for entry in log_history if "eval/accuracy" in entry]


def results_table(log_history: Sequence[Mapping[str, Any]]) -> str:
    """The table of stages in the terminal; empty if nothing was answered."""
    lines = [
        f"{'stage':>5}  {'thoughts':>8}  {'accuracy':>8}  {'95 % interval':>16}  {'new tokens':>10}  {'samples':>7}"
    ]
    for row in answers_of(log_history):
        low, high = wilson_interval(row["eval/accuracy"], row["eval/samples"])
        kept = f"  kept, of step {row['eval/best_step']}" if "eval/best_step" in row else ""
        lines.append(
            f"{row['eval/stage']:>5}  {row['eval/num_thoughts']:>8}  {row['eval/accuracy']:>8.1%}  "
            f"{low:>7.1%} - {high:>6.1%}  {row['eval/new_tokens']:>10.1f}  {row['eval/samples']:>7}{kept}"
        )
    return "\n".join(lines) if lines[1:] else ""


def write_results(log_history: Sequence[Mapping[str, Any]], output_dir: str | Path) -> None:
    """results.json, and the picture results.png, beside the model. Neither tells the time that a run took."""
    answers = [
        {name: value for name, value in entry.items() if not name.startswith(SPEED)}
        for entry in answers_of(log_history)
    ]
    text = json.dumps(answers, indent=2, sort_keys=True)
    (Path(output_dir) / "results.json").write_text(text)
    draw_results(log_history, Path(output_dir) / "results.png")


def draw_results(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Loss over the run with its stages, accuracy over stages, accuracy against generated tokens."""
    losses = [entry for entry in log_history if "loss" in entry]
    answers = answers_of(log_history)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss_axes, stage_axes, token_axes = figure.subplots(1, 3)

    loss_axes.plot([entry["step"] for entry in losses], [entry["loss"] for entry in losses], linewidth=1)
    loss_axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    starts = {entry["curriculum/stage"]: entry["step"] for entry in reversed(losses)}
    for stage, step in starts.items():
        loss_axes.axvline(step, color="0.85", linewidth=0.8, zorder=0)
        loss_axes.text(step, 1.01, f" {stage}", transform=loss_axes.get_xaxis_transform(), fontsize=8, color="0.4")
    loss_axes.set_title("stage", loc="left", fontsize=8, color="0.4", pad=14)

    if answers:
        stages = [entry["eval/stage"] for entry in answers]
        rates = [entry["eval/accuracy"] for entry in answers]
        intervals = [wilson_interval(entry["eval/accuracy"], entry["eval/samples"]) for entry in answers]
        low_high = [[rate - low for rate, (low, _) in zip(rates, intervals, strict=True)]]
        low_high.append([high - rate for rate, (_, high) in zip(rates, intervals, strict=True)])
        tokens = [entry["eval/new_tokens"] for entry in answers]
        for axes, values in ((stage_axes, stages), (token_axes, tokens)):
            axes.errorbar(values, rates, yerr=low_high, marker="o", markersize=4, capsize=3, linewidth=1)
            axes.set(ylim=(0, 1.08), ylabel="accuracy")
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.grid(axis="y", color="0.9")
        stage_axes.set(xlabel="stage (95 % intervals)")
        stage_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for value, rate, stage in zip(tokens, rates, stages, strict=True):
            token_axes.annotate(f"stage {stage}", (value, rate), (3, -12), textcoords="offset points", fontsize=7)
        token_axes.set(xlabel="generated tokens per answer", xlim=(0, max(tokens) * 1.15))
    figure.savefig(path, dpi=150)
