"""The model that is trained: loaded, with its thought tokens, frozen parts and adapters. Knows no data."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BitsAndBytesConfig, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, logging

from ..compat import read_json
from ..configuration_multicoco import MultiCoCoConfig
from ..evaluation.checkpoints import ADAPTERS, MODEL, START, base_of, files_of
from ..modeling_multicoco import MultiCoCoForConditionalGeneration, add_thought_tokens
from ..processing_multicoco import MultiCoCoProcessor
from ..trainer_callbacks import last_complete_checkpoint
from .arguments import ModelArguments


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is

# Beside the layers that adapters are added to; what stays in its own precision is trained, or sees the picture.
NOT_IN_4BIT = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def load_model(
    model_args: ModelArguments, args: TrainingArguments, processor: MultiCoCoProcessor
) -> MultiCoCoForConditionalGeneration:
    """
    The model with its thought tokens. A checkpoint that lacks them gets them once, on one process and unsharded, in
    `output_dir/_start`, before DeepSpeed partitions anything; then all ranks load that. peft wraps it for `lora_rank`.

    Raises:
        ValueError: see [`find_kind`], or what was asked for does not go together.
    """
    kind = find_kind(model_args, find_checkpoint(args))
    name: str | Path = model_args.model_name_or_path
    is_new = MultiCoCoConfig.from_pretrained(name).latent_token_id is None
    if is_new:
        start = Path(str(args.output_dir)) / START
        unset_hf_deepspeed_config()
        with args.main_process_first(local=False, desc="adding thought tokens"):
            if args.process_index == 0:
                model = MultiCoCoForConditionalGeneration.from_pretrained(name, dtype="auto")
                add_thought_tokens(model, processor.tokenizer, model_args.init_latents_from)
                model.save_pretrained(start)
        if getattr(args, "hf_deepspeed_config", None) is not None:
            set_hf_deepspeed_config(args.hf_deepspeed_config)
        name = start
    elif model_args.init_latents_from is not None:
        logger.warning(f"`--init_latents_from` is not used: {name} has thought tokens already.")
    # Only DeepSpeed keeps the weights in float32 beside a bfloat16 model; in plain bfloat16 small updates are lost.
    # Beside 4 bits they may be bfloat16 if they are frozen: peft keeps adapters and rows in float32.
    is_frozen = kind.load_in_4bit and kind.lora_embeddings == "rows"
    dtype = torch.bfloat16 if args.bf16 and (args.deepspeed or is_frozen) else torch.float32
    kwargs = {name: getattr(model_args, name) for name in ("attn_implementation", "thought_feedback")}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if kind.load_in_4bit:
        kwargs["quantization_config"] = _in_4bit(args)
    model = MultiCoCoForConditionalGeneration.from_pretrained(name, dtype=dtype, **kwargs)
    if model_args.thought_sweeps is not None:
        model.config.set_trained(thought_sweeps=model_args.thought_sweeps or None)
    for freeze, module in (
        (model_args.freeze_backbone, model.model.vision_tower),
        (model_args.freeze_mlp, model.model.multi_modal_projector),
        (model_args.freeze_llm, model.model.language_model),
        (model_args.freeze_llm, model.lm_head),
    ):
        if freeze:
            module.requires_grad_(False)
    if not model_args.lora_rank:
        return model
    if is_new and model_args.init_latents_from is not None:
        model.config.init_latents_from = model_args.init_latents_from  # how the base gets the same tokens again
    adapted = _add_adapters(model, kind, is_zero3=_is_zero3(args))
    # Not `_start`: adapters hold all that the thought tokens learned, so that the base as it is will do.
    adapted.peft_config["default"].base_model_name_or_path = model_args.model_name_or_path
    return adapted


def check_folders(model_args: ModelArguments, args: TrainingArguments) -> None:
    """
    Asks what lies where the run reads and writes, before it does either.

    Raises:
        ValueError: what is to be trained is adapters, new adapters would take the place of their base, or what is
            pushed would be both.
    """
    name, folder = model_args.model_name_or_path, Path(str(args.output_dir))
    if base_of(name) is not None:
        raise ValueError(
            f"`--model_name_or_path` {name} holds adapters, which are no model to begin with. Merge them first "
            f"(`python examples/merge_lora.py --adapters {name} --output_dir MERGED`), or go on with their run by "
            "`--resume_from_checkpoint last` and the same `--output_dir`."
        )
    base = Path(name).resolve()
    is_own_checkpoint = base.parent == folder.resolve() and base.name.startswith("checkpoint-")
    if model_args.lora_rank and (base == folder.resolve() or is_own_checkpoint):
        raise ValueError(
            f"`--output_dir` {folder} is where the base model of the adapters of `--lora_rank` lies, {name}, whose "
            "place they would take. Give another folder."
        )
    form, other = (ADAPTERS, MODEL) if model_args.lora_rank else (MODEL, ADAPTERS)
    old = [
        path.relative_to(folder) for place in (folder, *folder.glob("checkpoint-*")) for path in files_of(place, other)
    ]
    if old and args.process_index == 0:
        logger.warning(
            f"`--output_dir` {folder} holds {other} of an earlier run: {', '.join(map(str, old))}. They are removed "
            f"when this run saves {form} in their places. To keep them, give another folder."
        )
    if args.push_to_hub and files_of(folder, other):
        raise ValueError(
            f"`--push_to_hub` sends what lies in {folder}, also while the run lasts, and that is {other} of an "
            "earlier run too. Give another folder (and, if that run was pushed, another `--hub_model_id`)."
        )


def find_checkpoint(args: TrainingArguments) -> str | None:
    """
    The checkpoint that a run goes on from, if it does: for `last` the newest in `output_dir` that is whole.

    Raises:
        ValueError: a folder that is given is no checkpoint.
    """
    checkpoint = args.resume_from_checkpoint
    if checkpoint in ("true", "True", "last"):
        return last_complete_checkpoint(str(args.output_dir))
    if checkpoint is not None and not Path(checkpoint, "trainer_state.json").is_file():
        raise ValueError(
            f"`--resume_from_checkpoint` {checkpoint} is no checkpoint of a run: it has no trainer_state.json. Give a "
            "folder `checkpoint-*`, or `last` for the newest whole one in `--output_dir`."
        )
    return checkpoint


class Kind(NamedTuple):
    """The flags that say which weights are trained; of a whole model the last three say nothing."""

    lora_rank: int = 0
    lora_alpha: int | None = None
    lora_embeddings: str | None = None
    load_in_4bit: bool = False


def find_kind(model_args: ModelArguments, checkpoint: str | None) -> Kind:
    """
    The kind of weights that a run trains. A flag that may be left out is then that of the checkpoint it goes on from.

    Raises:
        ValueError: the checkpoint holds weights of another kind; says by which flags it would not.
    """
    found = _kind_of_checkpoint(checkpoint) if checkpoint else None
    kind = Kind()
    if model_args.lora_rank:
        kind = Kind(
            model_args.lora_rank,
            model_args.lora_alpha or 2 * model_args.lora_rank,
            model_args.lora_embeddings or (found and found.lora_embeddings) or "rows",
            model_args.load_in_4bit,
        )
    if found is not None and found != kind:
        names = [name for name in Kind._fields if getattr(found, name) != getattr(kind, name)]
        had, has = (", ".join(f"`--{name} {getattr(one, name)}`" for name in names) for one in (found, kind))
        raise ValueError(
            f"`--resume_from_checkpoint` {checkpoint} was trained with {had}, this run with {has}. Give the same "
            "flags, or begin anew in another `--output_dir`."
        )
    return kind


def _kind_of_checkpoint(checkpoint: str) -> Kind | None:
    if files_of(checkpoint, MODEL):  # also beside adapters, as earlier versions left both: `Trainer` loads the model
        return Kind()
    if not files_of(checkpoint, ADAPTERS):
        return None  # nothing is there, or what `Trainer` knows
    saved = read_json(checkpoint, ADAPTER_CONFIG_NAME)
    embeddings = "rows" if saved.get("trainable_token_indices") else "whole"
    return Kind(
        saved["r"], saved["lora_alpha"], embeddings, "quantization_config" in read_json(checkpoint, CONFIG_NAME)
    )


def _is_zero3(args: TrainingArguments) -> bool:
    config = getattr(args, "hf_deepspeed_config", None)
    return config is not None and config.is_zero3()


def _in_4bit(args: TrainingArguments) -> BitsAndBytesConfig:
    """QLoRA's own 4 bits, for the layers of the language model."""
    if _is_zero3(args):
        raise ValueError(
            "`--load_in_4bit` keeps whole layers on every device, which ZeRO-3 partitions. Use ds_configs/zero2.json."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        llm_int8_skip_modules=NOT_IN_4BIT,
    )


def _add_adapters(model: MultiCoCoForConditionalGeneration, kind: Kind, *, is_zero3: bool) -> Any:
    """The model with adapters in its language model, and what they learn of the embeddings: thought tokens are new."""
    from peft import LoraConfig, get_peft_model

    config = model.config
    if kind.lora_embeddings == "whole":
        learned: dict[str, Any] = {
            "modules_to_save": ["embed_tokens", "lm_head"],
            "ensure_weight_tying": config.tie_word_embeddings,
        }
    elif is_zero3 and not torch.cuda.is_available():
        raise ValueError(
            "`--lora_embeddings rows` under ZeRO-3 needs CUDA, which peft asks for there. Give `whole`, or use "
            "ds_configs/zero2.json."
        )
    else:  # a tied head follows; in another they stay as they are: these tokens are fed, never labels, never written
        rows = [config.start_latent_id, config.latent_token_id, config.end_latent_id]
        learned = {"trainable_token_indices": {"language_model.embed_tokens": rows}}
    lora = LoraConfig(
        r=kind.lora_rank,
        lora_alpha=kind.lora_alpha,
        target_modules=r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj",
        **learned,
    )
    return get_peft_model(model, lora)
