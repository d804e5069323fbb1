"""Evaluation while training: what is measured, at which stage, with what it is compared, and what it keeps in memory.

A run here has one step an epoch, and answers are judged by a list that the test writes: how many are right of each
evaluation.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    EarlyStoppingCallback,
    LogitsProcessor,
    LogitsProcessorList,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from multicoco import (
    AnswerCallback,
    CurriculumArguments,
    CurriculumCallback,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    ReasoningCollator,
    StageDataset,
    load_records,
    score,
    train,
)
from multicoco.curriculum import written_tokens
from multicoco.evaluation.subject import AskArguments, Subject
from multicoco.recipes.trails.prepare import prepare
from multicoco.trainer_callbacks import StageComparisonCallback, last_complete_checkpoint
from multicoco.training.results import answers_of, results_table
from multicoco.training.trainer import StageTrainer


NUM_ASKED = 3
RULES = {"c_thought": 1, "max_latent_stage": 1, "final_stage": False, "epochs_stage_0": 2, "epochs_per_stage": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "trails"
    prepare(folder, num_train=4, num_val=NUM_ASKED)
    return folder


@pytest.fixture(scope="module")
def records(folder):
    return {split: load_records(folder / f"{split}.jsonl") for split in ("train", "val")}


@pytest.fixture
def start(trails_start):
    return MultiCoCoForConditionalGeneration.from_pretrained(trails_start)


@pytest.fixture(scope="module")
def processor(trails_start):
    return MultiCoCoProcessor.from_pretrained(trails_start)


def arguments(tmp_path, **settings):
    values = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**values | settings)


@pytest.fixture
def make(start, records, processor, tmp_path):
    """A `StageTrainer` whose k-th evaluation has `right[k]` right answers."""

    def make(right, callbacks=(), rules=None, optimizer=None, **settings):
        curriculum = CurriculumArguments(**RULES | (rules or {}))
        dataset = StageDataset(records["train"], processor, curriculum)
        asked = StageDataset(records["val"], processor, curriculum, is_evaluated=True)
        collator, judged, is_averaged = ReasoningCollator(processor), [], []

        def is_correct(tokens, index):
            judged.append(index)
            is_averaged.append(getattr(optimizer, "is_averaged", None))
            return index < right[(len(judged) - 1) // NUM_ASKED]

        short = {"max_new_tokens": 1}
        answer = AnswerCallback(curriculum, asked, collator, is_correct, every="epoch", generate_kwargs=short)
        trainer = StageTrainer(
            start,
            arguments(tmp_path, num_train_epochs=curriculum.num_epochs, **settings),
            collator,
            dataset,
            asked,
            curriculum=curriculum,
            callbacks=[CurriculumCallback(curriculum, dataset), answer, *callbacks],
            optimizers=(optimizer, None),
        )
        trainer.judged, trainer.is_averaged = judged, is_averaged
        return trainer

    return make


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


class Losses(TrainerCallback):
    """What the plain forward says of the evaluation data at each stage, and how often: `{step: {stage: loss}}`."""

    def __init__(self, records, processor, **rules):
        curriculum = CurriculumArguments(**RULES | rules)
        self.data, self.collator = StageDataset(records, processor, curriculum), ReasoningCollator(processor)
        self.found = {}

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        losses = {}
        for stage in (0, 1):
            self.data.set_stage(stage)
            with torch.no_grad():
                losses[stage] = float(model(**self.collator([self.data[row] for row in range(NUM_ASKED)])).loss)
        self.found[state.global_step] = losses


def test_an_evaluation_has_loss_and_answers_of_its_stage(make, records, processor):
    """The training data is mixed, anew in each epoch; what is evaluated is not. Answers are generated once a step."""
    losses = Losses(records["val"], processor)
    trainer = make([1, 3, 2, 0, 1], [losses], {"mix": "linear"}, eval_strategy="epoch", eval_on_start=True)
    trainer.train()
    found = evaluations(trainer)
    assert [entry["step"] for entry in found] == [0, 1, 2, 3, 4]
    assert [entry["eval_stage"] for entry in found] == [0, 0, 0, 1, 1]
    assert [entry["eval_num_thoughts"] for entry in found] == [0, 0, 0, 1, 1]
    for entry in found:
        expected = losses.found[entry["step"]]
        assert entry["eval_loss"] == pytest.approx(expected[entry["eval_stage"]], rel=1e-5)
        assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    assert [entry["eval_accuracy"] for entry in found] == [1 / 3, 1, 2 / 3, 0, 1 / 3]
    assert {entry["eval_samples"] for entry in found} == {NUM_ASKED}
    assert trainer.judged == [*range(NUM_ASKED)] * 5
    assert [row["eval/accuracy"] for row in answers_of(trainer.state.log_history)] == [1, 2 / 3, 0, 1 / 3]

    for _ in range(2):  # other weights may be there: asked again
        trainer.judged.clear()
        assert trainer.evaluate()["eval_accuracy"] == 1 / 3
        assert trainer.judged == [*range(NUM_ASKED)]
    assert "eval_accuracy" not in trainer.evaluate(trainer.train_dataset)
    assert trainer.train_dataset.epoch == 3


class Averaging(torch.optim.SGD):
    """In the manner of schedule-free ones, which train other weights than they give."""

    is_averaged = False

    def train(self):
        self.is_averaged = False

    def eval(self):
        self.is_averaged = True


def test_answers_are_of_the_weights_that_an_optimizer_gives(make, start):
    trainer = make([0], optimizer=Averaging(start.parameters(), lr=1e-3), max_steps=1)
    trainer.train()
    assert trainer.is_averaged == [True] * NUM_ASKED


BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "best",
    "metric_for_best_model": "accuracy",
    "load_best_model_at_end": True,
}


def test_the_best_model_is_that_of_the_last_stage(make, tmp_path):
    """Also of a run that is resumed between the two stages, where the best so far was of the first."""
    rules, out = {"epochs_stage_0": 1, "epochs_per_stage": 3}, tmp_path / "out"
    trainer = make([3, 1, 2, 0], rules=rules, **BEST)
    trainer.train()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (2 / 3, 3)
    saved, kept = load_file(out / "checkpoint-3" / "model.safetensors"), trainer.model.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in saved.items())
    *rows, last = answers_of(trainer.state.log_history)  # the last is what the card tells
    assert (last["eval/accuracy"], last["eval/best_step"], last["eval/stage"]) == (2 / 3, 3, 1)
    assert {name for name in rows[-1] if name.startswith("eval/")} == last.keys() - {"eval/best_step", "step", "epoch"}
    assert results_table(trainer.state.log_history).splitlines()[-1].split()[-2:] == ["step", "3"]

    trainer = make([1, 0, 0], rules=rules, **BEST)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-1"))
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (1 / 3, 2)


@pytest.mark.parametrize(
    ("kind", "kwargs", "expected"),
    [("reduce_lr_on_plateau", {}, 0.5), ("greedy", {"min_lr": 1e-7}, 2**4 * 0.5)],
    ids=["reduce_lr_on_plateau", "greedy"],
)
def test_a_rate_that_follows_evaluations_compares_within_a_stage(make, kind, kwargs, expected):
    """
    A rise is better, a fall from one stage to the next is nothing: of five evaluations the last alone is bad. One that
    is bad halves the rate; one that is good doubles it if it is `greedy`.
    """
    kwargs = {"factor": 0.5, "patience": 0, **kwargs}
    trainer = make(
        [2, 3, 1, 2, 0],
        rules={"epochs_per_stage": 3},
        eval_strategy="epoch",
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=kwargs,
        metric_for_best_model="accuracy",
    )
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * expected)


def test_a_rate_for_each_group_of_weights_is_no_obstacle_to_the_plan(make):
    """A schedule that follows evaluations was tried on one group: "expected 1 min_lrs, got 2"."""
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"min_lr": [1e-6, 1e-6]}}
    assert make([], eval_strategy="epoch", **schedule).plan().factors == ()


def test_a_run_is_stopped_in_its_last_stage_only(make):
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    settings = {"eval_strategy": "epoch", "metric_for_best_model": "accuracy"}
    trainer = make([3, 1, 2, 1, 0], [stopping], {"epochs_per_stage": 3}, **settings)
    trainer.train()
    assert [entry["eval_stage"] for entry in evaluations(trainer)] == [0, 0, 1, 1]
    assert trainer.state.global_step == 4 < trainer.state.max_steps


@pytest.mark.parametrize(("epoch", "expected"), [(0, 1.0), (1, 1.0), (2, None), (2.5, 1.0), (3, 1.0)])
def test_a_run_that_begins_with_a_stage_begins_without_a_best(tmp_path, epoch, expected):
    """`eval_on_start` comes before the first epoch: early stopping would compare with another stage."""
    state = TrainerState(epoch=epoch, best_metric=1.0, max_steps=4)
    StageComparisonCallback(CurriculumArguments(**RULES)).on_train_begin(arguments(tmp_path), state, None)
    assert state.best_metric == expected


WITH_EVALUATION = ["--eval_file", "no.jsonl", "--eval_strategy", "epoch"]
REFUSED = [
    ("--eval_strategy epoch", "`--eval_strategy epoch` has nothing to evaluate. Give `--eval_file`"),
    ("--eval_on_start true", "`--eval_on_start` has nothing to evaluate. Give `--eval_file`"),
    (
        "--load_best_model_at_end true --save_strategy no",
        "`--load_best_model_at_end` .*would be ignored.*`--eval_strategy epoch`",
    ),
    ("--save_strategy best", "`--save_strategy best` .*would be ignored"),
    ("--metric_for_best_model accuracy", "`--metric_for_best_model` .*would be ignored"),
    ("--eval_steps 5", "`--eval_steps` .*would be ignored.*`--eval_strategy steps`"),
    ("--eval_delay 5", "`--eval_delay` .*would be ignored"),
    ("--do_eval true", "`--do_eval` .*would be ignored"),
    ("--do_predict true", "`--do_predict` would be ignored"),
]
REFUSED_BESIDE = [
    ("--save_strategy best", "`--save_strategy best` needs `--metric_for_best_model`: loss"),
    ("--metric_for_best_model bleu", "is 'bleu', expected .*: loss, accuracy"),
    (
        "--eval_strategy steps --eval_steps 2 --save_strategy steps --save_steps 4 --load_best_model_at_end true",
        "the best model of a stage might not be saved",
    ),
    ("--lr_scheduler_type greedy --learning_rate 1e-4", "`min_lr` 0.001.* could only rise"),
    ("--lr_scheduler_type reduce_lr_on_plateau --restart_schedule true", "two schedules"),
    (
        "--lr_scheduler_type reduce_lr_on_plateau --metric_for_best_model accuracy --lr_scheduler_kwargs"
        ' {"mode":"min"}',
        "mode 'min', but .*accuracy` is better the larger",
    ),
]


@pytest.mark.parametrize(
    ("words", "message"),
    [*REFUSED, *((f"{' '.join(WITH_EVALUATION)} {words}", message) for words, message in REFUSED_BESIDE)],
    ids=[words for words, _ in [*REFUSED, *REFUSED_BESIDE]],
)
def test_what_would_be_ignored_is_refused_before_anything_is_read(tmp_path, words, message):
    flags = [
        "--model_name_or_path",
        "no/such/model",
        "--train_file",
        "no.jsonl",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(ValueError, match=message):
        train.main([*flags, "--report_to", "none", *words.split(" ")])


def test_a_run_that_would_end_before_its_first_evaluation_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match="`--eval_delay` is 5.*ends after 4 epochs"):
        make([], eval_strategy="epoch", eval_delay=5).train()
    args, state = arguments(tmp_path, eval_strategy="steps"), TrainerState(max_steps=4, eval_steps=10)
    with pytest.raises(ValueError, match="`--eval_steps` is 10.*ends after 4 steps"):
        StageComparisonCallback(CurriculumArguments()).on_train_begin(args, state, None)


def test_train_evaluates_its_eval_file(folder, trails_start, tmp_path):
    """Through the flags: no accuracy above 0 after two steps, so of equals the first is kept."""
    settings = {
        **{name: value for name, value in RULES.items() if not name.startswith("epochs")},
        **{"model_name_or_path": str(trails_start), "output_dir": str(tmp_path / "out"), "report_to": "none"},
        **{"train_file": str(folder / "train.jsonl"), "eval_file": str(folder / "val.jsonl"), "mix": "linear"},
        **{"epochs_stage_0": 0, "epochs_per_stage": 2, "per_device_train_batch_size": 4, "disable_tqdm": True},
        **BEST,
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))
    trainer = train.main([str(tmp_path / "a.yaml")])
    found = evaluations(trainer)
    assert [entry["eval_accuracy"] for entry in found] == [0, 0]
    assert trainer.eval_dataset.curriculum.mix == "none"
    assert trainer.state.best_global_step == 1
    assert last_complete_checkpoint(tmp_path / "out").endswith("checkpoint-1")
    saved = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert all(
        torch.equal(value, saved[name]) for name, value in load_file(tmp_path / "out/model.safetensors").items()
    )


def test_evaluated_data_is_composed_as_it_is_asked(records, processor):
    """Without any written step `no_thoughts` gave none, where the same records were asked with those of the stage."""
    rules = CurriculumArguments(
        c_thought=2, max_latent_stage=2, mix="uniform", draw_surplus=True, without_steps="no_thoughts"
    )
    bare = [{name: record[name] for name in ("id", "images", "question", "answer")} for record in records["val"]]
    latent_id = processor.tokenizer.convert_tokens_to_ids("<|latent|>")
    for rows in (records["val"], bare):
        data = StageDataset(load_records(rows, needs_steps=False), processor, rules, is_evaluated=True)
        for stage in range(4):
            for epoch in range(3):
                data.set_stage(stage, epoch)
                counts = [data[row]["input_ids"].count(latent_id) for row in range(NUM_ASKED)]
                assert counts == [data.num_thoughts(row, stage) for row in range(NUM_ASKED)] == [2 * min(stage, 2)] * 3


# --- several devices ----------------------------------------------------------------------------------------------


def test_several_gpus_without_a_launcher_are_refused(make, start, records, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda args: 2))
    computed = []
    start.register_forward_pre_hook(lambda *args: computed.append(1))
    flags = ["--model_name_or_path", "no/such/model", "--train_file", "no.jsonl", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="2 GPUs.*torchrun --nproc_per_node 2"):
        train.main([*flags, "--report_to", "none"])
    with pytest.raises(ValueError, match="2 GPUs.*torchrun"):
        make([])
    curriculum = CurriculumArguments(**RULES)
    dataset = StageDataset(records["train"], processor, curriculum)
    trainer = Trainer(
        start,
        arguments(tmp_path),
        ReasoningCollator(processor),
        dataset,
        callbacks=[CurriculumCallback(curriculum, dataset)],
    )
    with pytest.raises(ValueError, match="2 GPUs.*torchrun"):
        trainer.train()
    assert not computed


# --- smoothed labels ----------------------------------------------------------------------------------------------


@pytest.fixture
def batch(records, processor):
    """Two samples with a thought, and their texts if the model has a step loss."""

    def batch(**rules):
        data = StageDataset(records["val"], processor, CurriculumArguments(**RULES | rules))
        data.set_stage(1)
        return ReasoningCollator(processor)([data[0], data[1]])

    return batch


def smoothed(model, batch, factor):
    """By the plain formula: the logits of each position against the next label."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name not in ("labels", "step_ids")}).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=factor)


