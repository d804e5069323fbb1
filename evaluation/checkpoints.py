"""Checkpoints as they lie in a folder or on the Hub: whole models, and adapters with their base. Knows no record.

A folder holds one of the two forms: transformers lays adapters that it finds beside a model over its weights, whoever
wrote them.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    is_bitsandbytes_available,
    is_peft_available,
    logging,
)

from ..compat import optional_file, read_json
from ..configuration_multicoco import MultiCoCoConfig
from ..modeling_multicoco import MultiCoCoForConditionalGeneration, add_thought_tokens
from ..processing_multicoco import MultiCoCoProcessor


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is

START = "_start"  # in a run's folder, its base with thought tokens; what begins with _ is not pushed to the Hub
UNFINISHED = "_unfinished"  # in a folder, what is to take its content's place
MODEL, ADAPTERS = "a whole model", "adapters"
# What transformers, Trainer and peft write of each form: of a user's own files nothing has these names.
FILES = {
    MODEL: re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"),
    ADAPTERS: re.compile(r"adapter_config\.json|adapter_model\.(safetensors|bin)"),
}


def files_of(folder: str | os.PathLike[str], form: str) -> list[Path]:
    """The files of a folder that make it `MODEL` or `ADAPTERS`, in the order of their names."""
    return sorted(path for path in Path(folder).glob("*") if path.is_file() and FILES[form].fullmatch(path.name))


def _has_model(name_or_path: str | os.PathLike[str]) -> bool:
    if os.path.isdir(name_or_path):
        return bool(files_of(name_or_path, MODEL))
    return any(optional_file(name_or_path, name) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))


def base_of(name_or_path: str | os.PathLike[str], base_model: str | os.PathLike[str] | None = None) -> str | None:
    """
    What the adapters of a folder or Hub repository are to be added to; `None` if it holds a whole model.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub name.
        base_model (`str` or `os.PathLike`, *optional*): Where the base is, if not where the adapters say.

    Raises:
        ValueError: it holds both, or the base is not there.
    """
    if optional_file(name_or_path, ADAPTER_CONFIG_NAME) is None:
        return None
    if _has_model(name_or_path):
        raise ValueError(
            f"`{name_or_path}` holds {MODEL} and {ADAPTERS}, which transformers lays over it, also if they were "
            f"trained on another. Move one of the two away: {ADAPTER_CONFIG_NAME} and adapter_model.safetensors, or "
            "the model's weights."
        )
    recorded = read_json(name_or_path, ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    places = [base_model or recorded]
    if base_model is None and recorded and Path(recorded).name == START:  # as runs wrote it before; they may be moved
        places += [Path(name_or_path, START), Path(name_or_path).absolute().parent / START]
    for place in filter(None, places):
        with contextlib.suppress(OSError):  # which includes a name that the Hub would not take
            if optional_file(place, CONFIG_NAME) is not None:
                return str(place)
    raise ValueError(
        f"The base model of the adapters in `{name_or_path}` is {str(places[0])!r}, but no checkpoint can be read "
        f"there. If it was moved, correct `base_model_name_or_path` in {ADAPTER_CONFIG_NAME}, or merge the two: "
        f"`python examples/merge_lora.py --adapters {name_or_path} --base_model FOLDER --output_dir MERGED`. The "
        "run's settings.json names as `model_name_or_path` what it began with."
    )


def load_checkpoint(
    name_or_path: str | os.PathLike[str], *, base_model: str | os.PathLike[str] | None = None, **kwargs: Any
) -> MultiCoCoForConditionalGeneration:
    """
    An ordinary model of any checkpoint: a whole one as it is; adapters of `train.py --lora_rank` added to their base,
    in float32, with its thought tokens and what they were trained with. What was trained in 4 bits is added to the
    weights that 4 bits stand for.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub name.
        base_model (`str` or `os.PathLike`, *optional*): What adapters are added to, if not what they name.
        kwargs: As of `from_pretrained`. With adapters, `dtype` `"auto"` (the default) is that of the base; bfloat16
            if they were trained in 4 bits.

    Raises:
        ValueError: the folder holds both forms, the base is not there, or a package is missing.

    Example:

    ```python
    >>> from multicoco import load_checkpoint

    >>> model = load_checkpoint("out", device_map="auto")  # doctest: +SKIP
    ```"""
    base = base_of(name_or_path, base_model)
    if base is None:
        if base_model is not None:
            raise ValueError(
                f"`base_model` is {base_model}, but `{name_or_path}` holds no {ADAPTER_CONFIG_NAME}: it is no folder "
                "of adapters. Leave `base_model` out, or give the folder that train.py --lora_rank wrote."
            )
        return MultiCoCoForConditionalGeneration.from_pretrained(name_or_path, **kwargs)
    config = MultiCoCoConfig.from_pretrained(name_or_path)
    in_4bit = getattr(config, "quantization_config", None)
    for extra, is_there in (("peft", is_peft_available()), ("qlora", not in_4bit or is_bitsandbytes_available())):
        if not is_there:
            raise ValueError(f"The adapters in `{name_or_path}` need a package: `pip install 'multicoco[{extra}]'`.")
    from peft import PeftModel

    tokenizer = MultiCoCoProcessor.from_pretrained(name_or_path).tokenizer
    dtype = kwargs.pop("dtype", "auto")
    if in_4bit:
        # In the type that they were trained in, of which 4 bits were made.
        kwargs |= {"dtype": config.dtype, "quantization_config": AutoQuantizationConfig.from_dict(in_4bit)}
    model = MultiCoCoForConditionalGeneration.from_pretrained(base, **{"dtype": "auto", **kwargs})
    own = torch.bfloat16 if in_4bit else model.dtype
    if in_4bit:
        model = model.dequantize()
    add_thought_tokens(model, tokenizer, getattr(config, "init_latents_from", None))  # nothing, if the base has them
    _cast(model, torch.float32)
    model = PeftModel.from_pretrained(model, os.fspath(name_or_path)).merge_and_unload()
    model.config.set_trained(**config.trained)
    _cast(model, own if dtype in ("auto", None) else getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return model


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Not `model.to(dtype)`, which rounds the frequencies of the rotary embedding too; loading does not."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


@contextlib.contextmanager
def replace_checkpoint(folder: str | os.PathLike[str], *, is_writer: bool = True) -> Iterator[Path]:
    """
    A folder inside `folder` to write a checkpoint to. When the block has ended, the weights of either form that lay in
    `folder` go and its files take their places, the weights last. If the block fails, for a full disk maybe, `folder`
    is as it was: it never holds half of a model.

    Args:
        folder (`str` or `os.PathLike`): Where the checkpoint is to be.
        is_writer (`bool`, defaults to `True`): Whether this process moves the files; of several, one does.
    """
    folder = Path(folder)
    unfinished = folder / UNFINISHED
    if not is_writer:
        yield unfinished
        return
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        new = sorted(unfinished.iterdir(), key=lambda path: any(form.fullmatch(path.name) for form in FILES.values()))
        if new:  # ranks that keep their shards of a model to themselves write nothing here
            remove(folder, *FILES, kept={path.name for path in new})
        for path in new:
            place = folder / path.name
            if place.is_dir():  # of DeepSpeed, where it writes shards
                shutil.rmtree(place)
            os.replace(path, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def remove(folder: str | os.PathLike[str], *forms: str, kept: Collection[str] = ()) -> None:
    """
    Removes the weights of these forms from a folder, and says which.

    Args:
        folder (`str` or `os.PathLike`): Of a checkpoint.
        forms (`str`): `MODEL` or `ADAPTERS`.
        kept (`Collection[str]`, *optional*): Names that are written anew at once, so that nothing needs to be said.
    """
    for form in forms:
        old = files_of(folder, form)
        for path in old:
            path.unlink()
        if gone := [path.name for path in old if path.name not in kept]:
            logger.warning(f"`{folder}` held {form} of an earlier run: {', '.join(gone)}. They are removed.")
