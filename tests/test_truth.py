"""The short form of `make truth` and `make beyond`: trainings and diagnoses of seconds, and what is read of them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from multicoco import MODES, CurriculumArguments
from multicoco.recipes.trails import beyond, runs, truth
from multicoco.recipes.trails.prepare import prepare
from multicoco.recipes.trails.start_model import make_start_model


SHORT = ["--num_train_epochs", "1", "--warmup_steps", "1", "--lr_scheduler_type", "constant", "--use_cpu"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_truth_trains_diagnoses_and_writes_its_table(tmp_path, capsys):
    prepare(tmp_path / "data", num_train=16, num_val=12)
    folder = tmp_path / "truth"
    command = ["--data", str(tmp_path / "data"), "--output_dir", str(folder), "--modes", "coconut", "pause_steps"]
    command += ["--seeds", "0", "--samples", "12", "--jobs", "2", *SHORT]
    settings = ["--epochs_stage_0", "0", "--max_latent_stage", "1", "--first_latent_stage", "1"]
    rows = truth.main(command + settings)
    assert [(row["mode"], row["seed"], row["samples"], row["diagnosed"]) for row in rows] == [
        ("coconut", 0, 12, 12),
        ("pause_steps", 0, 12, 12),
    ]
    for row in rows:
        results = read(folder / f"{row['mode']}-0" / "results.json")[-1]
        diagnosis = read(folder / "diagnosis" / f"{row['mode']}-0" / "diagnosis.json")
        assert row["accuracy"] == results["eval/accuracy"] == diagnosis["experiments"]["intact"]["accuracy"]["rate"]
        assert row["num_thoughts"] == results["eval/num_thoughts"] == 1
        assert row["grey picture"] == diagnosis["experiments"]["grey-both"]["accuracy"]["rate"]
        assert row["follows the donor"] == diagnosis["thoughts"]["following"]["donors_picture"]["donor"]["rate"]
        assert row["verdict"] == "not shown to be used"  # one step of training
        assert (folder / f"{row['mode']}-0.html").is_file()
    assert read(folder / "diagnosis" / "coconut-0" / "diagnosis.json")["control"]["mode"] == "pause"
    assert (folder / "truth.png").stat().st_size > 10_000
    shown = (folder / "truth.md").read_text(encoding="utf-8")
    assert shown in capsys.readouterr().out
    assert f"{100 * rows[0]['accuracy']:.1f}" in shown.splitlines()[2]

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert truth.main(command + settings) == rows  # nothing is trained or asked again
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


def test_beyond_goes_from_words_to_thoughts_and_asks_for_more(tmp_path):
    command = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "beyond")]
    command += ["--variants", "two_thoughts", "--seeds", "0", "--num_train", "16", "--num_val", "48", "--jobs", "2"]
    results = beyond.main(command + SHORT)
    assert set(results) == {"cot", "two_thoughts"}
    assert set(results["two_thoughts"][0]) == {*beyond.ASKED, "9 arrows", "10 arrows"}
    assert set(results["cot"][0]) == {"none", "9 arrows", "10 arrows"}
    config = read(tmp_path / "beyond" / "two_thoughts-0" / "config.json")
    assert (config["c_thought"], config["stage"], config["num_thoughts"]) == (2, 1, 2)
    settings = read(tmp_path / "beyond" / "two_thoughts-0" / "settings.json")
    assert settings["model_name_or_path"] == str(tmp_path / "beyond" / "cot-0")
    scores = read(tmp_path / "beyond" / "scores" / "two_thoughts-0" / "scores.json")["scores"]
    assert [row["num_thoughts"] for row in scores] == [0, 2, 4, 6, 8]
    steps = [len(json.loads(line)["steps"]) for line in (tmp_path / "data" / "train.jsonl").open()]
    assert max(steps) <= 8 < max(len(json.loads(line)["steps"]) for line in (tmp_path / "data" / "val.jsonl").open())
    assert (tmp_path / "beyond" / "beyond.png").stat().st_size > 10_000


def test_a_failed_command_is_told_with_its_reason_and_leaves_no_folder(tmp_path):
    prepare(tmp_path / "data", num_train=0, num_val=1)
    flags = ["--model", str(tmp_path / "absent"), "--data", str(tmp_path / "data" / "val.jsonl")]
    with pytest.raises(RuntimeError, match="(?s)1 of 1 commands failed.*no checkpoint can be read there"):
        runs.run_all([runs.Run(tmp_path / "out", "score.py", flags)], 1, "test")
    assert not (tmp_path / "out").exists()


def test_what_was_made_with_other_settings_is_not_taken(tmp_path):
    prepare(tmp_path / "data", num_train=0, num_val=2)
    make_start_model(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data" / "val.jsonl")]
    flags += ["--max_new_tokens", "1"]
    run = runs.Run(tmp_path / "out", "score.py", flags)
    runs.run_all([run], 1, "test")
    made = (tmp_path / "out" / "scores.json").stat().st_mtime_ns
    runs.run_all([run], 1, "test")
    assert (tmp_path / "out" / "scores.json").stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="made with other settings"):
        runs.run_all([runs.Run(tmp_path / "out", "score.py", [*flags, "--batch_size", "2"])], 1, "test")


def test_an_interruption_ends_the_commands_and_starts_no_other(tmp_path):
    """A training of hours must not go on by itself. Two commands that tell their process and then wait for ever."""
    os.mkfifo(tmp_path / "told")
    (tmp_path / "wait.py").write_text(
        f"import os, signal\nopen({str(tmp_path / 'told')!r}, 'w').write(str(os.getpid()))\nsignal.pause()\n"
    )
    names = [str(tmp_path / name) for name in ("first", "second")]
    program = "from multicoco.recipes.trails.runs import *; import sys\n"
    program += f"run_all([Run(Path(name), {str(tmp_path / 'wait.py')!r}, []) for name in {names}], 1, 'test')"
    process = subprocess.Popen([sys.executable, "-c", program])
    with open(tmp_path / "told") as told:  # opens when the first command has begun
        child = int(told.read())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"told", "wait.py", "first.log"}


def test_answers_of_beyond_are_sorted_by_thoughts_and_by_arrows(tmp_path):
    """Planted: right with the thoughts of up to 1 step, and of 2 on questions of one arrow."""
    records = [{"steps": ["A1"] * count, "answer": "red"} for count in (1, 8, 9, 10)]
    (tmp_path / "predictions").mkdir()
    for thoughts in (0, 2, 4, 6, 8):  # two thoughts a step
        right = [thoughts <= 2 or (thoughts == 4 and index == 0) for index in range(4)]
        lines = [{"num_thoughts": thoughts}]
        lines += [{"index": index, "prediction": "red" if hit else "blue"} for index, hit in enumerate(right)]
        text = "\n".join(map(json.dumps, lines))
        (tmp_path / "predictions" / f"x-{thoughts}-0.jsonl").write_text(text, encoding="utf-8")
    right = beyond.read_answers(tmp_path, records)
    assert [right[asked].tolist() for asked in (1, 2, 3)] == [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    found = beyond.columns(right, np.array([1, 8, 9, 10]))
    rates = {"none": 1, "1 less": 1, "as trained": 0.5, "1 more": 0, "2 more": 0}
    assert found == {**rates, "9 arrows": 0, "10 arrows": 0}


def test_each_variant_is_asked_around_the_number_that_it_was_trained_with(tmp_path):
    for variant, c_thought, steps, asked in (
        ("plain", 1, 2, "0 1 2 3 4"),
        ("two_thoughts", 2, 2, "0 2 4 6 8"),
        ("steps", 1, 9, "0 8 9 10 11"),
    ):
        (tmp_path / f"{variant}-0").mkdir()
        config = json.dumps({"c_thought": c_thought, "max_latent_stage": steps})
        (tmp_path / f"{variant}-0" / "config.json").write_text(config)
        flags = beyond.scoring(variant, 0, "data", tmp_path).flags
        assert flags[flags.index("--num_thoughts") + 1 :] == asked.split()
    (tmp_path / "plain-0" / "config.json").write_text('{"c_thought": 1, "max_latent_stage": 1}')
    with pytest.raises(ValueError, match="`max_latent_stage` of .*plain-0 is 1, expected at least 2"):
        beyond.scoring("plain", 0, "data", tmp_path)


def test_every_variant_names_its_settings():
    """A variant is a YAML and flags that change it: none is written twice, and the YAML is there."""
    for module in (beyond, truth):
        assert len({(name, *change) for name, change in module.VARIANTS.values()}) == len(module.VARIANTS)
        for name, change in module.VARIANTS.values():
            assert (runs.ROOT / "recipes" / "trails" / f"{name}.yaml").is_file()
            assert all(flag.startswith("--") for flag in change[::2])
    assert set(MODES) < set(truth.VARIANTS)
    flags = truth.training("pause_steps", 1, "data", runs.ROOT / "out", ["--seed", "5"]).flags
    assert [Path(flags[0]).name, *flags[3:5], *flags[-2:]] == ["coconut.yaml", "--mode", "pause", "--seed", "5"]


def test_steps_yaml_goes_through_all_stages_within_2000_steps():
    """8 stages of 60 steps of 64 boards, then 1,500 with one thought more than the longest trail has steps."""
    settings = yaml.safe_load((runs.ROOT / "recipes" / "trails" / "steps.yaml").read_text(encoding="utf-8"))
    names = {field.name for field in fields(CurriculumArguments)}
    curriculum = CurriculumArguments(**{name: value for name, value in settings.items() if name in names})
    stages = [curriculum.stage(epoch) for epoch in range(settings["num_train_epochs"])]
    steps = settings["train_weights"][0] * 16000 / settings["per_device_train_batch_size"]
    assert steps == 60
    assert {stage: round(stages.count(stage) * steps) for stage in set(stages)} == dict.fromkeys(range(1, 9), 60) | {
        beyond.MAX_TRAIN_ARROWS + 1: 1500
    }
    assert settings["step_loss_weight"] == 1
    assert settings["draw_surplus"] is True


def test_table_of_beyond_pairs_seeds():
    names = (*beyond.ASKED, "9 arrows", "10 arrows")
    plain = [dict.fromkeys(names, rate) for rate in (0.2, 0.5, 0.8)]
    better = [dict.fromkeys(names, rate) for rate in (0.3, 0.6, 0.9)]  # 10 points in each seed
    line = beyond.table({"plain": plain, "linear": better}).splitlines()[-1]
    assert line == "| linear | " + " | ".join(["60.0 (+10.0: +10.0 to +10.0)"] * 7) + " |"


def test_truth_shows_seeds_and_what_a_mode_lacks():
    base = {"num_thoughts": 5, "new_tokens": 2.0, "verdict": "used"}
    rows = [
        {"mode": "coconut", "seed": seed, "accuracy": rate, **base, **dict.fromkeys(truth.FIGURES, 0.25)}
        for seed, rate in enumerate((0.98, 1.0, 0.99))
    ]
    rows.append(
        {"mode": "cot", "seed": 0, "accuracy": 1.0, **base, "verdict": None, **dict.fromkeys(truth.FIGURES, None)}
    )
    text = truth.table(rows, ["coconut", "cot"]).splitlines()
    assert text[2].startswith("| coconut | 5 | 2.0 | 99.0% | 96.5% - 100.0% | 98.0, 100.0, 99.0 | 25.0% |")
    assert text[2].endswith("| 3 x used |")
    assert text[3] == "| cot | 5 | 2.0 | 100.0% | - | 100.0 | - | - | - | - | - | - |"
