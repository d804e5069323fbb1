"""Every optimizer that Trainer offers, after a reset: a new one of its class on the same weights, or refused.

Most need packages that the gate does not have; `make test-optimizers` has them.
"""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from multicoco import MultiCoCoConfig
from multicoco.curriculum import CurriculumArguments
from multicoco.trainer_callbacks import CurriculumCallback, check_can_be_reset, reset_optimizer


BITSANDBYTES = (
    "adamw_bnb_8bit adamw_8bit ademamix ademamix_8bit lion_32bit lion_8bit paged_adamw_32bit paged_adamw_8bit "
    "paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit "
    "rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit"
)
PACKAGES = {  # of the optimizers that are made here
    None: "adamw_torch adamw_torch_fused adafactor sgd adagrad rmsprop",
    "bitsandbytes": BITSANDBYTES,
    "torchao": "adamw_torch_4bit adamw_torch_8bit",
    "schedulefree": "schedule_free_radam schedule_free_adamw schedule_free_sgd",
    "apollo_torch": "apollo_adamw apollo_adamw_layerwise",
    "galore_torch": "galore_adamw galore_adafactor galore_adamw_layerwise",
    "grokadamw": "grokadamw",
    "optimi": "stable_adamw",
}
MADE = {name: package for package, names in PACKAGES.items() for name in names.split()}
REFUSED = {"lomo": "lomo_optim"}
NOT_MADE = {
    "adalomo": "its constructor asks for CUDA; refused as lomo is",
    "galore_adamw_8bit": "its step asks for CUDA, its constructor for an old bitsandbytes",
    "galore_adamw_8bit_layerwise": "as galore_adamw_8bit",
    "galore_adafactor_layerwise": "Trainer makes it with settings that it refuses",
    "adamw_torch_xla": "needs a TPU",
    "adamw_torch_npu_fused": "needs an Ascend NPU",
    "adamw_anyprecision": "torchdistx is on no index",
}
# Their state is in no checkpoint (transformers), or comes back under other keys (grokadamw).
NOT_RESUMED = {"apollo_adamw_layerwise", "galore_adamw_layerwise", "grokadamw"}


class Model(nn.Module):
    """Two matrices of more than 4,096 elements, from which on states are of 8 bit, and what is not decayed."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 80), nn.LayerNorm(80), nn.Linear(80, 64)

    def forward(self, x, labels=None):
        return (self.second(self.norm(torch.tanh(self.first(x)))) - 1).square().mean()


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the optimizer of this name as Trainer does, in accelerate's wrapper, and the step that it takes."""

    def made(name, model, optim_args=None):
        is_low_rank = name.startswith(("galore", "apollo"))
        args = TrainingArguments(
            output_dir=str(tmp_path),
            optim=name,
            optim_args="rank=4,update_proj_gap=2" if is_low_rank else optim_args,
            optim_target_modules=["first", "second"] if is_low_rank else None,
            learning_rate=1e-2,
            weight_decay=0.1,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=args)
        optimizer = trainer.accelerator.prepare(trainer.create_optimizer())
        return optimizer, functools.partial(step, model, optimizer)

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao's step, for a minute
    return made


def step(model, optimizer, seed):
    model.train()
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
    model(x).backward()
    optimizer.step()
    optimizer.zero_grad()


def inside(optimizer):
    """The optimizers themselves, without accelerate's wrapper: one, or of a layer-wise one one for each weight."""
    own = optimizer.optimizer
    return list((getattr(own, "optimizer_dict", None) or {None: own}).values())


def plain(value, places):
    """A value of the state or of a group as what `==` compares; parameters by their place, tensors bit by bit."""
    if isinstance(value, nn.Parameter):
        return ("parameter", places[value])
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):  # torchao's
        names, context = value.__tensor_flatten__()
        return {**{name: plain(getattr(value, name), places) for name in names}, "context": repr(context)}
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {plain(key, places): plain(each, places) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each, places) for each in value]
    if hasattr(value, "__dict__") and not isinstance(value, type):  # projectors
        return {name: plain(each, places) for name, each in vars(value).items()}
    return value


