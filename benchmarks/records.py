r"""What many records cost: time to start, and memory of each of two ranks after an epoch.

    python benchmarks/records.py                    # 100,000 records; about 7 minutes on 2 idle cores
    python benchmarks/records.py --count 2000       # does it run? No figure to quote.

It ends with status 1 if a goal of memory is missed; times are those of an idle machine only.

Each rank is a process that starts as `train.py` does (`load_records`, `StageDataset`), reads its half of a shuffled
epoch through the collator, and then says what Linux counts as its memory: pages that only it has written
(`Private_Dirty`), and its share of all its pages (`Pss`: a page that two processes map counts half for each). The same
is measured with 8 records; the differences are what records cost. Records have one picture of 1,000, whose header is
read once for each 500 records that are checked together, and 300 to 1,000 tokens.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import HfArgumentParser
from transformers.utils import logging

from multicoco import CurriculumArguments, MultiCoCoProcessor, ReasoningCollator, StageDataset, load_records
from multicoco.benchmarks.passes import print_table
from multicoco.curriculum import setting
from multicoco.recipes.trails.start_model import make_start_model


WORDS = (
    "the a car street left right two three four stands on of in red blue walks tree house small large behind front "
    "because so then we see count which answer parked near far light dark window door green sign"
).split()
TOKENS = 300, 1000
GOALS = {"warm start": 10.0, "private": 100.0, "shared": 300.0, "faster": 1.6}  # seconds, MB, MB, times


@dataclass
class RecordsArguments:
    """What is measured."""

    count: int = setting("Records.", default=100_000)
    pictures: int = setting("Different pictures among them.", default=1000)
    role: str | None = setting("Of a process that this script starts: start or epoch.", default=None)
    file: str | None = setting("Of such a process: the records.", default=None)
    rank: int = setting("Of such a process: which half of the epoch.", default=0)
    num_proc: int | None = setting("Of such a process: how many it may start.", default=None)


def make_file(folder: Path, count: int, pictures: int) -> Path:
    """Records of random words, as long as they are to be, and their pictures."""
    generator = random.Random(0)
    folder.mkdir()
    for number in range(pictures):
        Image.new("RGB", (64, 48), (number % 256, 30, 60)).save(folder / f"{number}.jpg")
    tokenizer = MultiCoCoProcessor.from_pretrained(folder.parent / "start").tokenizer
    each = len(tokenizer(" ".join(WORDS))["input_ids"]) / len(WORDS)  # tokens of a word

    def text(tokens: float) -> str:
        return " ".join(generator.choices(WORDS, k=max(1, round(tokens / each))))

    path = folder / "train.jsonl"
    with open(path, "w") as file:
        for number in range(count):
            tokens = generator.uniform(TOKENS[0], TOKENS[1] - 60) - 40  # the prompt's own, and chance
            num_steps = generator.randint(2, 6)
            row = {
                "id": f"r{number}",
                "images": [f"{generator.randrange(pictures)}.jpg"],
                "question": text(tokens / 4) + "?",
                "steps": [text(tokens * 0.7 / num_steps) + "." for _ in range(num_steps)],
                "answer": text(tokens / 20),
            }
            file.write(json.dumps(row) + "\n")
    return path


def memory() -> dict[str, float]:
    """MB of this process."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    found = {name.rstrip(":"): int(value) * 1024 / 1e6 for name, value, *_ in lines}
    return {"private": found["Private_Dirty"], "shared": found["Pss"]}


