"""
What the version before wrote is read by the code as it stands: nothing is asked or trained twice, no name is another.

The files and how they were made: tests/golden/version_before/README.md. Each test has them, with the model that they
belong to, in a folder of its own that it works in. The times of models and pictures, and the absolute paths of
pictures, are part of what predictions depend on: times are set to what they were, and headers are written anew for the
new paths, by the rule that is spelled out here, after this rule has given what stands in the old ones.
"""

import csv
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32_INSIDE, GOLDEN, TRAILS
from reference import widened
from safetensors.torch import load_file

from multicoco import (
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    diagnose,
    load_records,
    model_card,
    score,
    train,
)
from multicoco.training.arguments import parse


OLD = GOLDEN / "version_before"
MADE_IN = "/tmp/version_before"
TIME = 1767323045 * 10**9
NUM_CUT = 3  # boards that the killed run of score.py had not answered with two thoughts


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def written(*folders):
    """The files in these folders, but for code, which changes with every version."""
    paths = [path for folder in folders for path in Path(folder).rglob("*")]
    return sorted(str(path) for path in paths if path.is_file() and path.suffix != ".py")


def expected_names(*folders):
    return sorted(name for name in read(OLD / "names.json") if name.startswith(tuple(f"{one}/" for one in folders)))


def assert_same(found, expected, where="", rel=1e-9):
    """Equal in names and values; numbers up to the last bits, in which processors differ."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_same(found[name], expected[name], f"{where}.{name}", rel)
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{place}]", rel)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=1e-12), where
    else:
        assert found == expected, where


# --- the files, moved --------------------------------------------------------------------------------------------


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def data_digest(records, folder):
    """Of records, each picture as path, size and time; the pictures lie in this folder."""
    found = hashlib.sha256()
    for record in records:
        images = [[image.replace(os.getcwd(), folder), os.stat(image).st_size, TIME] for image in record["images"]]
        found.update(json.dumps({**record, "images": images}, sort_keys=True).encode())
    return found.hexdigest()


def move_header(settings, records):
    assert settings["data_digest"] == data_digest(records, MADE_IN)
    return {**settings, "data_digest": data_digest(records, os.getcwd())}


def move_predictions(records):
    for path in Path("trails/scores/predictions").iterdir():
        first, rest = path.read_bytes().split(b"\n", 1)
        header = json.loads(first)
        assert path.name == f"trails-{header['num_thoughts']}-{digest(header)[:8]}.jsonl"
        header = move_header(header, records)
        path.unlink()
        path = path.with_name(f"trails-{header['num_thoughts']}-{digest(header)[:8]}.jsonl")
        path.write_bytes(json.dumps(header).encode() + b"\n" + rest)


def move_experiments(records):
    (folder,) = Path("trails/diagnosis/experiments").iterdir()
    names = set()
    for path in (*folder.glob("*.jsonl"), *folder.glob("*.json")):
        first, line_break, rest = path.read_bytes().partition(b"\n")
        content = json.loads(first)
        header = content if path.suffix == ".jsonl" else content["settings"]
        of_this_file = ("experiment", "num_drawn", "num_attention")
        settings = {name: value for name, value in header.items() if name not in of_this_file}
        assert folder.name == f"trails-{digest(settings)[:8]}"
        names.add(f"trails-{digest(move_header(settings, records))[:8]}")
        header |= move_header(settings, records)
        path.write_bytes(json.dumps(content).encode() + line_break + rest)
    (name,) = names
    folder.rename(folder.with_name(name))


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The files of the version before in a folder of their own, which the test works in."""
    shutil.copytree(TRAILS, tmp_path / "trails")
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for path in (*Path("trails").iterdir(), *Path("boards").rglob("*")):
        os.utime(path, ns=(TIME, TIME))
    records = load_records("boards/train.jsonl")
    move_predictions(records)
    move_experiments(records[: read("trails/diagnosis/diagnosis.json")["samples"]])


# Settings that the version before did not have, and what they are if nobody gives them.
NEW = {
    "dataset_num_proc": None,
    "draft_jpeg": None,
    "dry_run": False,
    "draw_surplus": False,
    "edits_from": None,
    "first_latent_stage": 1,
    "follow": None,
    "image_folder": None,
    "load_in_4bit": False,
    "lora_embeddings": None,
    "normalize_on_device": False,
    "num_read": 8,
    "overwrite_cache": False,
    "same_step": None,
    "step_loss_weight": 0.0,
    "steps_from": "none",
    "thought_sweeps": None,
    "train_weights": None,
    "without_steps": "refuse",
}


