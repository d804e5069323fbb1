"""The callbacks in the stock `Trainer`: stages, moments, saved budgets, resuming bit for bit, answers, marks."""

import copy
import json
from pathlib import Path

import pytest
import torch
from reference import reference_step_losses
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainerState, TrainingArguments

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor
from multicoco.configuration_multicoco import BLOCK_MODES, MODES
from multicoco.curriculum import CurriculumArguments
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.processing_multicoco import thought_block
from multicoco.recipes.trails.prepare import prepare
from multicoco.records import load_records
from multicoco.trainer_callbacks import (
    AnswerCallback,
    CompletionCallback,
    CurriculumCallback,
    check_resumed,
    global_batch_size,
    identity,
    last_complete_checkpoint,
)


# 20 boards in batches of 4: 5 steps an epoch. Epochs are at stages 0 0 1 2, so steps 10 and 15 end a stage.
STAGES = [0] * 10 + [1] * 5 + [2] * 5
CURRICULUM = {"c_thought": 1, "max_latent_stage": 2, "final_stage": False, "epochs_per_stage": 1, "epochs_stage_0": 2}


@pytest.fixture(scope="module")
def trails_processor(trails_start):
    return MultiCoCoProcessor.from_pretrained(trails_start)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "trails"
    prepare(folder, num_train=20, num_val=7)
    return {split: load_records(folder / f"{split}.jsonl") for split in ("train", "val")}


class Spy(TrainerCallback):
    """What every step saw: latent tokens and ids of its batch, and how many updates Adam's moments hold after it."""

    def __init__(self, model, latent_id):
        self.batches, self.latents, self.updates, self.trains = [], [], [], []
        self.latent_id = latent_id
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, model, args, kwargs):
        if model.training and kwargs.get("labels") is not None:
            self.batches.append(kwargs["input_ids"].tolist())
            self.latents.append(int((kwargs["input_ids"] == self.latent_id).sum(1).max()))

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.updates.append({int(value["step"]) for value in optimizer.state.values()})
        self.trains.append(model.training)


@pytest.fixture
def run(trails_start, data, trails_processor, tmp_path):
    """Trains on the 20 boards; returns the trainer and its spy."""

    def train(
        resume=None,
        callbacks=None,
        settings=None,
        split="train",
        allow_changed=(),
        prepare=lambda trainer: None,
        **curriculum,
    ):
        curriculum = CurriculumArguments(**{**CURRICULUM, **curriculum})
        dataset = StageDataset(data[split], trails_processor, curriculum, seed=1)
        model = MultiCoCoForConditionalGeneration.from_pretrained(trails_start)
        spy = Spy(model, model.config.latent_token_id)
        values = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "num_train_epochs": curriculum.num_epochs,
            "logging_steps": 1,
            "save_strategy": "no",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        extra = callbacks(model, dataset, curriculum) if callbacks else []
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**{**values, **(settings or {})}),
            train_dataset=dataset,
            data_collator=ReasoningCollator(trails_processor),
            processing_class=trails_processor,
            callbacks=[
                CurriculumCallback(curriculum, dataset, allow_changed=allow_changed),
                CompletionCallback(),
                *extra,
                spy,
            ],
        )
        prepare(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, spy

    return train


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def assert_same_weights(model, other):
    for (name, param), value in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(param, value), name


def test_every_step_sees_its_stage_and_every_checkpoint_says_it(run, tmp_path):
    trainer, spy = run(settings={"save_strategy": "steps", "save_steps": 5})
    assert spy.latents == STAGES
    logged = [entry["curriculum/stage"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == STAGES
    for step in (5, 10, 15, 20):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        config, stage = MultiCoCoConfig.from_pretrained(checkpoint), STAGES[step - 1]
        assert (config.stage, config.num_thoughts, config.mode) == (stage, stage, "coconut")
        processor = MultiCoCoProcessor.from_pretrained(checkpoint)
        assert processor.num_thoughts == stage
        for writer in (processor, AutoTokenizer.from_pretrained(checkpoint)):  # each template has the number
            text = writer.apply_chat_template(
                [{"role": "user", "content": "Why?"}], add_generation_prompt=True, tokenize=False
            )
            assert text.endswith(thought_block(stage))


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        ("stage", [*range(1, 11), *range(1, 6), *range(1, 6)]),
        ("epoch", [*range(1, 6)] * 4),
        ("never", [*range(1, 21)]),
    ],
    ids=["stage", "epoch", "never"],
)
def test_moments_are_cleared_when_asked_and_only_then(run, every, expected):
    _, spy = run(reset_optimizer_every=every)
    assert spy.updates == [{count} for count in expected]


def test_after_a_clearing_no_moment_is_left(run):
    class Look(TrainerCallback):
        cleared = []

        def on_epoch_begin(self, args, state, control, optimizer=None, **kwargs):
            values = [value for entry in optimizer.state.values() for value in entry.values()]
            self.cleared.append(all(not value.any() for value in values))

    run(callbacks=lambda *_: [Look()])
    assert Look.cleared == [True, False, True, True]  # before the first step there is none


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_trains_and_is_saved(run, tmp_path, mode):
    trainer, spy = run(mode=mode, epochs_stage_0=0, settings={"max_steps": 2})
    trainer.save_model(tmp_path / "saved")
    config = MultiCoCoConfig.from_pretrained(tmp_path / "saved")
    has_thoughts = mode in BLOCK_MODES
    assert spy.latents == [int(has_thoughts)] * 2
    assert (config.mode, config.stage) == (mode, 0 if mode in ("cot", "no_cot") else 1)
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses(trainer).values())


