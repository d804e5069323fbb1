"""One rank of the runs that `test_distributed.py` starts: `distributed_worker.py FOLDER STRATEGY...`.

Reads the model and this rank's batches from the folder; for each strategy wraps the model, takes all steps with this
one wrapped model, and writes what came out to `STRATEGY.rankN.safetensors`. It compares nothing: the tests do.
"""

import contextlib
import datetime
import faulthandler
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace


SECONDS = 180  # a run takes some twenty; whatever takes longer hangs, and its stack is what one wants to see
COLLECTIVE_SECONDS = 60
faulthandler.dump_traceback_later(SECONDS, exit=True)
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from reference import training, widened  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import TrainerState, TrainingArguments  # noqa: E402
from transformers.integrations import HfDeepSpeedConfig  # noqa: E402

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor, add_thought_tokens  # noqa: E402
from multicoco.compat import leave, leave_out_shm_kernel  # noqa: E402
from multicoco.curriculum import CurriculumArguments  # noqa: E402
from multicoco.trainer_callbacks import CurriculumCallback, reset_optimizer  # noqa: E402
from multicoco.training import trainer  # noqa: E402


def read_batch(folder: Path, name: str, dtype: torch.dtype) -> dict:
    """What `model` takes, as written by `write_batch` of the test."""
    batch = load_file(folder / f"{name}.rank{dist.get_rank()}.safetensors")
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        batch["num_patches_list"] = batch["num_patches_list"].tolist()
    return batch


class DDP:
    dtype = torch.float64

    def __init__(self, folder: Path):
        self.model = MultiCoCoForConditionalGeneration.from_pretrained(folder / "model", dtype=self.dtype)
        self.wrap()

    def wrap(self):
        self.wrapped = torch.nn.parallel.DistributedDataParallel(self.model)

    def backward(self, loss):
        loss.backward()

    def gradients(self):
        return {name: param.grad.clone() for name, param in self.model.named_parameters() if param.grad is not None}

    def end_step(self):
        self.model.zero_grad(set_to_none=True)


class FSDP2(DDP):
    def wrap(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (*self.model.model.language_model.layers, *self.model.model.vision_tower.encoder.layer):
            fully_shard(layer, mesh=mesh)
        self.wrapped = fully_shard(self.model, mesh=mesh)

    def gradients(self):
        return {name: grad.full_tensor() for name, grad in super().gradients().items()}


class Zero(DDP):
    dtype = torch.float32

    def __init__(self, folder: Path, stage: int):
        import deepspeed

        leave_out_shm_kernel()
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        self.settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
        }
        if stage == 3:
            # At their defaults tiny parameters are kept whole on every rank, and nothing is tested.
            self.settings["zero_optimization"].update(
                stage3_param_persistence_threshold=0, stage3_max_live_parameters=0, stage3_max_reuse_distance=0
            )
        self.hf_config = HfDeepSpeedConfig(self.settings)  # alive: `from_pretrained` and `generate` look for it
        super().__init__(folder)

    def wrap(self):
        import deepspeed

        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)  # all steps start from the same weights
        self.wrapped, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=self.settings)

    def backward(self, loss):
        self.wrapped.backward(loss)

    def gradients(self):
        from deepspeed.utils import safe_get_full_grad

        gradients = {name: safe_get_full_grad(param) for name, param in self.model.named_parameters()}
        return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}

    def end_step(self):
        self.wrapped.step()


STRATEGIES = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    "zero1": lambda folder: Zero(folder, 1),
    "zero2": lambda folder: Zero(folder, 2),
    "zero3": lambda folder: Zero(folder, 3),
}


def train(strategy, folder, name, num_labels, checkpointing, results):
    """One step; its loss is this rank's share of the sum over all labels, divided by the number of all labels."""
    batch = read_batch(folder, name, strategy.dtype)
    with training(strategy.model, checkpointing):
        strategy.wrapped.train()
        output = strategy.wrapped(**batch, num_items_in_batch=torch.tensor(num_labels))
        loss = output.loss
        strategy.backward(loss * dist.get_world_size())  # every strategy averages over the ranks
    step = f"{name}.{'checkpointing' if checkpointing else 'plain'}"
    results[f"{step}.loss"] = loss.detach().reshape(1)
    if "step_ids" in batch:
        results[f"{step}.step_loss"] = output.step_loss.detach().reshape(1)
    for parameter, gradient in strategy.gradients().items():
        results[f"{step}.grad.{parameter}"] = gradient
    strategy.end_step()


@torch.no_grad()
def evaluate(strategy, folder, name, num_labels, results):
    strategy.wrapped.eval()
    batch = read_batch(folder, name, strategy.dtype)
    output = strategy.wrapped(**batch, num_items_in_batch=torch.tensor(num_labels))
    results[f"{name}.eval.loss"] = output.loss.reshape(1)
    results[f"{name}.eval.logits"] = output.logits
    if "step_ids" in batch:
        results[f"{name}.eval.step_loss"] = output.step_loss.reshape(1)
        del batch["step_ids"]
    del batch["labels"]
    for mode in (False, True):  # as others call it: the unwrapped backbone, and a head of their own
        strategy.model.train(mode)
        hidden_states = strategy.model.base_model(**batch, use_cache=False).last_hidden_state
        results[f"{name}.backbone.{'train' if mode else 'eval'}"] = strategy.model.lm_head(hidden_states)
    strategy.wrapped.eval()


def generate(strategy, folder, name, case, results):
    strategy.wrapped.eval()
    batch = read_batch(folder, name, strategy.dtype)
    del batch["labels"]
    settings = {**case, "max_new_tokens": case["max_new_tokens"][dist.get_rank()]}
    tokens = strategy.model.generate(**batch, **settings)
    results[f"{name}.tokens"] = tokens[:, batch["input_ids"].shape[1] :].contiguous()


