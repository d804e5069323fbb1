"""The settings of train.py: dataclasses, and their values from a file and from flags. Knows no model and no data."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import is_bitsandbytes_available, is_peft_available

from ..compat import leave_out_shm_kernel
from ..configuration_multicoco import CONTROL_FEEDBACK, STATE_FEEDBACKS
from ..curriculum import CurriculumArguments, setting
from ..evaluation.settings import RecordArguments, find_settings, make_parser
from ..processing_multicoco import MultiCoCoProcessor
from .trainer import CoconutArguments


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = setting(
        "Folder or Hub name of a multicoco, transformers (-hf) or original InternVL checkpoint."
    )
    init_latents_from: str | None = setting(
        "Token whose embedding the thought tokens start from; the mean of all embeddings if not given.", default=None
    )
    thought_feedback: str | None = setting(
        "How a state becomes a thought; the checkpoint's own way if not given.", default=None, choices=STATE_FEEDBACKS
    )
    thought_sweeps: int | None = setting(
        "Sweeps in which all thoughts are computed together; 0: one pass after another. The checkpoint's own way if "
        "not given.",
        default=None,
    )
    attn_implementation: str | None = setting(
        "eager, sdpa or flash_attention_2; transformers' choice if not given.", default=None
    )
    freeze_backbone: bool = setting("Keep the vision tower as it is.", default=False)
    freeze_llm: bool = setting("Keep the language model and its head as they are.", default=False)
    freeze_mlp: bool = setting("Keep the projector between the two as it is.", default=False)
    lora_rank: int = setting(
        "Train LoRA adapters of this rank in the language model (needs peft); 0 trains all.", default=0
    )
    lora_alpha: int | None = setting("LoRA scale; twice the rank if not given.", default=None)
    lora_embeddings: str | None = setting(
        "What adapters learn of the embeddings. rows: those of the three thought tokens. whole: embeddings and head. "
        "rows if not given; a resumed run goes on with what it began with.",
        default=None,
        choices=["rows", "whole"],
    )
    load_in_4bit: bool = setting(
        "Keep the layers of the language model in 4 bits, under adapters (QLoRA; needs bitsandbytes).", default=False
    )
    estimate_memory: bool = setting(
        "Print what the largest training step needs in memory, by formula, and exit.", default=False
    )
    dry_run: bool = setting(
        "Print what the run would do (stages, steps, thoughts, learning rates, longest sample, memory) and exit.",
        default=False,
    )

    def __post_init__(self):
        needed = {"peft": self.lora_rank and "--lora_rank", "qlora": self.load_in_4bit and "--load_in_4bit"}
        for extra, is_there in (("peft", is_peft_available), ("qlora", is_bitsandbytes_available)):
            if needed[extra] and not is_there():
                raise ValueError(f"`{needed[extra]}` needs a package: `pip install 'multicoco[{extra}]'`.")
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError(
                "`--load_in_4bit` keeps weights that cannot be trained themselves, but `--lora_rank` is 0. Give it, "
                "as `--lora_rank 16`, or leave `--load_in_4bit` out."
            )
        ignored = [name for name in ("lora_alpha", "lora_embeddings") if getattr(self, name) is not None]
        if ignored and not self.lora_rank:
            raise ValueError(
                f"`--{ignored[0]}` is about adapters, but `--lora_rank` is 0, which trains the whole model. Give it, "
                f"as `--lora_rank 16`, or leave `--{ignored[0]}` out."
            )
        if self.lora_rank and self.freeze_llm:
            raise ValueError(
                "`--freeze_llm` keeps the language model as it is, but the adapters of `--lora_rank` change what it "
                "does. Drop one."
            )
        if self.load_in_4bit and (self.estimate_memory or self.dry_run):
            raise ValueError(
                "The estimate of memory (`--estimate_memory`, `--dry_run`) knows no 4 bits. Leave `--load_in_4bit` "
                "out for it: that needs more."
            )


@dataclass(kw_only=True)
class DataArguments(RecordArguments):
    """What it is trained on: records, see docs/data.md."""

    train_file: list[str] = setting(
        "Records: .jsonl, .json, .parquet, a glob of them, a folder, a Hub data set, or InternVL's .json of sets. "
        "Several are several sets."
    )
    train_weights: list[float] | None = setting(
        "How often an epoch goes through each set of `train_file`; once, or InternVL's `repeat_time`, if not given.",
        default=None,
    )
    eval_file: str | None = setting("Records that are answered at the end of each stage.", default=None)
    max_length: int | None = setting(
        "Longest sequence in tokens. A longer record is an error, never cut.", default=None
    )
    skip_bad_records: bool = setting("List and leave out defective records.", default=False)
    draft_jpeg: bool | None = setting(
        "true: decode large JPEG files smaller where their tiles need no more. Faster, but PIXELS DIFFER, so the "
        "checkpoint keeps it for whoever asks it; its own value (false) if not given.",
        default=None,
    )
    normalize_on_device: bool = setting(
        "Send tiles to the device as bytes, a quarter of the size, and normalise them there. Same values.",
        default=False,
    )
    answer_every: str = setting("When `eval_file` is answered.", default="stage", choices=["stage", "epoch", "end"])
    answer_batch_size: int = setting("Prompts per generate call of one rank.", default=64)

    def load_processor(self, name: str) -> MultiCoCoProcessor:
        """As [`RecordArguments.load_processor`], and how files are decoded, which only a training may change."""
        processor = super().load_processor(name)
        if self.draft_jpeg is not None:
            processor.image_processor.draft_jpeg = self.draft_jpeg
        return processor


class Settings(NamedTuple):
    """All settings of a run, and where each that was given comes from: a file, the command line, the curriculum."""

    model: ModelArguments
    data: DataArguments
    curriculum: CurriculumArguments
    training: CoconutArguments
    sources: dict[str, str]


def parse(description: str | None, arguments: Sequence[str]) -> Settings:
    """
    The settings of a run, from a file and from flags, which win.

    Raises:
        ValueError: a value out of range, or see [`~evaluation.settings.find_settings`].
    """
    parser = make_parser(ModelArguments, DataArguments, CurriculumArguments, CoconutArguments, description=description)
    words, sources = find_settings(parser, arguments)
    if not torch.accelerator.is_available():
        words.append("--use_cpu")  # else accelerate takes the processes of torchrun for runs of their own
        if "deepspeed" in sources:
            words += _prepare_deepspeed_on_cpu()
    model_args, data_args, curriculum, args = parser.parse_args_into_dataclasses(args=words)
    if model_args.thought_feedback is not None and curriculum.mode in CONTROL_FEEDBACK:
        raise ValueError(
            f"`--thought_feedback` is {model_args.thought_feedback!r}, but `--mode {curriculum.mode}` feeds "
            "constants: leave it out, or train another mode."
        )
    if args.max_steps == 0 or args.num_train_epochs <= 0:
        name = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise ValueError(
            f"`--{name}` is {getattr(args, name)}, so that nothing would be trained. Leave it out for the whole "
            "curriculum, or give a number of at least 1."
        )
    if "num_train_epochs" not in sources and args.max_steps <= 0:
        args.num_train_epochs = curriculum.num_epochs
        sources["num_train_epochs"] = "curriculum"
    if args.resume_from_checkpoint in ("false", "False"):  # as a file of settings may have it
        args.resume_from_checkpoint = None
    args.push_to_hub = args.push_to_hub and not model_args.dry_run  # `Trainer` makes the repository at once
    args.remove_unused_columns = False  # the collator reads `images`
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    return Settings(model_args, data_args, curriculum, args, sources)


def _prepare_deepspeed_on_cpu() -> list[str]:
    """Without a GPU, accelerate and DeepSpeed must be told so before `TrainingArguments` is made."""
    from accelerate import PartialState

    leave_out_shm_kernel()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return ["--accelerator_config", json.dumps({"use_configured_state": True})]
