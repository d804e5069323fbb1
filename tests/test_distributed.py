"""Two real gloo processes with uneven data: no rank waits for the other, and the gradients are those of one process.

A launch of `distributed_worker.py` takes all steps by some strategies, evaluates and (ZeRO-3) generates. What it must
equal is the plain definition over the data of both ranks. The loss is the sum over all labels divided by their number;
that of a rank is its share.

Tolerances: DDP and FSDP2 run in float64 and equal the definition to 1e-9 as everywhere. DeepSpeed keeps gradients in
float32, so its steps are compared with one process in float32: per tensor, deviations are within 1e-5 of the largest
entry, plus `FLOAT32_NOISE`.
"""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, model_inputs
from reference import (
    add_texts,
    loss_and_grads,
    reference_generate,
    reference_logits,
    reference_loss,
    reference_step_losses,
    split_rows,
    training,
    widened,
)
from safetensors.torch import load_file, save_file

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor, add_thought_tokens
from multicoco.training.trainer import SPEED


WORLD_SIZE = 2
SECONDS = 200  # more than those of the worker itself, which shows where it hangs
LAUNCHES = (("ddp", "fsdp2"), ("zero1", "zero2", "zero3"))  # one start of two processes each: starting is the cost
STRATEGIES = [strategy for launched in LAUNCHES for strategy in launched]
DTYPES = {strategy: "float32" if strategy.startswith("zero") else "float64" for strategy in STRATEGIES}
FLOAT32_NOISE = 1e-7  # biases of keys have no gradient but what rounding leaves

# What each rank has; see `make_batch`.
STEPS = {
    "other_counts_and_no_image": (
        dict(num_thoughts=(3, 3), images=((1,), (2,)), text_lengths=(6, 9)),
        dict(num_thoughts=(1, 0), images=((), ()), text_lengths=(2, 3), answer_lengths=(2, 1)),
    ),
    "no_thought_on_one_rank": (
        dict(num_thoughts=(3, 3), images=((1,), (2, 1)), padding="left"),
        dict(num_thoughts=(0,), images=((),), text_lengths=(2,), answer_lengths=(3,)),
    ),
    "more_passes_where_no_image_is": (
        dict(num_thoughts=(0, 0), images=((1,), ())),
        dict(num_thoughts=(2, 4), images=((), ()), padding="right"),
    ),
    "no_label_on_one_rank": (
        dict(num_thoughts=(2, 1), images=((), (1,)), padding="right"),
        dict(num_thoughts=(1,), images=((),), answer_lengths=(0,)),
    ),
    "in_sweeps": (  # as many as the most thoughts, so that the definition is that of passes
        dict(num_thoughts=(1, 0), images=((1,), ())),
        dict(num_thoughts=(2, 4), images=((), ()), padding="right"),
    ),
    "in_sweeps_on_one_rank": (
        dict(num_thoughts=(3, 1), images=((1,), (2,))),
        dict(num_thoughts=(0, 0), images=((), ())),
    ),
    "no_image_anywhere": (
        dict(num_thoughts=(1, 2), images=((), ())),
        dict(num_thoughts=(2,), images=((),)),
    ),
    "no_thought_anywhere": (
        dict(num_thoughts=(0, 0), images=((1,), (1,))),
        dict(num_thoughts=(0,), images=((),)),
    ),
}
SWEEPS = {"in_sweeps": 4, "in_sweeps_on_one_rank": 3}
# The lengths of the texts that the thoughts of each rank's samples stand for; without them there is no step loss.
TEXTS = {
    "other_counts_and_no_image": (((2, 1, 3), (4,)), ((2,), ())),
    "no_thought_on_one_rank": (((2, 2), (1, 0, 3)), ((),)),
    "more_passes_where_no_image_is": (((), ()), ((1, 3), (2, 1, 1, 2))),
    "in_sweeps": (((1,), ()), ((1, 3), (2, 1, 1, 2))),
    "no_label_on_one_rank": (((2, 0), (3,)), ((),)),
    "no_thought_anywhere": (((), ()), ((),)),
}
WEIGHT = 0.7  # of the step loss
PROMPT = (
    dict(num_thoughts=(3, 2), images=((1,), (2, 1)), text_lengths=(6, 4), answer_lengths=(0, 0), padding="left"),
    dict(num_thoughts=(0, 1, 0), images=((), (), ()), text_lengths=(2, 5, 3), answer_lengths=(0,) * 3, padding="left"),
)
PROMPTS = {
    "first_rank_writes_more": (PROMPT, dict(max_new_tokens=[7, 3])),
    "second_rank_writes_more": (PROMPT, dict(max_new_tokens=[2, 6])),
    "beams": (PROMPT, dict(max_new_tokens=[5, 3], num_beams=3, num_return_sequences=2)),
}

