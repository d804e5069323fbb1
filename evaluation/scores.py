"""Accuracies of checkpoints at numbers of thoughts, their comparison, table and picture. Knows no model."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..configuration_multicoco import MultiCoCoConfig
from .intervals import mcnemar, mean_score_interval, paired_bootstrap


def summarise(
    model: str,
    config: MultiCoCoConfig,
    num_thoughts: int | None,
    predictions: Sequence[Mapping[str, Any]],
    scores: Sequence[float | None],
    reads: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One row of the table; `scores` is empty where none were asked for. `reads` is from [`~readings.share`]."""
    count = len(predictions)
    row = {
        "model": model,
        "mode": config.mode,
        "stage": config.stage,
        "num_thoughts": num_thoughts,
        "samples": count,
        "new_tokens": sum(line["new_tokens"] for line in predictions) / count,
        "seconds_per_sample": sum(line["seconds"] for line in predictions) / count,
    }
    counted = [score for score in scores if score is not None]
    if counted:
        low, high = mean_score_interval(counted)
        row |= {"scored": len(counted), "accuracy": sum(counted) / len(counted), "low": low, "high": high}
    if reads and reads["samples"]:
        row["reads"] = reads["rate"]
        row |= {f"reads_{name}": reads[name] for name in ("low", "high", "samples")}
    return row


def pair_numbers(
    numbers: Mapping[str, Sequence[int | None]], first: str, second: str
) -> list[tuple[tuple[str, int | None], tuple[str, int | None]]]:
    """Keys of rows to compare: the same number of thoughts asked of both; of a checkpoint without a block its row."""
    count = max(len(numbers[first]), len(numbers[second]))
    keys = [
        [(name, number) for number in numbers[name]] * (count if len(numbers[name]) == 1 else 1)
        for name in (first, second)
    ]
    return [(mine, other) for mine, other in zip(*keys, strict=True) if mine != other]


def compare(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    first_scores: Sequence[float | None],
    second_scores: Sequence[float | None],
) -> dict[str, Any]:
    """Two rows on the same samples: the difference of their accuracies, its interval, and McNemar's p-value."""
    pairs = [(a, b) for a, b in zip(first_scores, second_scores, strict=True) if a is not None and b is not None]
    one, other = zip(*pairs, strict=True)
    low, high = paired_bootstrap(one, other)
    row = {
        "model": first["model"],
        "num_thoughts": first["num_thoughts"],
        "other": second["model"],
        "other_num_thoughts": second["num_thoughts"],
        "samples": len(pairs),
        "difference": (sum(one) - sum(other)) / len(pairs),
        "low": low,
        "high": high,
    }
    if set(one) | set(other) <= {0.0, 1.0}:  # McNemar's test knows right and wrong only
        row["only_model"] = sum(a > b for a, b in pairs)
        row["only_other"] = sum(a < b for a, b in pairs)
        row["mcnemar_p"] = mcnemar([a == 1 for a in one], [b == 1 for b in other])
    return row


def score_table(rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]) -> str:
    """The tables in the terminal."""
    width = max(len("model"), *(len(row["model"]) for row in rows)) + 2
    has_readings = any("reads" in row for row in rows)
    lines = [
        f"{'model':{width}}{'mode':13}{'thoughts':>8}  {'accuracy':>8}  {'95 % interval':>16}  {'new tokens':>10}  "
        f"{'s/sample':>8}  {'samples':>7}" + (f"  {'reads':>6}  {'95 % interval':>17}" if has_readings else "")
    ]
    for row in rows:
        accuracy, interval = "-", "-"
        if "accuracy" in row:
            accuracy, interval = f"{row['accuracy']:.1%}", f"{row['low']:.1%} - {row['high']:>6.1%}"
        lines.append(
            f"{row['model']:{width}}{row['mode']:13}{_number(row['num_thoughts']):>8}  {accuracy:>8}  {interval:>16}  "
            f"{row['new_tokens']:>10.1f}  {row['seconds_per_sample']:>8.3f}  {row.get('scored', row['samples']):>7}"
            f"{_readings(row)}"
        )
    lines.append("s/sample: wall time of a batch over its samples, on one rank, pictures and prompts included.")
    if has_readings:
        lines.append(
            "reads: share of groups of thoughts that read as their step, or behind the last one as the answer."
        )
    for row in comparisons:
        test = f", McNemar's exact p = {row['mcnemar_p']:.3g}" if "mcnemar_p" in row else ""
        test += f" (only one right: {row['only_model']}, {row['only_other']})" if test else ""
        names = f"{row['model']} ({_number(row['num_thoughts'])}) - "
        names += f"{row['other']} ({_number(row['other_num_thoughts'])})"
        lines.append(f"{names}: {row['difference']:+.1%}, 95 % interval {row['low']:+.1%} to {row['high']:+.1%}{test}")
    return "\n".join(lines)


def _readings(row: Mapping[str, Any]) -> str:
    if "reads" not in row:
        return ""
    return f"  {row['reads']:>6.1%}  {row['reads_low']:>7.1%} - {row['reads_high']:>6.1%}"


def _number(num_thoughts: int | None) -> str:
    return "no block" if num_thoughts is None else str(num_thoughts)


def draw(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Accuracy against the number of thoughts and against generated tokens, with 95 % intervals."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    number_axes, token_axes = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, model in enumerate(models):
        mine = sorted(
            (row for row in rows if row["model"] == model),
            key=lambda row: -1 if row["num_thoughts"] is None else row["num_thoughts"],
        )
        rates = [row["accuracy"] for row in mine]
        low_high = [[max(0, row["accuracy"] - row["low"]) for row in mine]]
        low_high.append([max(0, row["high"] - row["accuracy"]) for row in mine])
        style = {"yerr": low_high, "color": f"C{number}", "marker": "o", "markersize": 4, "capsize": 3}
        if mine[0]["num_thoughts"] is None:  # no block: the same beside every number
            number_axes.axhline(rates[0], color=f"C{number}", linewidth=1, linestyle="--")
        else:
            number_axes.errorbar([row["num_thoughts"] for row in mine], rates, linewidth=1, **style)
        tokens = [row["new_tokens"] for row in mine]
        token_axes.errorbar(tokens, rates, linestyle="none", label=model, **style)
        for row in mine:
            place = (row["new_tokens"], row["accuracy"])
            token_axes.annotate(_number(row["num_thoughts"]), place, (4, 4), textcoords="offset points", fontsize=7)
    for axes in (number_axes, token_axes):
        axes.set(ylim=(0, 1.05), ylabel="accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y", color="0.92")
    number_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    number_axes.set(xlabel="thoughts (95 % intervals; dashed: trained without a block)")
    most = max(row["new_tokens"] for row in rows)
    token_axes.set(xlabel="generated tokens per answer (labels: thoughts)", xlim=(0, max(1, most) * 1.15))
    figure.legend(*token_axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def write_scores(
    output_dir: str | Path,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
) -> str:
    """Writes scores.json, scores.csv and, where there are accuracies, scores.png; returns what lies where."""
    folder, is_scored = Path(output_dir), "accuracy" in rows[0]
    report = {"settings": settings, "scores": rows, "comparisons": comparisons}
    (folder / "scores.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    with open(folder / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    if is_scored:
        draw(rows, folder / "scores.png")
    return f"predictions, scores.json, scores.csv{' and scores.png' if is_scored else ''} are in {folder}"
