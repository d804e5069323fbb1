"""Trains an InternVL to think: written reasoning first, continuous thoughts stage by stage.

    python train.py recipes/trails/coconut.yaml
    python train.py recipes/trails/coconut.yaml --learning_rate 5e-4 --seed 1          # flags win over the file
    deepspeed --num_gpus 8 train.py --deepspeed ds_configs/zero3.json recipes/aokvqa/coconut.yaml
    torchrun --nproc_per_node 8 train.py recipes/aokvqa/coconut.yaml
    python train.py --model_name_or_path OpenGVLab/InternVL3-1B --train_file mine.jsonl --mode coconut --output_dir out

The file is YAML or JSON with the names of the flags. Everything of transformers' `TrainingArguments` is a flag too
(`--deepspeed`, `--bf16`, `--activation_checkpointing`, `--report_to`, `--push_to_hub`, `--resume_from_checkpoint`).
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor, add_thought_tokens
from multicoco.configuration_multicoco import STATE_FEEDBACKS, feedback_of
from multicoco.data_multicoco import ANSWER_MARK, CurriculumArguments, ReasoningCollator, StageDataset, load_records
from multicoco.intervals import wilson_interval
from multicoco.memory import PARTS, estimate_memory, worst_batches
from multicoco.model_card import write_card
from multicoco.settings import leave, read_settings
from multicoco.trainer_callbacks import (
    AnswerCallback,
    CompletionCallback,
    CurriculumCallback,
    last_complete_checkpoint,
)


logger = logging.get_logger("multicoco.train")


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or Hub name of a multicoco, transformers (-hf) or original InternVL checkpoint."}
    )
    init_latents_from: str | None = field(
        default=None,
        metadata={
            "help": "Token whose embedding the thought tokens start from; the mean of all embeddings if not given."
        },
    )
    thought_feedback: str | None = field(
        default=None,
        metadata={
            "help": "How a state becomes a thought; the checkpoint's own way if not given.",
            "choices": list(STATE_FEEDBACKS),
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa or flash_attention_2; transformers' choice if not given."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Keep the vision tower as it is."})
    freeze_llm: bool = field(default=False, metadata={"help": "Keep the language model and its head as they are."})
    freeze_mlp: bool = field(default=False, metadata={"help": "Keep the projector between the two as it is."})
    lora_rank: int = field(
        default=0,
        metadata={"help": "Train LoRA adapters of this rank in the language model (needs peft); 0 trains all."},
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA scale; twice the rank if not given."})
    estimate_memory: bool = field(
        default=False, metadata={"help": "Print what the largest training step needs in memory, by formula, and exit."}
    )


@dataclass
class DataArguments:
    """What it is trained on: records, see docs/data.md."""

    train_file: str = field(metadata={"help": "Records: .jsonl, .json, a folder, or a Hub data set."})
    eval_file: str | None = field(
        default=None, metadata={"help": "Records that are answered at the end of each stage."}
    )
    column_mapping: str | None = field(
        default=None, metadata={"help": 'JSON object from field to column name, as {"steps": "rationale"}.'}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest sequence in tokens. A longer record is an error, never cut."}
    )
    max_patches: int | None = field(
        default=None, metadata={"help": "Tiles per image at most; the checkpoint's own value (12) if not given."}
    )
    skip_bad_records: bool = field(default=False, metadata={"help": "List and leave out defective records."})
    allow_outside: bool = field(default=False, metadata={"help": "Allow image paths outside the folder of the file."})
    answer_every: str = field(
        default="stage",
        metadata={"help": "When `eval_file` is answered.", "choices": ["stage", "epoch", "end"]},
    )
    answer_batch_size: int = field(default=64, metadata={"help": "Prompts per generate call of one rank."})


class EpochLengthSampler(LengthGroupedSampler):
    """Groups samples by length in an order drawn from seed and epoch: the same on every rank and after a resume."""

    def __init__(self, dataset: StageDataset, batch_size: int, seed: int):
        super().__init__(batch_size, lengths=[len(sample["input_ids"]) for sample in dataset])
        self.dataset, self.seed = dataset, seed

    def __iter__(self):
        self.generator = torch.Generator().manual_seed((self.seed << 32) + self.dataset.epoch)
        return super().__iter__()


class StageTrainer(Trainer):
    """
    The stock trainer, with a learning rate that starts again (warm-up, then down) at every stage, an order by length
    that survives a resume, and our model card.
    """

    curriculum: CurriculumArguments

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthSampler(self.train_dataset, batch_size, self.args.seed)

    def create_model_card(self, model_name: str | None = None, license: str | None = None, tags=()):
        """README.md made from the run's files, in the place of the stock trainer's (and of peft's)."""
        if self.is_world_process_zero():
            write_card(self.args.output_dir, model_id=self.hub_model_id or model_name, license=license, tags=tags)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and self.curriculum.restart_schedule:
            batch_size = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            steps_per_epoch = math.ceil(len(self.train_dataset) / batch_size)
            warmup = self.args.get_warmup_steps(num_training_steps)
            first = self.curriculum.first_epochs * steps_per_epoch
            later = self.curriculum.epochs_per_stage * steps_per_epoch

            def factor(step: int) -> float:
                length = first if step < first else later
                done = step if step < first else (step - first) % later
                cosine = 0.5 * (1 + math.cos(math.pi * done / length))
                return min(1.0, (done + 1) / max(1, warmup)) * (0.1 + 0.9 * cosine)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)


