"""The modes side by side: reads the results.json of finished runs, prints a table and draws a picture.

python recipes/trails/compare.py out/trails-coconut out/trails-cot out/trails-pause --output out/trails.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from multicoco import wilson_interval


def read_run(folder: str | Path) -> dict:
    """
    What a run reached: its name, mode, seed, optimizer steps, and one row for each stage.

    Raises:
        ValueError: the folder holds no finished run.
    """
    folder = Path(folder)
    files = [folder / name for name in ("results.json", "trainer_state.json", "config.json")]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"`{folder}` lacks {missing}, expected the output of a finished train.py. Run it first.")
    rows, state, config = (json.loads(path.read_text()) for path in files)
    return {"name": folder.name, "mode": config["mode"], "steps": state["global_step"], "rows": rows}


def show_table(runs: list[dict]) -> None:
    """At the last stage of each run, in Markdown."""
    print("| run | mode | steps | thoughts | accuracy | 95 % interval | new tokens | samples |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for run in runs:
        row = run["rows"][-1]
        low, high = wilson_interval(row["eval/accuracy"], row["eval/samples"])
        print(
            f"| {run['name']} | {run['mode']} | {run['steps']} | {row['eval/num_thoughts']} | "
            f"{row['eval/accuracy']:.1%} | {low:.1%} - {high:.1%} | {row['eval/new_tokens']:.1f} | "
            f"{row['eval/samples']} |"
        )


def draw_runs(runs: list[dict], path: str | Path, chance: float) -> None:
    """Accuracy over stages, and accuracy against generated tokens at the last stage."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    stage_axes, token_axes = figure.subplots(1, 2)
    last_stage = max(row["eval/stage"] for run in runs for row in run["rows"])
    for number, run in enumerate(runs):
        stages = [row["eval/stage"] for row in run["rows"]]
        rates = [row["eval/accuracy"] for row in run["rows"]]
        final = run["rows"][-1]
        low, high = wilson_interval(final["eval/accuracy"], final["eval/samples"])
        colour = f"C{number}"
        if len(stages) == 1:  # a mode without stages: the same at all of them
            stage_axes.plot([0, last_stage], rates * 2, color=colour, linewidth=1, linestyle="--")
        else:
            stage_axes.plot(stages, rates, color=colour, marker="o", markersize=4, linewidth=1.2)
        token_axes.errorbar(
            final["eval/new_tokens"],
            final["eval/accuracy"],
            yerr=[[final["eval/accuracy"] - low], [high - final["eval/accuracy"]]],
            marker="o",
            capsize=3,
            color=colour,
            linestyle="none",
            label=run["name"],
        )
    for axes in (stage_axes, token_axes):
        axes.axhline(chance, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(
            "chance", (0.99, chance), (0, 3), ("axes fraction", "data"), "offset points", ha="right", fontsize=8
        )
        axes.set(ylim=(0, 1.05), ylabel="accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y", color="0.92")
    stage_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    stage_axes.set(xlabel="stage (dashed: modes without stages)")
    token_axes.set(xlabel="generated tokens, last stage", xlim=(0, None))
    figure.legend(*token_axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description="Compare finished runs.")
    parser.add_argument("runs", nargs="+", help="Output folders of train.py.")
    parser.add_argument("--output", default="out/trails.png", help="Picture to write.")
    parser.add_argument("--chance", type=float, default=1 / 8, help="Accuracy of guessing (default: 1 in 8).")
    args = parser.parse_args()
    runs = [read_run(folder) for folder in args.runs]
    show_table(runs)
    draw_runs(runs, args.output, args.chance)
    print(f"\n{args.output}: drawn")


if __name__ == "__main__":
    main()
