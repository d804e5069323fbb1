"""The trainer: the stock one, with schedules and comparisons by stage, its speed in the log, and our model card.

It knows no settings file, and asks by `AnswerCallback` only.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerState, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, SaveStrategy, SchedulerType, TrainOutput
from transformers.utils import logging

from ..compat import is_sharded, put_first, set_scheduler, world_size
from ..curriculum import CurriculumArguments, setting
from ..data_multicoco import StageDataset
from ..trainer_callbacks import (
    AnswerCallback,
    CurriculumCallback,
    StageComparisonCallback,
    check_devices,
    global_batch_size,
)
from .trackers import report_answers


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is

# The library's and ours: who asks for another schedule is told if it is not used.
DEFAULT_SCHEDULES = (SchedulerType.LINEAR, SchedulerType.WARMUP_STABLE_DECAY)
ADAPTIVE_SCHEDULES = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # they follow evaluations
# What of a parameter's name says which part with a learning rate of its own it belongs to.
PARTS = {"vision": "vision_tower.", "projector": "multi_modal_projector.", "thought": "trainable_tokens"}
SPEED = "speed/"  # begins the names of what depends on the time a run took
ANSWERS = "eval/"  # begins the names of what `AnswerCallback` logs
METRICS = ("loss", "accuracy")  # of an evaluation with answers, by which models may be compared


def _default(name: str, value: Any) -> Any:
    """A setting of `TrainingArguments` with another default."""
    return field(default=value, metadata=TrainingArguments.__dataclass_fields__[name].metadata)


@dataclass
class CoconutArguments(TrainingArguments):
    """
    transformers' settings of a training, with the defaults of the method. A rate that comes down over all epochs, as
    the library's does, would starve the last stage, which is the one that is used; and the loss of thoughts falls only
    while the rate comes down. So it warms up, stays, and comes down over the last half of the last stage.
    """

    lr_scheduler_type: SchedulerType | str = _default("lr_scheduler_type", "warmup_stable_decay")
    warmup_steps: float = _default("warmup_steps", 0.03)
    logging_steps: float = _default("logging_steps", 10)
    save_strategy: SaveStrategy | str = _default("save_strategy", "epoch")
    save_total_limit: int | None = _default("save_total_limit", 2)
    vision_learning_rate: float | None = setting("Of the vision tower; `learning_rate` if not given.", default=None)
    projector_learning_rate: float | None = setting("Of the projector; `learning_rate` if not given.", default=None)
    thought_learning_rate: float | None = setting(
        "Of the rows of the thought tokens, which `--lora_rank` trains as weights of their own; `learning_rate` if "
        "not given.",
        default=None,
    )
    allow_changed: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What may differ from the run that is resumed: train_file, train_weights, seed, settings of the "
            "curriculum, and for adapters model_name_or_path, if their base was moved."
        },
    )
    logging_nan_inf_filter: bool = _default("logging_nan_inf_filter", False)  # it would log a NaN as a loss of 0


def check_evaluation(
    args: TrainingArguments,
    curriculum: CurriculumArguments,
    *,
    has_data: bool,
    metrics: Sequence[str] | None = METRICS,
) -> None:
    """
    Checks what a run is told of evaluations. A learning rate that follows a metric which is to rise learns that it is.

    Args:
        args ([`~transformers.TrainingArguments`]): Of the run.
        curriculum ([`CurriculumArguments`]): Of the run.
        has_data (`bool`): Whether there is something to evaluate.
        metrics (`Sequence[str]`, *optional*): What an evaluation measures; `None` if that is not known.

    Raises:
        ValueError: a flag would be ignored, or could not mean what it says.
    """
    strategy, is_best = IntervalStrategy(args.eval_strategy), args.save_strategy == "best"
    evaluates = strategy != "no"
    if (evaluates or args.eval_on_start) and not has_data:
        flag = f"--eval_strategy {strategy.value}" if evaluates else "--eval_on_start"
        raise ValueError(
            f"`{flag}` has nothing to evaluate. Give `--eval_file` (in Python `eval_dataset`), or drop it."
        )
    needs_evaluations = {
        "--load_best_model_at_end": args.load_best_model_at_end,
        "--save_strategy best": is_best,
        "--metric_for_best_model": args.metric_for_best_model is not None,
        "--greater_is_better": args.greater_is_better is not None,
        "--eval_delay": args.eval_delay > 0,
        "--do_eval": args.do_eval,
    }
    ignored = [] if evaluates else [flag for flag, is_given in needs_evaluations.items() if is_given]
    if args.eval_steps is not None and strategy != "steps":
        ignored.append("--eval_steps")
    if ignored:
        raise ValueError(
            f"`{ignored[0]}` is about evaluations during training and would be ignored. Give `--eval_file` and "
            f"`--eval_strategy {'steps' if ignored[0] == '--eval_steps' else 'epoch'}`, or drop it."
        )
    if args.do_predict:
        raise ValueError("`--do_predict` would be ignored. Score the trained model by score.py.")
    if is_best and args.metric_for_best_model is None:
        raise ValueError("`--save_strategy best` needs `--metric_for_best_model`: loss, or what else is measured.")
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metrics is not None and wanted not in metrics:
        raise ValueError(
            f"`--metric_for_best_model` is {args.metric_for_best_model!r}, expected what an evaluation measures: "
            f"{', '.join(metrics)}."
        )
    if args.load_best_model_at_end and args.save_strategy == "steps" and args.save_steps != args.eval_steps:
        raise ValueError(
            f"`--load_best_model_at_end` with `--eval_steps {args.eval_steps}` and `--save_steps {args.save_steps}`: "
            "the best model of a stage might not be saved. Make them equal, or give `--save_strategy best`."
        )
    if args.lr_scheduler_type in ADAPTIVE_SCHEDULES:
        _check_adaptive_rate(args, curriculum)


def _check_adaptive_rate(args: TrainingArguments, curriculum: CurriculumArguments) -> None:
    kind, mode = SchedulerType(args.lr_scheduler_type).value, "max" if args.greater_is_better else "min"
    given: dict[str, Any] = {"mode": mode, **cast(dict, args.lr_scheduler_kwargs or {})}
    if curriculum.restart_schedule:
        raise ValueError(
            f"`--lr_scheduler_type {kind}` and `--restart_schedule` are two schedules, of which one would be ignored. "
            "Drop one."
        )
    if given["mode"] != mode:
        raise ValueError(
            f"`--lr_scheduler_kwargs` has mode {given['mode']!r}, but `--metric_for_best_model "
            f"{args.metric_for_best_model}` is better the {'larger' if mode == 'max' else 'smaller'} it is. Leave "
            "`mode` out, or set `--greater_is_better`."
        )
    least = given.get("min_lr", 1e-3)  # the default of `greedy`
    least = max(least) if isinstance(least, (list, tuple)) else least
    if kind == "greedy" and least >= args.learning_rate:
        raise ValueError(
            f"`--lr_scheduler_type greedy` does not go below its `min_lr` {least}, and `--learning_rate` is "
            f"{args.learning_rate}, so that it could only rise. Give `--lr_scheduler_kwargs '{{\"min_lr\": 1e-7}}'`."
        )
    args.lr_scheduler_kwargs = given


class EpochLengthSampler(LengthGroupedSampler):
    """Groups samples by length in an order drawn from seed and epoch: the same on every rank and after a resume."""

    def __init__(self, dataset: StageDataset, batch_size: int, seed: int):
        super().__init__(batch_size, lengths=[dataset.length(index) for index in range(len(dataset))])
        self.dataset, self.seed = dataset, seed

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.default_rng((self.seed, self.dataset.epoch)).integers(2**32))  # torch reads 32 bits of it
        self.generator = torch.Generator().manual_seed(seed)
        return super().__iter__()


class Throughput:
    """
    What a trainer's batches held since the last log, and the seconds that went into them, as this rank's host saw it.

    The clock runs from `start`, before the batches of a step are asked for, until `stop`; without a stop it runs on
    into the next step. Nothing is read from the device before `rates`.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.samples, self.tiles = 0, 0
        self.tokens: torch.Tensor | int = 0  # on the device
        self.seconds, self.waiting = 0.0, 0.0
        self._started: float | None = None

    def start(self) -> None:
        """Lets the clock run, or go on."""
        self.stop()
        self._started = perf_counter()

    def stop(self) -> None:
        """Stops the clock, before something that is no training; it may stand already."""
        if self._started is not None:
            self.seconds += perf_counter() - self._started
        self._started = None

    def counted(self, batches: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        """The same batches, counted as they come, and the time until each came."""
        while True:
            asked = perf_counter()
            batch = next(batches, None)
            self.waiting += perf_counter() - asked
            if batch is None:
                return
            labels = batch["labels"]  # which alone are in every training batch
            mask, pixels = batch.get("attention_mask"), batch.get("pixel_values")
            self.samples += len(labels)
            self.tokens = self.tokens + (labels.numel() if mask is None else mask.sum())
            self.tiles += 0 if pixels is None else len(pixels)
            yield batch

    def rates(self, device: torch.device, *, other_seconds: float = 0.0) -> dict[str, float]:
        """
        What is logged, of all ranks together; then the count begins anew. Every rank must call it.

        Args:
            device (`torch.device`): Where ranks add up their counts.
            other_seconds (`float`, defaults to 0): Seconds of this rank's clock that were not spent on training.

        Returns:
            `dict[str, float]`: Samples, tokens and tiles a second, by the mean time of a rank, and the share (0 to 1)
            of the time that ranks waited for batches. Empty if there was no step.
        """
        self.stop()
        own = [self.samples, int(self.tokens), self.tiles, self.seconds - other_seconds, self.waiting]
        self._begin()
        if world_size() > 1:
            totals = torch.tensor(own, dtype=torch.float64, device=device)  # exact for counts below 2 ** 53
            dist.all_reduce(totals)
            own = totals.tolist()
        *counts, seconds, waiting = own
        if seconds <= 0:
            return {}
        names = ("samples", "tokens", "tiles")
        rates = {
            f"{SPEED}{name}_per_second": count * world_size() / seconds
            for name, count in zip(names, counts, strict=True)
        }
        return {**rates, f"{SPEED}waiting": waiting / seconds}


def set_rates(optimizer: Optimizer, names: Mapping[int, str], rates: Mapping[str, float]) -> None:
    """
    Gives parts of a model a learning rate of their own, in a new optimizer.

    Args:
        names (`Mapping[int, str]`): The name of each parameter, by its `id`.
        rates (`Mapping[str, float]`): Of some of the parts vision, projector and thought.

    Raises:
        ValueError: see [`StageTrainer.create_optimizer`].
    """
    missing = set(rates)
    for group in list(getattr(optimizer, "param_groups", ())):
        own: dict[str | None, list[Any]] = {None: []}
        for param in group["params"]:
            name = names.get(id(param), "")
            part = next((part for part in rates if PARTS[part] in name), None)
            own.setdefault(part, []).append(param)
        group["params"] = own.pop(None)
        for part, params in own.items():
            optimizer.add_param_group({**group, "params": params, "lr": rates[str(part)]})
            missing.discard(str(part))
    if missing:
        told = ", ".join(f"`--{part}_learning_rate`" for part in sorted(missing))
        raise ValueError(
            f"{told}: this run trains no such weights of their own (frozen parts; rows of thought tokens without "
            "`--lora_rank`), or its optimizer takes no groups of them. Leave it out."
        )


def restarting(starts: Sequence[int], warmup: int) -> Callable[[int], float]:
    """
    The factor of the learning rate at a step: from each of `starts`, of which the last is the end, `warmup` steps up
    and a cosine down to a tenth.
    """

    def factor(step: int) -> float:
        number = bisect_right(starts[:-1], step)
        done, length = step - starts[number - 1], starts[number] - starts[number - 1]
        cosine = 0.5 * (1 + math.cos(math.pi * done / length))
        return min(1.0, (done + 1) / max(1, warmup)) * (0.1 + 0.9 * cosine)

    return factor


@dataclass
class RunPlan:
    """What a training will do, known before it begins."""

    steps_per_epoch: int
    max_steps: int
    batch_size: int  # samples of an optimizer step, of all ranks
    stages: list[tuple[int, int, int]]  # each that is reached: its number, its first step (from 0), the step behind it
    factors: Sequence[Callable[[int], float]]  # of the learning rate at a step; empty if the run itself sets it


class StageTrainer(Trainer):
    """
    The stock trainer, with a learning rate that starts again (warm-up, then down) at every stage, an order by length
    that survives a resume, the speed beside every logged loss, and our model card. Callbacks that are given come
    before its own, so that what they add to the log is reported.

    An evaluation is at the model's stage. Its metrics are the loss and, of data that an [`AnswerCallback`] asks, the
    answers (`eval_accuracy` and more). They are compared within a stage only: the best model is that of the stage in
    force, and [`~transformers.EarlyStoppingCallback`] stops in the last one only. The model smooths labels, also those
    of a step loss.

    Args:
        curriculum ([`CurriculumArguments`]): Says how long stages are.
        callbacks (`Sequence[TrainerCallback]`, *optional*): As of [`~transformers.Trainer`], like all other arguments.
    """

    train_dataset: StageDataset
    optimizer: Optimizer  # made before its schedule
    model: Any

    def __init__(
        self,
        *args: Any,
        curriculum: CurriculumArguments,
        callbacks: Sequence[Any] | None = None,
        **kwargs: Any,
    ):
        self.curriculum, self.throughput = curriculum, Throughput()
        super().__init__(*args, callbacks=list(callbacks or ()), **kwargs)  # type: ignore[misc]  # never by its place
        put_first(self, callbacks or ())
        self._check()
        self.add_callback(StageComparisonCallback(curriculum))
        self.label_smoother = None  # the model smooths, see `_prepare_inputs`

    def _check(self) -> None:
        check_devices(self.args)
        has_answers = any(one.dataset is self.eval_dataset for one in self._answering())
        is_known = self.compute_metrics is None and not isinstance(self.eval_dataset, dict)
        metrics = METRICS if has_answers else METRICS[:1]
        has_data = self.eval_dataset is not None
        check_evaluation(self.args, self.curriculum, has_data=has_data, metrics=metrics if is_known else None)
        deepspeed = getattr(getattr(self.args, "hf_deepspeed_config", None), "config", {})
        if "scheduler" in deepspeed:
            raise ValueError(
                "The file of `--deepspeed` has a `scheduler`, for which `--lr_scheduler_type`, `--warmup_steps` and "
                "`--restart_schedule` would be ignored. Take it out of the file."
            )
        if self._rates() and (self.optimizer is not None or "optimizer" in deepspeed):
            raise ValueError(
                f"`--{next(iter(self._rates()))}_learning_rate` would be ignored: the optimizer comes from elsewhere "
                "(`optimizer` in the file of `--deepspeed`, `optimizers` in Python). Drop one."
            )
        if self.args.label_smoothing_factor and self.compute_loss_func is not None:
            raise ValueError(
                "`label_smoothing_factor` would be ignored beside `compute_loss_func`, which computes the loss. "
                "Drop one."
            )

    def _answering(self) -> list[AnswerCallback]:
        return [one for one in self.callback_handler.callbacks if isinstance(one, AnswerCallback)]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else cast(StageDataset, train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthSampler(dataset, batch_size, seed)

    def get_train_dataloader(self) -> DataLoader:
        """As [`~transformers.Trainer.get_train_dataloader`]; what is counted begins anew, as a run does."""
        self.throughput = Throughput()
        return super().get_train_dataloader()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As [`~transformers.Trainer.get_batch_samples`], which it is asked for at the start of a step; counted."""
        self.throughput.start()
        return super().get_batch_samples(self.throughput.counted(epoch_iterator), num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`~transformers.Trainer.log`]; a logged loss has the speed of its steps beside it."""
        if "loss" in logs:
            answering = sum(callback.seconds for callback in self._answering())
            logs = logs | self.throughput.rates(self.args.device, other_seconds=answering)
        super().log(logs, start_time)
        if f"{ANSWERS}accuracy" in logs and self.is_world_process_zero() and self.processing_class is not None:
            self._report_answers()

    def _report_answers(self) -> None:
        for callback in self._answering():
            rows = []
            for index, tokens, is_right in callback.shown:
                record = callback.dataset.records[callback.dataset.record_of(index)]
                written = cast(Any, self.processing_class).tokenizer.decode(tokens, skip_special_tokens=True)
                rows.append((record["id"], record["question"], record["answer"], written, is_right))
            report_answers(self.callback_handler.callbacks, rows, self.state.global_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`], outside the time of training."""
        self.throughput.stop()
        if self.model.config.stage < self.curriculum.last_stage:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, EarlyStoppingCallback):
                    callback.early_stopping_patience_counter = -1  # so that it is 0 at most after this evaluation
        return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As [`~transformers.Trainer.evaluation_loop`]; an evaluation is at the model's stage, and has the answers."""
        dataset, is_evaluation = getattr(dataloader, "dataset", None), description == "Evaluation"
        stage = self.model.config.stage
        if is_evaluation and isinstance(dataset, StageDataset) and dataset is not self.train_dataset:
            dataset.set_stage(stage)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = cast(dict[str, float], output.metrics)
        for callback in self._answering():
            if is_evaluation and callback.dataset is dataset:
                measure = callback.measure_once if self.is_in_train else callback.measure
                answers = measure(self.model, stage, disable_tqdm=bool(self.args.disable_tqdm))
                for name, value in answers.items():
                    metrics[f"{metric_key_prefix}_{name.removeprefix(ANSWERS)}"] = value
        return output

    def _load_best_model(self) -> None:
        """As [`~transformers.Trainer`]; the last answers of the log are then those of the model that is kept."""
        super()._load_best_model()
        history, step = self.state.log_history, self.state.best_global_step
        rows = [entry for entry in history if f"{ANSWERS}accuracy" in entry]
        best = [entry for entry in history if entry["step"] == step and "eval_accuracy" in entry]
        if best and rows and rows[-1]["step"] != step:
            names = {name: f"eval_{name.removeprefix(ANSWERS)}" for name in rows[-1] if name.startswith(ANSWERS)}
            answers = {name: best[-1][logged] for name, logged in names.items()}
            self.log({**answers, f"{ANSWERS}best_step": cast(int, step)})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        As [`~transformers.Trainer.save_model`], with which a checkpoint begins, outside the time of training. In a
        folder other than a checkpoint's the model is complete or not there; weights of another form that lay there go.
        """
        from ..evaluation.checkpoints import ADAPTERS, MODEL, remove, replace_checkpoint

        self.throughput.stop()
        has_adapters, is_writer = hasattr(self.model, "peft_config"), self.args.should_save
        if _internal_call and output_dir is not None:  # a checkpoint's, which has a mark when it is complete
            if is_writer:
                remove(output_dir, MODEL if has_adapters else ADAPTERS)
            super().save_model(output_dir, _internal_call=True)
            if has_adapters and is_writer:
                self.model.config.save_pretrained(output_dir)  # also where no callback is asked (SIGTERM)
            return
        with replace_checkpoint(output_dir or str(self.args.output_dir), is_writer=is_writer) as folder:
            super().save_model(str(folder), _internal_call=True)
            if has_adapters and is_writer:
                self.model.config.save_pretrained(folder)  # peft saves the adapters only
            if is_sharded(self.model):
                self.accelerator.wait_for_everyone()  # each rank may have written a part
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """
        As [`~transformers.Trainer`]; tiles that came to the device as bytes are normalised there, and the model is
        told to smooth labels.
        """
        inputs = super()._prepare_inputs(inputs)
        if self.args.label_smoothing_factor and "labels" in inputs:
            inputs["smoothing"] = self.args.label_smoothing_factor
        pixel_values, normalize = inputs.get("pixel_values"), getattr(self.processing_class, "normalize_pixels", None)
        if normalize and pixel_values is not None and pixel_values.dtype == torch.uint8:
            inputs["pixel_values"] = normalize(pixel_values)
        return inputs

    def create_model_card(
        self,
        *args: Any,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        README.md made from the run's files, in the place of the stock trainer's (and of peft's); by keyword only.

        Raises:
            ValueError: an argument of the stock trainer's whose value stands in the run's files, or one by its place.
        """
        if refused := [*args, *(name for name, value in kwargs.items() if value is not None)]:
            raise ValueError(
                f"{refused}: the card takes all but `language`, `license`, `tags` and `model_name` from the run's "
                "files. Leave them out, and give those by name."
            )
        from .card import write_card  # which reads scores, while a training step needs nothing of evaluation/

        if self.is_world_process_zero():
            write_card(
                str(self.args.output_dir),
                model_id=self.hub_model_id or model_name,
                language=language,
                license=license,
                tags=[tags] if isinstance(tags, str) else tags or (),
            )

    def _rates(self) -> dict[str, float]:
        """The learning rates of parts that have one of their own."""
        given: dict[str, Any] = {part: getattr(self.args, f"{part}_learning_rate", None) for part in PARTS}
        return {part: float(rate) for part, rate in given.items() if rate is not None}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """
        As [`~transformers.Trainer.create_optimizer`]; parts of the model may have a learning rate of their own.

        Raises:
            ValueError: of a part that is not trained, or of an optimizer that takes no groups of weights.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rates = self._rates()
        if is_new and rates:
            model = cast(torch.nn.Module, self.model)
            names = {id(param): name for name, param in model.named_parameters()}
            set_rates(optimizer, names, rates)
        return optimizer

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """As [`~transformers.Trainer.set_initial_training_values`], whose steps of an epoch the schedules go by."""
        values = super().set_initial_training_values(args, dataloader)
        self.steps_per_epoch, max_steps = values[1], values[-1]
        if isinstance(args, CoconutArguments) and args.logging_steps == CoconutArguments.logging_steps:
            args.logging_steps = max(1, min(args.logging_steps, max_steps // 10))  # a small run speaks too
        return values

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As [`~transformers.Trainer.train`]; a checkpoint of another run, or one that lacks its optimizer, is refused
        before anything of it is loaded.

        Raises:
            ValueError: see [`~trainer_callbacks.check_resumed`].
        """
        if isinstance(resume_from_checkpoint, str):
            folder = Path(resume_from_checkpoint)
            state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
            if not [*folder.glob("optimizer*"), *folder.glob("global_step*")]:
                raise ValueError(
                    f"{folder} has no optimizer (`save_only_model`), so that a resumed run would begin again with its "
                    "learning rate and moments. Begin a new run with its weights (`--model_name_or_path`), or resume "
                    "from a whole checkpoint."
                )
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, CurriculumCallback):
                    callback.check_resumed(self.args, state, self.model)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def plan(self) -> RunPlan:
        """The stages and the learning rate of a training, without beginning one."""
        values = self.set_initial_training_values(self.args, self.get_train_dataloader())
        per_epoch, max_steps = values[1], values[6]
        batch_size = global_batch_size(self.args, self.state)
        stages = []
        numbers = range(math.ceil(max_steps / per_epoch))
        for stage, epochs in groupby(numbers, self.curriculum.stage):
            first, *later = epochs
            stop = (later[-1] if later else first) + 1
            stages.append((stage, first * per_epoch, min(stop * per_epoch, max_steps)))
        if self.args.lr_scheduler_type in ADAPTIVE_SCHEDULES:
            return RunPlan(per_epoch, max_steps, batch_size, stages, ())
        scheduler = self._make_schedule(max_steps, SGD([torch.zeros(1)], lr=self.args.learning_rate))
        return RunPlan(per_epoch, max_steps, batch_size, stages, getattr(scheduler, "lr_lambdas", ()))

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """
        As [`~transformers.Trainer.create_scheduler`]; with `restart_schedule` warm-up and cosine for each stage, and
        `warmup_stable_decay` that is not told its steps goes down over the last half of the stage that a run ends in.
        """
        if self.lr_scheduler is None:
            set_scheduler(self, self._make_schedule(num_training_steps, optimizer or self.optimizer))
        return super().create_scheduler(num_training_steps, optimizer)

    def _make_schedule(self, num_training_steps: int, optimizer: Optimizer) -> LRScheduler:
        args, curriculum = self.args, self.curriculum
        warmup = args.get_warmup_steps(num_training_steps)
        starts = [epoch * self.steps_per_epoch for epoch in curriculum.starts]
        is_constant = args.lr_scheduler_type == SchedulerType.CONSTANT and not curriculum.restart_schedule
        if hasattr(getattr(optimizer, "optimizer", optimizer), "optimizer_dict") and not is_constant:
            raise ValueError(
                f"`--optim {args.optim}` has an optimizer for each weight, whose rate no schedule reaches: it stays "
                f"{args.learning_rate}. Say so by `--lr_scheduler_type constant` without `--restart_schedule`, or "
                "choose another `--optim`."
            )
        if curriculum.restart_schedule:
            unused = [f"--lr_scheduler_type {SchedulerType(args.lr_scheduler_type).value}"]
            unused = [] if args.lr_scheduler_type in DEFAULT_SCHEDULES else unused
            unused += ["--lr_scheduler_kwargs"] if args.lr_scheduler_kwargs else []
            if unused:
                logger.warning(
                    f"`{'`, `'.join(unused)}` is not used: with `--restart_schedule` each stage has a warm-up and a "
                    "cosine."
                )
            end = max(num_training_steps, curriculum.num_epochs * self.steps_per_epoch)
            return LambdaLR(optimizer, restarting([*starts, end], warmup))
        own: dict[str, Any] = dict(cast(Any, args.lr_scheduler_kwargs) or {})
        is_told = "num_decay_steps" in own or "num_stable_steps" in own
        if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and not is_told:
            begun = max(start for start in starts if start < num_training_steps)
            own["num_decay_steps"] = min((num_training_steps - begun + 1) // 2, num_training_steps - warmup)
        return get_scheduler(args.lr_scheduler_type, optimizer, warmup, num_training_steps, own)
