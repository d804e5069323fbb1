"""What lies beyond the trained range, and which setting moves it: a harder Trails, every change with several seeds.

    python recipes/trails/beyond.py --seeds 0 1 2 --jobs 2
    python recipes/trails/beyond.py --variants plain linear --seeds 0 --output_dir out/small --learning_rate 5e-4

Flags that it does not know go to train.py.

Boards of 6 x 6 cells. Questions to train on follow up to 8 arrows, questions to answer up to 10. One model learns to
write the steps (`coconut_plain.yaml --mode cot`), in two runs: colours are learned only after the learning rate has
come down once. From it, as one fine-tunes a checkpoint, every variant of `beyond.yaml` replaces the first 2 steps by
thoughts, and those of `steps.yaml`, whose thoughts must be readable as their steps, replace all. Each is asked without
thoughts, and with those of one step less than it was trained with to two more; a seed is that of the order of boards
and of the drawn stages. A command that was interrupted goes on with what is missing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from multicoco import load_records, mean_interval
from multicoco.recipes.trails.prepare import prepare
from multicoco.recipes.trails.runs import ROOT, Run, add_flags, markdown, run_all
from multicoco.recipes.trails.start_model import make_start_model


SIZE, MAX_ARROWS, MAX_TRAIN_ARROWS = 6, 10, 8
ASKED = ("none", "1 less", "as trained", "1 more", "2 more")  # steps that thoughts stand for
TRAINED = ASKED.index("as trained")
VARIANTS = {  # a YAML, and the change against it
    "plain": ("beyond", []),
    "linear": ("beyond", ["--mix", "linear"]),
    "uniform": ("beyond", ["--mix", "uniform", "--mix_prob", "0.5"]),
    "longer": ("beyond", ["--epochs_per_stage", "2", "--num_train_epochs", "4"]),
    "two_thoughts": ("beyond", ["--c_thought", "2"]),
    "rms_match": ("beyond", ["--thought_feedback", "rms_match"]),
    "steps": ("steps", []),
    "steps_at_once": ("steps", ["--first_latent_stage", "9"]),
}
ARROWS, COT = "arrows", "cot"  # the two runs of written reasoning; the second starts from the first
EPOCHS = {ARROWS: "8", COT: "4"}
DECAY = ["--lr_scheduler_kwargs", json.dumps({"num_decay_steps": 500})]


def training(variant: str, seed: int, data: str, output_dir: Path, settings: Sequence[str]) -> Run:
    """From written reasoning to thoughts, or, for `cot`, from random weights to written reasoning."""
    start = {ARROWS: "start", COT: f"{ARROWS}-0"}.get(variant, f"{COT}-0")
    name, change = VARIANTS.get(variant, ("coconut_plain", ["--mode", "cot"]))
    if variant in EPOCHS:
        change = [*change, "--num_train_epochs", EPOCHS[variant], *DECAY]
    flags = [str(ROOT / "recipes" / "trails" / f"{name}.yaml"), *change]
    flags += ["--train_file", f"{data}/train.jsonl", "--eval_file", f"{data}/val.jsonl", "--answer_every", "end"]
    flags += ["--model_name_or_path", str(output_dir / start), "--seed", str(seed)]
    flags += ["--per_device_train_batch_size", "64", *settings]
    return Run(output_dir / f"{variant}-{seed}", "train.py", flags)


def scoring(variant: str, seed: int, data: str, output_dir: Path) -> Run:
    """Its answers with each number of thoughts of `ASKED`; a model that only writes is asked once."""
    model = output_dir / f"{variant}-{seed}"
    flags = ["--model", str(model), "--data", f"{data}/val.jsonl", "--batch_size", "256"]
    if variant != COT:
        flags += ["--num_thoughts", *map(str, asked_thoughts(model))]
    return Run(output_dir / "scores" / model.name, "score.py", flags)


def asked_thoughts(model: Path) -> list[int]:
    """
    The numbers of thoughts of `ASKED`, of a trained model.

    Raises:
        ValueError: it was trained with the thoughts of less than two steps, so that two of them are the same.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    c_thought, steps = config["c_thought"], config["max_latent_stage"]
    if steps < 2:
        raise ValueError(f"`max_latent_stage` of {model} is {steps}, expected at least 2. Train with more stages.")
    return [0, *(c_thought * (steps + more) for more in (-1, 0, 1, 2))]


def read_answers(folder: Path, records: Sequence[dict]) -> dict[int, np.ndarray]:
    """
    For each number of thoughts, by its place in `ASKED`, whether each record was answered right.

    Raises:
        ValueError: the folder holds answers to other records.
    """
    right = {}
    for path in (folder / "predictions").glob("*.jsonl"):
        header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        answers = {line["index"]: line["prediction"] for line in lines}
        if set(answers) != set(range(len(records))) or (header["num_thoughts"] or 0) in right:
            raise ValueError(f"{path} is not the one answer to each of {len(records)} records. Delete {folder}.")
        hits = [answers[index] == record["answer"] for index, record in enumerate(records)]
        right[header["num_thoughts"] or 0] = np.array(hits, dtype=float)
    return {place: right[thoughts] for place, thoughts in enumerate(sorted(right))}