def run_role(args: RecordsArguments) -> None:
    """One process: starts, and reads its half of an epoch if it is to."""
    path = Path(str(args.file))
    processor = MultiCoCoProcessor.from_pretrained(path.parent.parent / "start")
    began = time.perf_counter()
    records = load_records(path, num_proc=args.num_proc)
    dataset = StageDataset(records, processor, CurriculumArguments(), num_proc=args.num_proc)
    result = {"start": time.perf_counter() - began}
    if args.role == "epoch":
        collator = ReasoningCollator(processor)
        order = np.random.default_rng(0).permutation(len(dataset))[args.rank :: 2]
        tokens, began = 0, time.perf_counter()
        for start in range(0, len(order), 4):
            batch = collator([dataset[int(index)] for index in order[start : start + 4]])
            tokens += int(batch["attention_mask"].sum())
        result |= {"tokens": tokens / len(order), "epoch": time.perf_counter() - began}
        print("read", flush=True)
        sys.stdin.readline()  # until the other rank has read its half too: both map the same pages
        result |= memory()
    print(json.dumps(result), flush=True)
    sys.stdin.readline()


def start(path: Path, role: str, **flags: int) -> subprocess.Popen:
    """A process of this script with another role."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, __file__, "--role", role, "--file", str(path), *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def result_of(*processes: subprocess.Popen) -> list[dict[str, float]]:
    """What they print last. All stay until each has printed."""

    def read(process: subprocess.Popen) -> str:
        if not (line := process.stdout.readline()):
            raise RuntimeError("A process has failed; what it said stands above.")
        return line

    lines = [read(process) for process in processes]
    if lines[0] == "read\n":
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        lines = [read(process) for process in processes]
    for process in processes:
        process.communicate("\n")
    return [json.loads(line) for line in lines]


def main(args: RecordsArguments) -> bool:
    """Makes the data, starts the processes and prints the table; whether the goals of memory are met."""
    with tempfile.TemporaryDirectory() as name:
        make_start_model(Path(name) / "start")
        files = {count: make_file(Path(name) / str(count), count, args.pictures) for count in (8, args.count)}

        def cold(num_proc: int) -> float:
            os.environ["HF_DATASETS_CACHE"] = f"{name}/cache-{num_proc}"
            (result,) = result_of(start(files[args.count], "start", num_proc=num_proc))
            return result["start"]

        seconds = {f"cold start, {number} process{'es' * (number > 1)}": cold(number) for number in (1, 2)}
        (warm,) = result_of(start(files[args.count], "start"))
        rows = {}
        for count, path in files.items():
            rows[count] = result_of(*(start(path, "epoch", rank=rank) for rank in (0, 1)))
    one, two = seconds.values()
    seconds["warm start"] = warm["start"]
    lines = [[name, f"{value:.1f} s", f"{1000 * value / args.count:.3f} ms"] for name, value in seconds.items()]
    print_table([f"{args.count:,} records", "time", "a record"], lines)
    epoch = rows[args.count][0]
    print(f"\n{epoch['tokens']:.0f} tokens a sample; half an epoch {epoch['epoch']:.0f} s\n")
    lines, is_met = [], True
    for kind in ("private", "shared"):
        few, many = (max(rank[kind] for rank in rows[count]) for count in files)
        is_met &= many - few <= GOALS[kind]
        lines.append([kind, f"{few:.0f} MB", f"{many:.0f} MB", f"{many - few:.0f} MB", verdict(many - few, kind)])
    print_table(["a rank's memory", "8 records", f"{args.count:,}", "difference", "goal"], lines)
    print(f"\nwarm start, seconds: {verdict(seconds['warm start'], 'warm start')}")
    faster = "met" if one >= GOALS["faster"] * two else "missed"
    print(f"2 processes: {one / two:.2f}x as fast as one, at least {GOALS['faster']}: {faster}")
    return is_met


def verdict(value: float, kind: str) -> str:
    """Whether a goal was reached."""
    return f"at most {GOALS[kind]:.0f}: {'met' if value <= GOALS[kind] else 'missed'}"


if __name__ == "__main__":
    logging.set_verbosity_error()
    arguments = HfArgumentParser(RecordsArguments).parse_args_into_dataclasses()[0]
    sys.exit(run_role(arguments) if arguments.role else not main(arguments))
