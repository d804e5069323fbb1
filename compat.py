"""Every touch on the inside of a library, and what ranks ask of each other. Knows modules and pictures, no InternVL.

Each function that touches one says in its last line what upstream could offer instead.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeGuard

import numpy as np
from huggingface_hub.utils import httpx  # as it stands there: `import httpx` would be asked of who loads remote code
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_utils import is_pil_image
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file, is_torch_available


if is_torch_available():  # a configuration and a tokenizer load without it
    import torch
    import torch.distributed as dist
    from torch import nn
    from transformers.integrations.fsdp import is_fsdp_managed_module
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What a picture that cannot be fetched raises, none of it an `OSError`. Upstream: `load_image` that raises one.
DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (httpx.HTTPError, httpx.InvalidURL)
# What auto classes, and programs that call them, hand to every `from_pretrained`, to a processor's too. Upstream: auto
# classes that keep to themselves what is theirs.
LOADER_KWARGS = ["trust_remote_code", "code_revision", "use_fast", "backend", "dtype", "torch_dtype", "device_map"]
LOADER_KWARGS += ["attn_implementation", "config", "repo_type", "user_agent", "_from_auto", "_commit_hash"]
# Arguments of `from_pretrained` that are the tokenizer's. Upstream: a list of them.
TOKENIZER_KWARGS = ["padding_side", "truncation_side", "model_max_length", "split_special_tokens"]
TOKENIZER_KWARGS += ["clean_up_tokenization_spaces", "extra_special_tokens", "additional_special_tokens"]
TOKENIZER_KWARGS += ["add_bos_token", "add_eos_token", "add_prefix_space", "fix_mistral_regex", "from_slow", "legacy"]
TOKENIZER_KWARGS += ["gguf_file", "tokenizer_type", "verbose"]
TOKENIZER_KWARGS += PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
# Of a picture that was decoded smaller: its size before, and where that lies in it. Its copies do not inherit it.
_DRAFT = "draft_of"


def world_size() -> int:
    """The number of processes of this run; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def leave() -> None:
    """
    Ends a rank whose work is done; nothing in a run of one process.

    No rank leaves while another still writes. On gloo the process then ends without destructors: now and then one of
    a thread of torch aborts ("terminate called without an active exception"), and a run that was saved whole would
    be told to have failed.

    Upstream: threads of gloo that are joined when their group is destroyed.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    if dist.get_backend() != "gloo":
        dist.destroy_process_group()
        return
    atexit._run_exitfuncs()  # of loggers, as at any other end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def leave_out_shm_kernel() -> None:
    """
    DeepSpeed on CPU builds a kernel for shared memory, which needs a compiler and which gloo does without.

    Upstream: a failed build that falls back to gloo.
    """
    importlib.import_module("deepspeed")
    backend: Any = sys.modules["deepspeed.comm.torch"]
    backend.build_shm_op = lambda: None


def is_sharded(model: nn.Module) -> bool:
    """
    Whether ranks gather parameters from each other, so that all must call all modules equally often.

    Upstream: one question for ZeRO-3 and both FSDPs.
    """
    return world_size() > 1 and (hasattr(next(model.parameters()), "ds_id") or is_fsdp_managed_module(model))


def most_of_all_ranks(count: int, device: torch.device) -> int:
    """The largest `count` that a rank gives; a small all-reduce that each must join."""
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def is_finite(model: nn.Module, device: torch.device) -> bool:
    """
    Whether all parameters of a model are numbers, on all ranks; each must call it. Of what is sharded every rank looks
    at its own part. It waits for the device.

    Upstream: a model that says so, however it is sharded.
    """
    defects = torch.zeros((), device=device)
    for param in model.parameters():
        own: Any = getattr(param, "ds_tensor", param)
        own = own.to_local() if hasattr(own, "to_local") else own
        if own.is_floating_point():
            defects += (~torch.isfinite(own.detach())).any().to(defects)
    if world_size() > 1:
        dist.all_reduce(defects)
    return not defects.item()


def gathered(weight: torch.Tensor) -> AbstractContextManager[Any]:
    """
    The whole of a parameter that ZeRO-3 has partitioned; what is written to it on rank 0 reaches all.

    Upstream: a context that does nothing where nothing is partitioned.
    """
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    deepspeed: Any = importlib.import_module("deepspeed")  # no `import`: remote code would ask it of everyone
    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


@contextlib.contextmanager
def settled_rotary(language_model: nn.Module, position_ids: torch.Tensor | None) -> Iterator[None]:
    """
    InternVL3's rotary embedding is of the dynamic kind: each call asks the device for the largest position, to change
    its frequencies beyond `max_position_embeddings`. Within, it is the plain one, so this asks once for all passes.

    Upstream: frequencies that are chosen on the host, or by the length of the cache.
    """
    rotary: Any = language_model.rotary_emb
    limit = getattr(rotary, "original_max_seq_len", 0)
    is_plain = getattr(rotary, "rope_type", None) == "dynamic" and rotary.max_seq_len_cached == limit
    settled = is_plain and position_ids is not None and int(position_ids.max()) < limit
    if settled:
        rotary.rope_type = "default"
    try:
        yield
    finally:
        if settled:
            rotary.rope_type = "dynamic"


def is_reentrant(layer: nn.Module) -> bool:
    """
    Whether the checkpointing function of a layer is not known to be non-reentrant, also when it is wrapped.

    Upstream: a property of the model that says how it is checkpointed.
    """
    checkpointing: Any = layer._gradient_checkpointing_func
    function = inspect.unwrap(checkpointing)  # LlamaFactory wraps it
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


@contextlib.contextmanager
def checkpointed_with_cache(layers: nn.ModuleList) -> Iterator[None]:
    """
    Inside, checkpointed layers keep the cache that they are given; else they drop it, with one warning. The flag is
    read in the forward only, and a `PassCache` is safe to replay.

    Upstream: the flag as a property of the cache, which is what knows whether it can be replayed.
    """
    checkpointed: list[Any] = [layer for layer in layers if layer.gradient_checkpointing and layer.training]
    for layer in checkpointed:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in checkpointed:
            layer._can_checkpoint_with_cache = False


def only_loss_is_read() -> bool:
    """
    Whether a `Trainer` evaluates this forward and drops all but its loss, as it does without `compute_metrics`; never
    for one with a `compute_loss` of its own, which may read more. It does not tell the model, so its call is found.

    Upstream: `skip_logits`, which `Trainer.prediction_step` hands to the model beside the liger kernels only.
    """
    library: Any = sys.modules.get("transformers.trainer")
    frame: Any = None if library is None or torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None and frame.f_code is not library.Trainer.prediction_step.__code__:
        frame = frame.f_back
    if frame is None:
        return False
    is_stock = type(frame.f_locals["self"]).compute_loss is library.Trainer.compute_loss
    return is_stock and bool(frame.f_locals["prediction_loss_only"])


def shifts_smoothed_labels(model_class: type) -> None:
    """
    Tells `Trainer` that the labels of a class are those of the next token, which it asks only by the class's name, and
    only of transformers' own: with `label_smoothing_factor` it would let each position predict itself.

    Upstream: a `LabelSmoother` that is told `Trainer._loss_shifts_labels`, which is known.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"multicoco:{model_class.__name__}"] = model_class.__name__


