"""Every touch on the inside of a library, and what ranks ask of each other. Knows modules and processes, no InternVL.

Each function says in its last line what upstream could offer instead.
"""

import contextlib
import inspect
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from transformers.integrations.fsdp import is_fsdp_managed_module


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """
    Whether ranks gather parameters from each other, so that all must call all modules equally often.

    Upstream: one question for ZeRO-3 and both FSDPs.
    """
    return world_size() > 1 and (hasattr(next(model.parameters()), "ds_id") or is_fsdp_managed_module(model))


def most_of_all_ranks(count: int, device: torch.device) -> int:
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def gathered(weight: nn.Parameter):
    """
    The whole of a parameter that ZeRO-3 has partitioned; what is written to it on rank 0 reaches all.

    Upstream: a context that does nothing where nothing is partitioned.
    """
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


@contextlib.contextmanager
def settled_rotary(language_model: nn.Module, position_ids: torch.LongTensor | None):
    """
    InternVL3's rotary embedding is of the dynamic kind: each call asks the device for the largest position, to change
    its frequencies beyond `max_position_embeddings`. Within, it is the plain one, so this asks once for all passes.

    Upstream: frequencies that are chosen on the host, or by the length of the cache.
    """
    rotary = language_model.rotary_emb
    limit = getattr(rotary, "original_max_seq_len", None)
    is_dynamic = position_ids is not None and getattr(rotary, "rope_type", None) == "dynamic"
    settled = is_dynamic and rotary.max_seq_len_cached == limit and int(position_ids.max()) < limit
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
    function = inspect.unwrap(layer._gradient_checkpointing_func)  # LlamaFactory wraps it
    return getattr(function, "keywords", {}).get("use_reentrant") is not False


@contextlib.contextmanager
def checkpointed_with_cache(layers: Sequence[nn.Module]):
    """
    Inside, checkpointed layers keep the cache that they are given; else they drop it, with one warning. The flag is
    read in the forward only, and a `PassCache` is safe to replay.

    Upstream: the flag as a property of the cache, which is what knows whether it can be replayed.
    """
    checkpointed = [layer for layer in layers if layer.gradient_checkpointing and layer.training]
    for layer in checkpointed:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in checkpointed:
            layer._can_checkpoint_with_cache = False
