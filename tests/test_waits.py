"""No pass waits for the device: after the first read of the batch, nothing is asked of it before the loss."""

import pytest
import torch
from conftest import model_inputs
from reference import training
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.utils import GenerationMixin


WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")


class Waits(TorchDispatchMode):
    """Operators that make the host wait for a value, from the first call of the language model on."""

    def __init__(self):
        super().__init__()
        self.started, self.names = False, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.started and func._schema.name.removeprefix("aten::") in WAITS:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("padding", ["left", "aligned", "none"])
def test_passes_do_not_wait_for_the_device(model, make_batch, padding, checkpointing):
    same = dict(text_lengths=(4, 4), answer_lengths=(3, 3), images=((1,), (1,))) if padding == "none" else {}
    batch = model_inputs(make_batch(num_thoughts=(3, 3), padding="aligned" if padding == "none" else padding, **same))
    assert bool(batch["attention_mask"].all()) == (padding == "none")
    waits = Waits()
    hook = model.model.language_model.register_forward_pre_hook(lambda *args: setattr(waits, "started", True))
    with training(model, checkpointing), waits:
        model(**batch).loss.backward()
    hook.remove()
    assert waits.started
    assert waits.names == []


def test_waits_are_seen(model, make_batch):
    """The same count finds what a plain forward of transformers asks: the mask, and the dynamic rotary embedding."""
    batch = model_inputs(make_batch(num_thoughts=(0, 0), padding="left"))
    waits = Waits()
    model.model.language_model.register_forward_pre_hook(lambda *args: setattr(waits, "started", True))
    with training(model), waits:
        model(**batch)
    assert waits.names


@pytest.mark.filterwarnings("ignore")
def test_a_decoding_step_compiles_as_one_graph(model, make_batch, monkeypatch):
    """As `generate` does on a GPU with a static cache; a rotary embedding of the dynamic kind breaks the graph."""
    model.model.language_model.rotary_emb.rope_type = "default"
    batch = model_inputs(make_batch(num_thoughts=(2, 2), padding="left", answer_lengths=(0, 0)))
    batch.pop("labels")
    settings = dict(max_new_tokens=4, do_sample=False, cache_implementation="static")
    expected = model.generate(**batch, **settings)
    torch._dynamo.reset()
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda *args, **kwargs: True)
    compiled = torch.compile(model.__call__, backend="eager", fullgraph=True)  # raises where the graph would break
    monkeypatch.setattr(type(model), "get_compiled_call", lambda self, config: compiled)
    assert torch.equal(model.generate(**batch, **settings), expected)
