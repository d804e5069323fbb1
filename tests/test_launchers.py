"""The launchers that users type, on CPU: each trains `recipes/trails/smoke.yaml` as one process does.

The commands are those of the header of that file, run as they stand there; only the folder of the output is added.
"""

import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from multicoco import MultiCoCoConfig, train
from multicoco.training.trainer import SPEED


ROOT = Path(train.__file__).parent
SMOKE = "recipes/trails/smoke.yaml"
COMMANDS = [shlex.split(line) for line in re.findall(r"#     (\S.*?)(?:  #.*)?\n", (ROOT / SMOKE).read_text())]
PORT = 29500  # the default of both launchers

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the launches are compared with one process on CPU, which this machine is not"
)


def command(program):
    """The arguments of the one command of the header that begins with these words."""
    (found,) = [words for words in COMMANDS if " ".join(words).startswith(program)]
    return found[len(program.split()) :]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder as after `git clone`, with the data of the header's commands."""
    site = tmp_path_factory.mktemp("launchers")
    for name in ("train.py", "ds_configs", "recipes"):
        (site / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(site)
        for script in ("prepare.py", "start_model.py"):
            script = f"recipes/trails/{script}"
            patch.setattr(sys, "argv", [script, *command(f"python {script}")])
            runpy.run_path(script, run_name="__main__")
    return site


def train_here(site, name, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(site)
        train.main([*command("python train.py"), "--output_dir", name, *flags])
    return site / name


@pytest.fixture(scope="module")
def one(site):
    """What one process leaves."""
    return train_here(site, "one")


def history(output_dir):
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def sizes(entry):
    """Mean tokens and tiles of the samples of a logged step, from how many of each there were a second."""
    samples, tokens, tiles = (entry[f"{SPEED}{name}_per_second"] for name in ("samples", "tokens", "tiles"))
    return tokens / samples, tiles / samples


def other_port():
    """Nothing, or a free port for a launcher if another program holds the one that it takes by itself."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) != 0:
            return []
        probe.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ["--master_port", str(probe.getsockname()[1])]


@pytest.mark.parametrize("zero", ["zero3", "zero2", "zero1", None], ids=["zero3", "zero2", "zero1", "ddp"])
def test_two_ranks_train_as_one_process_does(site, one, zero):
    if zero:
        program, arguments = "deepspeed", command("deepspeed")
        arguments = [word.replace("zero3", zero) for word in arguments]
    else:
        program, arguments = "torchrun", command("torchrun")
    out = f"two_{zero}"
    process = subprocess.run(
        [Path(sys.executable).parent / program, *other_port(), *arguments, "--output_dir", out],
        cwd=site,
        env={"OMP_NUM_THREADS": "1", **os.environ},  # only faster
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-5000:]
    assert len(history(one)) == 12
    for mine, expected in zip(history(site / out), history(one), strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        same = ("step", "curriculum/stage", "eval/stage", "eval/accuracy", "eval/samples", "eval/new_tokens")
        assert [mine.get(key) for key in same] == [expected.get(key) for key in same]
        assert sizes(mine) == pytest.approx(sizes(expected))
    assert [row["eval/stage"] for row in json.loads((site / out / "results.json").read_text())] == [0, 1, 2]
    config = MultiCoCoConfig.from_pretrained(site / out)
    assert (config.stage, config.num_thoughts) == (2, 2)
    names = load_file(one / "model.safetensors").keys()  # DeepSpeed writes the tied head too
    weights, expected, start = (
        torch.cat([tensors[name].flatten() for name in names])
        for tensors in (
            load_file(site / folder / "model.safetensors") for folder in (out, one, "data/trails-smoke-start")
        )
    )
    # Not each by itself: attention does not depend on the bias of its keys, so Adam moves that by rounding errors.
    assert (weights - expected).norm() < 0.1 * (expected - start).norm()


def test_bfloat16_trains_nearly_as_float32_does(site, one):
    losses = [entry["loss"] for entry in history(train_here(site, "bf16", "--bf16", "true"))]
    expected = [entry["loss"] for entry in history(one)]
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != pytest.approx(expected, rel=1e-5)  # it was not float32 after all