class Derived(MultiCoCoForConditionalGeneration):
    """As FSDP2 makes one of a model, and users do."""


@pytest.mark.parametrize("model_class", [MultiCoCoForConditionalGeneration, Derived], ids=["ours", "derived"])
def test_the_stock_trainer_smooths_shifted_labels(start, batch, tmp_path, model_class):
    start.__class__ = model_class
    trainer = Trainer(start.eval(), arguments(tmp_path, label_smoothing_factor=0.1))
    loss = trainer.compute_loss(start, batch())
    torch.testing.assert_close(loss, smoothed(start, batch(), 0.1))


def test_a_run_trains_on_smoothed_labels(make, batch, start):
    """The logged loss of a first step is that of the model before it."""
    before = copy.deepcopy(start).eval()
    trainer = make([0], label_smoothing_factor=0.1, max_steps=1, eval_strategy="epoch")
    trainer.train_dataset.set_stage(0)
    inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(smoothed(before, inputs, 0.1)), rel=1e-4)
    asked = trainer.data_collator([trainer.eval_dataset[row] for row in range(NUM_ASKED)])
    (found,) = evaluations(trainer)
    assert found["eval_loss"] == pytest.approx(float(smoothed(trainer.model.eval(), asked, 0.1)), rel=1e-4)


