"""The trainer: the stock one, with schedules and comparisons by stage, its speed in the log, and our model card.

It knows no settings file, and asks by `AnswerCallback` only.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, SchedulerType

from ..compat import put_first, set_scheduler, world_size
from ..curriculum import CurriculumArguments
from ..data_multicoco import StageDataset
from ..trainer_callbacks import AnswerCallback, StageComparisonCallback, check_devices


SPEED = "speed/"  # begins the names of what depends on the time a run took
ANSWERS = "eval/"  # begins the names of what `AnswerCallback` logs
METRICS = ("loss", "accuracy")  # of an evaluation with answers, by which models may be compared


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
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
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
        self.generator = torch.Generator().manual_seed((self.seed << 32) + self.dataset.epoch)
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
        return EpochLengthSampler(dataset, batch_size, self.args.seed)

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

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As [`~transformers.Trainer.save_model`], with which a checkpoint begins, outside the time of training."""
        self.throughput.stop()
        super().save_model(*args, **kwargs)

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

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """As [`~transformers.Trainer.create_scheduler`]; with `restart_schedule` warm-up and cosine for each stage."""
        if self.lr_scheduler is None and self.curriculum.restart_schedule:
            batch_size = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            steps_per_epoch = math.ceil(len(self.train_dataset) / batch_size)
            warmup = self.args.get_warmup_steps(num_training_steps)
            first = self.curriculum.first_epochs * steps_per_epoch
            later = self.curriculum.epochs_per_stage * steps_per_epoch

            def factor(step: int) -> float:
                length = first if step < first else later
                done = step if step < first else (step - first) % later
                cosine = 0.5 * (1 + math.cos(math.pi * done / length))
                return min(1.0, (done + 1) / max(1, warmup)) * (0.1 + 0.9 * cosine)

            set_scheduler(self, LambdaLR(optimizer or self.optimizer, factor))
        return super().create_scheduler(num_training_steps, optimizer)
