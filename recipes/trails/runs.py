"""Many trainings and measurements side by side, each a command of its own: what truth.py and beyond.py share."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """
    A command of this repository and the folder that it fills.

    Args:
        output_dir (`Path`): Appears under this name only when the command has ended well.
        script (`str`): `train.py`, `score.py` or `diagnose.py`.
        flags (`Sequence[str]`): Its settings, without `--output_dir`.
    """

    output_dir: Path
    script: str
    flags: Sequence[str]


def add_flags(parser: argparse.ArgumentParser, output_dir: str) -> None:
    """What every such command takes beside its own flags."""
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="Folder of all runs.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Seeds (default: 0 1 2).")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Commands at a time (default: the cores).")


def run_all(runs: Sequence[Run], jobs: int, description: str) -> None:
    """
    Runs what is not there yet, `jobs` commands at a time on one core each. A `.log` beside each folder has its output.
    An interruption ends the commands that run.

    Raises:
        ValueError: a folder is there, but was made with other settings.
        RuntimeError: a command failed; the others have been let finish.
    """
    for run in runs:
        found = run.output_dir / "run.json"
        if found.is_file() and json.loads(found.read_text(encoding="utf-8")) != _settings(run):
            raise ValueError(
                f"`{run.output_dir}` was made with other settings: {found} is not {_settings(run)}. Give another "
                "`--output_dir`, or delete the folder."
            )
    todo = [run for run in runs if not run.output_dir.is_dir()]
    live: set[subprocess.Popen] = set()
    default = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the commands would outlive this one
    failed = []
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(todo), desc=description) as bar,
    ):
        started = {pool.submit(_run, run, live): run for run in todo}
        try:
            for future in as_completed(started):
                if future.result():
                    failed.append(started[future])
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(live):
                process.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, default)
    if failed:
        log = _log(failed[0])
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(
            f"{len(failed)} of {len(todo)} commands failed, the first is {failed[0].output_dir} ({log}):\n{tail}\n"
            "The same command again does only what is missing."
        )


def _log(run: Run) -> Path:
    return run.output_dir.with_name(run.output_dir.name + ".log")


def _settings(run: Run) -> dict:
    return {"script": run.script, "flags": list(run.flags)}


def _run(run: Run, live: set[subprocess.Popen]) -> int:
    partial = run.output_dir.with_name(run.output_dir.name + ".partial")  # diagnose.py and score.py go on from there
    partial.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / run.script), *run.flags, "--output_dir", str(partial)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    with open(_log(run), "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        live.add(process)
        code = process.wait()
        live.discard(process)
        log.write(f"\n{time.perf_counter() - began:.0f} seconds\n")
    if code == 0:
        (partial / "run.json").write_text(json.dumps(_settings(run)), encoding="utf-8")
        os.replace(partial, run.output_dir)
    return code


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns but the first to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
