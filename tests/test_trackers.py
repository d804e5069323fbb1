"""What wandb, trackio and TensorBoard receive of a run: stages, thoughts, accuracies, sample answers as a table."""

import json
import sqlite3

import pytest
import yaml

from multicoco import train
from multicoco.recipes.trails.prepare import prepare


# trackio asks for another Pillow than ours, so that is tried by hand (0.43.0).
REASON = "needs the package {name} (`pip install {name}`); `make test-extras` has tensorboard and wandb"


@pytest.fixture
def run(tmp_path, trails_start, monkeypatch):
    """Trains two stages with a tracker; returns the records that are answered."""

    def train_with(tracker):
        pytest.importorskip(tracker, reason=REASON.format(name=tracker))
        prepare(tmp_path / "trails", num_train=16, num_val=3)
        settings = {
            "model_name_or_path": str(trails_start),
            "train_file": str(tmp_path / "trails" / "train.jsonl"),
            "eval_file": str(tmp_path / "trails" / "val.jsonl"),
            "output_dir": str(tmp_path / "out"),
            "max_latent_stage": 1,
            "final_stage": False,
            "epochs_per_stage": 1,
            "report_to": tracker,
            "run_name": "stages",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        monkeypatch.chdir(tmp_path)
        trainer = train.main([str(tmp_path / "run.yaml")])
        lines = (tmp_path / "trails" / "val.jsonl").read_text().splitlines()
        return trainer, [json.loads(line) for line in lines]

    return train_with


def test_tensorboard_shows_stages_and_answers(run, tmp_path):
    trainer, asked = run("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (tmp_path / "out").rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert {event.value for event in events.Scalars("train/curriculum/stage")} == {0, 1}
    assert {event.value for event in events.Scalars("train/curriculum/num_thoughts")} == {0, 2}
    logged = [entry["eval/accuracy"] for entry in trainer.state.log_history if "eval/accuracy" in entry]
    assert [event.value for event in events.Scalars("train/eval/accuracy")] == pytest.approx(logged)
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("eval/answers/text_summary")]
    assert len(texts) == len(logged) == 2
    for record in asked:
        assert f"| {record['id']} | {record['question']} | {record['answer']} |" in texts[-1]


def test_wandb_has_a_table_of_answers(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    _, asked = run("wandb")
    import wandb

    try:
        summary = dict(wandb.run.summary)
        assert (summary["train/curriculum/stage"], summary["train/curriculum/num_thoughts"]) == (1, 2)
        assert 0 <= summary["train/eval/accuracy"] <= 1
    finally:
        wandb.finish()
    tables = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("answers*.table.json"))]
    assert len(tables) == 2
    assert [row[:3] for row in tables[-1]["data"]] == [[one["id"], one["question"], one["answer"]] for one in asked]


def test_trackio_has_a_table_of_answers(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    _, asked = run("trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        kept = " ".join(str(row) for table in ("metrics",) for row in connection.execute(f"select * from {table}"))
    assert "curriculum/stage" in kept
    assert all(one["question"] in kept for one in asked)
