"""The speed beside every logged loss, counted again from what the model was given, by a clock that the test moves.

Opening a training sample takes one second of that clock, a training step of a batch ten; whatever else a run does
takes so long that it would be seen.
"""

import json

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from multicoco import (
    AnswerCallback,
    CurriculumArguments,
    CurriculumCallback,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    ReasoningCollator,
    StageDataset,
    load_records,
    trainer_callbacks,
)
from multicoco.recipes.trails.prepare import prepare
from multicoco.training import trainer as trainer_module
from multicoco.training.results import write_results
from multicoco.training.trainer import SPEED, StageTrainer, Throughput


NAMES = {f"{SPEED}{name}" for name in ("samples_per_second", "tokens_per_second", "tiles_per_second", "waiting")}
SAMPLE, BATCH, ASIDE = 1.0, 10.0, 1e6  # seconds of opening a sample, of a training step's batch, of anything else
# 7 records in batches of 2, 2 batches a step: 2 steps an epoch, of which the second has 2 and 1 samples.
CURRICULUM = {"c_thought": 1, "max_latent_stage": 1, "final_stage": False, "epochs_per_stage": 1, "epochs_stage_0": 2}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (trainer_module, trainer_callbacks):
        monkeypatch.setattr(module, "perf_counter", clock)
    return clock


class SlowDataset(StageDataset):
    """Opening a sample moves the clock; in a worker, one that nobody reads."""

    clock, opened = None, 0

    def __getitem__(self, index):
        self.opened += 1
        self.clock.now += SAMPLE
        return super().__getitem__(index)