def test_a_step_loss_is_smoothed_too(start, batch):
    """Smoothing mixes two targets, so a loss is the same mixture of the losses of each."""
    inputs = batch(step_loss_weight=0.5)
    start.config.set_trained(c_thought=1, step_loss_weight=0.5)
    start.eval()
    with torch.no_grad():
        sharp, mixed, flat = (start(**inputs, smoothing=factor) for factor in (0.0, 0.25, 1.0))
    for name in ("loss", "step_loss"):
        torch.testing.assert_close(mixed[name], 0.75 * sharp[name] + 0.25 * flat[name])
        assert abs(float(flat[name] - sharp[name])) > 0.1
    torch.testing.assert_close(mixed.loss - 0.5 * mixed.step_loss, smoothed(start, inputs, 0.25))


def test_smoothing_beside_another_loss_is_refused(start, tmp_path):
    with pytest.raises(ValueError, match="`label_smoothing_factor` would be ignored beside `compute_loss_func`"):
        StageTrainer(
            start,
            arguments(tmp_path, label_smoothing_factor=0.1),
            curriculum=CurriculumArguments(**RULES),
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: 0.0,
        )


# --- memory of an evaluation --------------------------------------------------------------------------------------


class Reading(Trainer):
    """One whose loss needs all logits."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (outputs.logits.mean(), outputs) if return_outputs else outputs.logits.mean()


@pytest.fixture
def evaluate(start, records, processor, tmp_path):
    """Evaluates by a stock trainer; returns its metrics, the positions that the head read, the outputs, the labels."""

    def evaluate(trainer_class=Trainer, collate=None, use_cache=False, **kwargs):
        dataset = StageDataset(records["val"], processor, CurriculumArguments(**RULES))
        dataset.set_stage(1)
        read, returned = [], []
        start.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[:-1].numel()))
        start.register_forward_hook(lambda module, args, output: returned.append(output))
        collator = ReasoningCollator(processor)
        trainer = trainer_class(
            start,
            arguments(tmp_path, use_cache=use_cache),
            collate(collator) if collate else collator,
            eval_dataset=dataset,
            **kwargs,
        )
        labels = collator([dataset[row] for row in range(NUM_ASKED)])["labels"]
        return trainer.evaluate(), read, returned, labels

    return evaluate


def test_a_stock_evaluation_keeps_no_logits_and_no_cache(evaluate):
    _, read, (output,), labels = evaluate()
    assert read == [int((labels[:, 1:] != -100).sum())]
    assert output.logits is None
    assert output.past_key_values is None


def test_metrics_and_losses_that_read_logits_get_all_of_them(evaluate):
    shapes = []

    def compute_metrics(prediction):
        shapes.extend(value.shape[:2] for value in (prediction.predictions[0], prediction.label_ids))
        return {"seen": 1}

    metrics, read, _, labels = evaluate(compute_metrics=compute_metrics)
    assert metrics["eval_seen"] == 1
    assert shapes == [labels.shape, labels.shape]
    assert labels.numel() in read
    metrics, *_ = evaluate(Reading)
    assert isinstance(metrics["eval_loss"], float)


def test_an_evaluation_keeps_what_it_is_asked_for(evaluate):
    _, _, (output,), _ = evaluate(collate=lambda collator: lambda rows: {**collator(rows), "logits_to_keep": 2})
    assert output.logits.shape[:2] == (NUM_ASKED, 2)
    _, _, (*_, output), _ = evaluate(use_cache=True)
    assert output.past_key_values is not None


# --- new tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "ends", "pad", "expected"),
    [
        ([5, 9, 0, 0], 9, 0, 2),
        ([5, 9, 9, 9], 9, 9, 2),
        ([5, 0, 6, 9], [9], 0, 4),
        ([5, 8, 0], [9, 8], 0, 2),
        ([5, 6, 7], [9], 0, 3),
        ([5, 6, 0, 0], None, 0, 2),
        ([9, 9], 9, 9, 1),
        ([], 9, 0, 0),
    ],
    ids=["padded", "pad is end", "pad inside", "two ends", "cut", "no end", "empty answer", "nothing"],
)
def test_new_tokens_end_with_the_first_end_token(row, ends, pad, expected):
    assert written_tokens(row, ends, pad) == row[:expected]


class Says(LogitsProcessor):
    """Each row writes one word, then the end; the first row a word more."""

    def __init__(self, start, word, end):
        self.start, self.word, self.end = start, word, end

    def __call__(self, input_ids, scores):
        num_written = input_ids.shape[1] - self.start
        words = torch.tensor([2 if row == 0 else 1 for row in range(len(scores))])
        chosen = torch.where(num_written < words, self.word, self.end)
        return torch.full_like(scores, -1e9).scatter(1, chosen[:, None], 0.0)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"], ids=["another", "the end token"])
def test_training_and_scoring_count_the_same_tokens(start, records, trails_start, tmp_path, pad):
    """A tokenizer whose pad token is its end token had the end left out of one count, and not of the other."""
    processor = MultiCoCoProcessor.from_pretrained(trails_start)
    processor.tokenizer.pad_token = pad
    processor.save_pretrained(tmp_path / "model")
    end, word = (processor.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("<|im_end|>", "A"))
    start.generation_config.update(eos_token_id=end, pad_token_id=processor.tokenizer.pad_token_id)
    start.save_pretrained(tmp_path / "model")
    rules, rows = CurriculumArguments(**RULES), range(NUM_ASKED)
    dataset, collator = StageDataset(records["val"], processor, rules), ReasoningCollator(processor)
    width = collator.prompts([dataset.prompt(row, 1) for row in rows])["input_ids"].shape[1]
    says = LogitsProcessorList([Says(width, word, end)])
    callback = AnswerCallback(
        rules, dataset, collator, lambda tokens, index: True, generate_kwargs={"logits_processor": says}
    )
    assert callback.measure(start.eval(), 1)["eval/new_tokens"] == pytest.approx((3 + 2 + 2) / 3)
    subject = Subject(str(tmp_path / "model"), records["val"], AskArguments(data="-"), torch.device("cpu"))
    subject.load()
    answers, _ = subject.write(subject._whole_inputs(rows, 1), logits_processor=says)
    assert [answer["new_tokens"] for answer in answers] == [3, 2, 2]


# --- a rank alone -------------------------------------------------------------------------------------------------


@pytest.fixture
def of_two_ranks():
    """This process as one of two, of which the other never answers: what is asked of it comes back as it was."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_a_rank_scores_alone_or_says_that_it_would_wait(folder, trails_start, tmp_path, of_two_ranks):
    flags = ["--model", str(trails_start), "--data", str(folder / "val.jsonl"), "--use_cpu", "--max_new_tokens", "2"]
    flags += ["--output_dir", str(tmp_path / "scores")]
    with pytest.raises(ValueError, match="2 ranks, and would wait.*alone=True"):
        score.main(flags)
    (row,) = score.main(flags, alone=True)
    assert row["samples"] == NUM_ASKED
    (lines,) = [path.read_text().splitlines() for path in (tmp_path / "scores" / "predictions").iterdir()]
    assert len(lines) == 1 + NUM_ASKED
