"""The trainer: the stock one, with schedules by stage, its speed in the log, and our model card. Asks nothing.

It knows no settings file.
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
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..compat import put_first, set_scheduler, world_size
from ..curriculum import CurriculumArguments
from ..data_multicoco import StageDataset
from ..trainer_callbacks import AnswerCallback


SPEED = "speed/"  # begins the names of what depends on the time a run took


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

    Args:
        curriculum ([`CurriculumArguments`]): Says how long stages are.
        callbacks (`Sequence[TrainerCallback]`, *optional*): As of [`~transformers.Trainer`], like all other arguments.
    """

    train_dataset: StageDataset
    optimizer: Optimizer  # made before its schedule

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
            callbacks = self.callback_handler.callbacks
            answering = sum(callback.seconds for callback in callbacks if isinstance(callback, AnswerCallback))
            logs = logs | self.throughput.rates(self.args.device, other_seconds=answering)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`], outside the time of training."""
        self.throughput.stop()
        return super().evaluate(*args, **kwargs)

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
            return
        with replace_checkpoint(output_dir or str(self.args.output_dir), is_writer=is_writer) as folder:
            super().save_model(str(folder), _internal_call=True)
            if has_adapters and is_writer:
                self.model.config.save_pretrained(folder)  # peft saves the adapters only
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As [`~transformers.Trainer`]; tiles that came to the device as bytes are normalised there."""
        inputs = super()._prepare_inputs(inputs)
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
