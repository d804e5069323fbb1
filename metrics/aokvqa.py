"""A-OKVQA's accuracies as the official program computes them, and VQA-Eval's under its own name.

    metric = evaluate.load("metrics/aokvqa.py", "multiple_choice")
    metric.compute(predictions=["train"], references=[question])["multiple_choice"]  # in percent

The other settings are "direct_answer" and "direct_answer_vqa_normalized".

Rules and quirks are those of allenai/aokvqa, evaluation/eval_predictions.py, commit 42e8c44 (August 2022; the version
before dropped difficult questions from multiple choice instead of direct answer), and of GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation/vqaEval.py.
"""

import re

import datasets
import evaluate


SETTINGS = ("multiple_choice", "direct_answer", "direct_answer_vqa_normalized")

_DESCRIPTION = """
Accuracy on A-OKVQA, in percent.

multiple_choice: the prediction is, letter by letter, the text of the correct choice. All questions count.
direct_answer: min(1, n / 3) where n of the (ten) direct answers are, letter by letter, the prediction. Questions that
are marked as difficult to answer directly do not count.
direct_answer_vqa_normalized: the same questions by VQA-Eval: answers and prediction are normalized (unless all answers
are the same), each answer in turn is left out, and the n / 3 of the others are averaged; rounded to two places.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Answers. An empty string stands for a missing one, which scores 0.
    references (`list[dict]`): Rows of the data set with `question_id`, `choices`, `correct_choice_idx`,
        `direct_answers` and `difficult_direct_answer`. Of rows with the same id the last one counts.
    strict (`bool`, defaults to `False`): Refuse a missing prediction, and one that is none of the choices. The
        official command does not, its function does unless told.

Returns:
    `dict`: The name of the setting with its accuracy in percent, and `questions`, the number that counted.
"""

_CITATION = """
@inproceedings{schwenk2022okvqa,
  title = {A-OKVQA: A Benchmark for Visual Question Answering using World Knowledge},
  author = {Schwenk, Dustin and Khandelwal, Apoorv and Clark, Christopher and Marino, Kenneth and Mottaghi, Roozbeh},
  booktitle = {ECCV},
  year = {2022}
}
"""

# --- VQA-Eval's normalization ------------------------------------------------------------------------------------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(value) for value, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")

# Each word is what it becomes when one of its apostrophes is missing. For I'd've, I'm and I've that never happens,
# since words are in lower case by then; the original lists them all the same.
APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
    we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
""".split()
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in APOSTROPHES for place in range(len(word)) if word[place] == "'"
}
CONTRACTIONS |= {"let's": "let's", "she's": "she's"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the original

DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
PERIOD = re.compile(
    r"\.(?!\d)"
)  # the original also means to keep one *behind* a digit, but its look-behind is misspelt
MOST_PERIODS = 32  # it passes re.UNICODE where `sub` takes the count


def normalize_vqa(text: str) -> str:
    """VQA-Eval's form of an answer: without punctuation and articles, numbers up to ten as digits, in lower case."""
    joins = DIGIT_COMMA_DIGIT.search(text) is not None  # anywhere in the text, for every sign
    result = text
    for sign in PUNCTUATION:
        vanishes = joins or sign + " " in text or " " + sign in text
        result = result.replace(sign, "" if vanishes else " ")
    result = PERIOD.sub("", result, count=MOST_PERIODS)
    words = [DIGITS.get(word, word) for word in result.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """VQA-Eval's accuracy of one prediction, from 0 to 1."""
    prediction, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:  # people who agree are taken at their word
        prediction, *answers = map(normalize_vqa, (prediction, *answers))
    matches = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(answers)


# --- A-OKVQA's program -------------------------------------------------------------------------------------------


def question_scores(questions: list, predictions: dict, setting: str, strict: bool = False) -> dict:
    """
    The score of each question that counts, from 0 to 1; the accuracy is their mean.

    Args:
        questions (`list[dict]`): Rows of the data set; of those with the same `question_id` the last one counts.
        predictions (`dict[str, str]`): Answers by `question_id`. A missing one scores 0; surplus ones are ignored.
        setting (`str`): One of `SETTINGS`.
        strict (`bool`, defaults to `False`): Refuse a missing prediction, and one that is none of the choices.

    Raises:
        ValueError: no question counts, a question lacks a field, or `strict` and a prediction is refused.
    """
    if setting not in SETTINGS:
        raise ValueError(
            f"The setting is {setting!r}, expected one of {', '.join(SETTINGS)}: evaluate.load(path, it)."
        )
    multiple_choice = setting == "multiple_choice"
    needed = ("choices", "correct_choice_idx") if multiple_choice else ("direct_answers", "difficult_direct_answer")
    scores = {}
    for name, question in {question["question_id"]: question for question in questions}.items():
        for field in needed:
            if question.get(field) is None or isinstance(question[field], str):
                raise ValueError(
                    f"Question {name!r}: `{field}` is {question.get(field)!r:.100}, which cannot be scored. The test "
                    "split has no answers, and `direct_answers` of the Hub is the text of a list: read it as a list."
                )
        if not multiple_choice and question["difficult_direct_answer"]:
            continue
        prediction = predictions.get(name)
        if strict and prediction is None:
            raise ValueError(f"Question {name!r}: the prediction is missing. Add it, or set `strict=False` for 0.")
        if strict and multiple_choice and prediction not in question["choices"]:
            raise ValueError(
                f"Question {name!r}: the prediction is {prediction!r}, expected one of {question['choices']}. Map it "
                "to a choice, or set `strict=False` for 0."
            )
        if prediction is None:
            scores[name] = 0.0
        elif multiple_choice:
            scores[name] = float(prediction == question["choices"][question["correct_choice_idx"]])
        elif setting == "direct_answer":
            scores[name] = min(1.0, sum(prediction == answer for answer in question["direct_answers"]) / 3.0)
        else:
            scores[name] = vqa_accuracy(prediction, question["direct_answers"])
    if not scores:
        raise ValueError("`references` has no question that counts. Check the split; difficult ones do not count.")
    return scores


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class AOKVQA(evaluate.Metric):
    def _info(self):
        if self.config_name not in SETTINGS:
            raise ValueError(f"The setting is {self.config_name!r}, expected one of {', '.join(SETTINGS)}.")
        texts = datasets.Sequence(datasets.Value("string"))
        reference = {
            "question_id": datasets.Value("string"),
            "choices": texts,
            "correct_choice_idx": datasets.Value("int64"),
            "direct_answers": texts,
            "difficult_direct_answer": datasets.Value("bool"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string"), "references": reference}),
            homepage="https://aokvqa.allenai.org",
            codebase_urls=["https://github.com/allenai/aokvqa", "https://github.com/GT-Vision-Lab/VQA"],
        )

    def _compute(self, predictions, references, strict=False):
        ids = [reference["question_id"] for reference in references]
        given = {name: prediction for name, prediction in zip(ids, predictions, strict=True) if prediction}
        scores = question_scores(references, given, self.config_name, strict)
        accuracy = sum(scores.values()) / len(scores) * 100
        if self.config_name == "direct_answer_vqa_normalized":
            accuracy = round(accuracy, 2)
        return {self.config_name: accuracy, "questions": len(scores)}