def test_removing_unused_columns_is_refused(run):
    with pytest.raises(ValueError, match="remove_unused_columns"):
        run(settings={"remove_unused_columns": True})


@pytest.mark.parametrize("workers", [0, 2], ids=["no_workers", "two_workers"])
def test_resuming_continues_stages_batches_and_losses_bit_for_bit(run, tmp_path, workers):
    settings = {"save_strategy": "steps", "save_steps": 3, "dataloader_num_workers": workers, "seed": 3}
    settings["dataloader_persistent_workers"] = workers > 0
    curriculum = {"mix": "linear", "draw_surplus": True, "step_loss_weight": 1.0}
    whole, spy = run(settings=settings, **curriculum)
    for step in (12, 15):  # in the middle of stage 1, and at its end
        again, rest = run(f"{tmp_path}/out/checkpoint-{step}", settings=settings, **curriculum)
        assert rest.batches == spy.batches[step:]
        assert rest.updates == spy.updates[step:]
        assert losses(again) == losses(whole)
        assert_same_weights(again.model, whole.model)


def test_the_same_seed_repeats_and_another_does_not(run):
    settings = {"max_steps": 12}
    first, again, other = (run(settings={**settings, "seed": seed})[0] for seed in (1, 1, 2))
    assert losses(first) == losses(again)
    assert_same_weights(first.model, again.model)
    assert losses(first) != losses(other)


def test_accumulated_gradients_are_those_of_the_large_batch(run):
    settings = {"max_steps": 6, "max_grad_norm": 0.0, "learning_rate": 1e-2, "optim": "sgd"}
    runs = [
        run(
            epochs_stage_0=1,
            settings={**settings, "per_device_train_batch_size": size, "gradient_accumulation_steps": k},
        )
        for size, k in ((8, 1), (1, 8))
    ]
    (large, _), (small, _) = runs
    assert losses(small) == pytest.approx(losses(large), rel=1e-5)
    for (name, param), value in zip(small.model.named_parameters(), large.model.parameters(), strict=True):
        assert torch.allclose(param, value, rtol=1e-4, atol=1e-6), name


class Noted(TrainerCallback):
    """What the model was trained on; it also answers each batch, as an evaluation does, which is not to be logged."""

    def __init__(self, model):
        self.batches = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, args, kwargs):
        if model.training:
            self.batches.append({name: copy.deepcopy(kwargs[name]) for name in BATCH})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.eval()
        with torch.no_grad():
            model(**self.batches[0])
            model(**self.batches[-1])
        model.train()


BATCH = ("input_ids", "attention_mask", "labels", "pixel_values", "num_patches_list", "step_ids")