def is_2d(attention_mask: object) -> TypeGuard[torch.Tensor]:
    """
    Whether an attention mask is one number for each token. transformers' models also take one for each pair, and one
    for each kind of layer.

    Upstream: a type of its own for each.
    """
    return isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2


def attention_of(config: PreTrainedConfig) -> str:
    """
    The attention implementation that the model of a configuration runs with.

    Upstream: a public name for what `set_attn_implementation` sets.
    """
    return config._attn_implementation


@contextlib.contextmanager
def saved_as_registered(model: PreTrainedModel, save_directory: str | os.PathLike[str]) -> Iterator[type]:
    """
    The class by which a saved model is loaded again: its own, or for one that a library makes of ours (FSDP2) or a
    user in his program, the nearest that was registered for an auto class. Inside, `save_pretrained` copies its files.

    Upstream: `save_pretrained` that looks for the registered class along the bases.
    """
    model_class = type(model)
    known = next(base for base in model_class.__mro__ if "_auto_class" in vars(base))
    if known is model_class:
        yield known
        return
    os.makedirs(save_directory, exist_ok=True)
    custom_object_save(known, save_directory)
    model_class._auto_class = None  # so that the file of this class is not copied
    try:
        yield known
    finally:
        del model_class._auto_class


def pixel_table(image_processor: Any, kwargs: dict[str, Any]) -> np.ndarray[Any, Any]:
    """
    The numbers `(3, 256)` that a library's image processor, called with `kwargs`, makes of the bytes of each channel.

    Upstream: rescaling and normalising in one pass, as its torchvision back end does, with the bits of two.
    """
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    settings = {name: kwargs.get(name, getattr(image_processor, name)) for name in names}
    table: Any = np.tile(np.arange(256, dtype=np.uint8), (3, 1, 1))
    if settings["do_rescale"]:
        table = image_processor.rescale(table, settings["rescale_factor"])
    if settings["do_normalize"]:
        table = image_processor.normalize(table, settings["image_mean"], settings["image_std"])
    return np.ascontiguousarray(table[:, 0])


