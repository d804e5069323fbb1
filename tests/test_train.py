"""`train.py`: settings, modes, frozen parts, adapters, results. Kills and launchers have files of their own."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import CHECKPOINT
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.utils import logging

from multicoco import CurriculumArguments, MultiCoCoConfig, MultiCoCoForConditionalGeneration, train
from multicoco.evaluation.settings import find_settings, make_parser
from multicoco.recipes.trails import compare, show
from multicoco.recipes.trails.prepare import prepare
from multicoco.recipes.trails.start_model import make_start_model
from multicoco.score import ScoreArguments
from multicoco.trainer_callbacks import last_complete_checkpoint
from multicoco.training.arguments import parse
from multicoco.training.trainer import SPEED, CoconutArguments, StageTrainer


ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Boards, a start model, and `settings.yaml`: 24 boards in batches of 8, so 3 steps an epoch; stages 0 0 1 2."""
    folder = tmp_path_factory.mktemp("train")
    prepare(folder / "trails", num_train=24, num_val=7)
    make_start_model(folder / "start")
    settings = {
        "model_name_or_path": str(folder / "start"),
        "train_file": str(folder / "trails" / "train.jsonl"),
        "eval_file": str(folder / "trails" / "val.jsonl"),
        "output_dir": str(folder / "out"),
        "c_thought": 1,
        "max_latent_stage": 2,
        "final_stage": False,
        "epochs_stage_0": 2,
        "epochs_per_stage": 1,
        "mix": "linear",
        "restart_schedule": True,
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "answer_batch_size": 3,
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return folder


def start_process(arguments):
    threads = {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **threads},
    )


def history(output_dir):
    """Of a run's log all that does not depend on the time it took."""
    log = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    return [
        {name: value for name, value in entry.items() if not name.startswith(SPEED)}
        for entry in log
        if "loss" in entry
    ]


def is_picture(path):
    with Image.open(path) as image:
        return image.format == "PNG" and np.asarray(image.convert("L")).std() > 10


def run_here(folder, name, *flags):
    train.main([str(folder / "settings.yaml"), "--output_dir", str(folder / name), *map(str, flags)])
    return folder / name


@pytest.fixture(scope="module")
def whole(folder):
    """The run of one process without an interruption."""
    return run_here(folder, "whole")


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write(name, settings):
        text = json.dumps(settings) if name.endswith(".json") else yaml.safe_dump(settings)
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


NEEDED = {"model_name_or_path": "some/model", "train_file": "some.jsonl"}


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.json"])
def test_flags_win_over_the_file_and_each_setting_tells_its_source(write, name):
    path = write(name, {**NEEDED, "learning_rate": 1e-3, "final_stage": True, "seed": 5, "bf16": None})
    model, data, curriculum, args, sources = parse(
        None, [path, "--seed=7", "--no_final_stage", "--weight-decay", "0.5"]
    )
    assert (model.model_name_or_path, data.train_file) == ("some/model", ["some.jsonl"])
    assert (args.learning_rate, args.seed, args.weight_decay, curriculum.final_stage) == (1e-3, 7, 0.5, False)
    assert args.bf16 is False
    assert sources["learning_rate"] == path
    assert {sources[key] for key in ("seed", "final_stage", "weight_decay")} == {"command line"}
    assert "c_thought" not in sources


def test_bools_lists_and_objects_are_read_from_the_file(write):
    settings = {"restart_schedule": True, "pad_latent_to_max": False, "report_to": ["none"], "label_names": ["a", "b"]}
    path = write("a.yaml", {**NEEDED, **settings, "column_mapping": {"steps": "rationale"}})
    _, data, curriculum, args, _ = parse(None, [path])
    assert (curriculum.restart_schedule, curriculum.pad_latent_to_max) == (True, False)
    assert args.label_names == ["a", "b"]
    assert json.loads(data.column_mapping) == {"steps": "rationale"}


def test_a_number_inside_an_object_needs_no_point(tmp_path):
    """YAML takes 1e-7 for a text; that of a flag is read as a number, that of an object was not."""
    (tmp_path / "a.yaml").write_text(
        "model_name_or_path: some/model\ntrain_file: some.jsonl\nlearning_rate: 1e-3\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7, text: 1e-7 a}\n"
    )
    args = parse(None, [str(tmp_path / "a.yaml")]).training
    assert (args.learning_rate, args.lr_scheduler_kwargs) == (1e-3, {"min_lr": 1e-7, "text": "1e-7 a"})