def learned(model, optimizer):
    """All state and all settings but the learning rates, and what a scheduler notes of them."""
    places = {param: place for place, param in enumerate(model.parameters())}
    skipped = ("lr", "initial_lr")
    return [
        {
            "state": {places[param]: plain(dict(state), places) for param, state in each.state.items()},
            "groups": [
                {name: plain(value, places) for name, value in group.items() if name not in skipped}
                for group in each.param_groups
            ],
        }
        for each in inside(optimizer)
    ]


def rates(optimizer):
    return [float(group["lr"]) for each in inside(optimizer) for group in each.param_groups]


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def copy_of(model):
    other = Model()
    other.load_state_dict(model.state_dict())
    return other


def test_every_optimizer_of_trainer_is_in_one_table():
    names = [*MADE, *REFUSED, *NOT_MADE]
    assert len(names) == len(set(names))
    assert set(names) == {name.value for name in OptimizerNames}


@pytest.mark.parametrize("name", MADE)
def test_a_reset_makes_a_new_one_on_the_same_weights(make, tmp_path, name):
    """Three steps under a schedule and a reset; then state and settings, two steps, and a checkpoint of them."""
    if MADE[name]:
        pytest.importorskip(MADE[name], reason=f"--optim {name} needs the package {MADE[name]}")
    torch.manual_seed(0)
    model = Model()
    optim_args = "momentum=0.9,dampening=0.5" if name == "sgd" else None
    optimizer, take = make(name, model, optim_args)
    check_can_be_reset(optimizer)
    scheduler = LambdaLR(optimizer.optimizer, lambda step: 1 / (1 + step))
    for seed in range(3):
        take(seed)
        scheduler.step()
    before = rates(optimizer)
    reset_optimizer(optimizer)
    assert rates(optimizer) == before

    other = copy_of(model)
    fresh, take_fresh = make(name, other, optim_args)
    for each, of_reset in zip(inside(fresh), inside(optimizer), strict=True):
        for group, given in zip(each.param_groups, of_reset.param_groups, strict=True):
            group["lr"] = copy.deepcopy(given["lr"])
    found, expected = learned(model, optimizer), learned(other, fresh)
    if name == "stable_adamw":  # None until the first step, which chooses by the device
        for each in (*found, *expected):
            for group in each["groups"]:
                assert not group.pop("triton")
    assert found == expected
    for seed in (7, 8):
        take(seed)
        take_fresh(seed)
        assert_equal(weights(model), weights(other))
    assert learned(model, optimizer) == learned(other, fresh)

    if name not in NOT_RESUMED:
        resumed = copy_of(model)
        again, take_again = make(name, resumed, optim_args)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=False))
        take(9)
        take_again(9)
        assert_equal(weights(resumed), weights(model))
    scheduler.step()
    assert rates(optimizer) == before or not name.endswith("layerwise")  # whose schedule is none
    assert name.endswith("layerwise") or rates(optimizer) < before


@pytest.mark.parametrize("name", [name for name in MADE if name.startswith("schedule_free")])
def test_a_mean_of_weights_is_kept_whether_or_not_an_evaluation_came_before(make, name):
    pytest.importorskip("schedulefree", reason=f"--optim {name} needs the package schedulefree")
    found = []
    for is_evaluated in (False, True):
        torch.manual_seed(0)
        model = Model()
        optimizer, take = make(name, model)
        for seed in range(8):
            take(seed)
        if is_evaluated:
            optimizer.eval()
            mean = weights(model)
        reset_optimizer(optimizer)
        found.append(weights(model))
    assert_equal(found[1], mean)
    assert_equal(found[0], mean)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_ademamix_8bit", "paged_lion_32bit"])
