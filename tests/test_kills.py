"""Runs that are killed and resumed end as the run nobody touched: the short form of `benchmarks/kills.py`."""

import json
import shutil

import pytest

from multicoco import train
from multicoco.benchmarks import kills
from multicoco.benchmarks.kills import BOUNDARY, MID_EPOCH, SAVE, Moment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    kills.prepare_run(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return kills.run(folder, folder / "whole")


def test_a_run_killed_in_an_epoch_at_a_boundary_and_in_a_save_equals_the_whole_run(folder, whole):
    moments = [Moment(4), Moment(17), Moment(18, file="model.safetensors")]
    runs = kills.run_with_kills(folder, moments, report=lambda row: None)
    assert [kills.kind(run) for run in runs[:-1]] == [MID_EPOCH, BOUNDARY, SAVE]
    assert [run.resumed_from for run in runs[:3]] == [0, 3, 15]
    assert runs[-1].resumed_from == int(runs[-2].unfinished.split("-")[1]) - 3  # the unfinished one is passed by
    assert kills.find_differences(folder, whole, runs) == []


def test_a_run_that_is_resumed_with_something_changed_is_refused(folder, monkeypatch):
    monkeypatch.setattr(kills, "CHANGES", {name: kills.CHANGES[name] for name in ("file", "ranks")})
    told = []
    assert kills.run_changed(folder, report=told.append) == []
    assert "`train_file` was" in told[0]
    assert "`world_size` was 1, is 2" in told[1]
    monkeypatch.setattr(kills, "CHANGES", {"nothing": ((), ())})
    (missed,) = kills.run_changed(folder, report=told.append)
    assert "resumed with another nothing, it was not refused" in missed


def one_more_digit(path):
    state = json.loads(path.read_text())
    state["log_history"][5]["loss"] += 1e-12
    path.write_text(json.dumps(state))


def other_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("trainer_state.json", one_more_digit, "steps [6]"),
        ("model.safetensors", other_last_byte, "model.safetensors differs"),
        ("results.json", lambda path: path.write_text(path.read_text().replace("12", "11")), "results.json differs"),
    ],
    ids=["loss", "weights", "accuracy"],
)
def test_a_difference_in_what_is_left_is_found(folder, whole, tmp_path, name, change, told):
    for copy in ("whole", "killed"):
        shutil.copytree(folder / "whole", tmp_path / copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    assert kills.find_differences(tmp_path, whole, [whole]) == []
    change(tmp_path / "killed" / name)
    (difference,) = kills.find_differences(tmp_path, whole, [whole])
    assert told in difference


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"newest": 3}, "but the newest finished checkpoint was that of step 3"),
        ({"lines": {1: "{'loss': '0'}"}}, "step 1: {'loss': '0'} instead of"),
    ],
    ids=["resumed from another step", "lost step"],
)
def test_a_difference_in_what_a_process_did_is_found(folder, whole, tmp_path, change, told):
    for copy in ("whole", "killed"):
        shutil.copytree(folder / "whole", tmp_path / copy, ignore=shutil.ignore_patterns("checkpoint-*"))
    (difference,) = kills.find_differences(tmp_path, whole, [whole._replace(**change)])
    assert told in difference


@pytest.mark.parametrize("seed", range(5))
def test_the_moments_are_of_all_kinds_and_follow_the_seed(seed):
    moments = kills.draw_moments(12, seed, step_seconds=0.1)
    assert moments == kills.draw_moments(12, seed, step_seconds=0.1)
    assert moments != kills.draw_moments(12, seed + 1, step_seconds=0.1)
    assert len(moments) == 12
    assert len([moment for moment in moments if moment.file]) >= 2
    first_after = {16: 18, 24: 27}  # a stage's last step, and the first checkpoint of the next stage
    ends = [(end, save) for end, save in first_after.items() for m in moments if not m.file and end <= m.step < save]
    assert len(ends) == 2


def test_too_few_kills_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        kills.draw_moments(3, 0, 0.1)


def test_a_killed_run_of_adapters_equals_the_whole_run(folder):
    pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")
    flags = ("--lora_rank", "4", "--max_steps", "20")

    def train_here(name):
        train.main([str(folder / "settings.yaml"), "--output_dir", str(folder / name), *flags])
        weights = (folder / name / "adapter_model.safetensors").read_bytes()
        return kills.read_history(folder / name), weights

    killed = kills.run(folder, folder / "adapters_killed", Moment(17), flags)
    assert killed.returncode != 0
    log, weights = train_here("adapters_killed")
    expected_log, expected_weights = train_here("adapters_whole")
    assert len(log) == 20
    assert log == expected_log
    assert weights == expected_weights