@pytest.mark.parametrize(("flag", "value"), [("max_steps", "0"), ("num_train_epochs", "0")])
def test_a_run_of_no_step_is_refused(write, flag, value):
    """It ended with "max() arg is an empty sequence"."""
    with pytest.raises(ValueError, match=f"`--{flag}` is 0.*nothing would be trained"):
        parse(None, [write("a.yaml", NEEDED), f"--{flag}", value])


def test_the_file_may_stand_behind_a_switch_and_a_flag_may_take_a_file(write):
    path = write("a.yaml", NEEDED)
    model, data, _, args, _ = parse(None, ["--skip_bad_records", path, "--train_file", "other.json"])
    assert (data.skip_bad_records, data.train_file) == (True, ["other.json"])


def test_epochs_are_those_of_the_curriculum_unless_given(write):
    path = write("a.yaml", {**NEEDED, "epochs_stage_0": 4, "epochs_per_stage": 2, "max_latent_stage": 3})
    assert parse(None, [path])[3].num_train_epochs == 4 + 2 * (3 + 1)
    assert parse(None, [path, "--num_train_epochs", "1"])[3].num_train_epochs == 1


def test_an_unknown_key_is_refused_by_name(write):
    with pytest.raises(ValueError, match="no_such_setting"):
        parse(None, [write("a.yaml", {**NEEDED, "no_such_setting": 1})])


def test_two_files_are_refused(write):
    with pytest.raises(ValueError, match="one settings file"):
        parse(None, [write("a.yaml", NEEDED), write("b.json", NEEDED)])


def test_a_value_that_ends_like_a_settings_file_is_a_value(write, tmp_path):
    """Behind a flag with several values only a file that is there is one of settings: a checkpoint is a folder."""
    settings = write("a.yaml", {"data": "some.jsonl", "seed": 5})
    parser = make_parser(ScoreArguments, description=None)
    (tmp_path / "out_x.yaml").mkdir()
    folder = str(tmp_path / "out_x.yaml")
    words, sources = find_settings(parser, ["--model", "mt", folder, "--data", "b.json"])
    assert words == ["--model", "mt", folder, "--data", "b.json"]
    assert sources == {"model": "command line", "data": "command line"}
    words, sources = find_settings(parser, ["--num_thoughts", "0", "2", settings, "--predictions_to", "c.json"])
    assert words == ["--data", "some.jsonl", "--seed", "5", "--num_thoughts", "0", "2", "--predictions_to", "c.json"]
    assert sources["data"] == settings


def test_a_control_takes_no_feedback_of_states(write):
    """It was replaced by the control's in silence."""
    with pytest.raises(ValueError, match="`--mode pause` feeds constants"):
        parse(None, [write("a.yaml", {**NEEDED, "mode": "pause", "thought_feedback": "rms_match"})])


def test_a_setting_of_adapters_without_adapters_is_refused(write):
    """The whole model was trained instead; and of a frozen language model the adapters."""
    path = write("a.yaml", NEEDED)
    for flags in (["--lora_alpha", "8"], ["--lora_embeddings", "rows"]):
        with pytest.raises(ValueError, match=rf"`{flags[0]}` is about adapters, but `--lora_rank` is 0"):
            parse(None, [path, *flags])
    pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")
    with pytest.raises(ValueError, match="`--freeze_llm` keeps the language model"):
        parse(None, [path, "--freeze_llm", "--lora_rank", "2"])


def test_a_dry_run_makes_no_repository_and_false_is_no_checkpoint(write):
    settings = {"dry_run": True, "push_to_hub": True, "resume_from_checkpoint": False}
    args = parse(None, [write("a.yaml", {**NEEDED, **settings})]).training
    assert not args.push_to_hub
    assert args.resume_from_checkpoint is None


class Noted(TrainerCallback):
    pass


def make_trainer(tmp_path, restart_schedule=False, optimizers=(None, None), deepspeed=None, **settings):
    args = CoconutArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    if deepspeed is not None:
        args.hf_deepspeed_config = SimpleNamespace(config=deepspeed)
    curriculum = CurriculumArguments(restart_schedule=restart_schedule)
    trainer = StageTrainer(torch.nn.Linear(1, 1), args, curriculum=curriculum, optimizers=optimizers)
    trainer.steps_per_epoch = 2
    return trainer


