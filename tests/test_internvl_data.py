"""Records in InternVL's own format train as they are, by the command of the README; sets in flags, files and cards."""

import json
import math
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, TRAILS
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image

from multicoco import (
    CurriculumArguments,
    MultiCoCoForConditionalGeneration,
    ReasoningCollator,
    StageDataset,
    sources,
    train,
)
from multicoco.evaluation.settings import find_settings, make_parser
from multicoco.evaluation.subject import AskArguments, Subject
from multicoco.records import load_records
from multicoco.score import ScoreArguments
from multicoco.training.arguments import parse
from multicoco.training.card import make_card


ROOT = Path(__file__).parent.parent
NEEDED = {"model_name_or_path": "some/model", "train_file": "some.jsonl"}
THOUGHT = "<think>\nTwo stand on the left.\nOne stands on the right.\n</think>\n3"


def turns_of(*texts):
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


def rows_of(count, folder):
    """Rows as InternVL has them: pictures as string, list or not at all, one or more turns, with thoughts or not."""
    draw = random.Random(0)
    folder.mkdir()
    names = [f"{number}.png" for number in range(20)]
    for name in names:
        colour = tuple(draw.randrange(256) for _ in range(3))
        Image.new("RGB", (draw.randrange(20, 90), draw.randrange(20, 90)), colour).save(folder / name)
    one, two = "<image>\nHow many cars are parked?", "<image>\n<image>\nWhich street has more?"
    kinds = [
        lambda: {"image": draw.choice(names), "conversations": turns_of(one, THOUGHT)},
        lambda: {"image": draw.choices(names, k=2), "conversations": turns_of(two, THOUGHT)},
        lambda: {"image": [draw.choice(names)], "conversations": turns_of("How many?", "3")},
        lambda: {"conversations": turns_of(f"{draw.randrange(9)} + 1?", "It is more than before.")},
        lambda: {"image": draw.choice(names), "conversations": turns_of(one, THOUGHT, "And bikes?", THOUGHT)},
        lambda: {"image": draw.choice(names), "conversations": turns_of(one, "3", "Why?", THOUGHT, "So?", "Yes.")},
    ]
    return [{"id": number, **kinds[number % len(kinds)](), "width": 56, "height": 56} for number in range(count)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_command_of_the_readme_trains_a_thousand_records_as_they_are(tmp_path, monkeypatch):
    """Word for word but for the model, and for flags that make it short; at stage 1, where there are thoughts."""
    rows = rows_of(1000, tmp_path / "images")
    write_rows(tmp_path / "conversations.jsonl", rows)
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^python train\.py (.*conversations\.jsonl.*)$", page, flags=re.MULTILINE)
    words = [str(CHECKPOINT) if word == "OpenGVLab/InternVL3-1B" else word for word in shlex.split(command)]
    short = "--max_steps 20 --epochs_stage_0 0 --logging_steps 1 --learning_rate 3e-3 --report_to none"
    monkeypatch.chdir(tmp_path)
    trainer = train.main([*words, *short.split()])

    samples = sum(len(row["conversations"]) // 2 for row in rows)
    assert len(trainer.train_dataset) == len(trainer.train_dataset.records) == samples > len(rows)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    latent = trainer.train_dataset.block_ids[1]
    numbers = {trainer.train_dataset[index]["input_ids"].count(latent) for index in range(100)}
    assert numbers == {0, 2}  # records without steps have no thoughts, the others those of stage 1
    model = MultiCoCoForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.config.num_thoughts == 2
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["train_file"], settings["samples"]) == (["conversations.jsonl"], samples)
    assert "| training data | `conversations.jsonl` (local) |" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def sets_file(tmp_path, monkeypatch):
    """InternVL's file of sets, the first of which counts twice; its paths are relative to the working folder."""
    for name in ("words", "numbers"):
        rows = [{"id": place, "conversations": turns_of(f"{name} {place}?", f"{place}.")} for place in range(3)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    sets = {"words": {"annotation": "words.jsonl", "repeat_time": 2}, "numbers": {"annotation": "numbers.jsonl"}}
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    monkeypatch.chdir(tmp_path)
    return "sets.json"


def test_a_set_that_counts_twice_is_asked_once(sets_file):
    """Records were asked the questions of others: the index of one was taken for that of a sample of the mixture."""
    arguments = AskArguments(data=sets_file)
    subject = Subject(str(TRAILS), arguments.read_data(), arguments, torch.device("cpu"))
    ids = [f"{name}:{place}" for name in ("words", "numbers") for place in range(3)]
    assert [record["id"] for record in subject.records] == ids
    assert [subject.dataset.tokenized(index).id for index in range(len(subject.dataset))] == ids


def test_a_file_of_sets_is_trained_on_with_its_weights_and_answered_without(sets_file):
    flags = "--without_steps thoughts --answer_every end --max_steps 1 --save_strategy no --report_to none"
    flags += f" --train_file {sets_file} --eval_file {sets_file} --output_dir out"
    trainer = train.main(["--model_name_or_path", str(TRAILS), *flags.split()])
    assert len(trainer.train_dataset) == 2 * 3 + 3
    assert [entry["eval/samples"] for entry in trainer.state.log_history if "eval/samples" in entry] == [2 * 3]


def test_pictures_of_sets_stand_in_root_else_in_the_image_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (28, 28)).save(tmp_path / name / "x.png")
    row = {"image": "x.png", "conversations": turns_of("<image>\nWhich?", "This.")}
    write_rows(tmp_path / "rows.jsonl", [row])
    sets = {"first": {"root": "a/", "annotation": "rows.jsonl"}, "second": {"annotation": "rows.jsonl"}}
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    records = load_records("sets.json", image_folder="b", needs_steps=False)
    assert [record["images"] for record in records] == [[str(tmp_path / name / "x.png")] for name in "ab"]
    sets["first"]["root"] = "nowhere"
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    with pytest.raises(ValueError, match="`sets.json`, 'first': `root` nowhere is no folder"):
        load_records("sets.json", needs_steps=False)


def test_picture_paths_in_parquet_are_relative_to_it(tmp_path):
    """They were relative to the working folder, and `image_folder` was not looked at."""
    for name in ("rows", "pictures"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (28, 28)).save(tmp_path / name / "x.png")
    row = {"images": ["x.png"], "question": "Which?", "steps": ["Look."], "answer": "This."}
    Dataset.from_list([row]).to_parquet(tmp_path / "rows" / "mine.parquet")
    source = str(tmp_path / "rows" / "mine.parquet")
    assert load_records(source)[0]["images"] == [str(tmp_path / "rows" / "x.png")]
    folder = tmp_path / "pictures"
    assert load_records(source, image_folder=folder)[0]["images"] == [str(folder / "x.png")]


def test_switches_of_a_set_that_are_not_followed_are_named(sets_file, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sources.logger, "warning", said.append)
    load_records(sets_file, needs_steps=False)
    assert not said
    one = {"annotation": "words.jsonl", "data_augment": False, "max_dynamic_patch": 6}
    (tmp_path / "sets.json").write_text(json.dumps({"words": one}))
    load_records(sets_file, needs_steps=False)
    (line,) = said
    assert "['max_dynamic_patch'] are not followed" in line


def test_a_picture_that_changed_after_the_start_is_counted_anew_at_the_next(processor, tmp_path):
    picture, rows = tmp_path / "x.bmp", tmp_path / "mine.jsonl"
    record = {"images": ["x.bmp"], "question": "Which?", "steps": ["Look."], "answer": "This."}
    write_rows(rows, [record])
    Image.new("RGB", (84, 84)).save(picture)
    dataset = StageDataset(str(rows), processor, CurriculumArguments())
    size = picture.stat().st_size
    Image.new("RGB", (48, 147)).save(picture)
    assert picture.stat().st_size == size
    collator = ReasoningCollator(processor)
    with pytest.raises(ValueError, match="gave .* when they were counted.*Run again"):
        collator([dataset[0]])
    collator([StageDataset(str(rows), processor, CurriculumArguments())[0]])


# --- sets among flags, in settings files and in cards ------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write(name, settings):
        (tmp_path / name).write_text(json.dumps(settings))  # JSON is YAML
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize("name", ["a.yaml", "a.yml"])
@pytest.mark.parametrize("place", [0, 2, 3, 6])
def test_a_yaml_of_settings_may_stand_anywhere_among_sets(write, name, place):
    path = write(name, {**NEEDED, "seed": 5})
    words = ["--train_file", "a.jsonl", "b.json", "--train_weights", "1", "0.5"]
    words.insert(place, path)
    _, data, _, args, sources = parse(None, words)
    assert (data.train_file, data.train_weights, args.seed) == (["a.jsonl", "b.json"], [1, 0.5], 5)
    assert (sources["seed"], sources["train_file"]) == (path, "command line")


def test_a_json_behind_sets_is_one_of_them_and_behind_numbers_the_settings(write):
    settings, sets = write("a.json", {**NEEDED, "seed": 5}), write("sets.json", {"a": {"annotation": "a.jsonl"}})
    for between in (["--train_weights", "1", "0.5"], ["--skip_bad_records"], ["--output_dir", "out"]):
        _, data, _, args, sources = parse(None, ["--train_file", "a.jsonl", sets, *between, settings])
        assert (data.train_file, args.seed, sources["seed"]) == (["a.jsonl", sets], 5, settings)
    _, data, _, args, _ = parse(None, [settings, "--train_file=a.jsonl"])
    assert (data.train_file, args.seed) == (["a.jsonl"], 5)
    parser = make_parser(ScoreArguments, description=None)
    words, sources = find_settings(parser, ["--num_thoughts", "0", settings])
    assert words[-2:] == ["--num_thoughts", "0"]
    assert sources["seed"] == settings


def test_a_yaml_behind_sets_that_is_not_there_is_no_set():
    with pytest.raises(ValueError, match="`typo.yaml` does not exist, expected a file of settings"):
        parse(None, ["--model_name_or_path", "some/model", "--train_file", "a.jsonl", "typo.yaml"])


def test_a_settings_file_may_name_several_sets(write):
    path = write("a.yaml", {**NEEDED, "train_file": ["a.jsonl", "me/b", "c.json"], "train_weights": [1, 0.5, 2]})
    data = parse(None, [path]).data
    assert (data.train_file, data.train_weights) == (["a.jsonl", "me/b", "c.json"], [1, 0.5, 2])
    assert parse(None, [path, "--train_file", "d.jsonl"]).data.train_file == ["d.jsonl"]
    assert parse(None, [write("b.yaml", NEEDED)]).data.train_file == ["some.jsonl"]


@pytest.mark.parametrize(
    ("train_file", "weights", "shown", "datasets"),
    [
        (["/home/me/a.jsonl"], None, "`a.jsonl` (local)", None),
        (["/home/me/a.jsonl", "me/street"], [2.0, 0.25], "`a.jsonl` (local) x 2, `me/street` x 0.25", ["me/street"]),
        (["me/street", "me/words"], None, "`me/street`, `me/words`", ["me/street", "me/words"]),
        (["sets.json"], [1.0, 0.5], "`sets.json` (local); weights 1, 0.5", None),
        (["data/a.parquet", "data/*.jsonl"], None, "`a.parquet` (local), `*.jsonl` (local)", None),
        ("me/street", None, "`me/street`", ["me/street"]),  # as older runs have it
        (None, None, "not recorded", None),
    ],
)
def test_the_card_names_all_sets_and_those_of_the_hub(shared_model, tmp_path, train_file, weights, shown, datasets):
    shared_model.config.save_pretrained(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"train_file": train_file, "train_weights": weights}))
    card = ModelCard(str(make_card(tmp_path)))
    assert f"| training data | {shown} |" in card.text
    assert card.data.datasets == datasets
