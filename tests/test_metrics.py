"""`metrics/`: every rule and quirk of the official programs by hand, and against definitions written out here."""

import hashlib
import json
import random
from fractions import Fraction
from pathlib import Path

import evaluate
import pytest

import multicoco
from multicoco.metrics import answer_accuracy, aokvqa


METRICS = Path(multicoco.__file__).parent / "metrics"
MULTIPLE_CHOICE, DIRECT, NORMALIZED = aokvqa.SETTINGS


def question(name="q", choices=("cab", "train", "bus", "boat"), correct=0, answers=("cab",) * 10, difficult=False):
    return {
        "question_id": name,
        "choices": list(choices),
        "correct_choice_idx": correct,
        "direct_answers": list(answers),
        "difficult_direct_answer": difficult,
    }


def score(prediction, setting, **kwargs):
    return aokvqa.question_scores([question(**kwargs)], {"q": prediction}, setting)["q"]


# --- A-OKVQA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "kwargs", "expected"),
    [
        ("cab", {}, 1),
        ("train", {}, 0),
        ("boat", {"correct": 3}, 1),
        ("Cab", {}, 0),
        (" cab", {}, 0),
        ("cab.", {}, 0),
        ("A", {}, 0),
        ("cab", {"choices": ("cab", "bus", "cab", "boat"), "correct": 2}, 1),
        ("cab", {"difficult": True}, 1),
        ("cab", {"answers": ()}, 1),
    ],
    ids=[
        "right",
        "wrong",
        "index",
        "case",
        "space",
        "stop",
        "letter",
        "twice the same text",
        "difficult",
        "no answers",
    ],
)
def test_multiple_choice_is_the_exact_text_of_the_choice(prediction, kwargs, expected):
    assert score(prediction, MULTIPLE_CHOICE, **kwargs) == expected


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 1), (10, 1)])
def test_a_direct_answer_is_right_when_three_people_gave_it(matches, expected):
    assert score("cab", DIRECT, answers=["cab"] * matches + ["taxi"] * (10 - matches)) == pytest.approx(expected)


@pytest.mark.parametrize("prediction", ["Cab", "cab ", "a cab", "cab."])
def test_a_direct_answer_is_not_normalized(prediction):
    assert score(prediction, DIRECT) == 0


@pytest.mark.parametrize("setting", [DIRECT, NORMALIZED])
def test_difficult_questions_do_not_count_as_direct_answers(setting):
    questions = [question("a"), question("b", difficult=True)]
    assert aokvqa.question_scores(questions, {"a": "cab", "b": "x"}, setting) == {"a": 1}
    with pytest.raises(ValueError, match="no question that counts"):
        aokvqa.question_scores(questions[1:], {"b": "cab"}, setting)


@pytest.mark.parametrize("setting", aokvqa.SETTINGS)
def test_a_missing_prediction_scores_nothing_and_a_surplus_one_is_ignored(setting):
    scores = aokvqa.question_scores([question("a"), question("b")], {"a": "cab", "z": "cab"}, setting)
    assert scores == {"a": 1, "b": 0}


def test_of_two_rows_with_one_id_the_last_counts():
    questions = [question("a", correct=0), question("a", correct=1)]
    assert aokvqa.question_scores(questions, {"a": "train"}, MULTIPLE_CHOICE) == {"a": 1}


def test_strict_refuses_a_missing_prediction_and_one_that_is_no_choice():
    with pytest.raises(ValueError, match="'q': the prediction is missing"):
        aokvqa.question_scores([question()], {}, DIRECT, strict=True)
    with pytest.raises(ValueError, match="'q': the prediction is 'taxi', expected one of"):
        aokvqa.question_scores([question()], {"q": "taxi"}, MULTIPLE_CHOICE, strict=True)
    assert aokvqa.question_scores([question()], {"q": "taxi"}, DIRECT, strict=True) == {"q": 0}


@pytest.mark.parametrize(
    ("setting", "change", "field"),
    [
        (MULTIPLE_CHOICE, {"correct_choice_idx": None}, "correct_choice_idx"),
        (DIRECT, {"direct_answers": None}, "direct_answers"),
        (NORMALIZED, {"direct_answers": "['cab']"}, "direct_answers"),
    ],
    ids=["test split, choice", "test split, answers", "text of a list"],
)
def test_what_cannot_be_scored_is_refused(setting, change, field):
    with pytest.raises(ValueError, match=f"Question 'q': `{field}`"):
        aokvqa.question_scores([question() | change], {"q": "cab"}, setting)


def plain_scores(questions, predictions, setting):
    """The definition, written out."""
    last = {}
    for row in questions:
        last[row["question_id"]] = row
    scores = []
    for name, row in last.items():
        if setting == DIRECT and row["difficult_direct_answer"]:
            continue
        given = predictions.get(name)
        if setting == MULTIPLE_CHOICE:
            scores.append(Fraction(given == row["choices"][row["correct_choice_idx"]]))
        else:
            scores.append(min(Fraction(1), Fraction(row["direct_answers"].count(given), 3)))
    return scores


