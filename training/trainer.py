"""The trainer: the stock one, with schedules by stage, and our model card. Knows no settings file, asks nothing."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..compat import put_first, set_scheduler
from ..curriculum import CurriculumArguments
from ..data_multicoco import StageDataset


class EpochLengthSampler(LengthGroupedSampler):
    """Groups samples by length in an order drawn from seed and epoch: the same on every rank and after a resume."""

    def __init__(self, dataset: StageDataset, batch_size: int, seed: int):
        super().__init__(batch_size, lengths=[len(dataset[index]["input_ids"]) for index in range(len(dataset))])
        self.dataset, self.seed = dataset, seed

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed((self.seed << 32) + self.dataset.epoch)
        return super().__iter__()


class StageTrainer(Trainer):
    """
    The stock trainer, with a learning rate that starts again (warm-up, then down) at every stage, an order by length
    that survives a resume, and our model card. Callbacks that are given come before its own, so that what they add to
    the log is reported.

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
        self.curriculum = curriculum
        super().__init__(*args, callbacks=list(callbacks or ()), **kwargs)  # type: ignore[misc]  # never by its place
        put_first(self, callbacks or ())

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else cast(StageDataset, train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthSampler(dataset, batch_size, self.args.seed)

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