def add_tokens(checkpoint, name, results):
    """`add_thought_tokens` on a model that is sharded from its loading on."""
    import deepspeed

    model = MultiCoCoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    whole = [name for name, param in model.named_parameters() if not hasattr(param, "ds_id") or param.numel()]
    if whole:
        raise RuntimeError(f"Not sharded, so nothing would be tested: {whole}.")
    tokenizer = MultiCoCoProcessor.from_pretrained(checkpoint).tokenizer
    for _ in range(2):  # the second call must change nothing
        add_thought_tokens(model, tokenizer)
    for parameter, param in model.named_parameters():  # transformers leaves resized ones whole, until `initialize`
        with deepspeed.zero.GatheredParameters([param]) if hasattr(param, "ds_id") else contextlib.nullcontext():
            results[f"{name}.{parameter}"] = param.detach().clone()


def reset(strategy, results):
    """Weights and momentum two steps after a reset of the optimizer, and of a new one on the same weights."""
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state

    def engine(weights=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
        model.load_state_dict(weights or model.state_dict())
        # With dampening a momentum of zeros is not that of a first step.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, dampening=0.5)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=strategy.settings)[0]

    def take_steps(engine, seeds):
        for seed in seeds:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed + dist.get_rank()))
            engine.backward((engine(x) - 1).square().mean())
            engine.step()

    def weights(engine):
        found = {}
        for name, param in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([param]) if hasattr(param, "ds_id") else contextlib.nullcontext():
                found[name] = param.detach().clone()
        return found

    trained = engine()
    take_steps(trained, (0, 10, 20))
    reset_optimizer(trained.optimizer)
    for way, each in (("reset", trained), ("new", engine(weights(trained)))):
        take_steps(each, (30, 40))
        results.update({f"{way}.{name}": weight for name, weight in weights(each).items()})
        for name, param in each.module.named_parameters():
            results[f"{way}.momentum.{name}"] = safe_get_full_optimizer_state(param, "momentum_buffer").clone()


def count(folder, plan, results):
    """The speed that a trainer would log, by a clock that goes on by what the plan says of this rank."""
    now, (until_a_batch, with_a_batch, besides) = [0.0], plan["seconds"][dist.get_rank()]
    trainer.perf_counter = lambda: now[0]
    throughput = trainer.Throughput()

    def batches():
        for name in plan["steps"]:
            now[0] += until_a_batch
            yield read_batch(folder, name, torch.float32)

    throughput.start()
    for _ in throughput.counted(batches()):
        now[0] += with_a_batch
    now[0] += besides
    for name, value in throughput.rates(torch.device("cpu"), other_seconds=besides).items():
        results[name] = torch.tensor([value], dtype=torch.float64)


@contextlib.contextmanager
def logged(model, results):
    """The step loss that the callback logs of the training inside."""
    curriculum = CurriculumArguments(c_thought=1, step_loss_weight=model.config.step_loss_weight, epochs_stage_0=0)
    callback, logs = CurriculumCallback(curriculum), {"loss": 0.0}
    # The defaults of `TrainingArguments`, which itself would start a process group.
    defaults = {item.name: item.default for item in fields(TrainingArguments)}
    defaults |= {"remove_unused_columns": False, "device": torch.device("cpu")}
    args = SimpleNamespace(**defaults, train_batch_size=1, world_size=dist.get_world_size())
    state = TrainerState(epoch=0, num_train_epochs=1, log_history=[{}])
    callback.on_train_begin(args, state, None, model=model)
    yield
    callback.on_log(args, state, None, logs=logs, model=model)
    callback.on_train_end(args, state, None, model=model)
    results["logged.step_loss"] = torch.tensor([logs["step_loss"]], dtype=torch.float64)


def run(name: str, folder: Path, plan: dict) -> dict:
    strategy, results = STRATEGIES[name](folder), {}
    with widened() if strategy.dtype == torch.float64 else contextlib.nullcontext():
        for is_decoded in (True, False):  # the callback that logs step losses asks each batch for its texts
            steps = {step: count for step, count in plan["steps"].items() if (step in plan["decoded"]) == is_decoded}
            is_logged = name == "ddp" and is_decoded
            with logged(strategy.model, results) if is_logged else contextlib.nullcontext():
                for step, num_labels in steps.items():
                    strategy.model.config.thought_sweeps = plan["sweeps"].get(step)
                    train(strategy, folder, step, num_labels, False, results)
        for step, num_labels in plan["steps"].items():
            strategy.model.config.thought_sweeps = plan["sweeps"].get(step)
            evaluate(strategy, folder, step, num_labels, results)
        if name == "zero3":  # between training steps, as in a Trainer
            for prompt, case in plan["prompts"].items():
                generate(strategy, folder, prompt, case, results)
        for step, num_labels in plan["steps"].items():
            strategy.model.config.thought_sweeps = plan["sweeps"].get(step)
            train(strategy, folder, step, num_labels, True, results)
    if name == "ddp":
        count(folder, plan, results)
    if name.startswith("zero"):
        reset(strategy, results)
    if name == "zero3":
        for checkpoint, path in plan["checkpoints"].items():
            add_tokens(path, checkpoint, results)
    return results


def main():
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS))
    plan = json.loads((folder / "plan.json").read_text())
    for name in names:
        results = {key: value.contiguous() for key, value in run(name, folder, plan).items()}
        save_file(results, folder / f"{name}.rank{dist.get_rank()}.safetensors")
    leave()


if __name__ == "__main__":
    main()