@pytest.mark.parametrize("setting", [MULTIPLE_CHOICE, DIRECT])
def test_scores_equal_the_definition(setting):
    draw = random.Random(0)
    for _ in range(300):
        questions = [
            question(
                f"q{draw.randrange(8)}",
                choices=[draw.choice(["a", "b", "A", "a "]) for _ in range(4)],
                correct=draw.randrange(4),
                answers=[draw.choice(["a", "b", "A", "a "]) for _ in range(draw.choice([1, 5, 10]))],
                difficult=draw.random() < 0.3,
            )
            for _ in range(draw.randint(1, 10))
        ]
        predictions = {f"q{draw.randrange(10)}": draw.choice(["a", "b", "A", "a ", "c"]) for _ in range(8)}
        expected = plain_scores(questions, predictions, setting)
        if expected:
            scores = aokvqa.question_scores(questions, predictions, setting)
            assert list(scores.values()) == pytest.approx([float(value) for value in expected])


# --- VQA-Eval ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Red Cab", "red cab"),
        ("a an the", ""),
        ("none", "0"),
        ("Two and ten, eleven", "2 and 10 eleven"),
        ("twenty-one", "twenty 1"),
        ("dont", "don't"),
        ("hed've", "he'd've"),
        ("he'dve", "he'd've"),
        ("yall'd've", "y'all'd've"),
        ("cant wont", "can't won't"),
        ("can't", "can't"),
        ("hedve", "hedve"),
        ("Im", "im"),
        ("Ive", "ive"),
        ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("t -shirt", "t shirt"),
        ("a-b c- d", "ab c d"),
        ("red/blue", "red blue"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("yes!", "yes"),
        ("u.s.a.", "usa"),
        ("1.5", "1.5"),
        ("a.5", "a.5"),
        ("5.", "5"),
        ("5.a", "5a"),
        ("." * 40, "." * 8),
        ("what's up?", "what's up"),
        ("50%", "50%"),
        ("it is 'red'", "it is 'red'"),
        ("", ""),
    ],
    ids=repr,
)
def test_each_rule_of_the_normalization(text, expected):
    assert aokvqa.normalize_vqa(text) == expected


def test_the_table_of_contractions_is_the_original_one():
    """The digest is of GT-Vision-Lab/VQA's table, 120 pairs, as sorted JSON; ours is made by a rule."""
    assert len(aokvqa.CONTRACTIONS) == 120
    table = json.dumps(sorted(aokvqa.CONTRACTIONS.items())).encode()
    assert hashlib.sha256(table).hexdigest() == "3e5960526f62912d3b70896069c43c13d7c21be38d50ca28efbb9095b499454f"


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_each_person_is_left_out_in_turn(matches, expected):
    answers = ["the cab"] * matches + ["taxi"] * (10 - matches)
    assert aokvqa.vqa_accuracy("Cab!", answers) == pytest.approx(expected)


def test_people_who_all_agree_are_not_normalized():
    assert aokvqa.vqa_accuracy("cab", ["The cab"] * 10) == 0
    assert aokvqa.vqa_accuracy(" The\tcab\n", ["The cab"] * 9 + ["The\ncab "]) == 1  # line breaks and ends are, always


def test_a_single_answer_is_never_matched():
    assert aokvqa.vqa_accuracy("cab", ["cab"]) == 0


def plain_normalize(text):
    """VQA-Eval's rules, sign by sign."""
    signs = set(';/[]"{}()=+\\_-><@`,?!')
    between_digits = any(
        sign == "," and before.isdigit() and after.isdigit()
        for before, sign, after in zip(text, text[1:], text[2:], strict=False)
    )
    beside_space = {sign for sign in signs if f"{sign} " in text or f" {sign}" in text}
    spaced = "".join(
        letter if letter not in signs else "" if between_digits or letter in beside_space else " " for letter in text
    )
    kept, removed = "", 0
    for place, letter in enumerate(spaced):
        if letter == "." and not spaced[place + 1 : place + 2].isdigit() and removed < 32:
            removed += 1
        else:
            kept += letter
    words = []
    for word in kept.lower().split():
        word = {"none": "0", "one": "1", "ten": "10"}.get(word, word)
        if word not in ("a", "an", "the"):
            words.append({"dont": "don't", "itd've": "it'd've", "somebody'd": "somebodyd"}.get(word, word))
    return " ".join(words)


def plain_vqa_accuracy(prediction, answers):
    clean = [text.replace("\n", " ").replace("\t", " ").strip() for text in [prediction, *answers]]
    if any(text != clean[1] for text in clean[2:]):
        clean = [plain_normalize(text) for text in clean]
    prediction, answers = clean[0], clean[1:]
    total = Fraction(0)
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        total += min(Fraction(1), Fraction(others.count(prediction), 3))
    return total / len(answers)


