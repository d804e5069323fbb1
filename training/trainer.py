"""The trainer: the stock one, with schedules by stage, and our model card. Knows no settings file."""

import math

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..curriculum import CurriculumArguments, final_answer
from ..data_multicoco import StageDataset
from ..processing_multicoco import MultiCoCoProcessor
from .card import write_card


class EpochLengthSampler(LengthGroupedSampler):
    """Groups samples by length in an order drawn from seed and epoch: the same on every rank and after a resume."""

    def __init__(self, dataset: StageDataset, batch_size: int, seed: int):
        super().__init__(batch_size, lengths=[len(sample["input_ids"]) for sample in dataset])
        self.dataset, self.seed = dataset, seed

    def __iter__(self):
        self.generator = torch.Generator().manual_seed((self.seed << 32) + self.dataset.epoch)
        return super().__iter__()


class StageTrainer(Trainer):
    """
    The stock trainer, with a learning rate that starts again (warm-up, then down) at every stage, an order by length
    that survives a resume, and our model card.
    """

    def __init__(self, *args, curriculum: CurriculumArguments, **kwargs):
        self.curriculum = curriculum
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochLengthSampler(self.train_dataset, batch_size, self.args.seed)

    def create_model_card(self, model_name: str | None = None, license: str | None = None, tags=()):
        """README.md made from the run's files, in the place of the stock trainer's (and of peft's)."""
        if self.is_world_process_zero():
            write_card(self.args.output_dir, model_id=self.hub_model_id or model_name, license=license, tags=tags)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
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

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)


def make_judge(dataset: StageDataset, processor: MultiCoCoProcessor):
    """Exact match of what the model writes after the answer mark with the record's answer."""

    def is_correct(tokens, index: int) -> bool:
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return final_answer(text) == dataset.records[index]["answer"]

    return is_correct