def test_rates_that_would_be_ignored_are_refused(tmp_path):
    """Each was, in silence."""
    weights = [torch.nn.Parameter(torch.zeros(1))]
    own = (torch.optim.SGD(weights), None)
    with pytest.raises(ValueError, match="`--vision_learning_rate` would be ignored: the optimizer comes from"):
        make_trainer(tmp_path, optimizers=own, vision_learning_rate=0.0)
    with pytest.raises(ValueError, match="`--thought_learning_rate` would be ignored: the optimizer comes from"):
        make_trainer(tmp_path, deepspeed={"optimizer": {}}, thought_learning_rate=1e-3)
    with pytest.raises(ValueError, match="`--deepspeed` has a `scheduler`.*would be ignored"):
        make_trainer(tmp_path, deepspeed={"scheduler": {}})
    layers = LayerWiseDummyOptimizer(optimizer_dict={weights[0]: torch.optim.SGD(weights)})
    for settings in ({"restart_schedule": True, "lr_scheduler_type": "constant"}, {}):
        trainer = make_trainer(tmp_path, **settings)
        with pytest.raises(ValueError, match="for each weight, whose rate no schedule reaches"):
            trainer.create_scheduler(10, trainer.accelerator.prepare(layers))
    make_trainer(tmp_path, lr_scheduler_type="constant").create_scheduler(10, layers)


def test_a_schedule_that_is_not_used_is_named(tmp_path, caplog):
    trainer = make_trainer(tmp_path, restart_schedule=True, lr_scheduler_kwargs={"num_decay_steps": 3})
    trainer.create_scheduler(10, torch.optim.SGD(trainer.model.parameters()))
    assert "`--lr_scheduler_kwargs` is not used" in caplog.text


def test_an_order_by_length_is_drawn_from_the_seed_of_the_data_and_the_epoch(tmp_path):
    """It was the same for all seeds, of which torch's generator does not read what is above 32 bits."""

    class Lengths(list):
        epoch, length = 1, list.__getitem__

    data = Lengths(range(900))  # more than are sorted at once
    samplers = [
        make_trainer(tmp_path, train_sampling_strategy="group_by_length", **seeds)._get_train_sampler(data)
        for seeds in ({"seed": 3}, {"data_seed": 3}, {"data_seed": 4})
    ]
    first, again, other = map(list, samplers)
    assert first == again != other
    data.epoch = 2
    assert list(samplers[0]) not in (first, other)


@pytest.mark.parametrize("callbacks", [None, [Noted], [Noted()]], ids=["none", "class", "object"])
def test_given_callbacks_come_before_the_trainers_own(callbacks, tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    trainer = StageTrainer(torch.nn.Linear(1, 1), args, curriculum=CurriculumArguments(), callbacks=callbacks)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(Noted) == len(callbacks or ())
    assert kinds[: len(callbacks or ())] == [Noted] * len(callbacks or ())


def test_the_card_takes_by_name_only_what_the_run_does_not_say(tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    trainer = StageTrainer(torch.nn.Linear(1, 1), args, curriculum=CurriculumArguments())
    with pytest.raises(ValueError, match="'me/x'.*give those by name"):
        trainer.create_model_card("me/x")
    with pytest.raises(ValueError, match="dataset.*run's files"):
        trainer.create_model_card(language="en", dataset="mine", tasks=None)


def test_verbosity_of_the_library_is_that_of_every_logger_here():
    found = [
        module.logger
        for name, module in sys.modules.items()
        if name.startswith("multicoco") and hasattr(module, "logger")
    ]
    assert len(found) >= 7
    before = logging.get_verbosity()
    try:
        for level in (logging.ERROR, logging.INFO):
            logging.set_verbosity(level)
            assert {logger.getEffectiveLevel() for logger in found} == {level}
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize("mapping", ['{"steps"', "steps=rationale", '["steps"]', '{"steps": 3}'])
def test_a_mapping_of_columns_that_is_none_is_refused(mapping):
    data = parse(None, [f"--{name}={value}" for name, value in {**NEEDED, "column_mapping": mapping}.items()]).data
    with pytest.raises(ValueError, match=r"`--column_mapping` must be a JSON object.*got"):
        data.read("some.jsonl")


def test_a_file_that_holds_no_names_is_refused(write):
    with pytest.raises(ValueError, match="holds a list"):
        parse(None, [write("a.yaml", ["mode"])])


def test_help_tells_what_the_flags_do():
    process = start_process([ROOT / "train.py", "--help"])
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "python train.py recipes/trails/coconut.yaml" in text
    assert "--max_latent_stage" in text


# --- one process -------------------------------------------------------------------------------------------------


def test_a_run_learns_answers_and_says_what_it_is(whole):
    log = history(whole)
    assert [entry["curriculum/stage"] for entry in log] == [0] * 6 + [1] * 3 + [2] * 3
    assert log[-1]["loss"] < log[0]["loss"]
    results = json.loads((whole / "results.json").read_text())
    assert [(row["eval/stage"], row["eval/samples"], row["step"]) for row in results] == [
        (0, 7, 6),
        (1, 7, 9),
        (2, 7, 12),
    ]
    config = MultiCoCoConfig.from_pretrained(whole)
    assert (config.stage, config.num_thoughts, config.mode) == (2, 2, "coconut")
    assert is_picture(whole / "results.png")


def test_finished_runs_are_compared(folder, whole, capsys, monkeypatch):
    other = run_here(folder, "compared", "--mode", "no_cot", "--max_steps", 2)
    picture = folder / "compared.png"
    monkeypatch.setattr("sys.argv", ["compare.py", str(whole), str(other), "--output", str(picture)])
    capsys.readouterr()
    compare.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:4]]
    for row, run, mode, steps in zip(rows, (whole, other), ("coconut", "no_cot"), ("12", "2"), strict=True):
        last = json.loads((run / "results.json").read_text())[-1]
        assert row[:4] == [run.name, mode, steps, str(last["eval/num_thoughts"])]
        assert row[4] == f"{last['eval/accuracy']:.1%}"
    assert is_picture(picture)