def test_paged_memory_is_used_again(make, name):
    """bitsandbytes never gives it back. Here there is none: the states are only said to be paged."""
    pytest.importorskip("bitsandbytes", reason=f"--optim {name} needs the package bitsandbytes")
    torch.manual_seed(0)
    model = Model()
    optimizer, take = make(name, model)
    take(0)
    buffers = {id(state["state1"]): state["state1"] for state in optimizer.state.values()}
    for buffer in buffers.values():
        buffer.is_paged = True
    reset_optimizer(optimizer)
    assert {id(state["state1"]) for state in optimizer.state.values()} == set(buffers)
    for buffer in buffers.values():
        buffer.is_paged = False
    other = copy_of(model)
    fresh, take_fresh = make(name, other)
    for seed in (7, 8):
        take(seed)
        take_fresh(seed)
    assert_equal(weights(model), weights(other))
    assert learned(model, optimizer) == learned(other, fresh)


class Odd(torch.optim.SGD):
    """No other one can be made of it from what it shows."""

    def __init__(self, params, secret):
        super().__init__(params, lr=secret)


def test_an_optimizer_of_ones_own_is_reset_or_refused():
    class Counting(torch.optim.Optimizer):
        """Its count is a setting that its constructor does not take; its sum is there from the start."""

        def __init__(self, params, lr=1.0, start=2.0):
            super().__init__(params, {"lr": lr, "start": start, "count": 0})
            self.state.update({param: {"sum": start} for group in self.param_groups for param in group["params"]})

    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": weights[:1], "lr": 0.5}, {"params": weights[1:], "start": 3.0}]
    optimizer = Counting(groups, start=4.0)
    for group in optimizer.param_groups:
        group["count"] = 7
    for state in optimizer.state.values():
        state.update(sum=9.0, more=torch.ones(2))
    check_can_be_reset(optimizer)
    reset_optimizer(optimizer)
    assert [(group["lr"], group["start"], group["count"]) for group in optimizer.param_groups] == [
        (0.5, 4.0, 0),
        (1.0, 3.0, 0),
    ]
    assert [optimizer.state[weight] for weight in weights] == [{"sum": 4.0}, {"sum": 4.0}]
    with pytest.raises(ValueError, match=r"Odd cannot be reset(.|\n)*secret(.|\n)*--reset_optimizer_every never"):
        check_can_be_reset(Odd(weights, secret=1.0))


@pytest.mark.parametrize("name", REFUSED)
def test_what_keeps_its_state_elsewhere_is_refused_by_name(make, name):
    pytest.importorskip(REFUSED[name], reason=f"--optim {name} needs the package {REFUSED[name]}")
    optimizer, _ = make(name, Model())
    with pytest.raises(ValueError, match=rf"(?i)\.{name} cannot be reset(.|\n)*--reset_optimizer_every never"):
        check_can_be_reset(optimizer)


# Epochs are at stages 0 0 1 1 2 2.
@pytest.mark.parametrize(
    ("every", "epoch", "num_epochs", "is_refused"),
    [
        ("stage", 0.0, 6, True),
        ("stage", None, 3, True),
        ("stage", 0.0, 2, False),
        ("stage", 2.0, 3, True),  # resumed where a stage begins
        ("stage", 2.5, 4, False),
        ("epoch", 0.0, 2, True),
        ("epoch", 0.0, 1, False),
        ("epoch", 1.5, 2, False),
        ("never", 0.0, 6, False),
    ],
    ids=str,
)
def test_it_is_refused_at_the_start_if_a_reset_will_come(tmp_path, every, epoch, num_epochs, is_refused):
    curriculum = CurriculumArguments(
        c_thought=1,
        max_latent_stage=2,
        final_stage=False,
        epochs_per_stage=2,
        epochs_stage_0=2,
        reset_optimizer_every=every,
    )
    assert [curriculum.stage(each) for each in range(6)] == [0, 0, 1, 1, 2, 2]
    callback = CurriculumCallback(curriculum)
    model = SimpleNamespace(config=MultiCoCoConfig(), parameters=lambda: [])
    args = TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, use_cpu=True)
    state = TrainerState(epoch=epoch, num_train_epochs=num_epochs)
    optimizer = Odd(Model().parameters(), secret=1.0)
    if is_refused:
        with pytest.raises(ValueError, match=r"Odd cannot be reset"):
            callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
    else:
        callback.on_train_begin(args, state, None, model=model, optimizer=optimizer)
