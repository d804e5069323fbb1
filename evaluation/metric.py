"""Scores of single answers, and what they ask of records. Knows texts, no model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


PERCENT = ("multiple_choice", "direct_answer", "direct_answer_vqa_normalized")  # A-OKVQA's, as its program prints them
Metric = Callable[[Mapping[str, Any], str], float | None]


def as_written(record: Mapping[str, Any], text: str) -> str:
    """The choice that `text` is, with the blanks at its ends, which answers are read without; else `text` itself."""
    return next((choice for choice in record["choices"] if choice.strip() == text), text)


def check_records(
    records: Sequence[Mapping[str, Any]],
    metric: str,
    *,
    max_new_tokens: int | None = None,
    choices_by: str = "generation",
    predict_only: bool = False,
) -> None:
    """
    What scoring asks of records beyond what training does.

    Raises:
        ValueError: a record lacks what the metric compares with.
    """
    result = metric.rpartition(":")[2]
    if choices_by == "likelihood" or result == "multiple_choice":
        for record in records:
            if len(record["choices"]) < 2:
                raise ValueError(
                    f"Record {record['id']!r}: `choices` is {record['choices']}, expected at least two to choose "
                    "from. Fill it in, or score by generation with another metric."
                )
            if not predict_only and as_written(record, record["answer"]) not in record["choices"]:
                raise ValueError(
                    f"Record {record['id']!r}: `answer` {record['answer']!r} is none of its `choices` "
                    f"{record['choices']}, so no choice would be right. Write it as it stands among them."
                )
    unanswered = [record["id"] for record in records if not record["answer"]]
    if unanswered and choices_by == "generation" and max_new_tokens is None:
        raise ValueError(
            f"Record {unanswered[0]!r} has no `answer`, so how long the answers may be is not known. Give "
            "`--max_new_tokens`."
        )
    if not predict_only and result.startswith("direct_answer") and not any(record["answers"] for record in records):
        raise ValueError(
            f"`--metric {metric}` compares with `answers`, which no record has. Fill in the direct answers "
            "(only of difficult questions, which do not count, they may be left out)."
        )


def load_metric(name: str, *, try_on: Mapping[str, Any] | None = None) -> Metric:
    """
    `(record, prediction) -> score` from 0 to 1, or `None` for a record that does not count.

    Args:
        try_on (`dict`, *optional*): A record to score an empty prediction of, so that wrong names show at once.

    Raises:
        ValueError: the metric has no result of this name, or its scores are no shares.
    """
    if name == "exact":
        return lambda record, prediction: float(prediction == record["answer"])
    import datasets
    import evaluate

    path, _, result = name.rpartition(":")
    metric = evaluate.load(path, result, keep_in_memory=True)
    takes_text = isinstance(metric.features["references"], datasets.Value)

    def score(record, prediction):
        answer, choices = record["answer"], record["choices"]
        if not takes_text:
            answer, prediction = as_written(record, answer), as_written(record, prediction)
        row = {
            "question_id": str(record["id"]),
            "choices": choices,
            "correct_choice_idx": choices.index(answer) if answer in choices else None,
            "direct_answers": record["answers"],
            "difficult_direct_answer": not record["answers"],
            **(record.get("extra") or {}),
        }
        if result.startswith("direct_answer") and row["difficult_direct_answer"]:
            return None
        scores = metric.compute(predictions=[prediction], references=[answer if takes_text else row])
        if result not in scores:
            raise ValueError(f"`--metric {name}`: {path} has no result {result!r}, expected one of {list(scores)}.")
        value = scores[result] / (100 if result in PERCENT else 1)
        if not 0 <= value <= 1:
            raise ValueError(f"`--metric {name}`: a sample scores {value}, expected a share from 0 to 1. Rescale it.")
        return value

    if try_on is not None:
        score(try_on, "")
    return score