def parse(arguments: list[str]):
    """The dataclasses, and for each setting that was given where it came from."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, CurriculumArguments, TrainingArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    switches = {name for action in parser._actions if action.nargs in ("?", 0) for name in action.option_strings}
    files = []
    for place, argument in enumerate(arguments):
        before = arguments[place - 1] if place else ""
        is_value = before.startswith("--") and "=" not in before and before not in switches
        if argument.endswith((".yaml", ".yml", ".json")) and not argument.startswith("--") and not is_value:
            files.append(place)
    if len(files) > 1:
        raise ValueError(f"Give one settings file, got {[arguments[place] for place in files]}.")
    flags = [argument for place, argument in enumerate(arguments) if place not in files]
    from_file, sources = [], {}
    for place in files:
        for name, words in read_settings(arguments[place]).items():
            from_file += words
            sources[name] = arguments[place]
    for flag in flags:
        if flag.startswith("--"):
            action = parser._option_string_actions.get(flag.split("=")[0])
            sources[action.dest if action else flag] = "command line"
    arguments = [*from_file, *flags]
    if not torch.accelerator.is_available():
        arguments.append("--use_cpu")  # else accelerate takes the processes of torchrun for runs of their own
        if "deepspeed" in sources:
            arguments += _prepare_deepspeed_on_cpu()
    model_args, data_args, curriculum, args = parser.parse_args_into_dataclasses(args=arguments)
    if "num_train_epochs" not in sources and args.max_steps <= 0:
        args.num_train_epochs = curriculum.num_epochs
        sources["num_train_epochs"] = "curriculum"
    args.remove_unused_columns = False  # the collator reads `images`
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    return model_args, data_args, curriculum, args, sources


def _prepare_deepspeed_on_cpu() -> list[str]:
    """Without a GPU, accelerate and DeepSpeed must be told so before `TrainingArguments` is made."""
    import deepspeed  # noqa: F401
    from accelerate import PartialState

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # a shared-memory kernel that needs a compiler
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return ["--accelerator_config", json.dumps({"use_configured_state": True})]


def load_model(model_args: ModelArguments, args: TrainingArguments, processor: MultiCoCoProcessor):
    """
    The model with its thought tokens. A checkpoint that lacks them gets them once, on one process and unsharded, in
    `output_dir/_start`, before DeepSpeed partitions anything; then all ranks load that.
    """
    name = model_args.model_name_or_path
    if MultiCoCoConfig.from_pretrained(name).latent_token_id is None:
        start = Path(args.output_dir) / "_start"  # what begins with _ is not pushed to the Hub
        unset_hf_deepspeed_config()
        with args.main_process_first(local=False, desc="adding thought tokens"):
            if args.process_index == 0:
                model = MultiCoCoForConditionalGeneration.from_pretrained(name, dtype="auto")
                add_thought_tokens(model, processor.tokenizer, model_args.init_latents_from)
                model.save_pretrained(start)
        if getattr(args, "hf_deepspeed_config", None) is not None:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
        name = start
    # Only DeepSpeed keeps the weights in float32 beside a bfloat16 model; in plain bfloat16 small updates are lost.
    dtype = torch.bfloat16 if args.bf16 and args.deepspeed else torch.float32
    kwargs = {name: getattr(model_args, name) for name in ("attn_implementation", "thought_feedback")}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    model = MultiCoCoForConditionalGeneration.from_pretrained(name, dtype=dtype, **kwargs)
    for freeze, module in (
        (model_args.freeze_backbone, model.model.vision_tower),
        (model_args.freeze_mlp, model.model.multi_modal_projector),
        (model_args.freeze_llm, model.model.language_model),
        (model_args.freeze_llm, model.lm_head),
    ):
        if freeze:
            module.requires_grad_(False)
    if model_args.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=model_args.lora_rank,
            lora_alpha=model_args.lora_alpha or 2 * model_args.lora_rank,
            target_modules=r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
            modules_to_save=["embed_tokens", "lm_head"],  # thought tokens are new rows
            ensure_weight_tying=model.config.tie_word_embeddings,
        )
        model = get_peft_model(model, lora)
    return model


def show_memory(model_args: ModelArguments, args: TrainingArguments, dataset: StageDataset, processor):
    """Parts, sum and peak of the step that needs most memory: the longest records of the worst stage."""
    config = MultiCoCoConfig.from_pretrained(model_args.model_name_or_path)
    config.thought_feedback = feedback_of(dataset.curriculum.mode, config.thought_feedback)
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
    print(
        f"\nstage {stage}, {batch.samples} samples a device, each {batch.tiles} tiles, {batch.text_tokens} text "
        f"tokens, {batch.thoughts} thoughts and {batch.label_tokens} labels; {estimate.num_parameters / 1e6:.1f}M "
        f"parameters, {estimate.num_trainable / 1e6:.1f}M trained, {args.world_size} devices\n"
    )
    values = {part: getattr(estimate, part) for part in PARTS}
    values |= {"sum of the parts": estimate.total, "peak": estimate.peak}
    if estimate.host:
        values["host, for each device"] = estimate.host
    for name, value in values.items():
        print(f"{name:24}{value / 2**20:>12.1f} MiB")
    print("\nNot all parts are at their largest at once: the peak counts. CUDA and NCCL take one or two GiB more.")


def make_judge(dataset: StageDataset, processor: MultiCoCoProcessor):
    """Exact match of what the model writes after the answer mark with the record's answer."""

    def is_correct(tokens, index: int) -> bool:
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return text.rsplit(ANSWER_MARK, 1)[-1].strip() == dataset.records[index]["answer"]

    return is_correct