# For each rank, by the clock of the test: until a batch is there, until it is trained on, and for something else.
CLOCKS = ((0.5, 2.0, 40.0), (3.0, 4.0, 0.0))


class Workspace:
    """The folder that the processes read, and the same model and batches here."""

    def __init__(self, folder, model, make_batch):
        self.folder, self.model, self.errors = folder, model, {}
        cases = {**STEPS, **{name: prompt for name, (prompt, _) in PROMPTS.items()}}
        self.batches = {
            name: [make_batch(**case, seed=rank) for rank, case in enumerate(ranks)] for name, ranks in cases.items()
        }
        for name, ranks in TEXTS.items():
            for rank, lengths in enumerate(ranks):
                self.batches[name][rank] = add_texts(self.batches[name][rank], lengths)
        for name, ranks in self.batches.items():
            for rank, batch in enumerate(ranks):
                tensors = {key: torch.as_tensor(value) for key, value in model_inputs(batch).items()}
                save_file(tensors, folder / f"{name}.rank{rank}.safetensors")
        padded = MultiCoCoForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
        padded.resize_token_embeddings(640, mean_resizing=False)  # has room for the thought tokens
        padded.save_pretrained(folder / "padded")
        MultiCoCoProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder / "padded")
        self.checkpoints = {"grown": CHECKPOINT, "padded": folder / "padded"}
        plan = {
            "steps": {name: sum(self.num_labels(name)) for name in STEPS},
            "decoded": [name for name in STEPS if all("step_ids" in batch for batch in self.batches[name])],
            "sweeps": SWEEPS,
            "prompts": {name: settings for name, (_, settings) in PROMPTS.items()},
            "seconds": CLOCKS,
            "checkpoints": {name: str(path) for name, path in self.checkpoints.items()},
        }
        (folder / "plan.json").write_text(json.dumps(plan))

    def num_labels(self, name) -> list[int]:
        return [int((batch["labels"][:, 1:] != -100).sum()) for batch in self.batches[name]]

    def union_loss(self, name):
        """The loss of one process that holds the data of both ranks."""
        counts = self.num_labels(name)
        pairs = zip(counts, self.batches[name], strict=True)
        return sum(count * self._loss(batch) for count, batch in pairs if count) / sum(counts)

    def _loss(self, batch):
        return (
            reference_step_losses(self.model, batch)[0] if "step_ids" in batch else reference_loss(self.model, batch)
        )

    def step_loss(self, name):
        """The part of it that is of texts."""
        counts = self.num_labels(name)
        pairs = zip(counts, self.batches[name], strict=True)
        return sum(count * reference_step_losses(self.model, batch)[1] for count, batch in pairs if count) / sum(
            counts
        )

    def run(self, strategy) -> list[dict]:
        """What each rank has written; the processes run when a strategy is first asked for."""
        launched = next(names for names in LAUNCHES if strategy in names)
        if launched not in self.errors:
            self.errors[launched] = launch(self.folder, launched)
        if self.errors[launched]:
            pytest.fail(self.errors[launched])
        return [load_file(self.folder / f"{strategy}.rank{rank}.safetensors") for rank in range(WORLD_SIZE)]