def columns(right: dict[int, np.ndarray], arrows: np.ndarray) -> dict[str, float]:
    """The accuracies of the table: within the trained range, fewer and more thoughts, longer trails."""
    seen = arrows <= MAX_TRAIN_ARROWS
    found = {ASKED[place]: hits[seen] for place, hits in right.items()}
    last = right[TRAINED if len(right) > 1 else 0]  # a model that only writes was asked once
    found |= {f"{count} arrows": last[arrows == count] for count in range(MAX_TRAIN_ARROWS + 1, MAX_ARROWS + 1)}
    return {name: float(hits.mean()) for name, hits in found.items()}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Means of the seeds; of all but the first kind of thoughts the difference to `plain`, paired by seed."""
    names = [*ASKED, *(f"{n} arrows" for n in range(MAX_TRAIN_ARROWS + 1, MAX_ARROWS + 1))]
    lines = []
    for variant, seeds in results.items():
        line = [variant]
        for name in names:
            values = [seed[name] for seed in seeds if name in seed]
            cell = f"{100 * np.mean(values):.1f}" if values else "-"
            if values and variant not in (COT, "plain") and "plain" in results and len(values) > 1:
                gains = [value - plain[name] for value, plain in zip(values, results["plain"], strict=True)]
                low, high = mean_interval(gains)
                cell += f" ({100 * np.mean(gains):+.1f}: {100 * low:+.1f} to {100 * high:+.1f})"
            line.append(cell)
        lines.append(line)
    return markdown(["steps thought", *names], lines)


def draw(answers: dict[str, list[dict[int, np.ndarray]]], arrows: np.ndarray, path: Path) -> None:
    """Where it breaks: accuracy by arrows and thoughts of the plain variant, and of each variant by thoughts."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    first = "plain" if "plain" in answers else next(name for name in answers if name != COT)
    places = range(len(ASKED))
    hits = np.array([[seed[place] for place in places] for seed in answers[first]])  # (seeds, asked, records)
    cells = np.array([hits[..., arrows == count].mean(axis=-1).mean(axis=0) for count in range(1, MAX_ARROWS + 1)])
    left.imshow(cells, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    for (row, column), value in np.ndenumerate(cells):
        colour = "black" if value > 0.6 else "white"
        left.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    left.axvline(TRAINED + 0.5, color="red", linewidth=1.2)
    left.set_xticks(places, ASKED)
    left.axhline(MAX_TRAIN_ARROWS - 0.5, color="red", linewidth=1.2)
    left.set_yticks(range(MAX_ARROWS), range(1, MAX_ARROWS + 1))
    left.set(xlabel="steps thought, the rest is written", ylabel="arrows of the question")
    left.set_title(f"{first}: right answers in % (trained: left of and above the red lines)", fontsize=9)
    seen = arrows <= MAX_TRAIN_ARROWS
    for number, (variant, seeds) in enumerate(answers.items()):
        if variant == COT:
            right.axhline(np.mean([seed[0][seen].mean() for seed in seeds]), color="0.5", linestyle="--", label=COT)
            continue
        rates = np.array([[seed[place][seen].mean() for place in places] for seed in seeds])  # (seeds, asked)
        right.plot(places, rates.mean(axis=0), color=f"C{number}", label=variant)
        right.plot(places, rates.T, "o", color=f"C{number}", markersize=3)
    right.axvline(TRAINED, color="red", linewidth=0.8, linestyle=":")
    right.set(xlabel="steps thought (a dot is a seed)", ylim=(0, 1.03))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.set_xticks(places, ASKED)
    right.set_title(f"questions of up to {MAX_TRAIN_ARROWS} arrows", fontsize=9)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, float]]]:
    """Runs what is missing; prints the table and returns its figures, of each seed of each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/beyond", help="Folder of the boards; made if it is not there.")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="Default: all.")
    parser.add_argument("--num_train", type=int, default=16000, help="Boards to train on.")
    parser.add_argument("--num_val", type=int, default=1024, help="Boards to answer.")
    add_flags(parser, "out/beyond")
    args, settings = parser.parse_known_args(arguments)
    prepare(
        args.data, args.num_train, args.num_val, size=SIZE, max_arrows=MAX_ARROWS, max_train_arrows=MAX_TRAIN_ARROWS
    )
    if not (args.output_dir / "start" / "model.safetensors").is_file():
        make_start_model(args.output_dir / "start", SIZE, MAX_ARROWS)
    pairs = [(variant, seed) for seed in args.seeds for variant in args.variants]
    for wave, name in (([(ARROWS, 0)], "written reasoning"), ([(COT, 0)], "the same again"), (pairs, "thoughts")):
        run_all([training(*pair, args.data, args.output_dir, settings) for pair in wave], args.jobs, name)
    run_all([scoring(*pair, args.data, args.output_dir) for pair in [(COT, 0), *pairs]], args.jobs, "answers")

    records = load_records(f"{args.data}/val.jsonl")
    arrows = np.array([len(record["steps"]) for record in records])
    answers = {
        variant: [read_answers(args.output_dir / "scores" / f"{variant}-{seed}", records) for seed in seeds]
        for variant, seeds in {COT: [0], **dict.fromkeys(args.variants, args.seeds)}.items()
    }
    results = {variant: [columns(right, arrows) for right in seeds] for variant, seeds in answers.items()}
    (args.output_dir / "beyond.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = table(results)
    (args.output_dir / "beyond.md").write_text(text, encoding="utf-8")
    draw(answers, arrows, args.output_dir / "beyond.png")
    print(f"\n{text}\nbeyond.json, beyond.md and beyond.png are in {args.output_dir}")
    return results


if __name__ == "__main__":
    main()
