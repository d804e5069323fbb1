"""The model that is trained: loaded, with its thought tokens, frozen parts and adapters. Knows no data."""

from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ..configuration_multicoco import MultiCoCoConfig
from ..modeling_multicoco import MultiCoCoForConditionalGeneration, add_thought_tokens
from ..processing_multicoco import MultiCoCoProcessor
from .arguments import ModelArguments


def load_model(
    model_args: ModelArguments, args: TrainingArguments, processor: MultiCoCoProcessor
) -> MultiCoCoForConditionalGeneration:
    """
    The model with its thought tokens. A checkpoint that lacks them gets them once, on one process and unsharded, in
    `output_dir/_start`, before DeepSpeed partitions anything; then all ranks load that. peft wraps it for `lora_rank`.
    """
    name: str | Path = model_args.model_name_or_path
    if MultiCoCoConfig.from_pretrained(name).latent_token_id is None:
        start = Path(str(args.output_dir)) / "_start"  # what begins with _ is not pushed to the Hub
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