class Spy(TrainerCallback):
    """For each logged loss, the entry and what the model was given since the one before; a save takes its time."""

    def __init__(self, model, dataset, clock):
        self.dataset, self.clock = dataset, clock
        self.begin()
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def begin(self):
        self.samples = self.tokens = self.tiles = self.batches = 0
        self.opened = self.dataset.opened

    def see(self, model, args, kwargs):
        if not model.training:
            self.clock.now += ASIDE
            return
        self.clock.now += BATCH
        self.batches += 1
        self.samples += kwargs["input_ids"].shape[0]
        self.tokens += sum(map(sum, kwargs["attention_mask"].tolist()))
        self.tiles += sum(kwargs.get("num_patches_list") or [])

    def on_train_begin(self, *args, **kwargs):
        self.entries, self.expected = [], []
        self.begin()

    def on_save(self, *args, **kwargs):
        self.clock.now += ASIDE

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            waited = (self.dataset.opened - self.opened) * SAMPLE
            seconds = waited + self.batches * BATCH
            counts = (self.samples, self.tokens, self.tiles)
            self.entries.append({**logs, "step": state.global_step})
            self.expected.append([*(count / seconds for count in counts), waited / seconds])
            self.begin()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Boards with one picture, none and two, so that tiles and tokens differ."""
    folder = tmp_path_factory.mktemp("throughput") / "trails"
    prepare(folder, num_train=7, num_val=3)
    train, val = (load_records(folder / f"{split}.jsonl") for split in ("train", "val"))
    for index, record in enumerate(train):
        record["images"] = record["images"] * (index % 3)
    return train, val


@pytest.fixture
def make(trails_start, records, clock, tmp_path):
    """A trainer that answers after every epoch, and its spy."""

    def make(answers=True, images=True, **settings):
        curriculum = CurriculumArguments(**CURRICULUM)
        processor = MultiCoCoProcessor.from_pretrained(trails_start)
        train, val = records
        train = train if images else [{**record, "images": []} for record in train]
        dataset, asked = SlowDataset(train, processor, curriculum), StageDataset(val, processor, curriculum)
        dataset.clock = clock
        model = MultiCoCoForConditionalGeneration.from_pretrained(trails_start)
        spy = Spy(model, dataset, clock)
        collator = ReasoningCollator(processor)
        answer = AnswerCallback(curriculum, asked, collator, lambda tokens, index: True, every="epoch")
        values = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": curriculum.num_epochs,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        trainer = StageTrainer(
            model,
            TrainingArguments(**{**values, **settings}),
            collator,
            dataset,
            asked,
            curriculum=curriculum,
            callbacks=[CurriculumCallback(curriculum, dataset), *([answer] if answers else []), spy],
        )
        return trainer, spy

    return make


def assert_as_expected(trainer, spy, steps):
    kept = [entry for entry in trainer.state.log_history if NAMES & entry.keys()]
    assert [entry["step"] for entry in kept] == steps
    assert [entry["step"] for entry in spy.entries] == steps
    assert all(("loss" in entry) == (entry.keys() >= NAMES) for entry in trainer.state.log_history)
    for entry, expected in zip(spy.entries, spy.expected, strict=True):
        values = [entry[f"{SPEED}{name}_per_second"] for name in ("samples", "tokens", "tiles")]
        assert [*values, entry[f"{SPEED}waiting"]] == pytest.approx(expected, rel=1e-9, abs=0)
        assert 0 <= entry[f"{SPEED}waiting"] <= 1


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_steps": 1}, [1, 2, 3, 4, 5, 6]),
        ({"logging_steps": 4}, [2, 4, 6]),  # at the end of an epoch the answers are logged, with the loss
        ({"logging_steps": 4, "answers": False}, [4]),
        ({"logging_strategy": "epoch", "answers": False}, [2, 4, 6]),
        ({"logging_steps": 1, "dataloader_num_workers": 2}, [1, 2, 3, 4, 5, 6]),
        ({"logging_steps": 1, "images": False}, [1, 2, 3, 4, 5, 6]),
    ],
    ids=["each step", "answers between", "across epochs", "each epoch", "workers", "text only"],
)
def test_what_is_logged_is_what_the_model_was_given(make, settings, steps):
    trainer, spy = make(**settings)
    trainer.train()
    assert_as_expected(trainer, spy, steps)
    rates = [entry[f"{SPEED}tiles_per_second"] for entry in spy.entries]
    assert all(rate > 0 for rate in rates) if settings.get("images", True) else not any(rates)


def test_evaluation_saving_and_answers_take_no_time_of_training(make):
    # A save after step 3 and an evaluation after 5, where no log has stopped the clock.
    trainer, spy = make(logging_steps=4, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=3)
    trainer.train()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    assert any("eval/accuracy" in entry for entry in trainer.state.log_history)
    assert_as_expected(trainer, spy, [2, 4, 6])


def test_a_resumed_run_counts_only_its_own_steps(make, tmp_path):
    settings = {"logging_steps": 5, "answers": False, "save_strategy": "steps", "save_steps": 3}
    make(**settings)[0].train()
    trainer, spy = make(**settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert_as_expected(trainer, spy, [5])  # of steps 4 and 5


def test_a_second_run_of_a_trainer_counts_only_its_own_steps(make):
    trainer, spy = make(logging_steps=4, answers=False)
    trainer.train()  # leaves steps 5 and 6, which were not logged
    trainer.train()
    assert_as_expected(trainer, spy, [4])


def test_results_do_not_tell_the_time_that_a_run_took(make, tmp_path):
    trainer, _ = make()
    trainer.train()
    write_results(trainer.state.log_history, tmp_path)
    (first, *_) = json.loads((tmp_path / "results.json").read_text())
    assert {"loss", "eval/accuracy"} <= first.keys()
    assert not NAMES & first.keys()


def test_counting_reads_nothing_from_the_device():
    """A meta tensor has no value to read, so whoever reads one raises."""
    mask = torch.ones(2, 5, dtype=torch.long, device="meta")
    batch = {"labels": mask, "attention_mask": mask, "pixel_values": torch.empty(3, 3, 4, 4, device="meta")}
    throughput = Throughput()
    throughput.start()
    assert list(throughput.counted(iter([batch, batch]))) == [batch, batch]
    throughput.stop()
    assert (throughput.samples, throughput.tiles) == (4, 6)
    with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
        throughput.rates(torch.device("cpu"))


def test_without_a_mask_all_tokens_are_real_and_without_a_step_nothing_is_logged(clock):
    throughput = Throughput()
    throughput.start()
    for _ in throughput.counted(iter([{"labels": torch.zeros(2, 5)}])):
        clock.now += 4
    rates = {"samples_per_second": 0.5, "tokens_per_second": 2.5, "tiles_per_second": 0, "waiting": 0}
    found = throughput.rates(torch.device("cpu"))
    assert found == {f"{SPEED}{name}": value for name, value in rates.items()}
    assert throughput.rates(torch.device("cpu")) == {}
