"""Do the thoughts of Trails matter? Every mode with several seeds, each diagnosed: one table, one picture, pages.

    python recipes/trails/truth.py --seeds 0 1 2 --jobs 2
    python recipes/trails/truth.py --modes coconut pause_steps --seeds 0 --output_dir out/small --learning_rate 5e-4

A mode here is one of multicoco's with its YAML, or one more of `VARIANTS`: `coconut` decodes steps, and so do
`pause_steps` and `pause_loop_steps`, the controls with its YAML; no other mode does.

Flags that it does not know go to train.py. A seed is that of the first weights, of the order of the boards and of the
drawn stages; the boards are the same. A command that was interrupted goes on with what is missing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from multicoco import MODES, mean_interval
from multicoco.recipes.trails.prepare import COLOURS
from multicoco.recipes.trails.runs import ROOT, Run, add_flags, markdown, run_all
from multicoco.recipes.trails.start_model import make_start_model


# Name of a mode here -> its YAML, and the change against it.
VARIANTS: dict[str, tuple[str, list[str]]] = {mode: (mode, []) for mode in MODES} | {
    "plain": ("plain", []),
    "coconut_plain": ("coconut_plain", ["--per_device_train_batch_size", "64"]),
    "pause_steps": ("coconut", ["--mode", "pause"]),
    "pause_loop_steps": ("coconut", ["--mode", "pause_loop"]),
}
CONTROLS = {"coconut": "pause_steps", "plain": "pause", "coconut_plain": "pause"}  # shown beside it, of the same seed
CHANCE = 1 / len(COLOURS)

# Columns: what diagnosis.json holds where; a mode without thoughts lacks most of it.
FIGURES = {
    "thoughts zeroed": ("experiments", "zero-all", "accuracy", "rate"),
    "thoughts of another": ("experiments", "swap-all", "accuracy", "rate"),
    "follows the donor": ("thoughts", "following", "donors_picture", "donor", "rate"),
    "follows a decoy": ("thoughts", "following", "donors_picture", "decoy", "rate"),
    "grey picture": ("experiments", "grey-both", "accuracy", "rate"),
}


def training(mode: str, seed: int, data: str, output_dir: Path, settings: Sequence[str]) -> Run:
    """From the first weights of the seed: the mode's own YAML and change, on one process."""
    name, change = VARIANTS[mode]
    flags = [str(ROOT / "recipes" / "trails" / f"{name}.yaml"), "--per_device_train_batch_size", "32", *change]
    flags += ["--train_file", f"{data}/train.jsonl", "--eval_file", f"{data}/val.jsonl"]
    flags += ["--model_name_or_path", str(output_dir / f"start-{seed}"), "--seed", str(seed), *settings]
    return Run(output_dir / f"{mode}-{seed}", "train.py", flags)


def diagnosis(mode: str, seed: int, data: str, output_dir: Path, samples: int, control: str | None) -> Run:
    """Of one training, beside the one of the mode `control` where there is one."""
    name = f"{mode}-{seed}"
    flags = ["--model", str(output_dir / name), "--data", f"{data}/val.jsonl", "--max_samples", str(samples)]
    if control is not None:
        flags += ["--control", str(output_dir / f"{control}-{seed}")]
    flags += ["--batch_size", "256", "--report", str(output_dir / f"{name}.html")]
    return Run(output_dir / "diagnosis" / name, "diagnose.py", flags)


def read_seed(output_dir: Path, mode: str, seed: int) -> dict[str, Any]:
    """What a seed of a mode reached, and what its diagnosis says; `None` for what the mode does not have."""
    name = f"{mode}-{seed}"
    final = json.loads((output_dir / name / "results.json").read_text())[-1]
    diagnosis = json.loads((output_dir / "diagnosis" / name / "diagnosis.json").read_text())
    found = {
        "mode": mode,
        "seed": seed,
        **{name: final[f"eval/{name}"] for name in ("samples", "accuracy", "new_tokens", "num_thoughts")},
        "verdict": diagnosis.get("thoughts", {}).get("verdict"),
        "lens": [row["top1"]["rate"] for row in diagnosis.get("lens", [])],
        "diagnosed": diagnosis["samples"],
    }
    for label, path in FIGURES.items():
        value = diagnosis
        for key in path:
            value = value.get(key, {})
        found[label] = value if isinstance(value, float) else None
    return found