def test_an_unfinished_run_is_not_compared(folder, tmp_path):
    with pytest.raises(ValueError, match="lacks .*results.json.* Run it first"):
        compare.read_run(tmp_path)


def test_a_board_is_drawn_with_both_answers(folder, whole, monkeypatch):
    data, picture = folder / "trails" / "val.jsonl", folder / "board.png"
    flags = ["--model", str(whole), "--data", str(data), "--index", "2", "--output", str(picture)]
    monkeypatch.setattr("sys.argv", ["show.py", *flags])
    show.main()
    assert is_picture(picture)
    monkeypatch.setattr("sys.argv", ["show.py", *flags, "--index", "7"])
    with pytest.raises(ValueError, match="`--index` must be between 0 and 6, got 7"):
        show.main()


def test_the_learning_rate_starts_again_at_each_stage(whole):
    rates = [entry["learning_rate"] for entry in history(whole)]
    assert [step for step in range(12) if rates[step] == pytest.approx(1e-3)] == [0, 6, 9]
    assert all(rates[step] < rates[step - 1] for step in range(1, 12) if step not in (6, 9))


def test_a_schedule_that_is_cut_short_has_the_same_rates(folder, whole):
    short = history(run_here(folder, "short", "--max_steps", 7))
    assert [entry["learning_rate"] for entry in short] == [entry["learning_rate"] for entry in history(whole)[:7]]


def starts_of_stages(log):
    return [
        index
        for index, entry in enumerate(log)
        if index and entry["curriculum/stage"] != log[index - 1]["curriculum/stage"]
    ]


def test_rates_start_again_where_stages_begin_however_steps_are_counted(folder):
    """24 boards in batches of 5, the last ones dropped: 4 steps an epoch, not 5."""
    flags = ("--per_device_train_batch_size", 5, "--dataloader_drop_last", "--answer_every", "end")
    log = history(run_here(folder, "dropped", *flags))
    rates = [entry["learning_rate"] for entry in log]
    assert starts_of_stages(log) == [8, 12]
    assert [step for step in range(1, len(rates)) if rates[step] > rates[step - 1]] == [8, 12]


def run_out_of_memory(monkeypatch, at):
    """The step of this number, from 1 and over all tries, does not fit."""
    begun = []

    def begin(self, args, state, control, **kwargs):
        begun.append(state.global_step)
        if len(begun) == at:
            raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(train.CompletionCallback, "on_step_begin", begin)