def test_vqa_accuracy_equals_the_definition():
    draw = random.Random(0)
    parts = ["a", "An", "the", "One", "none", "ten", "dont", "itd've", "somebody'd", "cab", "Cab", "1,5", "1.5", "."]
    parts += ["x.y", "-", "t-b", "/", ", ", "!", "?", "'", "_", '"', "\n", "\t", " ", "." * 35]
    for _ in range(3000):
        pool = ["".join(draw.choice(parts) + draw.choice(["", " "]) for _ in range(draw.randint(1, 3)))]
        pool += [draw.choice([pool[0].strip(), pool[0].upper(), f"the {pool[0]}", draw.choice(parts)])]
        answers = [draw.choice(pool) for _ in range(draw.choice([1, 2, 10]))]
        prediction = draw.choice(pool)
        assert aokvqa.normalize_vqa(prediction) == plain_normalize(prediction), prediction
        assert aokvqa.vqa_accuracy(prediction, answers) == pytest.approx(
            float(plain_vqa_accuracy(prediction, answers))
        )


# --- in evaluate's form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", aokvqa.SETTINGS)
def test_the_module_loads_from_any_folder_and_gives_percent(setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric = evaluate.load(str(METRICS / "aokvqa.py"), setting, experiment_id=setting)
    answers = ["The cab"] * 2 + ["taxi"] * 8
    references = [question("a", answers=answers), question("b", answers=answers), question("c", difficult=True)]
    result = metric.compute(predictions=["cab", "The cab", ""], references=references)
    expected = {MULTIPLE_CHOICE: (100 / 3, 3), DIRECT: (100 / 3, 2), NORMALIZED: (60, 2)}[setting]
    assert result == {setting: pytest.approx(expected[0]), "questions": expected[1]}


def test_vqa_normalized_is_rounded_to_two_places_as_the_original_does():
    metric = evaluate.load(str(METRICS / "aokvqa.py"), NORMALIZED, experiment_id="rounded")
    references = [question(name, answers=["cab"] * 1 + ["taxi"] * 9) for name in "abc"]
    assert metric.compute(predictions=["cab", "bus", "bus"], references=references)[NORMALIZED] == 10.0
    references = [question(name, answers=["cab"] * 4 + ["taxi"] * 6) for name in "abc"]
    assert metric.compute(predictions=["cab", "bus", "bus"], references=references)[NORMALIZED] == 33.33


def test_strict_reaches_the_rules_and_a_setting_is_needed(monkeypatch):
    monkeypatch.chdir(METRICS.parent)
    metric = evaluate.load("metrics/aokvqa.py", MULTIPLE_CHOICE, experiment_id="strict")
    with pytest.raises(ValueError, match="expected one of"):
        metric.compute(predictions=["taxi"], references=[question()], strict=True)
    with pytest.raises(ValueError, match="multiple_choice, direct_answer"):
        evaluate.load("metrics/aokvqa.py", "exact")


# --- answer accuracy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "numeric"),
    [
        ("red", "red", True, True),
        ("B4\nC4\n### red", "red", True, True),
        ("### blue\nno:\n### red ", "red", True, True),
        ("###red", "red", False, False),
        ("Red", "red", False, False),
        ("the answer is red", "red", False, False),
        ("### 18", "### 18", True, True),
        ("18.0", "18", False, True),
        ("18.", "18", False, True),
        ("$18", "18", False, True),
        ("-$1,000.50", "-1000.5", False, True),
        ("+3", "3", False, True),
        (".5", "0.5", False, True),
        ("1,00", "100", False, False),
        ("12,345,678", "12345678", False, True),
        ("18 apples", "18", False, False),
        ("50%", "50", False, False),
        ("1e3", "1000", False, False),
        ("nan", "nan", True, True),
        ("", "0", False, False),
        (".", "0", False, False),
        ("$", "0", False, False),
        ("0.1", "0.10000000000000000001", False, False),
        ("٣", "3", False, True),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_answers_as_text_and_as_numbers(prediction, reference, exact, numeric):
    assert answer_accuracy.is_exact(prediction, reference) is exact
    assert answer_accuracy.is_numeric(prediction, reference) is numeric


def test_numbers_equal_the_definition():
    draw = random.Random(0)
    for _ in range(2000):
        value = Fraction(draw.randint(-2_000_000, 2_000_000), draw.choice([1, 1, 2, 4, 10, 1000]))
        text = draw.choice(["{:.3f}", "{:,.3f}", "{:.4f}"]).format(float(value))
        other = draw.choice([value, value + 1])
        expected = other == value
        assert answer_accuracy.is_numeric(f"so\n### {text}", f"{float(other):.3f}") is expected


def test_answer_accuracy_in_evaluates_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metric = evaluate.load(str(METRICS / "answer_accuracy.py"), experiment_id="answers")
    result = metric.compute(
        predictions=["x\n### 18.0", "### red", "blue", "18"], references=["18", "red", "red", "18"]
    )
    assert result == {"exact_match": 0.5, "numeric_match": 0.75}