class TilesInPillow:
    """
    For a class of the library's that cuts tiles: a picture stays in Pillow until it is cut, and one look-up makes each
    byte a number. Settings for which `grid(size, settings)` is `None`, and arrays, go the library's own way.

    Upstream: a Pillow back end that makes no array before it has resized.
    """

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> Any:
        """The library's array `(channels, height, width)`; a picture that is RGB as it is."""
        is_rgb = is_pil_image(image) and image.mode == "RGB" and image.info.get("transparency") is None
        return image if is_rgb else super().process_image(image, *args, **kwargs)  # type: ignore[misc]

    def _preprocess(self: Any, images: list[Any], *args: Any, **settings: Any) -> BatchFeature:
        drafts: list[Any] = [is_pil_image(image) and getattr(image, _DRAFT, (image.size, None)) for image in images]
        grids: list[Any] = [draft and self.grid(draft[0], settings) for draft in drafts]
        if args or not grids or not all(grids):
            arrays = [np.moveaxis(np.array(image), -1, 0) if is_pil_image(image) else image for image in images]
            return super()._preprocess(arrays, *args, **settings)  # type: ignore[misc]
        table, height, width = pixel_table(self, settings), settings["size"].height, settings["size"].width
        counts = [columns * rows + (columns * rows > 1) for columns, rows in grids]
        tiles = np.empty((sum(counts), 3, height, width), table.dtype)
        free = iter(tiles)
        for image, (_, box), grid, count in zip(images, drafts, grids, counts, strict=True):
            for columns, rows in [grid] if count == 1 else [grid, (1, 1)]:  # the tiles, then the thumbnail
                canvas = image.resize((columns * width, rows * height), settings["resample"], box)
                planes = [np.asarray(plane) for plane in canvas.split()]
                for y, x in itertools.product(range(0, canvas.height, height), range(0, canvas.width, width)):
                    for tile, numbers, plane in zip(next(free), table, planes, strict=True):
                        part = plane[y : y + height, x : x + width]
                        if table.dtype == part.dtype:  # bytes stay bytes
                            tile[...] = part
                        else:
                            np.take(numbers, part, out=tile, mode="clip")  # by default it goes through a copy of `out`
        data = {"pixel_values": tiles if settings["return_tensors"] else list(tiles), "num_patches": counts}
        return BatchFeature(data, tensor_type=settings["return_tensors"])

    def draft(self: Any, image: Any, **kwargs: Any) -> Any:
        """
        An opened file as it is; a JPEG, with `draft_jpeg`, decoded at an eighth, a quarter or half of its size if that
        is not below what its tiles need. Tiles are counted by its full size.

        Args:
            kwargs: Settings of a call that win over the processor's own.
        """
        names, full = self.valid_kwargs.__annotations__, image.size
        settings = self._standardize_kwargs(**{name: kwargs.get(name, getattr(self, name)) for name in names})
        grid = self.grid(full, settings) if settings["draft_jpeg"] and 0 not in full else None
        if grid is None:
            return image
        drafted = image.draft(None, (grid[0] * settings["size"].width, grid[1] * settings["size"].height))
        if drafted is None or image.size == full:
            return image
        image = image.convert("RGB")
        setattr(image, _DRAFT, (full, drafted[1]))
        return image