def test_a_start_of_thought_tokens_that_are_there_is_named_as_unused(folder, caplog):
    run_here(folder, "unused", "--init_latents_from", "a", "--max_steps", "1", "--answer_every", "end")
    assert "`--init_latents_from` is not used" in caplog.text


def test_rates_follow_the_stages_of_a_batch_size_that_was_found(folder, monkeypatch):
    """Batches of 8 do not fit, as it seems; accelerate tries 7: 4 steps an epoch, not 3."""
    run_out_of_memory(monkeypatch, at=1)
    out = run_here(folder, "found", "--auto_find_batch_size", "--answer_every", "end")
    rates = [entry["learning_rate"] for entry in history(out)]
    assert starts_of_stages(history(out)) == [8, 12]
    assert [step for step in range(1, len(rates)) if rates[step] > rates[step - 1]] == [8, 12]
    assert json.loads((out / "settings.json").read_text())["global_batch_size"] == 7


def test_a_batch_size_is_not_found_with_weights_that_are_trained_already(folder, monkeypatch):
    """As where the thoughts of a later stage need more memory: the run began anew, but not the model."""
    run_out_of_memory(monkeypatch, at=3)
    with pytest.raises(ValueError, match="Memory ran out after step 2.*`--per_device_train_batch_size 7` or less"):
        run_here(folder, "found_late", "--auto_find_batch_size", "--answer_every", "end")
    assert not (folder / "found_late" / "model.safetensors").exists()


def test_the_last_stage_has_one_cosine_however_long_it_is(folder):
    log = history(run_here(folder, "longer", "--num_train_epochs", 6, "--answer_every", "end"))
    rates = [entry["learning_rate"] for entry in log]
    assert [step for step in range(1, len(rates)) if rates[step] > rates[step - 1]] == starts_of_stages(log) == [6, 9]