def show_settings(groups, sources):
    """Every setting that was given or that the curriculum is made of, and where it came from."""
    print(f"{'setting':32}{'value':44}from")
    for group in groups:
        for item in dataclasses.fields(group):
            if item.name in sources or isinstance(group, CurriculumArguments):
                value = getattr(group, item.name)
                value = str(getattr(value, "value", value))  # of an enumeration, what one would type
                print(f"{item.name:32}{value[:42]:44}{sources.get(item.name, 'default')}")


def write_settings(groups, trainer: Trainer):
    """settings.json beside the model: what was trained on what and how, of which the model card is made."""
    args, state = trainer.args, trainer.state
    settings = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
    settings |= {name: getattr(args, name) for name in ("learning_rate", "bf16", "seed")}
    settings |= {
        "samples": len(trainer.train_dataset),
        "epochs": state.epoch,
        "optimizer_steps": state.global_step,
        "global_batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "hub_model_id": trainer.hub_model_id,
    }
    (Path(args.output_dir) / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def show_results(log_history: list[dict], output_dir: str):
    """The table of stages in the terminal; beside the model, results.json and the picture results.png."""
    rows = [entry for entry in log_history if "eval/accuracy" in entry]
    if rows:
        names = f"{'stage':>5}  {'thoughts':>8}  {'accuracy':>8}  {'95 % interval':>16}  {'new tokens':>10}"
        print(f"\n{names}  {'samples':>7}")
    for row in rows:
        low, high = wilson_interval(row["eval/accuracy"], row["eval/samples"])
        print(
            f"{row['eval/stage']:>5}  {row['eval/num_thoughts']:>8}  {row['eval/accuracy']:>8.1%}  "
            f"{low:>7.1%} - {high:>6.1%}  {row['eval/new_tokens']:>10.1f}  {row['eval/samples']:>7}"
        )
    (Path(output_dir) / "results.json").write_text(json.dumps(rows, indent=2, sort_keys=True))
    draw_results(log_history, Path(output_dir) / "results.png")
    print(f"\nmodel, results.json and results.png are in {output_dir}")


def draw_results(log_history: list[dict], path: str | Path):
    """Loss over the run with its stages, accuracy over stages, accuracy against generated tokens."""
    losses = [entry for entry in log_history if "loss" in entry]
    answers = [entry for entry in log_history if "eval/accuracy" in entry]
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


def main(arguments: list[str] | None = None):
    model_args, data_args, curriculum, args, sources = parse(sys.argv[1:] if arguments is None else arguments)
    is_main = args.process_index == 0
    if is_main:
        show_settings((model_args, data_args, curriculum, args), sources)
    set_seed(args.seed)
    processor = MultiCoCoProcessor.from_pretrained(model_args.model_name_or_path)
    if data_args.max_patches is not None:
        processor.image_processor.max_patches = data_args.max_patches

    def load(path, needs_steps):
        records = load_records(
            path,
            columns=json.loads(data_args.column_mapping) if data_args.column_mapping else None,
            needs_steps=needs_steps,
            allow_outside=data_args.allow_outside,
            skip_bad_records=data_args.skip_bad_records,
        )
        return StageDataset(
            records,
            processor,
            curriculum,
            seed=args.seed,
            max_length=data_args.max_length,
            skip_bad_records=data_args.skip_bad_records,
        )

    train_dataset = load(data_args.train_file, needs_steps=curriculum.mode != "no_cot")
    if model_args.estimate_memory:
        if is_main:
            show_memory(model_args, args, train_dataset, processor)
        return None
    eval_dataset = load(data_args.eval_file, needs_steps=False) if data_args.eval_file else None
    collator = ReasoningCollator(processor)
    callbacks = [CurriculumCallback(curriculum, train_dataset), CompletionCallback()]
    if eval_dataset is not None:
        judge = make_judge(eval_dataset, processor)
        callbacks.append(
            AnswerCallback(
                curriculum, eval_dataset, collator, judge, data_args.answer_batch_size, data_args.answer_every
            )
        )
    trainer = StageTrainer(
        model=load_model(model_args, args, processor),
        args=args,
        train_dataset=train_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.curriculum = curriculum
    # Ours first, so that what they add to the log reaches the progress bar and every `report_to`.
    trainer.callback_handler.callbacks.sort(key=lambda callback: callback not in callbacks)
    resume = args.resume_from_checkpoint
    if resume in ("true", "True", "last"):
        resume = last_complete_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    if is_main:
        write_settings((model_args, data_args, curriculum), trainer)
        show_results(trainer.state.log_history, args.output_dir)
        if model_args.lora_rank:
            trainer.model.config.save_pretrained(args.output_dir)  # peft saves the adapters only
    trainer.save_model()  # with `--push_to_hub` it also makes the card and sends the folder
    if not args.push_to_hub:
        trainer.create_model_card()
    return trainer


if __name__ == "__main__":
    main()
    leave()