def optional_file(
    name_or_path: str | os.PathLike[str], filename: str, *, needs_hub: bool = True, **hub_kwargs: Any
) -> str | None:
    """
    The path of a file of a checkpoint, in a folder or from the Hub; `None` if there is no such file, and without
    `needs_hub` also if the Hub cannot be asked for it.

    Upstream: `cached_file` with a public way to say that a file may be missing.
    """
    return cached_file(
        name_or_path,
        filename,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=needs_hub,
        _raise_exceptions_for_gated_repo=needs_hub,
        **hub_kwargs,
    )


def read_text(name_or_path: str | os.PathLike[str], filename: str, **hub_kwargs: Any) -> str | None:
    """The text of a file of a checkpoint; `None` if there is no such file."""
    path = optional_file(name_or_path, filename, **hub_kwargs)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return file.read()


def read_json(name_or_path: str | os.PathLike[str], filename: str, **hub_kwargs: Any) -> dict[str, Any]:
    """The content of a JSON file of a checkpoint; empty if there is no such file."""
    content: dict[str, Any] = json.loads(read_text(name_or_path, filename, **hub_kwargs) or "{}")
    return content


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """
    What each flag of a parser does.

    Upstream: argparse has no public way to ask.
    """
    return parser._option_string_actions


def add_to_log(state: Any, logs: dict[str, Any], values: dict[str, Any]) -> None:
    """
    Adds, in a callback's `on_log`, to what is reported (`logs`) and to what is kept, of which the history has a copy.

    Upstream: callbacks that are asked before the history is written.
    """
    logs.update(values)
    state.log_history[-1].update(values)


def delete_first(checkpoint: str | os.PathLike[str]) -> None:
    """
    Makes a checkpoint the one that `save_total_limit` deletes before all others: it goes by the time of the folder.

    Upstream: a list of checkpoints that count.
    """
    os.utime(checkpoint, (0, 0))


def put_first(trainer: Any, callbacks: Sequence[Any]) -> None:
    """
    Moves callbacks before the trainer's own, so that what they add to the log reaches progress bar and `report_to`.

    Upstream: a place in the order for `callbacks=`.
    """
    own = [callback for callback in callbacks if isinstance(callback, type)]
    trainer.callback_handler.callbacks.sort(key=lambda one: one not in callbacks and type(one) not in own)


def forget_best(scheduler: Any) -> None:
    """
    Makes a schedule that follows evaluations (`reduce_lr_on_plateau`, `greedy`) compare anew, with the rate as it is;
    to any other it does nothing.

    Upstream: a public name for it that leaves the rate.
    """
    if hasattr(scheduler, "num_bad_epochs"):
        rates = [group["lr"] for group in scheduler.optimizer.param_groups]
        scheduler._reset()
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def set_scheduler(trainer: Any, scheduler: Any) -> None:
    """
    Gives a trainer, in its `create_scheduler`, a learning rate schedule as if it had made it, so that it steps it.

    Upstream: a scheduler that the method returns.
    """
    trainer.lr_scheduler, trainer._created_lr_scheduler = scheduler, True