def test_the_log_has_the_mean_step_loss_of_the_samples_that_have_one(run, data, trails_processor):
    """Two steps of two batches of five are an epoch and a log: one at stage 0, one at stages 0 and 1 mixed."""
    noted = []
    settings = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 4}
    trainer, _ = run(
        callbacks=lambda model, *_: noted.append(Noted(model)) or noted,
        settings=settings | {"learning_rate": 0.0},
        **{"mix": "linear", "epochs_stage_0": 1, "step_loss_weight": 0.3},
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["curriculum/stage"] for entry in logs] == [0, 1]
    assert "step_loss" not in logs[0]
    model, total, count = trainer.model.double(), 0.0, 0
    assert model.config.step_loss_weight == 0.3
    for batch in noted[0].batches[4:]:
        has_texts = (batch["step_ids"] != -100).flatten(1).any(dim=1)
        num_labels = (batch["labels"][:, 1:] != -100).sum(dim=1)
        batch |= {"images": [(tiles,) for tiles in batch["num_patches_list"]]}
        batch["pixel_values"] = batch["pixel_values"].double()
        with torch.no_grad():
            total += reference_step_losses(model, batch)[1] * num_labels.sum()
        count += int((num_labels * has_texts).sum())
        assert 0 < has_texts.sum()
    assert logs[1]["step_loss"] == pytest.approx(float(total / count), rel=1e-5)
    assert count < sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in noted[0].batches[4:])

    assert not trainer.model._forward_hooks
    val = StageDataset(data["val"], trails_processor, trainer.train_dataset.curriculum)
    val.set_stage(2)
    trainer.model.float()
    result = trainer.predict(val)
    assert "step_loss" in trainer.model(**trainer.data_collator([val[0]]))
    logits, features = result.predictions  # and no step loss
    assert logits.shape[::2] == (7, model.config.text_config.vocab_size)
    assert features.ndim == 3
    assert result.metrics["test_loss"] > 0


def test_after_an_interrupted_run_the_log_is_of_the_new_one(data, trails_start, trails_processor, tmp_path):
    """`on_train_end` did not come: what the first run counted is forgotten, and the second model is looked at."""
    curriculum = CurriculumArguments(**CURRICULUM, step_loss_weight=1.0)
    dataset = StageDataset(data["train"], trails_processor, curriculum)
    callback = CurriculumCallback(curriculum, dataset)
    arguments = TrainingArguments(output_dir=str(tmp_path), remove_unused_columns=False, use_cpu=True)
    state, losses, models = TrainerState(epoch=3.0), [], []
    for _ in range(2):
        model = MultiCoCoForConditionalGeneration.from_pretrained(trails_start).train()
        callback.on_train_begin(arguments, state, None, model=model)
        batch = ReasoningCollator(trails_processor)([dataset[index + len(losses)] for index in range(2)])
        losses.append(float(model(**batch).step_loss.detach()))
        models.append(model)
    logs = {"loss": 1.0}
    state.log_history = [logs]
    callback.on_log(arguments, state, None, logs=logs, model=model)
    assert logs["step_loss"] == pytest.approx(losses[1]) != pytest.approx(losses[0])
    del batch["step_ids"]  # as a collator of one's own may
    with pytest.raises(ValueError, match="no `step_ids`, but `--step_loss_weight` is 1.0.*`ReasoningCollator`"):
        model(**batch)
    callback.on_train_end(arguments, state, None, model=model)
    assert not any(model._forward_hooks for model in models)


def answers(data, processor, asked, **settings):
    """An `AnswerCallback` whose judge notes each sample, and says that every third is right."""

    def make(model, dataset, curriculum):
        val = StageDataset(data["val"], processor, curriculum)

        def is_correct(tokens, index):
            asked.append(index)
            return index % 3 == 0

        return [AnswerCallback(curriculum, val, ReasoningCollator(processor), is_correct, batch_size=3, **settings)]

    return make


def rows(trainer):
    return [entry for entry in trainer.state.log_history if "eval/accuracy" in entry]


