"""What experiments and measurements show: figures, tests, verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .diagnosis import Diagnosis
from .experiments import KINDS, name_of
from .intervals import mcnemar, mean_score_interval, paired_bootstrap
from .measurements import collapse_warnings, first_tokens, lens_hits


ALPHA = 0.05
USED, NOT_SHOWN = "used", "not shown to be used"


def difference(first: Sequence[float], second: Sequence[float], num_tests: int = 1) -> dict[str, Any] | None:
    """
    `mean(first) - mean(second)` of paired scores: its 95 % interval, McNemar's exact p where all scores are 0 or 1,
    and whether it is above 0 when `num_tests` are made: the interval, and the p of the sign test (which McNemar's is),
    at the level `ALPHA / num_tests`. The interval alone would not do: that of a few samples is too short.
    """
    if not len(first):
        return None
    first, second = np.asarray(first, float), np.asarray(second, float)
    low, high = paired_bootstrap(first, second)
    corrected_low, _ = paired_bootstrap(first, second, 1 - ALPHA / num_tests)
    is_binary = bool(np.isin(np.concatenate([first, second]), (0, 1)).all())
    sign = mcnemar(first > second, first < second)
    return {
        "samples": len(first),
        "difference": float(first.mean() - second.mean()),
        "low": low,
        "high": high,
        "mcnemar_p": sign if is_binary else None,
        "num_tests": num_tests,
        "above_0": corrected_low > 0 and sign < ALPHA / num_tests,
    }


def rate(hits: Sequence[float]) -> dict[str, Any]:
    """A share with its 95 % interval; of 0 samples `None`."""
    values = np.asarray(hits, float)
    if not len(values):
        return {"rate": None, "low": None, "high": None, "samples": 0}
    low, high = mean_score_interval(values)
    return {"rate": float(values.mean()), "low": low, "high": high, "samples": len(values)}


class Scores:
    """Predictions and scores of all experiments of a checkpoint as arrays; NaN is the score of what does not count."""

    def __init__(self, diagnosis: Diagnosis, metric):
        self.diagnosis = diagnosis
        self.predictions, self.scores, self.valid, self.new_tokens = {}, {}, {}, {}
        known = {}
        for experiment in (*diagnosis.first, *diagnosis.second):
            name, lines = experiment.name, diagnosis.lines[experiment.name]
            values = []
            for row, line in enumerate(lines):  # most experiments repeat an answer, and a metric may be slow
                key = row, line["prediction"]
                if key not in known:
                    known[key] = metric(diagnosis.records[row], line["prediction"])
                values.append(known[key])
            self.predictions[name] = np.array([line["prediction"] for line in lines], dtype=object)
            self.scores[name] = np.array([math.nan if value is None else value for value in values])
            self.new_tokens[name] = np.array([line["new_tokens"] for line in lines])
            self.valid[name] = diagnosis.valid(experiment)

    def minus(self, first: str, second: str, num_tests: int = 1, other: "Scores | None" = None):
        """[`difference`] of the accuracies of two experiments; the second may be another checkpoint's."""
        other = other or self
        keep = self.valid[first] & other.valid[second]
        keep &= ~np.isnan(self.scores[first]) & ~np.isnan(other.scores[second])
        return difference(self.scores[first][keep], other.scores[second][keep], num_tests)

    def table(self) -> dict[str, dict[str, Any]]:
        """For each experiment: settings, accuracy, tokens, and how it differs from the intact run."""
        rows = {}
        for experiment in (*self.diagnosis.first, *self.diagnosis.second):
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


def count_tests(num_thoughts: int | None, has_images: bool) -> int:
    """Tests that the verdicts of a page are made of: each holds at the level `ALPHA` / this number."""
    count = num_thoughts or 0
    of_thoughts = len(KINDS) + 2 + 2 * count if count else 0  # damage, following, each thought by itself
    of_pictures = 2 + (1 + 4 if count else 0)  # the picture; following under the donor's, through the thoughts
    return of_thoughts + (of_pictures if has_images else 0)


def judge_thoughts(scores: Scores, num_tests: int) -> dict[str, Any]:
    """
    The verdict, by tests that each hold at the level 0.05 / `num_tests` (interval and McNemar's p).

    "used": at least one kind of damage to all thoughts costs accuracy, *and* answers follow the donor of the thoughts.
    That damage alone costs accuracy says only that thoughts must look familiar. Following is shown if, with the
    donor's thoughts, the answer is the donor's

    - more often than it is a decoy's, a sample drawn in the same way whose thoughts are not fed (own picture); or
    - more often than with the thoughts of a sample that had the own answer (own picture): where there are only two
      answers, a decoy's is always the donor's; or
    - more often than with the decoy's thoughts, both times under the donor's picture and the own question: thoughts
      that say *where* to look give the donor's answer only there.

    A thought by itself is used if the verdict is "used" and accuracy falls, after the loop, when it alone is replaced
    by the mean or by the donor's.
    """
    diagnosis, count = scores.diagnosis, scores.diagnosis.num_thoughts
    damage = {kind: scores.minus("intact", f"{kind}-all", num_tests) for kind in KINDS}
    answers, swapped = scores.predictions["intact"], scores.predictions["swap-all"]
    donors, decoys = diagnosis.donors["swap"], diagnosis.donors["decoy"]
    rows = np.flatnonzero((donors >= 0) & (decoys >= 0))
    following = {"own_picture": ((swapped == answers[donors])[rows], (swapped == answers[decoys])[rows])}
    rows = np.flatnonzero((donors >= 0) & (diagnosis.donors["swap_same"] >= 0))
    following["same_answer"] = tuple(
        (scores.predictions[f"{kind}-all"] == answers[donors])[rows] for kind in ("swap", "swap_same")
    )
    if "swap-picture" in scores.scores:
        rows = np.flatnonzero(scores.valid["swap-picture"] & scores.valid["decoy-picture"])
        following["donors_picture"] = tuple(
            (scores.predictions[f"{kind}-picture"] == answers[donors])[rows] for kind in ("swap", "decoy")
        )
    following = {
        name: {"donor": rate(found), "decoy": rate(chance), "test": difference(found, chance, num_tests)}
        for name, (found, chance) in following.items()
    }
    harmful = [kind for kind, test in damage.items() if _above_0(test)]
    followed = [name for name, found in following.items() if _above_0(found["test"])]
    indices = []
    for index in range(count if harmful and followed else 0):
        names = [name_of(kind, index, "after", count) for kind in ("mean", "swap")]
        if any(_above_0(scores.minus("intact", name, num_tests)) for name in names):
            indices.append(index)
    same, another = (np.flatnonzero(diagnosis.donors[kind] >= 0) for kind in ("swap_same", "swap"))
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
    """
    "used" by the model: a grey or another picture for thoughts and answer costs accuracy. Through the thoughts:
    whichever picture is given to the answer, the right or the wrong one, it is right more often with the thoughts of
    the right one than of the wrong one, in at least one of four cases.
    """
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


def lens_table(diagnosis: Diagnosis, lens, steps, control: Diagnosis | None, control_lens) -> list[dict[str, Any]]:
    """Hit rates for each index that replaced a step of some sample, beside chance and the control."""
    c_thought, seed, table = diagnosis.subject.config.c_thought, diagnosis.arguments.seed, []
    for index in range(diagnosis.num_thoughts):
        hits = lens_hits(lens, steps, c_thought, index, seed)
        if not hits["top1"]:
            continue
        top1 = [float(hit) for hit in hits["top1"].values()]
        chance = [float(hit) for hit in hits["chance"].values()]
        row = {
            "index": index,
            "step": index // c_thought,
            "top1": rate(top1),
            "top5": rate([float(hit) for hit in hits["top5"].values()]),
            "chance": rate(chance),
            "above_chance": difference(top1, chance) if chance else None,
        }
        if control_lens is not None and index < control.num_thoughts:
            other = lens_hits(control_lens, first_tokens(control), control.subject.config.c_thought, index, seed)
            both = [sample for sample in hits["top1"] if sample in other["top1"]]
            row["control"] = rate([float(hit) for hit in other["top1"].values()])
            row["above_control"] = difference(
                [float(hits["top1"][sample]) for sample in both], [float(other["top1"][sample]) for sample in both]
            )
        table.append(row)
    return table


def summarise(diagnosis: Diagnosis, scores: Scores, seen: Mapping[str, Any], control, control_scores, control_seen):
    """All figures of the page; what a checkpoint or its data do not have is left out."""
    config = diagnosis.subject.config
    report = {
        "model": {
            "name": diagnosis.subject.name,
            "mode": config.mode,
            "stage": config.stage,
            "trained_thoughts": config.num_thoughts,
            "num_thoughts": diagnosis.num_thoughts,
            "c_thought": config.c_thought,
        },
        "samples": len(diagnosis.records),
        "experiments": scores.table(),
    }
    has_images = "grey-both" in scores.scores
    num_tests = count_tests(diagnosis.num_thoughts, has_images)
    report["verdict_tests"] = {"number": num_tests, "alpha": ALPHA}
    if diagnosis.num_thoughts:
        report["thoughts"] = judge_thoughts(scores, num_tests)
        steps = first_tokens(diagnosis)
        lens = control_seen.get("lens")
        report["lens"] = lens_table(diagnosis, seen["lens"], steps, control, lens)
        report["geometry"] = {**seen["geometry"], "warnings": collapse_warnings(seen["geometry"])}
        shares = np.array([sample["shares"] for sample in seen["attention"]][: diagnosis.arguments.num_attention])
        report["attention"] = {"samples": len(shares), "shares": shares.mean(axis=0).tolist()}
    if has_images:
        report["picture"] = judge_picture(scores, num_tests)
    if control is not None:
        report["control"] = {
            "name": control.subject.name,
            "mode": control.subject.config.mode,
            "num_thoughts": control.num_thoughts,
            "experiments": control_scores.table(),
            "accuracy_above_control": scores.minus("intact", "intact", other=control_scores),
        }
        if has_images:
            report["control"]["picture"] = judge_picture(control_scores, num_tests)
        if "geometry" in control_seen:
            geometry = control_seen["geometry"]
            report["control"]["geometry"] = {**geometry, "warnings": collapse_warnings(geometry)}
    report["examples"] = [show_example(diagnosis, row, seen) for row in range(min(6, len(diagnosis.records)))]
    return report


def show_example(diagnosis: Diagnosis, row: int, seen: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what was written and read, as plain text."""
    record, tokenizer = diagnosis.records[row], diagnosis.subject.processor.tokenizer
    example = {
        "id": str(record["id"]),
        "question": record["question"],
        "steps": record["steps"],
        "answer": record["answer"],
        "written": {"intact": diagnosis.lines["intact"][row]["text"]},
    }
    if "budget-0" in diagnosis.lines:
        example["written"]["no thoughts"] = diagnosis.lines["budget-0"][row]["text"]
    if diagnosis.donors is not None and (donor := int(diagnosis.donors["swap"][row])) >= 0:
        example["written"]["thoughts of another"] = diagnosis.lines["swap-all"][row]["text"]
        example["donor"] = {
            "id": str(diagnosis.records[donor]["id"]),
            "prediction": diagnosis.lines["intact"][donor]["prediction"],
        }
    if "lens" in seen:
        example["lens"] = [[tokenizer.decode([token]) for token in tokens[:3]] for tokens in seen["lens"][row]]
    return example
