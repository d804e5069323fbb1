"""Chain of Continuous Thought for vision-language models, on InternVL3.

What is public is what this file names. Importing it registers the model with transformers' Auto classes; what training
and scoring need (`datasets`, tables, pictures) is imported when it is asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration_multicoco import (
    IMAGE_CONTEXT_TOKEN,
    IMAGE_PLACEHOLDER,
    MODES,
    OWN,
    TURN_END_TOKEN,
    TURN_START_TOKEN,
    MultiCoCoConfig,
    chat_template,
)
from .modeling_internvl_chat import InternVLChatModel
from .modeling_multicoco import MultiCoCoForConditionalGeneration, add_thought_tokens, export_internvl
from .processing_multicoco import MultiCoCoProcessor


if TYPE_CHECKING:
    from .curriculum import CurriculumArguments, final_answer
    from .data_multicoco import ReasoningCollator, StageDataset
    from .evaluation.checkpoints import load_checkpoint, replace_checkpoint
    from .evaluation.intervals import mcnemar, mean_interval, paired_bootstrap, wilson_interval
    from .records import load_records, question_text, turns
    from .trainer_callbacks import AnswerCallback, CompletionCallback, CurriculumCallback, last_complete_checkpoint
    from .training.memory import BatchShape, estimate_memory

__version__ = "0.1.0"
__all__ = [
    "AnswerCallback",
    "BatchShape",
    "CompletionCallback",
    "CurriculumArguments",
    "CurriculumCallback",
    "IMAGE_CONTEXT_TOKEN",
    "IMAGE_PLACEHOLDER",
    "MODES",
    "InternVLChatModel",
    "MultiCoCoConfig",
    "MultiCoCoForConditionalGeneration",
    "MultiCoCoProcessor",
    "OWN",
    "TURN_END_TOKEN",
    "TURN_START_TOKEN",
    "ReasoningCollator",
    "StageDataset",
    "add_thought_tokens",
    "chat_template",
    "estimate_memory",
    "export_internvl",
    "final_answer",
    "last_complete_checkpoint",
    "load_checkpoint",
    "load_records",
    "mcnemar",
    "mean_interval",
    "paired_bootstrap",
    "question_text",
    "replace_checkpoint",
    "turns",
    "wilson_interval",
]
_LAZY = {
    "curriculum": ("CurriculumArguments", "final_answer"),
    "data_multicoco": ("ReasoningCollator", "StageDataset"),
    "evaluation.checkpoints": ("load_checkpoint", "replace_checkpoint"),
    "evaluation.intervals": ("mcnemar", "mean_interval", "paired_bootstrap", "wilson_interval"),
    "records": ("load_records", "question_text", "turns"),
    "trainer_callbacks": ("AnswerCallback", "CompletionCallback", "CurriculumCallback", "last_complete_checkpoint"),
    "training.memory": ("BatchShape", "estimate_memory"),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}

AutoConfig.register("multicoco", MultiCoCoConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(MultiCoCoConfig, MultiCoCoForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MultiCoCoConfig, MultiCoCoProcessor, exist_ok=True)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