def as_before(settings):
    """Without new settings, which must be at their defaults; the sets of a run, which may be several now, as one."""
    assert {name: value for name, value in settings.items() if name in NEW and value != NEW[name]} == {}
    settings = {name: value for name, value in settings.items() if name not in NEW}
    if "train_file" in settings:
        (settings["train_file"],) = settings["train_file"]
    return settings


# --- scores and diagnoses ----------------------------------------------------------------------------------------


def predictions():
    """By number of thoughts the lines of each file, by index; what is cut is no line."""
    found = {}
    for path in Path("trails/scores/predictions").iterdir():
        header, *lines = path.read_text().split("\n")[:-1]
        found[json.loads(header)["num_thoughts"]] = {json.loads(line)["index"]: json.loads(line) for line in lines}
    return found


def test_score_asks_only_what_the_version_before_had_not_answered(old, monkeypatch):
    asked, generate = [], MultiCoCoForConditionalGeneration.generate

    def counted(model, *args, **kwargs):
        asked.append(len(kwargs["input_ids"]))
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(MultiCoCoForConditionalGeneration, "generate", counted)
    before = predictions()
    assert {number: len(lines) for number, lines in before.items()} == {5: 8, 2: 8 - NUM_CUT}
    score.main(["score.yaml"])
    assert sum(asked) == NUM_CUT
    after = predictions()
    for number, lines in before.items():
        assert sorted(after[number]) == list(range(8))
        assert {index: after[number][index] for index in lines} == lines  # the seconds too: of the run before
    (names,) = {tuple(line) for lines in after.values() for line in lines.values()}
    assert names == ("index", "id", "prediction", "text", "new_tokens", "seconds")


def test_scores_are_those_of_the_version_before(old):
    expected = read("trails/scores/scores.json")
    with open("trails/scores/scores.csv", newline="") as file:
        columns = next(csv.reader(file))
    for path in (Path("trails/scores/scores.json"), Path("trails/scores/scores.csv")):
        path.unlink()
    score.main(["score.yaml"])
    found = read("trails/scores/scores.json")
    found["settings"] = as_before(found["settings"])
    for row in (*found["scores"], *expected["scores"]):
        assert row.pop("seconds_per_sample") > 0
    assert_same(found, expected)
    with open("trails/scores/scores.csv", newline="") as file:
        assert next(csv.reader(file)) == columns
    without_digest = lambda names: sorted(name.rsplit("-", 1)[0] for name in names)  # noqa: E731
    assert without_digest(written("trails/scores")) == without_digest(expected_names("trails/scores"))


def test_diagnose_asks_nothing_again_and_finds_the_same(old, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a model is loaded, though all answers are there")

    monkeypatch.setattr(MultiCoCoForConditionalGeneration, "from_pretrained", refuse)
    expected = read("trails/diagnosis/diagnosis.json")
    Path("trails/diagnosis/diagnosis.json").unlink()
    before = {path: path.read_bytes() for path in Path("trails/diagnosis/experiments").rglob("*") if path.is_file()}
    diagnose.main(["diagnose.yaml"])
    found = read("trails/diagnosis/diagnosis.json")
    assert_same({**found, "settings": as_before(found["settings"])}, expected)
    for path, content in before.items():
        assert path.read_bytes() == content, path
    (folder,) = Path("trails/diagnosis/experiments").iterdir()
    (old_folder,) = (OLD / "trails" / "diagnosis" / "experiments").iterdir()
    names = [name.replace(old_folder.name, folder.name) for name in expected_names("trails/diagnosis")]
    assert written("trails/diagnosis") == sorted(names)


def test_what_diagnose_recorded_is_found_again_from_the_start(old):
    """Without the answers of the version before, the same experiments are planned and answered alike."""
    expected = read("trails/diagnosis/diagnosis.json")
    shutil.rmtree("trails/diagnosis")
    diagnose.main(["diagnose.yaml"])
    found = read("trails/diagnosis/diagnosis.json")
    (folder,) = Path("trails/diagnosis/experiments").iterdir()
    (old_folder,) = (OLD / "trails" / "diagnosis" / "experiments").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in old_folder.iterdir())
    for path in old_folder.glob("*.jsonl"):
        assert (folder / path.name).read_text().split("\n")[1:] == path.read_text().split("\n")[1:], path.name
    for path in old_folder.glob("*.safetensors"):
        torch.testing.assert_close(load_file(folder / path.name), load_file(path), atol=1e-4, rtol=1e-4)
    assert list(found["experiments"]) == list(expected["experiments"])
    assert found["thoughts"]["verdict"] == expected["thoughts"]["verdict"]