def table(rows: Sequence[dict[str, Any]], modes: Sequence[str]) -> str:
    """A line for each mode: means of its seeds, and what each seed reached."""
    lines = []
    for mode in modes:
        mine = [row for row in rows if row["mode"] == mode]
        rates = [row["accuracy"] for row in mine]
        line = [mode, str(mine[0]["num_thoughts"]), f"{_mean(mine, 'new_tokens'):.1f}"]
        line += [f"{_mean(mine, 'accuracy'):.1%}", interval(rates), ", ".join(f"{100 * rate:.1f}" for rate in rates)]
        line += [_percent(_mean(mine, label)) for label in FIGURES]
        verdicts = [row["verdict"] for row in mine if row["verdict"]]
        line.append(", ".join(f"{verdicts.count(verdict)} x {verdict}" for verdict in dict.fromkeys(verdicts)) or "-")
        lines.append(line)
    head = ["", "thoughts", "generated tokens", "accuracy", "95 % of seeds", "each seed, %", *FIGURES, "thoughts are"]
    return markdown(head, lines)


def interval(rates: Sequence[float]) -> str:
    """Of the mean over seeds, cut at 0 and 1; nothing for one seed."""
    if len(rates) < 2:
        return "-"
    low, high = mean_interval(rates)
    return f"{max(0, low):.1%} - {min(1, high):.1%}"


def _mean(rows, label) -> float | None:
    values = [row[label] for row in rows if row[label] is not None]
    return sum(values) / len(values) if values else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def draw(rows: Sequence[dict[str, Any]], modes: Sequence[str], path: Path) -> None:
    """Accuracy of each mode, and what answers follow when thoughts and picture are a donor's; a dot is a seed."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    thinking = {row["mode"] for row in rows if row["follows the donor"] is not None}
    for axes, labels, names in (
        (left, ("accuracy", "thoughts zeroed", "grey picture"), modes),
        (right, ("follows the donor", "follows a decoy"), [mode for mode in modes if mode in thinking]),
    ):
        for number, label in enumerate(labels):
            width = 0.8 / len(labels)
            for place, mode in enumerate(names):
                values = [row[label] for row in rows if row["mode"] == mode and row[label] is not None]
                if not values:
                    continue
                x = place + (number - (len(labels) - 1) / 2) * width
                axes.bar(x, sum(values) / len(values), width * 0.92, color=f"C{number}", alpha=0.55)
                axes.plot([x] * len(values), values, "o", color=f"C{number}", markersize=3.5)
            axes.bar(0, 0, color=f"C{number}", alpha=0.55, label=label)
        axes.axhline(CHANCE, color="0.5", linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(names)), names, fontsize=9)
        axes.set(ylim=(0, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1])
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(fontsize=8, frameon=False, loc="upper center", ncols=3)
    left.set_title("accuracy on held-out boards (dotted: chance; a dot is a seed)", fontsize=9)
    right.set_title("answers under the thoughts and the picture of a donor", fontsize=9)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs what is missing; prints the table and returns what it is made of, a dictionary for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/trails", help="Folder that prepare.py made (default: data/trails).")
    parser.add_argument("--modes", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="Default: all.")
    parser.add_argument("--samples", type=int, default=1000, help="Boards of a diagnosis (default: 1000).")
    add_flags(parser, "out/truth")
    args, settings = parser.parse_known_args(arguments)
    for seed in args.seeds:
        if not (args.output_dir / f"start-{seed}" / "model.safetensors").is_file():
            make_start_model(args.output_dir / f"start-{seed}", seed=seed)
    pairs = [(mode, seed) for seed in args.seeds for mode in args.modes]
    folders = (args.data, args.output_dir)
    run_all([training(*pair, *folders, settings) for pair in pairs], args.jobs, "trainings")
    controls = {mode: control for mode, control in CONTROLS.items() if control in args.modes}
    runs = [diagnosis(*pair, *folders, args.samples, controls.get(pair[0])) for pair in pairs]
    run_all(runs, args.jobs, "diagnoses")
    rows = [read_seed(args.output_dir, mode, seed) for mode in args.modes for seed in args.seeds]
    (args.output_dir / "truth.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    text = table(rows, args.modes)
    (args.output_dir / "truth.md").write_text(text, encoding="utf-8")
    draw(rows, args.modes, args.output_dir / "truth.png")
    print(f"\n{text}\ntruth.json, truth.md, truth.png and a page for each run are in {args.output_dir}")
    return rows


if __name__ == "__main__":
    main()
