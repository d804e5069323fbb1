"""What groups of thoughts read as, beside what they stand for: shares, examples, edits. Knows texts, no model.

The k-th group of a record's thoughts stands for its k-th written step, and those beyond its last step for its answer.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..curriculum import ANSWER_MARK, final_answer
from .intervals import rate


SameStep = Callable[[str, str], bool]
Follow = Callable[[Mapping[str, Any], int, str], tuple[Sequence[str], str] | None]
Texts = Sequence[str]  # of the groups of one record


def check_function(name: str | None, flag: str) -> None:
    """
    Raises:
        ValueError: a name that is given is not FILE:FUNCTION with an existing file.
    """
    path, _, function = (name or "").rpartition(":")
    if name is not None and not (function and Path(path).is_file()):
        raise ValueError(
            f"`--{flag}` is {name!r}, expected FILE:FUNCTION with an existing file, as "
            f"recipes/trails/prepare.py:{flag}. Correct the path, or name the function."
        )


def load_function(name: str, flag: str) -> Callable[..., Any]:
    """
    The function that FILE:FUNCTION names; its file is run.

    Raises:
        ValueError: there is no such file, or no such function in it.
    """
    check_function(name, flag)
    path, _, function = name.rpartition(":")
    spec: Any = importlib.util.spec_from_file_location(f"multicoco_{flag}_{Path(path).stem}", path)
    if spec is None:
        raise ValueError(f"`--{flag}` {name}: {path} is no file of Python code. Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"`--{flag}` {name}: {path} has no function {function!r}. Correct the name.")
    return found


def load_same_step(name: str | None) -> SameStep:
    """`(text, step) -> bool`, whether a text says what a step says: of FILE:FUNCTION, else whether they are equal."""
    return (lambda text, step: text == step) if name is None else load_function(name, "same_step")


def load_follow(name: str, *, try_on: Sequence[Mapping[str, Any]]) -> Follow:
    """
    `(record, index, step) -> (later steps, answer)`, or `None` where the step cannot be, of FILE:FUNCTION.

    Args:
        try_on (`Sequence[dict]`): Records, of which the first with a written step is followed from that step.

    Raises:
        ValueError: see [`load_function`]; or what follows a record's own step is not the record's answer.
    """
    follow = load_function(name, "follow")
    for record in try_on:
        if record["steps"]:
            found = follow(record, 0, record["steps"][0])
            if not isinstance(found, tuple) or len(found) != 2 or found[1] != record["answer"]:
                raise ValueError(
                    f"`--follow` {name}: after the first step of record {record['id']!r}, its own, it gives "
                    f"{found!r:.200}, expected (later steps, answer) with the record's answer {record['answer']!r}. "
                    "Give the function that belongs to the data."
                )
            break
    return follow


def judge(record: Mapping[str, Any], texts: Texts, same_step: SameStep) -> list[bool | None]:
    """
    Whether each text is what its group stands for; `None` where the record does not say: it has no written steps, or
    no answer. With several rationales that of any of them will do.
    """
    rationales = _rationales(record)
    found: list[bool | None] = []
    for group, text in enumerate(texts):
        steps = [steps[group] for steps in rationales if group < len(steps)]
        is_surplus = any(group >= len(steps) for steps in rationales) and record["answer"] is not None
        if not any(rationales) or not (steps or is_surplus):
            found.append(None)
        else:
            reads_answer = is_surplus and final_answer(text) == record["answer"].strip()
            found.append(reads_answer or any(same_step(text, step) for step in steps))
    return found


def stands_for(record: Mapping[str, Any], group: int) -> list[str]:
    """What a group of thoughts may read as; nothing where the record does not say."""
    rationales = _rationales(record)
    if not any(rationales):
        return []
    answer = [] if record["answer"] is None else [ANSWER_MARK + record["answer"]]
    return list(dict.fromkeys(text for steps in rationales for text in ([*steps[group : group + 1]] or answer)))


def _rationales(record: Mapping[str, Any]) -> list[list[str]]:
    return record.get("rationales") or [record["steps"]]


def share(records: Sequence[Mapping[str, Any]], texts: Sequence[Texts | None], same_step: SameStep) -> dict[str, Any]:
    """
    The share of groups that read as what they stand for: of each record, and the mean of that with its interval by
    record, as groups of one record are no independent cases. What was not read, or cannot be judged, is left out.
    """
    shares = []
    for record, read in zip(records, texts, strict=True):
        judged = [right for right in judge(record, read or [], same_step) if right is not None]
        if judged:
            shares.append(sum(judged) / len(judged))
    return rate(shares)


def reading_table(
    records: Sequence[Mapping[str, Any]],
    texts: Sequence[Texts],
    control: Sequence[Texts] | None,
    same_step: SameStep,
    num_shown: int,
) -> dict[str, Any]:
    """
    For the page: the share of each group by its place and of all, and what the groups of the first records read as.

    Args:
        texts (`list[list[str]]`): Of each record the text of each group.
        control (`list[list[str]]`, *optional*): The same of a control.
    """

    def by_group(texts: Sequence[Texts]) -> list[dict[str, Any]]:
        judged = [judge(record, read, same_step) for record, read in zip(records, texts, strict=True)]
        rows = []
        for group in range(max(map(len, judged))):
            rights = [row[group] for row in judged]
            is_step = [any(group < len(steps) for steps in _rationales(record)) for record in records]
            steps, answers = (
                [right for right, step in zip(rights, is_step, strict=True) if step == wanted and right is not None]
                for wanted in (True, False)
            )
            rows.append({"all": rate(steps + answers), "step": rate(steps), "answer": rate(answers)})
        return rows

    table: dict[str, Any] = {"all": share(records, texts, same_step), "groups": by_group(texts)}
    if control is not None:
        table["control"] = {"all": share(records, control, same_step), "groups": by_group(control)}
    table["samples"] = [
        _show(record, texts[row], control[row] if control is not None else (), same_step)
        for row, record in enumerate(records[: min(num_shown, len(records))])
    ]
    return table


def _show(record: Mapping[str, Any], texts: Texts, control: Texts, same_step: SameStep) -> dict[str, Any]:
    groups: list[dict[str, Any]] = [
        {"stands_for": stands_for(record, group), "reads": text, "right": right}
        for group, (text, right) in enumerate(zip(texts, judge(record, texts, same_step), strict=True))
    ]
    for row, text, right in zip(groups, control, judge(record, control, same_step), strict=False):
        row["control"] = {"reads": text, "right": right}
    return {"id": str(record["id"]), "question": record["question"], "groups": groups}


def draw_edits(
    records: Sequence[Mapping[str, Any]],
    readings: Sequence[Texts],
    texts: Sequence[str],
    group: int,
    same_step: SameStep,
    seed: int,
) -> dict[int, int]:
    """
    For each record with more than `group` steps one of `texts` that says another step than the record's own and than
    what its group reads as; records for which there is none are left out.

    Returns:
        `dict[int, int]`: from the index of a record to that of a text.
    """
    rng = np.random.default_rng((seed, 3, group))
    drawn = {}
    for row, record in enumerate(records):
        if group >= len(record["steps"]):
            continue
        own = [readings[row][group], *(steps[group] for steps in _rationales(record) if group < len(steps))]
        others = [
            number
            for number, text in enumerate(texts)
            if text not in own and not any(same_step(text, step) for step in own)
        ]
        if others:
            drawn[row] = int(rng.choice(others))
    return drawn


def steps_among(
    texts: Sequence[str], records: Sequence[Mapping[str, Any]], group: int, same_step: SameStep
) -> list[int]:
    """Which of `texts`, by index, say a step that some record has at this place: others cannot be followed."""
    steps = {steps[group] for record in records for steps in _rationales(record) if group < len(steps)}
    return [number for number, text in enumerate(texts) if any(same_step(text, step) for step in sorted(steps))]


def edit_table(
    records: Sequence[Mapping[str, Any]],
    edits: Mapping[int, Sequence[Mapping[str, Any]]],
    intact: Sequence[str],
    follow: Follow,
    same_step: SameStep,
) -> dict[str, Any]:
    """
    Whether answers follow from what a group was made to read as, for each group and for all of them together.

    Args:
        edits (`dict[int, list[dict]]`): By group a line for each record that was edited: its `index`, the `step` that
            the group was made to read as, the `prediction`, and `thoughts`, what all groups read as then.
        intact (`list[str]`): The prediction of each record when nothing was edited.

    Returns:
        `dict`: of each group, and of `all`, the share of answers that are the followed one, those that `stayed` the
        intact one, both again where the two differ; how often the edited group reads as its edit, and the next one as
        what follows.
    """
    rows, whole = [], []
    for group, lines in edits.items():
        cases = []
        for line in lines:
            record = records[line["index"]]
            followed = follow(record, group, line["step"])
            if followed is None:
                continue
            (later, answer), before, texts = followed, intact[line["index"]], line["thoughts"]
            case = {
                "followed": line["prediction"] == answer,
                "stayed": line["prediction"] == before,
                "differs": answer != before,
                "reads_as_edit": same_step(texts[group], line["step"]),
            }
            if group + 1 < len(texts):
                then = texts[group + 1]
                case["next_reads"] = same_step(then, later[0]) if len(later) else final_answer(then) == answer
            cases.append(case)
        rows.append({"group": group, **_rates(cases)})
        whole += cases
    return {"groups": rows, "all": _rates(whole)}


def _rates(cases: Sequence[Mapping[str, bool]]) -> dict[str, Any]:
    apart = [case for case in cases if case["differs"]]
    return {
        "followed": rate([case["followed"] for case in cases]),
        "stayed": rate([case["stayed"] for case in cases]),
        "followed_where_they_differ": rate([case["followed"] for case in apart]),
        "stayed_where_they_differ": rate([case["stayed"] for case in apart]),
        "reads_as_edit": rate([case["reads_as_edit"] for case in cases]),
        "next_reads": rate([case["next_reads"] for case in cases if "next_reads" in case]),
    }