# --- runs --------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(old, caplog):
    expected = {name: read(f"run/{name}.json") for name in ("settings", "results", "trainer_state")}
    readme = Path("run/README.md").read_bytes()
    stopped = "run/checkpoint-3"
    shutil.copytree(stopped, "kept")
    shutil.rmtree("run")
    shutil.copytree("kept", stopped)
    # It was begun with the library's schedule; which version a checkpoint is of is said in a warning.
    as_begun = ["--lr_scheduler_type", "linear", "--warmup_steps", "0"]
    trainer = train.main(["run.yaml", "--resume_from_checkpoint", "last", *as_begun])
    assert "does not tell which run it is of" in caplog.text
    losses, expected_losses = (
        {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
        for log in (trainer.state.log_history, expected["trainer_state"]["log_history"])
    )
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert as_before(read("run/settings.json")) == expected["settings"]
    assert_same(read("run/results.json"), expected["results"], rel=1e-3)
    assert Path("run/README.md").read_bytes() == readme
    # The card that is not kept is not made again: the run has not begun anew.
    assert written("run") == [name for name in expected_names("run") if name != f"{stopped}/README.md"]


def test_settings_files_mean_what_they_meant(old):
    for name, expected in read("parsed.json").items():
        *groups, training, sources = parse(None, [name])
        values = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
        values |= {key: value for key, value in training.to_dict().items() if key in expected["values"]}
        assert as_before(values) == expected["values"], name
        assert sources == expected["sources"], name


def test_cards_are_those_of_the_version_before(old):
    expected = Path("run/README.md").read_bytes()
    Path("run/README.md").unlink()
    model_card.main(["run"])
    assert Path("run/README.md").read_bytes() == expected
    model_card.main(["trails", "--model_id", "me/trails", "--controls", "run", "--license", "mit"])
    assert Path("trails/README.md").read_bytes() == Path("cards/trails.md").read_bytes()


# --- models ------------------------------------------------------------------------------------------------------


def logits_of(model):
    """Of the last two tokens of the first two boards' prompts with two thoughts; only the rotary table is float32."""
    processor, found = MultiCoCoProcessor.from_pretrained("trails"), []
    for record in load_records("boards/train.jsonl")[:2]:
        text = f"<image>\n{record['question']}"
        inputs = processor(images=record["images"], text=text, num_thoughts=2, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.float64)
        with torch.no_grad(), widened():
            found.append(model.eval()(**inputs).logits[0, -2:])
    return torch.stack(found)


def load(name):
    return MultiCoCoForConditionalGeneration.from_pretrained(name, dtype=torch.float64)


def test_a_checkpoint_gives_the_same_logits(old):
    expected = load_file("logits.safetensors")["checkpoint"]
    model = load("trails")
    torch.testing.assert_close(logits_of(model), expected, atol=FLOAT32_INSIDE, rtol=0)
    assert "step_loss_weight" not in read("trails/config.json")
    assert model.config.step_loss_weight == 0.0  # nothing of it was trained to be read


def test_adapters_give_the_same_logits_added_or_merged(old):
    peft = pytest.importorskip("peft", reason="adapters need the package peft (`pip install multicoco[peft]`)")
    from multicoco.examples import merge_lora

    expected = load_file("logits.safetensors")
    assert (expected["adapters"] - expected["checkpoint"]).abs().max() > 1
    adapted = peft.PeftModel.from_pretrained(load("trails"), "run/checkpoint-3")
    torch.testing.assert_close(logits_of(adapted), expected["adapters"], atol=FLOAT32_INSIDE, rtol=0)
    merge_lora.main(["--adapters", "run/checkpoint-3", "--output_dir", "merged"])
    # The merged weights are rounded to the float32 of the base, which moved these logits by 1.0e-6.
    torch.testing.assert_close(logits_of(load("merged")), expected["adapters"], atol=1e-5, rtol=0)
