"""What multicoco adds to the stock `Trainer`: curriculum, answers while training, comparisons by stage, checkpoints.

    Trainer(model, args, train_dataset=dataset, data_collator=ReasoningCollator(processor),
            callbacks=[CurriculumCallback(curriculum, dataset)])          # args.remove_unused_columns=False

Stages are a pure function of the epoch, so resuming is exact and ranks agree without talking. This file knows no
tokenizer.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .compat import add_to_log, delete_first, forget_best, most_of_all_ranks, rank, world_size
from .curriculum import CurriculumArguments, written_tokens
from .data_multicoco import ReasoningCollator, StageDataset


logger = logging.get_logger(__name__)

COMPLETE = "complete"  # the file that marks a checkpoint


def check_ranks_agree(dataset: StageDataset, device: torch.device) -> None:
    """
    Checks that all ranks have the same samples: each takes its share by their numbers. Every rank must call it.

    Raises:
        ValueError: on all of them, if they do not.
    """
    if world_size() > 1:
        number = int(dataset.digest()[:15], 16)
        if most_of_all_ranks(number, device) != -most_of_all_ranks(-number, device):
            raise ValueError(
                "`dataset` is not the same on all ranks, so that samples would be lost or repeated; that of rank "
                f"{rank()} has {len(dataset)} samples of {len(dataset.records)} records. Has a file changed since the "
                "start, or does one machine lack some? Start again with the same files everywhere."
            )


def check_devices(args: TrainingArguments) -> None:
    """
    Checks that this process has one device at most.

    Raises:
        ValueError: it has several, over which `Trainer` would spread each batch by `torch.nn.DataParallel`.
    """
    count = getattr(args, "n_gpu", 1)
    if count > 1:
        raise ValueError(
            f"This process sees {count} GPUs, and `Trainer` would split each batch over them: rows by rows, but "
            "pictures by tiles, so that rows would lose theirs. Give each GPU a process, `torchrun --nproc_per_node "
            f"{count} train.py ...`, or show it one, `CUDA_VISIBLE_DEVICES=0`."
        )


class CurriculumCallback(TrainerCallback):
    """
    Moves the data to the stage of the epoch that begins, and keeps the model's configuration in step with it.

    At a new stage Adam's moments are cleared in place (`reset_optimizer_every`), on one process, DDP and ZeRO-1/2/3.
    Every checkpoint says which stage it was trained at and how many thoughts to use; so does the log.

    Args:
        curriculum ([`CurriculumArguments`]): The schedule.
        datasets ([`StageDataset`]): The training data, and any evaluation data that follows the same stage.
    """

    def __init__(self, curriculum: CurriculumArguments, *datasets: StageDataset):
        self.curriculum, self.datasets = curriculum, datasets
        self.stage = 0
        self._totals: torch.Tensor | None = None  # since the last log: of step losses times labels, and of labels
        self._hook: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begins at the stage of the epoch that a resumed run is in."""
        if getattr(args, "remove_unused_columns", False):
            raise ValueError("`remove_unused_columns` is True, but the collator reads `images`. Set it to False.")
        check_devices(args)
        for dataset in self.datasets:
            check_ranks_agree(dataset, args.device)
        self._enter(int(state.epoch or 0), model, processing_class)
        self._unhook()  # of a run that was interrupted, maybe of another model
        if self.curriculum.decodes_steps:
            self._hook = model.register_forward_hook(self._count_step_loss, with_kwargs=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the model without the hook that reads its step loss."""
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._totals = None

    def _count_step_loss(self, model: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training or output.get("step_loss") is None:
            return
        num_labels = (kwargs["labels"][:, 1:] != -100).sum(dim=1)  # (B,)
        has_texts = (kwargs["step_ids"] != -100).flatten(1).any(dim=1)  # (B,): only these have a part in the loss
        divisor = kwargs.get("num_items_in_batch")
        total = output.step_loss.detach() * (num_labels.sum() if divisor is None else divisor)
        totals = torch.stack([total, (num_labels * has_texts).sum()]).to(_widest_float(total.device))
        self._totals = totals if self._totals is None else self._totals + totals

    def _step_loss(self, device: torch.device) -> dict[str, float]:
        """The mean step loss since the last log, of all ranks together; every rank must call it."""
        zeros = torch.zeros(2, dtype=_widest_float(device), device=device)
        totals = zeros if self._totals is None else self._totals
        self._totals = None
        if world_size() > 1:
            dist.all_reduce(totals)
        total, num_labels = totals.tolist()
        return {"step_loss": total / num_labels} if num_labels else {}

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Moves data and configuration to the epoch's stage, and clears the moments if it is a new one."""
        epoch = int(state.epoch or 0)
        self._enter(epoch, model, processing_class)
        resumed_inside = (state.epoch or 0) % 1 > 0  # the epoch began before the interruption
        if epoch == 0 or resumed_inside:
            return
        is_new_stage = self.stage != self.curriculum.stage(epoch - 1)
        every = self.curriculum.reset_optimizer_every
        if every == "epoch" or (every == "stage" and is_new_stage):
            reset_optimizer(optimizer)
            logger.info(f"Stage {self.stage}: the optimizer's moments are cleared.")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        """Adds the stage, its number of thoughts and the step loss to a logged loss."""
        if "loss" in logs:
            num_thoughts = self.curriculum.num_thoughts(self.stage) or 0
            steps = self._step_loss(args.device) if self.curriculum.decodes_steps else {}
            stage = {"curriculum/stage": self.stage, "curriculum/num_thoughts": num_thoughts}
            add_to_log(state, logs, steps | stage)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Saves the configuration where the trainer has not."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and not (folder / "config.json").exists():  # of adapters, peft saves no config
            model.config.save_pretrained(folder)

    def _enter(self, epoch: int, model: PreTrainedModel, processing_class: Any) -> None:
        self.stage = self.curriculum.stage(epoch)
        for dataset in self.datasets:
            dataset.set_stage(self.stage, epoch)
        num_thoughts = self.curriculum.num_thoughts(self.stage)
        rules = {name: getattr(self.curriculum, name) for name in ("mode", "c_thought", "max_latent_stage")}
        weight = self.curriculum.step_loss_weight if self.curriculum.decodes_steps else 0.0
        model.config.set_trained(**rules, stage=self.stage, num_thoughts=num_thoughts, step_loss_weight=weight)
        if hasattr(processing_class, "num_thoughts"):
            processing_class.num_thoughts = num_thoughts


def _widest_float(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's chips do not have


def reset_optimizer(optimizer: Any) -> None:
    """Clears all moments and step counts in place, under any number of wrappers (accelerate's, DeepSpeed's)."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif name == "step":
                state[name] = 0


class CompletionCallback(TrainerCallback):
    """
    Marks a checkpoint as complete once all ranks have written all of it; [`last_complete_checkpoint`] reads the mark.

    A run that is killed while it saves leaves a folder without the mark, which is never resumed from.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the mark from checkpoints that this run will write again."""
        if args.save_total_limit == 1:
            raise ValueError(
                "`save_total_limit` is 1: a run killed while it saves would leave nothing complete. Use at least 2."
            )
        if state.is_world_process_zero:
            for checkpoint in Path(str(args.output_dir)).glob("checkpoint-*"):
                if _step(checkpoint) > state.global_step:  # about to be written again
                    (checkpoint / COMPLETE).unlink(missing_ok=True)
                    delete_first(checkpoint)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Marks the checkpoint, once every rank has written its part."""
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint in `output_dir` that was written to its end, or `None`."""
    complete = [path.parent for path in Path(output_dir).glob(f"checkpoint-*/{COMPLETE}")]
    return str(max(complete, key=_step)) if complete else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


class AnswerCallback(TrainerCallback):
    """
    Lets the model answer the evaluation data at the end of each stage (or epoch) and logs the accuracy.

    All ranks share the work, run the same number of `generate` calls, and each sample is counted once.

    Args:
        curriculum ([`CurriculumArguments`]): Says when a stage ends.
        dataset ([`StageDataset`]): What is asked.
        collator ([`ReasoningCollator`]): Makes the batches of prompts.
        is_correct (`Callable[[Sequence[int], int], bool]`): Judges the new tokens of the sample with this index.
        batch_size (`int`, defaults to 64): Prompts per `generate` call of one rank.
        every (`str`, defaults to `"stage"`): `"stage"`, `"epoch"` or `"end"`.
        generate_kwargs (`dict`, *optional*): More arguments of `generate`.

    [`StageTrainer`] also takes the answers into the metrics of its evaluations of the same data set.
    """

    def __init__(
        self,
        curriculum: CurriculumArguments,
        dataset: StageDataset,
        collator: ReasoningCollator,
        is_correct: Callable[[Sequence[int], int], bool],
        *,
        batch_size: int = 64,
        every: str = "stage",
        generate_kwargs: dict[str, Any] | None = None,
    ):
        self.curriculum, self.dataset, self.collator, self.is_correct = curriculum, dataset, collator, is_correct
        self.batch_size, self.every, self.generate_kwargs = batch_size, every, generate_kwargs or {}
        self.pending: dict[str, float] = {}
        self.seconds = 0.0  # of `pending`, which are none of training
        self._latest: dict[str, float] = {}  # what the weights as they are have answered

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses data of which ranks have different samples."""
        check_ranks_agree(self.dataset, args.device)
        self._latest = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the answers of weights that are about to change."""
        self._latest = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the answers: other weights may have been loaded."""
        self._latest = {}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measures after the last step of a stage (or epoch), or of the run."""
        # Not `on_epoch_end`: that comes after the checkpoint of an epoch's last step, which would lack the answers.
        is_last = state.global_step >= state.max_steps
        if not is_last and state.epoch % 1 > 0:
            return
        epoch = math.ceil(state.epoch)  # epochs that are done
        stage = self.curriculum.stage(epoch - 1)
        if is_last or self.every == "epoch" or (self.every == "stage" and self.curriculum.stage(epoch) != stage):
            begun = perf_counter()
            if hasattr(optimizer, "eval"):  # schedule-free ones train other weights than they give; as an evaluation
                optimizer.eval()
            self.pending = self.measure_once(model, stage, disable_tqdm=bool(args.disable_tqdm))
            self.seconds = perf_counter() - begun
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        """Adds what was measured to the log that it asked for."""
        add_to_log(state, logs, self.pending)
        self.pending, self.seconds = {}, 0.0

    def measure_once(self, model: PreTrainedModel, stage: int, *, disable_tqdm: bool = False) -> dict[str, float]:
        """As [`~AnswerCallback.measure`], while a run trains: not again before its next step."""
        if self._latest.get("eval/stage") != stage:
            self._latest = self.measure(model, stage, disable_tqdm=disable_tqdm)
        return dict(self._latest)

    def measure(self, model: PreTrainedModel, stage: int, *, disable_tqdm: bool = False) -> dict[str, float]:
        """Accuracy and mean number of new tokens at `stage`, over all ranks."""
        own = range(rank(), len(self.dataset), world_size())
        share = math.ceil(len(self.dataset) / world_size())  # the same for all ranks
        asked = [*own, rank() % len(self.dataset)][:share]  # a surplus place repeats a sample, and is not counted
        totals = torch.zeros(3, dtype=torch.long)  # correct, tokens, samples
        was_training = model.training
        model.eval()
        starts = range(0, share, self.batch_size)
        for start in tqdm(starts, desc=f"answers at stage {stage}", leave=False, disable=disable_tqdm or rank() > 0):
            places = slice(start, start + self.batch_size)
            for index, tokens in zip(own[places], self._answers(model, asked[places], stage), strict=False):
                totals += torch.tensor([self.is_correct(tokens, index), len(tokens), 1])
        model.train(was_training)
        if world_size() > 1:
            totals = totals.to(model.device)
            dist.all_reduce(totals)
        correct, num_tokens, count = totals.tolist()
        return {
            "eval/stage": stage,
            "eval/accuracy": correct / count,
            "eval/new_tokens": num_tokens / count,
            "eval/num_thoughts": self.curriculum.num_thoughts(stage) or 0,
            "eval/samples": count,
        }

    @torch.no_grad()
    def _answers(self, model: Any, indices: Sequence[int], stage: int) -> list[list[int]]:
        """New tokens of each of these samples, without padding."""
        prompts = [self.dataset.prompt(index, self.dataset.num_thoughts(index, stage)) for index in indices]
        batch = self.collator.prompts(prompts)
        length, pad = batch["input_ids"].shape[1], self.collator.pad_token_id
        config = self.generate_kwargs.get("generation_config") or model.generation_config
        ends = self.generate_kwargs.get("eos_token_id", config.eos_token_id)
        batch = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        settings = {"max_new_tokens": self.dataset.max_new_tokens(), "do_sample": False, "num_beams": 1}
        output = model.generate(**batch, **(settings | self.generate_kwargs))
        return [written_tokens(row, ends, pad) for row in output[:, length:].tolist()]


class StageComparisonCallback(TrainerCallback):
    """
    Lets evaluations be compared only within a stage: a new one begins with no best model, and with nothing that a
    learning rate which follows the evaluations (`reduce_lr_on_plateau`, `greedy`) has seen. The rate itself stays.

    Args:
        curriculum ([`CurriculumArguments`]): Says when a stage begins.
    """

    def __init__(self, curriculum: CurriculumArguments):
        self.curriculum = curriculum

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As at the beginning of an epoch, before which a run may evaluate; refuses a run that never would."""
        by_epoch = args.eval_strategy == "epoch"
        last, unit = (state.num_train_epochs, "epochs") if by_epoch else (state.max_steps, "steps")
        if args.eval_strategy != "no" and args.eval_delay > last:
            raise ValueError(
                f"`--eval_delay` is {args.eval_delay}, but the run ends after {last} {unit}, so that nothing would be "
                "evaluated. Lower it, or leave out `--eval_strategy`."
            )
        self.on_epoch_begin(args, state, control, **kwargs)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Forgets the best of another stage."""
        epoch = state.epoch or 0
        if epoch == 0 or epoch % 1 > 0 or self.curriculum.stage(int(epoch)) == self.curriculum.stage(int(epoch) - 1):
            return
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        forget_best(lr_scheduler)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says so if there is no best model to load."""
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            logger.warning(
                "`load_best_model_at_end`: no evaluation of the last stage gave a number, so there is no best model. "
                "The model is that of the last step."
            )
