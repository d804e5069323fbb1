"""Chain of Continuous Thought for vision-language models, on InternVL3."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_multicoco import MultiCoCoConfig
from .modeling_multicoco import (
    InternVLChatModel,
    MultiCoCoForConditionalGeneration,
    add_thought_tokens,
    export_internvl,
)
from .processing_multicoco import MultiCoCoProcessor


__version__ = "0.1.0"
__all__ = [
    "InternVLChatModel",
    "MultiCoCoConfig",
    "MultiCoCoForConditionalGeneration",
    "MultiCoCoProcessor",
    "add_thought_tokens",
    "export_internvl",
]

AutoConfig.register("multicoco", MultiCoCoConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(MultiCoCoConfig, MultiCoCoForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MultiCoCoConfig, MultiCoCoProcessor, exist_ok=True)
