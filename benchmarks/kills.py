"""Kills a training run at random moments, resumes it each time, and compares it with the run nobody touched.

    python benchmarks/kills.py --kills 12 --seed 0
    python benchmarks/kills.py --kills 6 --lora_rank 4        # flags of train.py are passed on

Trains a tiny model on a few Trails boards through three stages, once as a whole and once under SIGKILL (of the whole
process group): in the middle of epochs, between a stage's end and the next stage's first checkpoint, and while a
checkpoint is written. Every logged value, the accuracies and the final weights must be equal bit for bit, and no run
may start from a checkpoint that was not written to its end. Then it is killed once more and resumed with something
changed (batch, seed, records, curriculum, ranks): each must be refused before its first step. The exit status is 1 if
anything differs.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from multicoco.recipes.trails.prepare import prepare
from multicoco.recipes.trails.start_model import make_start_model
from multicoco.trainer_callbacks import COMPLETE
from multicoco.training.trainer import SPEED


TRAIN = Path(__file__).parent.parent / "train.py"
NUM_TRAIN, BATCH_SIZE, SAVE_STEPS = 64, 8, 3
EPOCH = NUM_TRAIN // BATCH_SIZE  # optimizer steps
BOUNDARIES = (2 * EPOCH, 3 * EPOCH)  # last steps of stages 0 and 1; only the second has a checkpoint of its own
LAST_STEP = 4 * EPOCH
# From a stage's last step to the last one before the next checkpoint.
AFTER_BOUNDARY = [step for end in BOUNDARIES for step in range(end, end + SAVE_STEPS - end % SAVE_STEPS)]
SAVED_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
# What is changed between a kill and the resumed run: a launcher, and flags.
TWO_RANKS = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d")
TWO_RANKS += ("--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1")  # any free port, no name to resolve
CHANGES = {
    "batch": ((), ("--per_device_train_batch_size", "4")),
    "ranks": (TWO_RANKS, ("--per_device_train_batch_size", "4")),
    "seed": ((), ("--seed", "7")),
    "file": ((), ("--train_file", "{folder}/trails/other.jsonl")),
    "curriculum": ((), ("--mix", "none")),
    "learning rate": ((), ("--learning_rate", "5e-4")),
}
MID_EPOCH, BOUNDARY, SAVE = "mid-epoch", "stage boundary", "during a save"


class Moment(NamedTuple):
    """
    When to kill: `delay` seconds after optimizer step `step` is logged, or, with `file`, once that file appears in the
    unfinished folder of the first checkpoint from `step` on.
    """

    step: int
    file: str | None = None
    delay: float = 0.0


class Run(NamedTuple):
    """
    What one process did. `lines` are the logged values of each step; `newest` is the step of the newest finished
    checkpoint as it began; `unfinished` names the checkpoint that it left half written.
    """

    lines: dict[int, str]
    newest: int
    unfinished: str | None
    returncode: int

    @property
    def resumed_from(self) -> int:
        return min(self.lines) - 1

    @property
    def killed_at(self) -> int:
        return max(self.lines)


def draw_moments(count: int, seed: int, step_seconds: float) -> list[Moment]:
    """`count` moments in the order of their steps: a quarter (at least 2) in saves, 1 or 2 at boundaries."""
    if count < 4:
        raise ValueError(f"`--kills` must be at least 4 (two saves, a stage boundary, mid-epoch), got {count}.")
    rng = random.Random(seed)
    saves = range(SAVE_STEPS, LAST_STEP - SAVE_STEPS, SAVE_STEPS)
    moments = [Moment(rng.choice(saves), file=rng.choice(SAVED_FILES)) for _ in range(max(2, count // 4))]
    for boundary in rng.sample(BOUNDARIES, 2 if count >= 8 else 1):
        # Not a step with a checkpoint of its own: it is logged before it is saved.
        steps = [step for step in AFTER_BOUNDARY if 0 <= step - boundary < SAVE_STEPS and step % SAVE_STEPS]
        moments.append(Moment(rng.choice(steps)))
    inside = [step for step in range(1, LAST_STEP) if step % EPOCH and step not in AFTER_BOUNDARY]
    while len(moments) < count:
        moments.append(Moment(rng.choice(inside), delay=rng.random() * step_seconds))
    return sorted(moments, key=lambda moment: moment.step)


def prepare_run(folder: Path) -> None:
    """Boards, the start model and `settings.yaml`: 32 optimizer steps, a checkpoint every third."""
    prepare(folder / "trails", num_train=NUM_TRAIN, num_val=12)
    make_start_model(folder / "start")
    settings = {
        "model_name_or_path": str(folder / "start"),
        "train_file": str(folder / "trails" / "train.jsonl"),
        "eval_file": str(folder / "trails" / "val.jsonl"),
        "c_thought": 1,
        "max_latent_stage": 2,
        "final_stage": False,
        "epochs_stage_0": 2,
        "epochs_per_stage": 1,
        "mix": "linear",
        "restart_schedule": True,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "resume_from_checkpoint": "last",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def run(folder: Path, output_dir: Path, moment: Moment | None = None, flags: tuple[str, ...] = ()) -> Run:
    """
    Starts or resumes training in a process group of its own, and kills it at `moment` or lets it end.

    Raises:
        RuntimeError: the run failed, or it ended before `moment`.
    """
    newest = max((_step(path.parent) for path in output_dir.glob(f"checkpoint-*/{COMPLETE}")), default=0)
    log = folder / "output.txt"
    started = time.time_ns()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(TRAIN), str(folder / "settings.yaml"), "--output_dir", str(output_dir), *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    while process.poll() is None:
        if moment is not None and _has_come(moment, log, output_dir, started):
            time.sleep(moment.delay)
            # Stopped first: a save that was seen to be unfinished may have ended before the kill.
            os.killpg(process.pid, signal.SIGSTOP)
            if moment.file is None or _unfinished(output_dir, started, moment.step, moment.file):
                os.killpg(process.pid, signal.SIGKILL)
            os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.003)
    text = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode != (0 if moment is None else -signal.SIGKILL):
        raise RuntimeError(f"The run ended with status {process.returncode} before {moment}:\n{text[-3000:]}")
    return Run(_logged(text), newest, _unfinished(output_dir, started), process.returncode)


def _has_come(moment: Moment, log: Path, output_dir: Path, started: int) -> bool:
    if moment.file is not None:
        return _unfinished(output_dir, started, moment.step, moment.file) is not None
    return max(_logged(log.read_text(encoding="utf-8", errors="replace")), default=0) >= moment.step


def _logged(text: str) -> dict[int, str]:
    """
    The logged values of each step, as printed, from the output of a run; a line cut short is left out, and so is what
    depends on the time it took.
    """
    lines = re.finditer(r"\{'loss'.*?'epoch': '([\d.]+)'.*\}(?=\n)", text)
    return {round(float(line[1]) * EPOCH): re.sub(rf"'{SPEED}\w+': '[^']*', ", "", line[0]) for line in lines}


def _unfinished(output_dir: Path, started: int, first_step: int = 0, name: str = "*") -> str | None:
    """A checkpoint without its mark in which a file was written since `started` (ns); older ones were left before."""
    for path in output_dir.glob(f"checkpoint-*/{name}"):
        folder = path.parent
        if _step(folder) >= first_step and not (folder / COMPLETE).exists() and path.stat().st_mtime_ns > started:
            return folder.name
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def kind(run: Run) -> str:
    """What a killed run was doing, from what it left."""
    if run.unfinished:
        return SAVE
    return BOUNDARY if run.killed_at in AFTER_BOUNDARY else MID_EPOCH


def run_with_kills(folder: Path, moments: list[Moment], flags: tuple[str, ...] = (), report=print) -> list[Run]:
    """Runs into `folder / "killed"`, killed at each moment and resumed, then to the end. Reports a row a run."""
    report(f"{'run':>3}  {'resumed from step':>17}  {'killed at step':>14}  while")
    runs = []
    for number, moment in enumerate([*moments, None], start=1):
        result = run(folder, folder / "killed", moment, flags)
        runs.append(result)
        end = f"{LAST_STEP:>14}  (to its end)"
        if moment is not None:
            left = f", leaving {result.unfinished}" if result.unfinished else ""
            end = f"{result.killed_at:>14}  {kind(result)}{left}"
        report(f"{number:>3}  {result.resumed_from:>17}  {end}")
    return runs


def find_differences(folder: Path, whole: Run, runs: list[Run]) -> list[str]:
    """How the runs and what they left in `folder / "killed"` differ from `whole` and `folder / "whole"`."""
    found = []
    for number, result in enumerate(runs, start=1):
        if result.resumed_from != result.newest:
            found.append(
                f"run {number} resumed from step {result.resumed_from}, "
                f"but the newest finished checkpoint was that of step {result.newest}"
            )
        for step, line in result.lines.items():  # also of steps whose checkpoint was never written
            if line != whole.lines[step]:
                found.append(f"run {number}, step {step}: {line} instead of {whole.lines[step]}")
    expected, killed = (read_history(folder / name) for name in ("whole", "killed"))
    if len(expected) != LAST_STEP:
        found.append(f"the whole run logged {len(expected)} steps, not {LAST_STEP}")
    if killed != expected:
        steps = [mine["step"] for mine, other in zip(killed, expected, strict=False) if mine != other]
        found.append(f"the log differs at steps {steps}; it has {len(killed)} entries and should have {len(expected)}")
    if _read_results(folder / "killed") != _read_results(folder / "whole"):
        found.append("results.json differs")
    for weights in (folder / "whole").glob("*.safetensors"):
        if (folder / "killed" / weights.name).read_bytes() != weights.read_bytes():
            found.append(f"{weights.name} differs")
    return found


def run_changed(folder: Path, flags: tuple[str, ...] = (), report=print) -> list[str]:
    """Kills a run in `folder / "changed"`, resumes it with each of [`CHANGES`], and returns those not refused."""
    run(folder, folder / "changed", Moment(EPOCH), flags)
    lines = (folder / "trails" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    record = json.loads(lines[0])
    answer = "red" if record["answer"] != "red" else "blue"
    lines[0] = json.dumps(record | {"answer": answer}) + "\n"
    (folder / "trails" / "other.jsonl").write_text("".join(lines), encoding="utf-8")
    not_refused = []
    for name, (launcher, change) in CHANGES.items():
        words = [word.format(folder=folder) for word in change]
        command = [sys.executable, *launcher, str(TRAIN), str(folder / "settings.yaml")]
        command += ["--output_dir", str(folder / "changed"), *flags, *words]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        told = re.search(r"ValueError: (The checkpoint is of another run: .*?)\. Give", done.stdout + done.stderr)
        refused = done.returncode != 0 and told is not None and not _logged(done.stdout)
        report(f"{name:16}  {told[1] if told else f'NOT REFUSED, exit status {done.returncode}'}")
        if not refused:
            not_refused.append(
                f"resumed with another {name}, it was not refused:\n{(done.stdout + done.stderr)[-2000:]}"
            )
    return not_refused


def _read_results(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "results.json").read_text(encoding="utf-8"))  # the order of keys may differ


def read_history(output_dir: Path) -> list[dict]:
    """Of the log, in full precision, what does not depend on the time it took."""
    log = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [
        {name: value for name, value in entry.items() if not name.startswith(SPEED)}
        for entry in log
        if "loss" in entry
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="How often the run is killed, at least 4 (default 12).")
    parser.add_argument("--seed", type=int, default=0, help="Other seeds draw other moments (default 0).")
    args, flags = parser.parse_known_args()
    draw_moments(args.kills, args.seed, 0.0)  # a bad number is told before anything runs
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_run(folder)
        print(f"{LAST_STEP} optimizer steps, stages end at {BOUNDARIES}, a checkpoint every {SAVE_STEPS} steps")
        whole = run(folder, folder / "whole", flags=tuple(flags))
        print(f"the uninterrupted run is done after {time.perf_counter() - start:.0f} s", flush=True)
        state = json.loads((folder / "whole" / "trainer_state.json").read_text(encoding="utf-8"))
        step_seconds = state["log_history"][-1]["train_runtime"] / LAST_STEP
        moments = draw_moments(args.kills, args.seed, step_seconds)
        runs = run_with_kills(folder, moments, tuple(flags), report=lambda row: print(row, flush=True))
        differences = find_differences(folder, whole, runs)
        print("\nresumed with a change:", flush=True)
        differences += run_changed(folder, tuple(flags), report=lambda row: print(row, flush=True))
    kinds = [kind(result) for result in runs[:-1]]
    print(f"\n{', '.join(f'{kinds.count(name)} {name}' for name in (MID_EPOCH, BOUNDARY, SAVE))}")
    if kinds.count(SAVE) < 2 or BOUNDARY not in kinds or MID_EPOCH not in kinds:
        differences.append("the kills did not hit two saves, a stage boundary and mid-epoch; try another seed")
    print(
        *differences
        or ["equal bit for bit: every logged step, stages, accuracies, final weights; each change was refused"],
        sep="\n",
    )
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
