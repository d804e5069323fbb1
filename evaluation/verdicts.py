"""What results and measurements show: figures, tests, verdicts. Knows no model, and not how they came about."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .experiments import KINDS, Results, name_of
from .intervals import Values, mcnemar, paired_bootstrap, rate
from .measurements import Measurements, collapse_warnings, lens_hits
from .metric import Metric
from .readings import Follow, SameStep, edit_table, reading_table


ALPHA = 0.05
USED, NOT_SHOWN = "used", "not shown to be used"


def difference(first: Values, second: Values, num_tests: int = 1) -> dict[str, Any] | None:
    """
    `mean(first) - mean(second)` of paired scores: its 95 % interval, McNemar's exact p where all scores are 0 or 1,
    and whether it is above 0 when `num_tests` are made: the interval, and the p of the sign test (which McNemar's is),
    at the level `ALPHA / num_tests`. The interval alone would not do: that of a few samples is too short.
    """
    if not len(first):
        return None
    one, other = np.asarray(first, float), np.asarray(second, float)
    low, high = paired_bootstrap(one, other)
    corrected_low, _ = paired_bootstrap(one, other, 1 - ALPHA / num_tests)
    is_binary = bool(np.isin(np.concatenate([one, other]), (0, 1)).all())
    sign = mcnemar(one > other, one < other)
    return {
        "samples": len(one),
        "difference": float(one.mean() - other.mean()),
        "low": low,
        "high": high,
        "mcnemar_p": sign if is_binary else None,
        "num_tests": num_tests,
        "above_0": corrected_low > 0 and sign < ALPHA / num_tests,
    }


class Scores:
    """Predictions and scores of all experiments of a checkpoint as arrays; NaN is the score of what does not count."""

    def __init__(self, results: Results, metric: Metric):
        self.results = results
        self.predictions, self.scores, self.valid, self.new_tokens = {}, {}, {}, {}
        known = {}
        for experiment in results.experiments:
            name, lines = experiment.name, results.lines[experiment.name]
            values = []
            for row, line in enumerate(lines):  # most experiments repeat an answer, and a metric may be slow
                key = row, line["prediction"]
                if key not in known:
                    known[key] = metric(results.records[row], line["prediction"])
                values.append(known[key])
            self.predictions[name] = np.array([line["prediction"] for line in lines], dtype=object)
            self.scores[name] = np.array([math.nan if value is None else value for value in values])
            self.new_tokens[name] = np.array([line["new_tokens"] for line in lines])
            self.valid[name] = results.changed(experiment)

    def minus(
        self, first: str, second: str, num_tests: int = 1, other: "Scores | None" = None
    ) -> dict[str, Any] | None:
        """[`difference`] of the accuracies of two experiments; the second may be another checkpoint's."""
        other = other or self
        keep = self.valid[first] & other.valid[second]
        keep &= ~np.isnan(self.scores[first]) & ~np.isnan(other.scores[second])
        return difference(self.scores[first][keep], other.scores[second][keep], num_tests)

    def table(self) -> dict[str, dict[str, Any]]:
        """For each experiment: settings, accuracy, tokens, and how it differs from the intact run."""
        rows = {}
        for experiment in self.results.experiments:
            name = experiment.name
            valid = self.valid[name]
            scored = valid & ~np.isnan(self.scores[name])
            flips = self.predictions[name][valid] != self.predictions["intact"][valid]
            rows[name] = {
                **asdict(experiment),
                "accuracy": rate(self.scores[name][scored]),
                "new_tokens": float(self.new_tokens[name][valid].mean()) if valid.any() else None,
                "flips": rate(flips.astype(float)),
                "loss": self.minus("intact", name),
            }
        return rows


@dataclass(frozen=True)
class Examined:
    """All that was found out about a checkpoint; without measurements, if it does not think."""

    scores: Scores
    measurements: Measurements | None


def count_tests(num_thoughts: int | None, *, has_images: bool) -> int:
    """Tests that the verdicts of a page are made of: each holds at the level `ALPHA` / this number."""
    count = num_thoughts or 0
    of_thoughts = len(KINDS) + 2 + 2 * count if count else 0  # damage, following, each thought by itself
    of_pictures = 2 + (1 + 4 if count else 0)  # the picture; following under the donor's, through the thoughts
    return of_thoughts + (of_pictures if has_images else 0)


def judge_thoughts(scores: Scores, num_tests: int) -> dict[str, Any]:
    """
    The verdict on the thoughts, and on each by itself. docs/truth.md has the rule in words.

    Args:
        num_tests (`int`): From [`count_tests`].
    """
    results, count = scores.results, scores.results.num_thoughts or 0
    damage = {kind: scores.minus("intact", f"{kind}-all", num_tests) for kind in KINDS}
    answers, swapped = scores.predictions["intact"], scores.predictions["swap-all"]
    donors, decoys = results.donors["swap"], results.donors["decoy"]

    def agreement(name, others, rows):
        return (scores.predictions[name] == answers[others])[rows]

    rows = np.flatnonzero((donors >= 0) & (decoys >= 0))
    fed = {"own_picture": (agreement("swap-all", donors, rows), agreement("swap-all", decoys, rows))}
    rows = np.flatnonzero((donors >= 0) & (results.donors["swap_same"] >= 0))
    fed["same_answer"] = (agreement("swap-all", donors, rows), agreement("swap_same-all", donors, rows))
    if "swap-picture" in scores.scores:
        rows = np.flatnonzero(scores.valid["swap-picture"] & scores.valid["decoy-picture"])
        fed["donors_picture"] = (agreement("swap-picture", donors, rows), agreement("decoy-picture", donors, rows))
    following = {
        name: {"donor": rate(found), "decoy": rate(chance), "test": difference(found, chance, num_tests)}
        for name, (found, chance) in fed.items()
    }
    harmful = [kind for kind, test in damage.items() if _above_0(test)]
    followed = [name for name, found in following.items() if _above_0(found["test"])]
    indices = []
    for index in range(count if harmful and followed else 0):
        names = [name_of(kind, index, "after", count) for kind in ("mean", "swap")]
        if any(_above_0(scores.minus("intact", name, num_tests)) for name in names):
            indices.append(index)
    same, another = (np.flatnonzero(results.donors[kind] >= 0) for kind in ("swap_same", "swap"))
    return {
        "verdict": USED if harmful and followed else NOT_SHOWN,
        "damage": damage,
        "harmful": harmful,
        "following": following,
        "followed": followed,
        "stays": rate((swapped == answers)[another]),
        "stays_with_same_answer": rate((scores.predictions["swap_same-all"] == answers)[same]),
        "used_indices": indices,
    }


def judge_picture(scores: Scores, num_tests: int) -> dict[str, Any]:
    """The verdict on the picture, and on what thoughts took from it; arguments and rule as [`judge_thoughts`]."""
    names = ("grey", "other")
    whole = {name: scores.minus("intact", f"{name}-both", num_tests) for name in names}
    found = {"tests": whole, "verdict": USED if any(map(_above_0, whole.values())) else NOT_SHOWN}
    if "grey-answer" in scores.scores:
        pairs = {f"{name}, wrong for the answer": (f"{name}-answer", f"{name}-both") for name in names}
        pairs |= {f"{name}, right for the answer": ("intact", f"{name}-thoughts") for name in names}
        through = {label: scores.minus(*pair, num_tests) for label, pair in pairs.items()}
        verdict = USED if any(map(_above_0, through.values())) else NOT_SHOWN
        found |= {"through_thoughts": through, "through_verdict": verdict}
    return found


def _above_0(test: Mapping[str, Any] | None) -> bool:
    return test is not None and test["above_0"]


def lens_table(model: Examined, control: Examined | None) -> list[dict[str, Any]]:
    """Hit rates for each index that replaced a step of some sample, beside chance and the control."""

    def hits_of(examined, index):
        results, found = examined.scores.results, examined.measurements
        return lens_hits(found.lens, found.steps, results.config.c_thought, index, results.seed)

    table = []
    for index in range(model.scores.results.num_thoughts or 0):
        hits = hits_of(model, index)
        if not hits["top1"]:
            continue
        top1, top5, chance = (list(hits[kind].values()) for kind in ("top1", "top5", "chance"))
        row: dict[str, Any] = {
            "index": index,
            "step": index // model.scores.results.config.c_thought,
            "top1": rate(top1),
            "top5": rate(top5),
            "chance": rate(chance),
            "above_chance": difference(top1, chance) if chance else None,
        }
        if control and control.measurements and index < (control.scores.results.num_thoughts or 0):
            other = hits_of(control, index)["top1"]
            both = [sample for sample in hits["top1"] if sample in other]
            row["control"] = rate(list(other.values()))
            row["above_control"] = difference([hits["top1"][one] for one in both], [other[one] for one in both])
        table.append(row)
    return table


@dataclass(frozen=True)
class Reading:
    """
    How read thoughts are judged and shown.

    Args:
        same_step (`Callable`): From [`~readings.load_same_step`].
        num_shown (`int`): Records whose groups are shown.
        edits (`dict[int, list[dict]]`, *optional*): From [`~Diagnosis.edit_readings`].
        follow (`Callable`, *optional*): From [`~readings.load_follow`]; comes with `edits`.
    """

    same_step: SameStep
    num_shown: int
    edits: Mapping[int, list[dict[str, Any]]] | None = None
    follow: Follow | None = None


def read_thoughts(model: Examined, control: Examined | None, reading: Reading) -> dict[str, Any]:
    """What is shown of a checkpoint whose thoughts can be read: `readings`, and `edits` if there are any."""
    records, found = model.scores.results.records, model.measurements
    if found is None or found.readings is None:
        return {}
    beside = control.measurements.readings if control and control.measurements else None
    report = {"readings": reading_table(records, found.readings, beside, reading.same_step, reading.num_shown)}
    if reading.edits is not None and reading.follow is not None:
        intact = list(model.scores.predictions["intact"])
        report["edits"] = edit_table(records, reading.edits, intact, reading.follow, reading.same_step)
    return report


def make_report(model: Examined, control: Examined | None = None, reading: Reading | None = None) -> dict[str, Any]:
    """All figures of the page; what a checkpoint or its data do not have is left out."""
    scores, found, results = model.scores, model.measurements, model.scores.results
    report: dict[str, Any] = {
        "model": {
            "name": results.name,
            "mode": results.config.mode,
            "stage": results.config.stage,
            "trained_thoughts": results.config.num_thoughts,
            "num_thoughts": results.num_thoughts,
            "c_thought": results.config.c_thought,
        },
        "samples": len(results.records),
        "experiments": scores.table(),
    }
    has_images = "grey-both" in scores.scores
    num_tests = count_tests(results.num_thoughts, has_images=has_images)
    report["verdict_tests"] = {"number": num_tests, "alpha": ALPHA}
    if found is not None:
        report["thoughts"] = judge_thoughts(scores, num_tests)
        report["lens"] = lens_table(model, control)
        report["geometry"] = _with_warnings(found.geometry)
        shares = np.array([sample["shares"] for sample in found.attention])
        report["attention"] = {"samples": len(shares), "shares": shares.mean(axis=0).tolist()}
        if reading is not None:
            report |= read_thoughts(model, control, reading)
    if has_images:
        report["picture"] = judge_picture(scores, num_tests)
    if control is not None:
        report["control"] = {
            "name": control.scores.results.name,
            "mode": control.scores.results.config.mode,
            "num_thoughts": control.scores.results.num_thoughts,
            "experiments": control.scores.table(),
            "accuracy_above_control": scores.minus("intact", "intact", other=control.scores),
        }
        if has_images:
            report["control"]["picture"] = judge_picture(control.scores, num_tests)
        if control.measurements is not None:
            report["control"]["geometry"] = _with_warnings(control.measurements.geometry)
    report["examples"] = [show_example(model, row) for row in range(min(6, len(results.records)))]
    return report


def _with_warnings(geometry: Mapping[str, Any]) -> dict[str, Any]:
    return {**geometry, "warnings": collapse_warnings(geometry)}


def show_example(model: Examined, row: int) -> dict[str, Any]:
    """A record with what was written and read, as plain text."""
    results, found = model.scores.results, model.measurements
    record, lines = results.records[row], results.lines
    example = {
        "id": str(record["id"]),
        "question": record["question"],
        "steps": record["steps"],
        "answer": record["answer"],
        "written": {"intact": lines["intact"][row]["text"]},
    }
    if "budget-0" in lines:
        example["written"]["no thoughts"] = lines["budget-0"][row]["text"]
    if results.donors and (donor := int(results.donors["swap"][row])) >= 0:
        example["written"]["thoughts of another"] = lines["swap-all"][row]["text"]
        example["donor"] = {
            "id": str(results.records[donor]["id"]),
            "prediction": lines["intact"][donor]["prediction"],
        }
    if found is not None:
        example["lens"] = [[found.texts[token] for token in tokens[:3]] for tokens in found.lens[row]]
    return example