def test_by_default_the_rate_comes_down_in_the_second_half_of_the_last_stage(folder, capsys):
    flags = ("--restart_schedule", "false", "--num_train_epochs", 7, "--warmup_steps", 2, "--answer_every", "end")
    log = history(run_here(folder, "default", *flags))
    rates = torch.tensor([entry["learning_rate"] for entry in log]) / 1e-3
    assert starts_of_stages(log) == [6, 9]  # and so the last stage has steps 9 to 20
    torch.testing.assert_close(rates[:3], torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(rates[3:16], torch.ones(13))  # six steps come down
    assert (rates[16:].diff() < 0).all()
    assert 0 < rates[20] < 0.1
    table = capsys.readouterr().out
    assert re.search(r"2 +2 +4 - 7 +10 - 21 +1\.00e-03, 1\.00e-03, 6\.70e-05", table)  # as it says before it begins


def test_a_short_run_speaks_and_says_which_stages_will_not_come(folder, caplog):
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    del settings["logging_steps"]
    (folder / "defaults.yaml").write_text(yaml.safe_dump(settings))
    for name, number, expected in (("short_default", 12, 12), ("ends_early", 6, 6)):
        caplog.clear()
        train.main([str(folder / "defaults.yaml"), "--output_dir", str(folder / name), "--max_steps", str(number)])
        assert len(history(folder / name)) == expected
        assert ("The run ends in stage 0 of 2" in caplog.text) == (name == "ends_early")


def test_a_stopped_run_is_no_finished_one(folder, monkeypatch):
    def asks_to_stop(self, args, state, control, **kwargs):
        self.jit_manager.is_checkpoint_requested |= state.global_step == 2  # as the handler of SIGTERM does

    monkeypatch.setattr(JITCheckpointCallback, "on_substep_end", asks_to_stop, raising=False)
    monkeypatch.setattr(JITCheckpointCallback, "on_optimizer_step", asks_to_stop)
    flags = ["--enable_jit_checkpoint", "--answer_every", "end"]
    with pytest.raises(SystemExit, match="Stopped at step 3: `--resume_from_checkpoint last` goes on there"):
        run_here(folder, "stopped", *flags)
    assert sorted(path.name for path in (folder / "stopped").iterdir()) == ["checkpoint-3"]
    monkeypatch.undo()
    out = run_here(folder, "stopped", *flags, "--resume_from_checkpoint", "last")
    assert [entry["step"] for entry in history(out)] == [1, 2, *range(4, 13)]  # it saved before it logged step 3


def test_parts_have_learning_rates_of_their_own(folder):
    flags = ["--max_steps", "3", "--answer_every", "end", "--weight_decay", "0.1", "--restart_schedule", "false"]
    out = run_here(folder, "rates", *flags, "--vision_learning_rate", 0, "--projector_learning_rate", 2e-3)
    same = run_here(folder, "one_rate", *flags, "--vision_learning_rate", 1e-3)
    plain = run_here(folder, "no_rates", *flags)
    start, rates, one, none = (load_file(path / "model.safetensors") for path in (folder / "start", out, same, plain))
    assert all(torch.equal(start[name], rates[name]) for name in start if "vision" in name)
    assert not any(torch.equal(start[name], rates[name]) for name in start if "projector" in name)
    assert all(torch.equal(one[name], none[name]) for name in none)


@pytest.mark.parametrize(
    "flags",
    [["--thought_learning_rate", "1e-3"], ["--vision_learning_rate", "1e-3", "--freeze_backbone"]],
    ids=" ".join,
)
def test_a_learning_rate_of_what_is_not_trained_is_refused(folder, flags):
    with pytest.raises(ValueError, match=f"`{flags[0]}`: this run trains no such weights"):
        run_here(folder, "no_part", *flags)


@pytest.mark.parametrize("seen_in", ["log", "checkpoint", "end"])
def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(folder, seen_in):
    """The first step has a rate of 0 and is good; all after it have weights that are no numbers."""
    name = f"diverged-{seen_in}"
    flags = ["--learning_rate", "1e40", "--restart_schedule", "false", "--warmup_steps", "10", "--max_grad_norm", "0"]
    flags += ["--answer_every", "end", "--max_steps", "4", "--logging_steps", "1" if seen_in == "log" else "100"]
    flags += ["--save_strategy", "no" if seen_in == "end" else "steps", "--save_steps", "1"]
    with pytest.raises(
        FloatingPointError, match=r"Step \d: the training has diverged.*Lower `learning_rate`"
    ) as error:
        run_here(folder, name, *flags)
    good = str(folder / name / "checkpoint-1")
    assert last_complete_checkpoint(folder / name) == (None if seen_in == "end" else good)
    assert ("the model it started from" if seen_in == "end" else good) in str(error.value)
    assert not (folder / name / "model.safetensors").exists()


@pytest.mark.parametrize("mode", ["cot", "no_cot", "no_thoughts", "pause", "pause_loop"])
def test_a_mode_trains_two_steps(folder, mode):
    out = run_here(folder, mode, "--mode", mode, "--max_steps", 2, "--epochs_stage_0", 0, "--answer_every", "end")
    assert all(math.isfinite(entry["loss"]) for entry in history(out))
    assert MultiCoCoConfig.from_pretrained(out).mode == mode


@pytest.mark.parametrize(
    ("flag", "frozen"),
    [("backbone", "vision_tower"), ("mlp", "multi_modal_projector"), ("llm", "language_model")],
    ids=["backbone", "mlp", "llm"],
)
def test_a_frozen_part_stays_and_the_others_move(folder, flag, frozen):
    out = run_here(folder, f"frozen_{flag}", f"--freeze_{flag}", "--max_steps", 2, "--answer_every", "end")
    before, after = load_file(folder / "start" / "model.safetensors"), load_file(out / "model.safetensors")
    for part in ("vision_tower", "multi_modal_projector", "language_model"):
        moved = [not torch.equal(before[name], after[name]) for name in before if part in name]
        assert any(moved) == (part != frozen), part


def test_thought_tokens_are_added_to_a_checkpoint_that_has_none(folder):
    out = run_here(folder, "original", "--model_name_or_path", CHECKPOINT, "--max_steps", 1, "--answer_every", "end")
    assert MultiCoCoConfig.from_pretrained(out).latent_token_id is not None
    assert (out / "_start" / "model.safetensors").is_file()


def test_adapters_train_and_are_saved_with_the_stage(folder):
    peft = pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")
    flags = ["--lora_rank", 2, "--max_steps", 8, "--save_strategy", "steps", "--save_steps", 8]
    out = run_here(folder, "lora", *flags)
    checkpoint = last_complete_checkpoint(out)
    assert MultiCoCoConfig.from_pretrained(checkpoint).stage == 1
    base = MultiCoCoForConditionalGeneration.from_pretrained(folder / "start")
    model = peft.PeftModel.from_pretrained(base, checkpoint)
    adapters = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert adapters
    assert any(value.any() for value in adapters)