def launch(folder, strategies) -> str | None:
    """Runs the worker on all ranks; returns what went wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(WORLD_SIZE)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(Path(__file__).with_name("distributed_worker.py")), str(folder), *strategies]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if "lo" in [name for _, name in socket.if_nameindex()]:
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # the name of the host may not resolve
    log = folder / f"{strategies[0]}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        try:
            code = process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            code = f"none after {SECONDS} seconds"
            process.terminate()  # the launcher ends its workers, which are in sessions of their own
            process.wait(timeout=60)
    return f"{strategies}: exit code {code}\n{log.read_text()[-8000:]}" if code != 0 else None


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, shared_model, make_batch):
    folder = tmp_path_factory.mktemp("distributed")
    rounded = copy.deepcopy(shared_model).float()
    rounded.config.c_thought, rounded.config.step_loss_weight = 1, WEIGHT
    rounded.save_pretrained(folder / "model")  # weights that float32 holds exactly
    model = MultiCoCoForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float64)
    return Workspace(folder, model.eval(), make_batch)


@pytest.fixture(scope="module")
def expected(workspace):
    """For each dtype and step the loss and the gradients of one process: in float64 by the plain definition."""
    model = MultiCoCoForConditionalGeneration.from_pretrained(workspace.folder / "model", dtype=torch.float32)
    found = {"float64": {}, "float32": {}}
    for name in STEPS:
        found["float64"][name] = loss_and_grads(workspace.model, lambda name=name: workspace.union_loss(name))
        with training(model):
            losses = []
            for batch in workspace.batches[name]:
                inputs = model_inputs(batch)
                if "pixel_values" in inputs:
                    inputs["pixel_values"] = inputs["pixel_values"].float()
                losses.append(model(**inputs, num_items_in_batch=sum(workspace.num_labels(name))).loss)
                losses[-1].backward()
        grads = {parameter: param.grad for parameter, param in model.named_parameters() if param.grad is not None}
        model.zero_grad(set_to_none=True)
        found["float32"][name] = (sum(losses).detach(), grads)
    return found


def assert_close(actual, wanted, strategy, name):
    if DTYPES[strategy] == "float32":
        tolerance = dict(atol=1e-5 * float(wanted.abs().max()) + FLOAT32_NOISE, rtol=0)
    else:
        tolerance = dict(atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(actual, wanted, **tolerance, check_dtype=False, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("checkpointing", ["plain", "checkpointing"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_uneven_ranks_equal_one_process(workspace, expected, strategy, step, checkpointing):
    loss, gradients = expected[DTYPES[strategy]][step]
    ranks = workspace.run(strategy)
    prefix = f"{step}.{checkpointing}."
    assert_close(sum(rank[f"{prefix}loss"] for rank in ranks), loss[None], strategy, "loss")
    for rank in ranks:
        found = {name.removeprefix(f"{prefix}grad."): value for name, value in rank.items() if name.startswith(prefix)}
        del found[f"{prefix}loss"]
        for name, param in workspace.model.named_parameters():  # without an image, none and zeros are the same
            zeros = torch.zeros_like(param)
            assert_close(found.get(name, zeros), gradients.get(name, zeros), strategy, name)


@pytest.mark.parametrize("checkpointing", ["plain", "checkpointing"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rank_without_labels_has_a_loss_of_zero(workspace, strategy, checkpointing):
    losses = [rank[f"no_label_on_one_rank.{checkpointing}.loss"] for rank in workspace.run(strategy)]
    assert losses[0] > 0
    assert losses[1] == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_step_losses_of_ranks_add_up_to_that_of_one_process(workspace, strategy):
    """Also where one rank has no text or no rank has any; and it is logged as the mean over samples with texts."""
    ranks = workspace.run(strategy)
    total = num_labels = 0
    for name in TEXTS:
        with torch.no_grad(), widened():
            wanted = torch.as_tensor(workspace.step_loss(name), dtype=torch.float64)
        for way in ("plain", "checkpointing", "eval"):
            assert_close(sum(rank[f"{name}.{way}.step_loss"] for rank in ranks), wanted[None], strategy, name)
        total += wanted * sum(workspace.num_labels(name))
        for batch in workspace.batches[name]:
            has_texts = (batch["step_ids"] != -100).flatten(1).any(dim=1)
            num_labels += int((batch["labels"][has_texts, 1:] != -100).sum())
    if strategy == "ddp":
        for rank in ranks:
            torch.testing.assert_close(rank["logged.step_loss"], total[None] / num_labels, atol=1e-11, rtol=0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_of_uneven_ranks_equals_one_process(workspace, expected, strategy, step):
    ranks = workspace.run(strategy)
    assert_close(
        sum(rank[f"{step}.eval.loss"] for rank in ranks), expected[DTYPES[strategy]][step][0][None], strategy, "loss"
    )
    for rank, batch in zip(ranks, workspace.batches[step], strict=True):
        for index, row in enumerate(split_rows(batch)):
            with torch.no_grad(), widened():
                logits, _ = reference_logits(workspace.model, row["input_ids"], row["pixel_values"])
            real = batch["attention_mask"][index].bool()
            for kind in ("eval.logits", "backbone.eval", "backbone.train"):
                assert_close(rank[f"{step}.{kind}"][index, real], logits, strategy, f"{kind} of sample {index}")


def test_the_logged_speed_is_that_of_all_ranks_together(workspace):
    batches = [batch for name in STEPS for batch in workspace.batches[name]]
    counts = {
        "samples_per_second": sum(len(batch["labels"]) for batch in batches),
        "tokens_per_second": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "tiles_per_second": sum(sum(batch.get("num_patches_list", ())) for batch in batches),
    }
    waited, computed = (len(STEPS) * sum(clock[place] for clock in CLOCKS) for place in (0, 1))
    expected = {name: count * WORLD_SIZE / (waited + computed) for name, count in counts.items()}
    expected["waiting"] = waited / (waited + computed)
    for rank in workspace.run("ddp"):
        found = {name.removeprefix(SPEED): float(value) for name, value in rank.items() if name.startswith(SPEED)}
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("strategy", LAUNCHES[1])
def test_a_reset_optimizer_is_a_new_one_on_the_same_weights(workspace, strategy):
    for rank in workspace.run(strategy):
        found, wanted = (
            {name.removeprefix(way): value for name, value in rank.items() if name.startswith(way)}
            for way in ("reset.", "new.")
        )
        assert found.keys() == wanted.keys()
        assert len(found) == 2 * len(("0.weight", "0.bias", "2.weight", "2.bias"))
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("prompt", [name for name in PROMPTS if name != "beams"])
def test_greedy_generation_of_uneven_ranks_equals_one_process(workspace, prompt):
    lengths = PROMPTS[prompt][1]["max_new_tokens"]
    for rank, batch, length in zip(workspace.run("zero3"), workspace.batches[prompt], lengths, strict=True):
        for tokens, row in zip(rank[f"{prompt}.tokens"].tolist(), split_rows(batch), strict=True):
            suppressed = workspace.model.generation_config.suppress_tokens
            with torch.no_grad(), widened():
                wanted = reference_generate(
                    workspace.model, row["input_ids"], row["pixel_values"], length, suppress=suppressed
                )
            assert tokens == wanted


def test_beams_of_uneven_ranks_equal_one_process(workspace):
    settings = PROMPTS["beams"][1]
    for rank, batch, length in zip(
        workspace.run("zero3"), workspace.batches["beams"], settings["max_new_tokens"], strict=True
    ):
        inputs = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
        wanted = workspace.model.generate(**inputs, **{**settings, "max_new_tokens": length})
        assert rank["beams.tokens"].tolist() == wanted[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("checkpoint", ["grown", "padded"])
def test_thought_tokens_added_to_a_sharded_model_equal_one_process(workspace, checkpoint):
    path = workspace.checkpoints[checkpoint]
    model = MultiCoCoForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    add_thought_tokens(model, MultiCoCoProcessor.from_pretrained(path).tokenizer)
    for rank in workspace.run("zero3"):
        for name, param in model.named_parameters():
            assert torch.equal(rank[f"{checkpoint}.{name}"], param), name
