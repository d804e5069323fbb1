"""Share of right answers: the text after the last `### `, compared as text and as a number.

metric = evaluate.load("metrics/answer_accuracy.py")
metric.compute(predictions=["6 * 3 = 18\\n### 18.0"], references=["18"])  # exact_match 0.0, numeric_match 1.0
"""

import re
from decimal import Decimal

import datasets
import evaluate


_DESCRIPTION = """
The answer is what follows the last "### " of a text (all of it if there is none), without white space at its ends.

exact_match: share of answers that are, letter by letter, the reference.
numeric_match: the same, but where both are numbers their values are compared: 18 = 18.0 = $18 = 18. and 1,000 = 1000.
A percentage is not a number here, since 50% is neither 50 nor surely 0.5.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Texts that a model wrote, with or without its steps.
    references (`list[str]`): Right answers, with or without the mark.

Returns:
    `dict`: `exact_match` and `numeric_match`, from 0 to 1; the second is never less than the first.
"""

ANSWER_MARK = "### "
NUMBER = re.compile(r"([-+]?)\$?(\d{1,3}(?:,\d{3})+|\d+)?(\.\d+)?\.?")


def final_answer(text: str) -> str:
    return text.rsplit(ANSWER_MARK, 1)[-1].strip()


def read_number(text: str) -> Decimal | None:
    """The value of a number with an optional sign, dollar, thousands separators and full stop; `None` for others."""
    match = NUMBER.fullmatch(text)
    if match is None or (match[2] is None and match[3] is None):
        return None
    return Decimal(match[1] + (match[2] or "0").replace(",", "") + (match[3] or ""))


def is_exact(prediction: str, reference: str) -> bool:
    return final_answer(prediction) == final_answer(reference)


def is_numeric(prediction: str, reference: str) -> bool:
    """Whether the answers are equal, as numbers if both are some."""
    values = [read_number(final_answer(text)) for text in (prediction, reference)]
    return is_exact(prediction, reference) or (None not in values and values[0] == values[1])


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AnswerAccuracy(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        if not pairs:
            raise ValueError("`predictions` is empty, expected at least one text.")
        return {
            "exact_match": sum(is_exact(*pair) for pair in pairs) / len(pairs),
            "numeric_match": sum(is_numeric(*pair) for pair in pairs) / len(pairs),
        }
