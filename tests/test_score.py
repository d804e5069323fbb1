"""`score.py` against the plain way: one sample at a time through the processor and `generate`, counted by hand."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from reference import reference_logits, widened

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor, score
from multicoco.curriculum import CurriculumArguments
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.evaluation.intervals import mcnemar, paired_bootstrap, wilson_interval
from multicoco.evaluation.metric import load_metric
from multicoco.evaluation.predictions import describe, predictions_path
from multicoco.evaluation.scores import compare, summarise
from multicoco.evaluation.settings import parse_settings
from multicoco.evaluation.subject import AskArguments, Subject
from multicoco.recipes.trails.prepare import COLOURS, prepare
from multicoco.recipes.trails.start_model import make_start_model
from multicoco.records import load_records, question_text
from multicoco.score import ScoreArguments


ROOT = Path(score.__file__).parent
NUM_SAMPLES = 7  # neither divides by 2 ranks nor by the batch size
BATCH_SIZE = 3


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    `asked.jsonl`: 7 boards, some of which a model has learned by heart: 4 with two thoughts, 2 with none (it writes
    the steps, and then a wrong colour) and 3 without a block. So it is right on some and not always on the same ones.
    `thinks` and `silent` are its weights as two checkpoints, the second without a thought block. Both in float64.
    """
    folder = tmp_path_factory.mktemp("score")
    prepare(folder / "trails", num_train=NUM_SAMPLES, num_val=0)
    (folder / "trails" / "train.jsonl").rename(folder / "trails" / "asked.jsonl")
    records = read_lines(folder / "trails" / "asked.jsonl")
    with_choices = [
        record | {"choices": list(dict.fromkeys([record["answer"], *COLOURS]))[: 2 + number % 3][::-1]}
        for number, record in enumerate(records)
    ]
    write_records(folder / "trails" / "choices.jsonl", with_choices)
    make_start_model(folder / "start")
    processor = MultiCoCoProcessor.from_pretrained(folder / "start")
    model = MultiCoCoForConditionalGeneration.from_pretrained(folder / "start")
    records = load_records(folder / "trails" / "asked.jsonl")
    wrong = [record | {"answer": "green" if record["answer"] == "red" else "red"} for record in records[:2]]
    batches = []
    for mode, stage, chosen in (("coconut", 3, records[:4]), ("coconut", 0, wrong), ("no_cot", 0, records[2:5])):
        curriculum = CurriculumArguments(mode=mode, c_thought=1, max_latent_stage=2)
        dataset = StageDataset(chosen, processor, curriculum)
        dataset.set_stage(stage)
        batches.append(ReasoningCollator(processor)([dataset[index] for index in range(len(dataset))]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(30):
        optimizer.zero_grad()
        sum(model(**batch).loss for batch in batches).backward()
        optimizer.step()
    model.eval().to(torch.float64)
    for name, mode, num_thoughts in (("thinks", "coconut", 2), ("silent", "no_cot", None)):
        model.config.mode, model.config.num_thoughts = mode, num_thoughts
        processor.num_thoughts = num_thoughts
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


def run_flags(folder, output_dir, *flags, data="asked", models=("thinks",)):
    names = [str(folder / name) for name in models]
    flags = ["--data", folder / "trails" / f"{data}.jsonl", "--output_dir", output_dir, *flags]
    return ["--model", *names, "--batch_size", str(BATCH_SIZE), *map(str, flags)]


ALL = ("--num_thoughts", 0, 2, "--compare")


@pytest.fixture(scope="module")
def whole(folder):
    """The output of one process without an interruption: two budgets, and the other checkpoint to compare with."""
    score.main(run_flags(folder, folder / "whole", *ALL, folder / "silent"))
    return folder / "whole"


def report(output_dir):
    return json.loads((output_dir / "scores.json").read_text())


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds_per_sample"} for row in rows]


def predictions(output_dir):
    """By model and budget the lines of each file, without what depends on the time it took or on the order."""
    found = {}
    for path in (output_dir / "predictions").glob("*.jsonl"):
        header, *lines = read_lines(path)
        lines = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
        found[Path(header["model"]).name, header["num_thoughts"]] = sorted(lines, key=lambda line: line["index"])
    return found


# --- the plain way -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(folder):
    """For each checkpoint and budget: text and number of new tokens of each sample, asked alone."""
    found = {}
    records = load_records(folder / "trails" / "asked.jsonl")
    for name, budgets in (("thinks", (0, 2)), ("silent", (None,))):
        processor = MultiCoCoProcessor.from_pretrained(folder / name)
        model = MultiCoCoForConditionalGeneration.from_pretrained(folder / name, dtype="auto").eval()
        wholes = [
            "".join(f"{step}\n" for step in item["steps"]) + f"### {item['answer']}<|im_end|>" for item in records
        ]
        limit = max(len(processor.tokenizer(text)["input_ids"]) for text in wholes)
        for budget in budgets:
            answers = []
            for record in records:
                content = [
                    {"type": "image", "path": record["images"][0]},
                    {"type": "text", "text": record["question"]},
                ]
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    num_thoughts=budget,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
                output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
                new_tokens = output[0, inputs["input_ids"].shape[1] :]
                answers.append((processor.decode(new_tokens, skip_special_tokens=True), len(new_tokens)))
            found[name, budget] = answers
    return records, found


def test_the_table_equals_a_loop_over_single_samples(folder, whole, plain):
    records, found = plain
    result = report(whole)
    right = {}
    assert [(Path(row["model"]).name, row["num_thoughts"]) for row in result["scores"]] == list(found)
    for row, (key, answers) in zip(result["scores"], found.items(), strict=True):
        right[key] = [
            text.split("### ")[-1] == record["answer"] for (text, _), record in zip(answers, records, strict=True)
        ]
        accuracy = sum(right[key]) / NUM_SAMPLES
        assert row["accuracy"] == pytest.approx(accuracy)
        assert (row["low"], row["high"]) == pytest.approx(wilson_interval(accuracy, NUM_SAMPLES))
        assert row["new_tokens"] == pytest.approx(sum(length for _, length in answers) / NUM_SAMPLES)
        assert row["samples"] == row["scored"] == NUM_SAMPLES
        assert row["seconds_per_sample"] > 0
        assert [line["text"] for line in predictions(whole)[key]] == [text for text, _ in answers]
    assert [row["mode"] for row in result["scores"]] == ["coconut", "coconut", "no_cot"]
    assert all(0 < sum(values) < NUM_SAMPLES for values in right.values())  # else the above shows little
    assert len(set(map(tuple, right.values()))) == len(right)

    for row, budget in zip(result["comparisons"], (0, 2), strict=True):
        mine, other = right["thinks", budget], right["silent", None]
        assert (row["num_thoughts"], row["other_num_thoughts"]) == (budget, None)
        assert row["difference"] == pytest.approx((sum(mine) - sum(other)) / NUM_SAMPLES)
        assert (row["low"], row["high"]) == pytest.approx(paired_bootstrap(mine, other))
        assert row["mcnemar_p"] == pytest.approx(mcnemar(mine, other))
        assert row["only_model"] - row["only_other"] == sum(mine) - sum(other)


def test_files_hold_the_table(whole):
    rows = report(whole)["scores"]
    with open(whole / "scores.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [[row[name] for name in row] for row in read] == [
        ["" if value is None else str(value) for value in row.values()] for row in rows
    ]
    assert (whole / "scores.png").read_bytes().startswith(b"\x89PNG")


# --- a run that was killed -----------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_with_what_is_missing(folder, whole):
    """One file ends in half a line, one in half a header, one is whole; nothing that was there is asked again."""
    again = folder / "again"
    shutil.copytree(whole, again)
    files = {}
    for path in sorted((again / "predictions").glob("*.jsonl")):
        header = read_lines(path)[0]
        files[Path(header["model"]).name, header["num_thoughts"]] = path
    half, broken, intact = files["thinks", 0], files["thinks", 2], files["silent", None]
    text = half.read_bytes()
    kept = b"".join(text.splitlines(keepends=True)[:5])  # header and four samples
    half.write_bytes(text[: len(kept) + 20])
    broken.write_bytes(broken.read_bytes()[:30])
    before = intact.read_bytes()
    score.main(run_flags(folder, again, *ALL, folder / "silent"))
    assert predictions(again) == predictions(whole)
    assert timeless(report(again)["scores"]) == timeless(report(whole)["scores"])
    assert report(again)["comparisons"] == report(whole)["comparisons"]
    assert half.read_bytes().startswith(kept)  # with the seconds of the first run
    assert intact.read_bytes() == before


def test_other_settings_data_or_weights_start_anew(folder, tmp_path):
    shutil.copytree(folder / "silent", tmp_path / "model")
    records = load_records(folder / "trails" / "asked.jsonl")

    def path(records=records, budget=None, **settings):
        arguments = ScoreArguments(model=[str(tmp_path / "model")], data="asked.jsonl", **settings)
        subject = Subject(str(tmp_path / "model"), records, arguments, torch.device("cpu"))
        return predictions_path(tmp_path, describe(subject, budget))

    first = path()
    assert path() == path(batch_size=1) == path(metric="exact") == first  # how it is computed, not what is asked
    others = [path(budget=3), path(max_new_tokens=2), path(max_patches=2), path(dtype="bfloat16")]
    others.append(path([*records[:-1], records[-1] | {"question": "Which colour?"}]))
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    others.append(path())
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("as_file", [False, True], ids=["embedded", "a file"])
def test_another_picture_of_a_data_set_starts_anew(folder, tmp_path, as_file):
    def path(colour):
        content = io.BytesIO()
        Image.new("RGB", (28, 28), colour).save(content, "BMP")  # of the same size whatever the colour
        if as_file:
            (tmp_path / "a.bmp").write_bytes(content.getvalue())
        image = {"bytes": None, "path": str(tmp_path / "a.bmp")} if as_file else {"bytes": content.getvalue()}
        row = {"id": 1, "question": "q", "answer": "a", "steps": ["s"], "image": {"path": None} | image}
        records = load_records(Dataset.from_list([row]).cast_column("image", ImageFeature()))
        arguments = ScoreArguments(model=[str(folder / "silent")], data="pictures")
        subject = Subject(str(folder / "silent"), records, arguments, torch.device("cpu"))
        return predictions_path(tmp_path, describe(subject, None))

    assert path("red") != path("blue")


def test_pictures_from_python_are_told_apart(folder, tmp_path):
    def path(image):
        record = {"id": "1", "question": "q", "answer": "a", "steps": ["s"], "images": [image]}
        arguments = ScoreArguments(model=[str(folder / "silent")], data="pictures")
        subject = Subject(str(folder / "silent"), load_records([record]), arguments, torch.device("cpu"))
        return predictions_path(tmp_path, describe(subject, None))

    def png(colour):
        content = io.BytesIO()
        Image.new("RGB", (28, 28), colour).save(content, "PNG")
        return content.getvalue()

    images = [Image.new("RGB", (28, 28), "red"), Image.new("RGB", (28, 28), "blue"), png("red"), png("blue")]
    assert len({path(image) for image in images}) == 4
    assert path(Image.new("RGB", (28, 28), "red")) == path(images[0])


# --- two ranks -----------------------------------------------------------------------------------------------------


def test_two_ranks_give_the_table_of_one(folder, whole):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = run_flags(folder, folder / "two", *ALL, folder / "silent")
    process = subprocess.run(
        [*launch, str(ROOT / "score.py"), *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-5000:]
    assert "thinks" in process.stdout
    assert timeless(report(folder / "two")["scores"]) == timeless(report(whole)["scores"])
    assert report(folder / "two")["comparisons"] == report(whole)["comparisons"]
    found = predictions(folder / "two")
    assert found == predictions(whole)
    assert all([line["index"] for line in lines] == list(range(NUM_SAMPLES)) for lines in found.values())


# --- choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "budget"), [("thinks", 2), ("thinks", 0), ("silent", None)])
def test_likelihood_of_choices_equals_the_plain_definition(folder, name, budget):
    """Without cache, padding or batch, in float64; the samples have 2, 3 and 4 choices."""
    records = load_records(folder / "trails" / "choices.jsonl")[:3]
    arguments = AskArguments(data="-")
    subject = Subject(str(folder / name), records, arguments, torch.device("cpu"), choices_by="likelihood")
    subject.load()
    tokenizer, processor = subject.processor.tokenizer, subject.processor
    with widened(), torch.no_grad():
        answers = subject.answer([0, 1, 2], budget)
        for record, answer in zip(records, answers, strict=True):
            expected = []
            for choice in record["choices"]:
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": question_text(record)}],
                    num_thoughts=budget,
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs={"images": record["images"]},
                )
                written = tokenizer(f"### {choice}<|im_end|>")["input_ids"]
                prompt = inputs["input_ids"][0]
                ids = torch.cat([prompt, torch.tensor(written)])
                logits, _ = reference_logits(subject.model, ids, inputs["pixel_values"])
                log_probs = logits.log_softmax(dim=-1)
                expected.append(
                    sum(float(log_probs[len(prompt) - 1 + place, token]) for place, token in enumerate(written))
                )
            assert answer["log_probs"] == pytest.approx(expected, rel=1e-9)
            assert answer["prediction"] == record["choices"][max(range(len(expected)), key=expected.__getitem__)]
            assert answer["new_tokens"] == 0


def test_a_metric_by_path_judges_choices_and_the_submission_holds_them(folder, tmp_path):
    metric = ROOT / "metrics" / "aokvqa.py"
    flags = ["--choices_by", "likelihood", "--metric", f"{metric}:multiple_choice"]
    submission = tmp_path / "predictions.json"
    submission.write_text(json.dumps({"train-000000": {"direct_answer": "kept"}}))
    flags += ["--predictions_to", submission]
    (row,) = score.main(run_flags(folder, tmp_path, *flags, data="choices"))
    lines = predictions(tmp_path)["thinks", 2]
    records = read_lines(folder / "trails" / "choices.jsonl")
    right = [line["prediction"] == record["answer"] for line, record in zip(lines, records, strict=True)]
    assert row["accuracy"] == pytest.approx(sum(right) / NUM_SAMPLES)
    assert row["new_tokens"] == 0
    expected = {
        record["id"]: {"multiple_choice": line["prediction"]} for record, line in zip(records, lines, strict=True)
    }
    expected["train-000000"]["direct_answer"] = "kept"
    assert json.loads(submission.read_text()) == expected


def test_without_choices_the_submission_holds_direct_answers(tmp_path):
    records = [{"id": 7, "choices": []}, {"id": "b", "choices": ["x", "y"]}]
    score.write_submission(records, [{"prediction": "dog"}, {"prediction": "x"}], tmp_path / "new" / "a.json")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {
        "7": {"direct_answer": "dog"},
        "b": {"multiple_choice": "x"},
    }


# --- metrics -------------------------------------------------------------------------------------------------------


RECORD = {"id": 1, "answer": "18", "choices": [], "answers": []}


@pytest.mark.parametrize(
    ("metric", "record", "prediction", "expected"),
    [
        ("exact", {}, "18", 1.0),
        ("exact", {}, "18.0", 0.0),
        ("answer_accuracy.py:exact_match", {}, "18.0", 0.0),
        ("answer_accuracy.py:numeric_match", {}, "18.0", 1.0),
        ("aokvqa.py:direct_answer", {"answers": ["dog", "dog", "cat"]}, "dog", 2 / 3),
        ("aokvqa.py:direct_answer", {}, "dog", None),
        ("aokvqa.py:direct_answer", {"answers": ["dog"], "extra": {"difficult_direct_answer": True}}, "dog", None),
    ],
    ids=["exact", "other text", "exact_match", "numeric_match", "share", "no answers", "difficult"],
)
def test_scores_of_single_predictions(metric, record, prediction, expected):
    judge = load_metric(metric if metric == "exact" else str(ROOT / "metrics" / metric))
    value = judge(RECORD | record, prediction)
    assert value == (expected if expected is None else pytest.approx(expected))


def test_shares_get_a_bootstrap_interval_and_what_does_not_count_is_left_out():
    lines = [{"new_tokens": number, "seconds": 0.5} for number in range(5)]
    values = [1 / 3, None, 1.0, 0.0, 2 / 3]
    row = summarise("some", MultiCoCoConfig(), 4, lines, values)
    counted = [1 / 3, 1.0, 0.0, 2 / 3]
    assert (row["samples"], row["scored"], row["accuracy"]) == (5, 4, pytest.approx(0.5))
    assert (row["low"], row["high"]) == pytest.approx(paired_bootstrap(counted, [0.0] * 4))
    assert (row["new_tokens"], row["seconds_per_sample"]) == (2.0, 0.5)
    compared = compare(row, row, values, [0.0, None, 1.0, 1.0, 0.0])
    assert compared["samples"] == 4
    assert compared["difference"] == pytest.approx(0.0)
    assert "mcnemar_p" not in compared


def test_a_result_that_the_metric_lacks_is_named():
    judge = load_metric(f"{ROOT / 'metrics' / 'answer_accuracy.py'}:numeric")
    with pytest.raises(ValueError, match="no result 'numeric', expected one of.*numeric_match"):
        judge(RECORD, "18")


# --- settings and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.yaml", "a.json"])
def test_flags_win_over_the_file(tmp_path, name):
    settings = {"model": ["a", "b"], "data": "x.jsonl", "num_thoughts": [0, 2], "batch_size": 4, "compare": None}
    settings |= {"use_cpu": True, "column_mapping": {"steps": "rationale"}}
    text = json.dumps(settings) if name.endswith(".json") else yaml.safe_dump(settings)
    (tmp_path / name).write_text(text)
    arguments = parse_settings(ScoreArguments, "", [str(tmp_path / name), "--num_thoughts", "1", "--batch_size=9"])
    assert (arguments.model, arguments.num_thoughts, arguments.batch_size) == (["a", "b"], [1], 9)
    assert (arguments.use_cpu, arguments.compare) == (True, None)
    assert json.loads(arguments.column_mapping) == {"steps": "rationale"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_thoughts", "2", "-1"], "`--num_thoughts` must be at least 0, got -1"),
        (["--batch_size", "0"], "`--batch_size` must be at least 1, got 0"),
        (["--max_new_tokens", "0"], "`--max_new_tokens` must be at least 1, got 0"),
        (["--metric", "no/such.py:exact_match"], "`--metric` is 'no/such.py:exact_match', expected"),
        (["--metric", str(ROOT / "metrics" / "aokvqa.py")], "expected 'exact' or FILE:RESULT"),
        (["--predict_only", "--compare", "b"], "`--compare` needs accuracies"),
        (["--predictions_to", "a.json", "--num_thoughts", "0", "1"], "answers of one checkpoint at one number"),
        (["--predictions_to", "a.json", "--compare", "b"], "answers of one checkpoint at one number"),
        ([], "`no/such.jsonl` does not exist"),
    ],
    ids=[
        "negative budget",
        "batch",
        "length",
        "missing metric",
        "unnamed result",
        "compare",
        "budgets",
        "models",
        "data",
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(flags, message):
    with pytest.raises(ValueError, match=message):
        score.main(["--model", "no/such/model", "--data", "no/such.jsonl", "--use_cpu", *flags])


def test_missing_checkpoints_and_settings_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="`--model` .*nowhere: no checkpoint can be read there"):
        score.main(run_flags(folder, tmp_path, models=["thinks", "nowhere"]))
    assert not list(tmp_path.iterdir())  # nor was the first one asked
    with pytest.raises(ValueError, match="settings.yaml` does not exist"):
        parse_settings(ScoreArguments, "", [str(tmp_path / "settings.yaml")])


@pytest.mark.parametrize(
    ("flags", "change", "message"),
    [
        (["--choices_by", "likelihood"], {"choices": []}, "Record 'x': `choices` is .* at least two"),
        (["--choices_by", "likelihood"], {"choices": ["red", "blue"]}, "Record 'x': `answer` 'green' is none of its"),
        (["--metric", f"{ROOT / 'metrics' / 'aokvqa.py'}:direct_answer"], {}, "compares with `answers`"),
        (["--predictions_to", "{broken}"], {}, "is there, but is not JSON"),
        ([], {"answer": None}, "`answer` is None"),
    ],
    ids=["no choices", "answer is no choice", "no direct answers", "submission", "no answer"],
)
def test_records_that_cannot_be_scored_are_refused_before_compute(tmp_path, flags, change, message):
    record = {"id": "x", "question": "Which colour?", "answer": "green"} | change
    path = write_records(tmp_path / "data.jsonl", [record])
    (tmp_path / "broken.json").write_text("{")
    flags = [flag.format(broken=tmp_path / "broken.json") for flag in flags]
    with pytest.raises(ValueError, match=message):
        score.main(["--model", "no/such/model", "--data", str(path), "--use_cpu", *flags])


def test_records_without_answers_can_be_asked_but_not_scored(folder, whole, tmp_path):
    records = read_lines(folder / "trails" / "asked.jsonl")
    kept = ("id", "images", "question")
    write_records(
        folder / "trails" / "unanswered.jsonl", [{name: record[name] for name in kept} for record in records]
    )
    flags = run_flags(folder, tmp_path / "out", data="unanswered", models=["silent"])
    with pytest.raises(ValueError, match="`answer` is None"):
        score.main(flags)
    with pytest.raises(ValueError, match="has no `answer`.*Give `--max_new_tokens`"):
        score.main([*flags, "--predict_only"])
    (row,) = score.main([*flags, "--predict_only", "--max_new_tokens", "16"])
    assert row["samples"] == NUM_SAMPLES
    assert "accuracy" not in row
    assert not (tmp_path / "out" / "scores.png").exists()
    assert predictions(tmp_path / "out")["silent", None] == predictions(whole)["silent", None]
