"""The trainer: the stock one, with schedules by stage, and our model card. Knows no settings file, asks nothing."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..compat import put_first, set_scheduler
from ..curriculum import CurriculumArguments
from ..data_multicoco import StageDataset


class EpochLengthSampler(LengthGroupedSampler):
    """Groups samples by length in an order drawn from seed and epoch: the same on every rank and after a resume."""

    def __init__(self, dataset: StageDataset, batch_size: int, seed: int):
        super().__init__(batch_size, lengths=[len(sample["input_ids"]) for sample in dataset])
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
        args, kwargs: As of [`~transformers.Trainer`].
    """

    def __init__(self, *args: Any, curriculum: CurriculumArguments, callbacks: Sequence[Any] = (), **kwargs: Any):
        self.curriculum = curriculum
        super().__init__(*args, callbacks=list(callbacks), **kwargs)
        put_first(self, callbacks)

    def _get_train_sampler(self, train_dataset: StageDataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthSampler(self.train_dataset, batch_size, self.args.seed)

    def create_model_card(
        self, model_name: str | None = None, license: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        """README.md made from the run's files, in the place of the stock trainer's (and of peft's)."""
        from .card import write_card  # which reads scores, while a training step needs nothing of evaluation/

        if self.is_world_process_zero():
            write_card(self.args.output_dir, model_id=self.hub_model_id or model_name, license=license, tags=tags)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
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

            set_scheduler(self, torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor))
        return super().create_scheduler(num_training_steps, optimizer)