@pytest.mark.parametrize(
    ("every", "steps"), [("stage", [10, 15, 20]), ("epoch", [5, 10, 15, 20]), ("end", [20])], ids=str
)
def test_each_sample_is_asked_once_when_asked_for(run, data, trails_processor, every, steps):
    asked = []
    trainer, spy = run(callbacks=answers(data, trails_processor, asked, every=every), settings={"logging_steps": 7})
    assert asked == [*range(7)] * len(steps)  # 7 samples in batches of 3
    assert [row["step"] for row in rows(trainer)] == steps
    assert [row["eval/stage"] for row in rows(trainer)] == [STAGES[step - 1] for step in steps]
    assert {row["eval/accuracy"] for row in rows(trainer)} == {3 / 7}
    assert {row["eval/samples"] for row in rows(trainer)} == {7}
    assert all(spy.trains)


def test_a_checkpoint_at_the_end_of_a_stage_has_its_answers(run, data, trails_processor, tmp_path):
    run(
        callbacks=answers(data, trails_processor, []),
        settings={"save_strategy": "steps", "save_steps": 5, "max_steps": 16},
    )
    for step, expected in ((5, []), (10, [0]), (15, [0, 1])):
        state = json.loads((tmp_path / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert [row["eval/stage"] for row in state["log_history"] if "eval/stage" in row] == expected


CHANGES = {
    "seed": (dict(settings={"seed": 7}), "seed"),
    "batch": (dict(settings={"per_device_train_batch_size": 2}), None),
    "accumulation": (dict(settings={"gradient_accumulation_steps": 2}), None),
    "rate": (dict(settings={"learning_rate": 5e-4}), None),
    "optimizer": (dict(settings={"optim": "adafactor"}), None),
    "mode": (dict(mode="pause"), None),
    "mix": (dict(mix="linear"), "mix"),
    "stages": (dict(epochs_per_stage=2), "epochs_per_stage"),
    "data": (dict(split="val"), "train_file"),
}


@pytest.mark.parametrize(("change", "free"), CHANGES.values(), ids=CHANGES)
def test_a_run_is_resumed_as_itself_or_refused(run, data, tmp_path, change, free):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    run(settings=settings)
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    change = {**change, "settings": {**settings, "max_steps": 4, **change.get("settings", {})}}
    name = next(iter({**change["settings"], **change}.keys() - {*settings, "settings", "split"}), "train_file")
    name = {
        "per_device_train_batch_size": "global_batch_size",
        "gradient_accumulation_steps": "global_batch_size",
    }.get(name, name)
    cure = f"`--allow_changed {free}`" if free else "begin a new run"
    with pytest.raises(ValueError, match=f"of another run: `{name}` was .*{cure}") as error:
        run(resume=checkpoint, **change)
    assert ("--allow_changed" in str(error.value)) == (free is not None)
    if free:
        trainer, _ = run(resume=checkpoint, allow_changed=[free], **change)
        assert trainer.state.global_step == 4


def test_a_run_that_is_made_longer_says_so(run, tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    run(settings=settings)
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    run(settings={**settings, "max_steps": 4}, resume=checkpoint)
    assert "of a run of 3 steps, this one has 4" in caplog.text


def test_a_step_has_the_samples_of_all_ranks_unless_they_share_a_batch(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=6, gradient_accumulation_steps=2, use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "world_size", 3)  # as on three ranks
    assert global_batch_size(args, TrainerState()) == 36
    args.accelerator_config.split_batches = True
    assert global_batch_size(args, TrainerState()) == 12
    args.auto_find_batch_size = True
    assert global_batch_size(args, TrainerState(train_batch_size=3)) == 6


@pytest.mark.parametrize(
    ("setting", "before", "now"),
    [
        ("label_smoothing_factor", 0.0, 0.1),
        ("train_sampling_strategy", "random", "group_by_length"),
        ("dataloader_drop_last", False, True),
        ("neftune_noise_alpha", None, 5.0),
        ("optim_args", None, "amsgrad=True"),
        ("thought_sweeps", None, 2),
        ("thought_feedback", "identity", "rms_match"),
    ],
)
def test_what_else_makes_a_run_another_one_is_its_identity(tmp_path, setting, before, now):
    """It went on with the new one, half a run each."""
    found = []
    for value in (before, before, now):
        model = torch.nn.Module()
        model.config = MultiCoCoConfig(**({setting: value} if setting.startswith("thought") else {}))
        settings = {} if setting.startswith("thought") else {setting: value}
        args = TrainingArguments(str(tmp_path), use_cpu=True, **settings)
        found.append(json.loads(json.dumps(identity(CurriculumArguments(), [], args, TrainerState(), model))))
    first, same, other = found
    check_resumed(first, same, ())
    with pytest.raises(ValueError, match=f"of another run: `{setting}` was {before}, is {now}"):
        check_resumed(first, other, ())


def test_an_optimizer_that_averages_gives_the_mean_at_the_end_of_a_run():
    """Without an evaluation data set the model was saved as it is trained, not as it is to be used."""

    class Averaging(torch.optim.SGD):
        is_mean = False

        def eval(self):
            self.is_mean = True

    optimizer, callback = Averaging([torch.nn.Parameter(torch.zeros(1))]), CurriculumCallback(CurriculumArguments())
    for step, is_mean in ((2, False), (3, True)):
        callback.on_step_end(None, TrainerState(global_step=step, max_steps=3), None, optimizer=optimizer)
        assert optimizer.is_mean == is_mean


def test_only_what_can_go_on_otherwise_may_be_allowed_to():
    with pytest.raises(ValueError, match=r"`allow_changed` has \['mode', 'optim'\]"):
        CurriculumCallback(CurriculumArguments(), allow_changed=["mode", "seed", "optim", "epochs_per_stage"])


def test_a_run_told_to_stop_leaves_a_whole_checkpoint_to_go_on_from(run, tmp_path):
    """SIGTERM is acted on some seconds later, so the request is made as its handler would make it."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                jit = next(one for one in self.trainer.callback_handler.callbacks if hasattr(one, "jit_manager"))
                jit.jit_manager.is_checkpoint_requested = True

    settings = {"save_strategy": "no", "enable_jit_checkpoint": True}
    whole, _ = run(settings={**settings, "enable_jit_checkpoint": False, "output_dir": str(tmp_path / "whole")})
    stop = Stop()

    def add(model, dataset, curriculum):
        return [stop]

    def prepare_trainer(trainer):
        stop.trainer = trainer

    stopped, _ = run(settings=settings, callbacks=add, prepare=prepare_trainer)
    assert stopped.state.global_step == 5  # transformers saves before the next step, takes that, and stops
    assert [callback.was_stopped for callback in callbacks_of(stopped, CompletionCallback)] == [True]
    checkpoint = last_complete_checkpoint(tmp_path / "out")
    assert Path(checkpoint).name == "checkpoint-4"
    resumed, _ = run(settings=settings, resume=checkpoint)
    assert [callback.was_stopped for callback in callbacks_of(resumed, CompletionCallback)] == [False]
    assert_same_weights(resumed.model, whole.model)


def callbacks_of(trainer, kind):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]


def test_only_a_marked_checkpoint_is_resumed_from(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    for step, is_complete in ((9, True), (30, False), (100, True), (200, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if is_complete:
            (folder / "complete").touch()
    assert Path(last_complete_checkpoint(tmp_path)).name == "checkpoint-100"


def test_a_checkpoint_that_will_be_written_again_loses_its_mark(run, tmp_path):
    stale = tmp_path / "out" / "checkpoint-400"
    stale.mkdir(parents=True)
    (stale / "complete").touch()
    run(settings={"save_strategy": "steps", "save_steps": 2, "max_steps": 3})
    assert Path(last_complete_checkpoint(tmp_path / "out")).name == "checkpoint-3"


def test_a_checkpoint_without_its_mark_is_deleted_before_one_with_it(run, tmp_path):
    """As after a resume from an older checkpoint by hand: the later one is the newer folder, but worth nothing."""
    run(settings={"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "save_total_limit": 2})
    stale = tmp_path / "out" / "checkpoint-400"
    stale.mkdir()
    whole = str(tmp_path / "out" / "checkpoint-2")
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 2}
    run(settings=settings, resume=whole)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_single_checkpoint_is_refused(run):
    with pytest.raises(ValueError, match="save_total_limit"):
        run(settings={"save_total_limit": 1})
