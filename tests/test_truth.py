"""The short form of `make truth` and `make beyond`: trainings and diagnoses of seconds, and what is read of them."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from multicoco.recipes.trails import beyond, runs, truth
from multicoco.recipes.trails.prepare import prepare
from multicoco.recipes.trails.start_model import make_start_model


SHORT = ["--num_train_epochs", "1", "--warmup_steps", "1", "--lr_scheduler_type", "constant", "--use_cpu"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_truth_trains_diagnoses_and_writes_its_table(tmp_path, capsys):
    prepare(tmp_path / "data", num_train=16, num_val=12)
    folder = tmp_path / "truth"
    command = ["--data", str(tmp_path / "data"), "--output_dir", str(folder), "--modes", "coconut", "pause"]
    command += ["--seeds", "0", "--samples", "12", "--jobs", "2", *SHORT]
    settings = ["--epochs_stage_0", "0", "--max_latent_stage", "1"]
    rows = truth.main(command + settings)
    assert [(row["mode"], row["seed"], row["samples"], row["diagnosed"]) for row in rows] == [
        ("coconut", 0, 12, 12),
        ("pause", 0, 12, 12),
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
    assert set(results["two_thoughts"][0]) == {"0", "1", "2", "3", "4", "9 arrows", "10 arrows"}
    assert set(results["cot"][0]) == {"0", "9 arrows", "10 arrows"}
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
    assert found == {"0": 1, "1": 1, "2": 0.5, "3": 0, "4": 0, "9 arrows": 0, "10 arrows": 0}


def test_table_of_beyond_pairs_seeds():
    names = ("0", "1", "2", "3", "4", "9 arrows", "10 arrows")
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
