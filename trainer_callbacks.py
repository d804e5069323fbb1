"""What multicoco adds to the stock `Trainer`: curriculum, answers while training, comparisons by stage, checkpoints.

    Trainer(model, args, train_dataset=dataset, data_collator=ReasoningCollator(processor),
            callbacks=[CurriculumCallback(curriculum, dataset)])          # args.remove_unused_columns=False

Stages are a pure function of the epoch, so resuming is exact and ranks agree without talking. This file knows no
tokenizer.
"""

import hashlib
import inspect
import math
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .compat import add_to_log, delete_first, forget_best, is_finite, most_of_all_ranks, rank, world_size
from .configuration_multicoco import feedback_of
from .curriculum import CurriculumArguments, written_tokens
from .data_multicoco import ReasoningCollator, StageDataset


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is

NUM_SHOWN = 8  # answers that are kept to be shown
COMPLETE = "complete"  # the file that marks a checkpoint
IDENTITY = "multicoco"  # where a checkpoint's trainer_state.json says which run it is of
# Settings of `TrainingArguments` that a resumed run takes from its checkpoint, or would go on with only from there.
KEPT = (
    *("optim", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "optim_args"),
    *("optim_target_modules", "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy"),
    "dataloader_drop_last",
)
RATES = ("vision_learning_rate", "projector_learning_rate", "thought_learning_rate")  # of `CoconutArguments`
NEVER_CHANGED = (
    *(*KEPT, *RATES, "global_batch_size", "world_size", "trained", "mode", "c_thought"),
    *("thought_feedback", "thought_sweeps"),
)
OF_FILES = ("train_file", "train_weights", "model_name_or_path")  # all of these may be elsewhere, or others


def global_batch_size(args: TrainingArguments, state: TrainerState) -> int:
    """Samples of an optimizer step, of all ranks, which share a batch with `split_batches`."""
    found = state.train_batch_size if args.auto_find_batch_size else None
    ranks = 1 if getattr(args.accelerator_config, "split_batches", False) else args.world_size
    return (found or args.train_batch_size) * args.gradient_accumulation_steps * ranks


def identity(
    curriculum: CurriculumArguments, datasets: Sequence[StageDataset], args: TrainingArguments, state: Any, model: Any
) -> dict[str, Any]:
    """Which run a checkpoint is of: all that must be the same when it is resumed, and how long it was to be."""
    num_trained = sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters() if param.requires_grad)
    adapters, config = list(getattr(model, "peft_config", {}).values()), model.config
    kind = "adapters" if adapters else "weights"
    return {
        "train_file": datasets[0].digest()[:16] if datasets else None,
        "train_weights": [float(weight) for _, weight in datasets[0].records.by_set()] if datasets else None,
        # Whole weights are all those of the checkpoint; adapters are added to what is given now.
        "model_name_or_path": adapters[0].base_model_name_or_path if adapters else None,
        "seed": args.seed if args.data_seed is None else [args.seed, args.data_seed],
        "global_batch_size": global_batch_size(args, state),
        "world_size": args.world_size,
        "trained": f"{num_trained} {kind}",
        **vars(curriculum),
        **{name: str(getattr(getattr(args, name), "value", getattr(args, name))) for name in KEPT},
        **{name: str(getattr(args, name, None)) for name in RATES},
        "thought_feedback": feedback_of(curriculum.mode, config.thought_feedback),
        "thought_sweeps": config.thought_sweeps,
        "max_steps": state.max_steps,
    }


def check_resumed(before: Mapping[str, Any] | None, now: Mapping[str, Any], allowed: Collection[str]) -> None:
    """
    Checks that a run that is resumed is the one that its checkpoint is of; one of an older version does not tell.

    Args:
        before, now (`Mapping`): What [`identity`] gave to the run of the checkpoint, and gives to this one.
        allowed (`Collection[str]`): Names of what may differ.

    Raises:
        ValueError: something else differs, or the checkpoint has no optimizer.
    """
    changed = [name for name in now if before and before.get(name, now[name]) != now[name] and name not in allowed]
    if before and "max_steps" in changed:
        changed.remove("max_steps")
        logger.warning(
            f"The checkpoint is of a run of {before['max_steps']} steps, this one has {now['max_steps']}: from here "
            "on the learning rate is that of the longer or shorter run."
        )
    if changed and before:
        told = "; ".join(f"`{name}` was {before[name]}, is {now[name]}" for name in changed)
        free = [name for name in changed if name not in NEVER_CHANGED]
        cure = f"; `--allow_changed {' '.join(free)}` goes on with what is given now" if free == changed else ""
        raise ValueError(
            f"The checkpoint is of another run: {told}. Give what it was trained with{cure}; or begin a new run with "
            "its weights (`--model_name_or_path` that checkpoint, and another `--output_dir`)."
        )


# What classes add to `param_groups` in their first step: stable_adamw and DeepSpeed's FusedAdam, grokadamw.
ADDED_TO_GROUPS = ("step", "state")


def check_ranks_agree(dataset: StageDataset, device: torch.device) -> None:
    """
    Checks that all ranks have the same samples: each takes its share by their numbers. Every rank must call it.

    Raises:
        ValueError: on all of them, if they do not.
    """
    if world_size() > 1:
        number = int(hashlib.sha256(f"{dataset.digest()} {dataset.seed}".encode()).hexdigest()[:15], 16)
        if most_of_all_ranks(number, device) != -most_of_all_ranks(-number, device):
            raise ValueError(
                "`dataset` is not the same on all ranks, so that samples would be lost or repeated; that of rank "
                f"{rank()} has {len(dataset)} samples of {len(dataset.records)} records. Has a file changed since the "
                "start, or does one machine lack some? Start again with the same files everywhere."
            )


def diverged(args: TrainingArguments, state: TrainerState, what: str) -> FloatingPointError:
    """The error that ends a training whose numbers are none."""
    good = last_complete_checkpoint(str(args.output_dir))
    return FloatingPointError(
        f"Step {state.global_step}: the training has diverged ({what}), so nothing more is saved. The last good "
        f"checkpoint is {good or 'the model it started from'}. Lower `learning_rate` (now {args.learning_rate}), or "
        "raise `warmup_steps`, and start again from there."
    )


def check_finite(args: TrainingArguments, state: TrainerState, model: Any) -> None:
    """
    Checks that all weights are numbers, which waits for the device; every rank must call it.

    Raises:
        FloatingPointError: on all of them, if some are not.
    """
    if not is_finite(model, args.device):
        raise diverged(args, state, "some of its weights are NaN or infinite")


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

    At a new stage the optimizer forgets what it has learned (`reset_optimizer_every`), on one process, DDP, FSDP2 and
    ZeRO-1/2/3; one that cannot is refused at the start.
    Every checkpoint says which stage it was trained at and how many thoughts to use; so does the log.

    Args:
        curriculum ([`CurriculumArguments`]): The schedule.
        datasets ([`StageDataset`]): The training data, and any evaluation data that follows the same stage.
        allow_changed (`Collection[str]`, *optional*): What may differ from the run that is resumed: `train_file`,
            `train_weights`, `seed`, fields of the curriculum, and for adapters `model_name_or_path`, if their base
            was moved. All else that changes what a resumed run is raises.
    """

    def __init__(self, curriculum: CurriculumArguments, *datasets: StageDataset, allow_changed: Collection[str] = ()):
        known = {item.name for item in fields(curriculum)} | {*OF_FILES, "seed"}
        if refused := [name for name in allow_changed if name not in known or name in NEVER_CHANGED]:
            raise ValueError(
                f"`allow_changed` has {refused}; what a resumed run can go on with otherwise is "
                f"{sorted(known - {*NEVER_CHANGED})}."
            )
        self.curriculum, self.datasets, self.allow_changed = curriculum, datasets, allow_changed
        self.stage = 0
        self._is_new = False  # whether no loss of the stage has been logged
        self._step = 0  # the last that was done, while a run lasts
        self._totals: torch.Tensor | None = None  # since the last log: of step losses times labels, and of labels
        self._hook: Any = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begins at the stage of the epoch that a resumed run is in; refuses an optimizer that it could not reset."""
        if getattr(args, "remove_unused_columns", False):
            raise ValueError("`remove_unused_columns` is True, but the collator reads `images`. Set it to False.")
        check_devices(args)
        if args.auto_find_batch_size and self._step > state.global_step:
            raise ValueError(
                f"Memory ran out after step {self._step}, and `--auto_find_batch_size` would begin anew at step "
                f"{state.global_step} with weights that have been trained already. Start again with "
                f"`--per_device_train_batch_size {state.train_batch_size}` or less; later stages need more memory."
            )
        for dataset in self.datasets:
            check_ranks_agree(dataset, args.device)
        first = max(1, math.ceil(state.epoch or 0))  # at the start of a resumed epoch comes its reset
        if optimizer is not None and any(map(self._resets, range(first, state.num_train_epochs))):
            check_can_be_reset(optimizer)
        self.check_resumed(args, state, model)
        kept: Any = state.stateful_callbacks  # what a checkpoint has beside its numbers
        kept[IDENTITY] = identity(self.curriculum, self.datasets, args, state, model)
        ends_in, last = self.curriculum.stage(max(0, state.num_train_epochs - 1)), self.curriculum.last_stage
        if ends_in < last:
            logger.warning(
                f"The run ends in stage {ends_in} of {last}: steps that later stages replace stay written words. The "
                f"whole schedule has {self.curriculum.num_epochs} epochs (`num_train_epochs`, without `max_steps`)."
            )
        self._enter(int(state.epoch or 0), model, processing_class)
        self._unhook()  # of a run that was interrupted, maybe of another model
        if self.curriculum.decodes_steps:
            self._hook = model.register_forward_hook(self._count_step_loss, with_kwargs=True)

    def check_resumed(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """See [`check_resumed`]; a state that was loaded from a checkpoint says which run that is of."""
        now = identity(self.curriculum, self.datasets, args, state, model)
        known: Any = state.stateful_callbacks
        if state.global_step and IDENTITY not in known:
            logger.warning_once(
                f"The checkpoint of step {state.global_step} does not tell which run it is of: an older version or "
                "another program wrote it. What is given now is taken on trust, and some defaults have changed: "
                f"`lr_scheduler_type` is {now['lr_scheduler_type']} and `warmup_steps` {now['warmup_steps']} now."
            )
        check_resumed(known.get(IDENTITY), now, self.allow_changed)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Lets an optimizer that trains other weights than it gives (schedule-free) give those at the end of a run."""
        self._step = state.global_step
        if state.global_step >= state.max_steps and hasattr(optimizer, "eval"):
            optimizer.eval()

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Leaves the model without the hook that reads its step loss; raises if its weights are no numbers."""
        self._unhook()
        self._step = 0
        check_finite(args, state, model)

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._totals = None

    def _count_step_loss(self, model: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training or kwargs.get("labels") is None:
            return
        if kwargs.get("step_ids") is None:
            raise ValueError(
                f"A batch has no `step_ids`, but `--step_loss_weight` is {self.curriculum.step_loss_weight}: without "
                "them there is no step loss. Collate by `ReasoningCollator`, or leave the flag out."
            )
        device = output.step_loss.device  # of a model on several devices not that of the labels
        num_labels = (kwargs["labels"][:, 1:] != -100).sum(dim=1).to(device)  # (B,)
        has_texts = (kwargs["step_ids"] != -100).flatten(1).any(dim=1).to(device)  # (B,): only these have a part in it
        divisor = kwargs.get("num_items_in_batch")
        count = num_labels.sum() if divisor is None else torch.as_tensor(divisor, device=device)
        total = output.step_loss.detach() * count
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
        self._is_new = self.stage != self.curriculum.stage(epoch - 1)
        if self._resets(epoch):
            reset_optimizer(optimizer)
            logger.info(f"Stage {self.stage}: the optimizer's moments are cleared.")

    def _resets(self, epoch: int) -> bool:
        """Whether this epoch, which is not the first, begins with a fresh optimizer."""
        is_new_stage = self.curriculum.stage(epoch) != self.curriculum.stage(epoch - 1)
        return {"epoch": True, "stage": is_new_stage, "never": False}[self.curriculum.reset_optimizer_every]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Adds the stage, its number of thoughts and the step loss to a logged loss; raises if that is no number."""
        if "loss" in logs:
            num_thoughts = self.curriculum.num_thoughts(self.stage) or 0
            steps = self._step_loss(args.device) if self.curriculum.decodes_steps else {}
            stage = {"curriculum/stage": self.stage, "curriculum/num_thoughts": num_thoughts}
            add_to_log(state, logs, steps | stage)
            if not math.isfinite(logs["loss"]) or not (args.fp16 or math.isfinite(logs.get("grad_norm", 0.0))):
                raise diverged(args, state, f"loss {logs['loss']}, norm of the gradient {logs.get('grad_norm')}")
            guessing = math.log(model.config.get_text_config().vocab_size)
            if self._is_new and logs["loss"] > guessing * (1 + self.curriculum.step_loss_weight):
                logger.warning(
                    f"Step {state.global_step}: with stage {self.stage} the loss has jumped to {logs['loss']:.3g}, "
                    f"more than guessing has ({guessing:.3g} a token). If it stays there, lower `learning_rate`, give "
                    "stages a warm-up (`restart_schedule`), or keep the moments (`reset_optimizer_every never`)."
                )
            self._is_new = False

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Saves the configuration where the trainer has not; raises if the weights are no numbers."""
        check_finite(args, state, model)
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
    """
    Lets an optimizer forget, in place: it is as a new one of its class on the same weights; the learning rate stays.

    Args:
        optimizer (`Optimizer`): Of any class that [`check_can_be_reset`] lets pass, in any number of wrappers
            (accelerate's, DeepSpeed's). One that averages weights (schedule-free) leaves the mean in the model.
    """
    wrappers, inner = _unwrapped(optimizer)
    for each in inner:
        if callable(getattr(each, "eval", None)):
            each.eval()  # else the new one would begin at the mean or beside it, by whether an evaluation came before
        if any(getattr(value, "is_paged", False) for state in each.state.values() for value in state.values()):
            _zero_paged(each.state)
            continue
        makers = [cast(Any, base).__init__ for base in type(each).__mro__]
        named = {name for maker in makers for name in inspect.signature(maker).parameters}
        for group in each.param_groups:
            group.update({name: value for name, value in each.defaults.items() if name in group.keys() - named})
            for name in ADDED_TO_GROUPS:
                group.pop(name, None)
        each.state.clear()  # before another one is made, which may fill as much memory
        each.state.update(_new(each, [dict(group) for group in each.param_groups]).state)
    for wrapper in wrappers:
        if getattr(wrapper, "_hp_optimizer_states_linked", False):  # ZeRO-1 and 2, bf16: as before the first step
            wrapper._hp_optimizer_states_linked = False
            groups = getattr(wrapper, "bit16_groups", None) or wrapper.bf16_groups
            for mapping in (param._hp_mapping for group in groups for param in group):
                if mapping is not None:
                    mapping.optim_fragment = None  # else the old state would stay in memory


def check_can_be_reset(optimizer: Any) -> None:
    """
    Checks that [`reset_optimizer`] reaches all that an optimizer has learned.

    Raises:
        ValueError: It keeps some of it elsewhere, or no other one can be made of its class.
    """
    wrappers, inner = _unwrapped(optimizer)
    zero = [wrapper for wrapper in wrappers if type(wrapper).__module__.startswith("deepspeed.")]
    for each in {type(each): each for each in inner}.values():
        package, reason = type(each).__module__.split(".")[0], ""
        if package == "lomo_optim":
            reason = "it updates the weights inside the backward pass, and keeps its state beside `state`"
        elif zero and callable(getattr(each, "eval", None)):
            reason = "under ZeRO it averages other copies of the weights than those of the model"
        elif type(each).__module__.startswith("deepspeed.runtime") or any(_keeps_elsewhere(each) for each in zero):
            reason = "DeepSpeed keeps a part of its state elsewhere (NVMe, ZenFlow, SuperOffload, `ratio`, Muon)"
        else:
            try:
                _new(each, [torch.nn.Parameter(torch.zeros(1))])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                reason = f"another one cannot be made from its `defaults` ({type(error).__name__}: {error})"
        if reason:
            raise ValueError(
                f"The optimizer {type(each).__module__}.{type(each).__qualname__} cannot be reset at a new stage: "
                f"{reason}. Set `--reset_optimizer_every never`, or choose another `--optim`."
            )


def _unwrapped(optimizer: Any) -> tuple[list[Any], list[Any]]:
    """The wrappers, outermost first, and what is in them: one optimizer, or (layer-wise ones) one for each weight."""
    wrappers = []
    while hasattr(optimizer, "optimizer"):
        wrappers.append(optimizer)
        optimizer = optimizer.optimizer
    return wrappers, list((getattr(optimizer, "optimizer_dict", None) or {None: optimizer}).values())


def _new(optimizer: Any, params: list[Any]) -> Any:
    """Another one of the same class and settings."""
    arguments = inspect.signature(type(optimizer)).parameters
    return type(optimizer)(params, **{name: value for name, value in optimizer.defaults.items() if name in arguments})


def _zero_paged(states: dict[Any, Any]) -> None:
    """bitsandbytes' state as it makes it; paged memory is never given back, so that a reset may not ask for more."""
    for state in states.values():
        for name, value in state.items():
            if name == "step":
                state[name] = 0
            elif isinstance(value, torch.Tensor) and not name.startswith("qmap"):  # tables, the same in all states
                value.zero_()


def _keeps_elsewhere(zero: Any) -> bool:
    names = ("swap_optimizer", "zenflow", "backup_optimizer")
    return any(getattr(zero, name, None) for name in names) or "SuperOffload" in type(zero).__name__


class CompletionCallback(TrainerCallback):
    """
    Marks a checkpoint as complete once all ranks have written all of it; [`last_complete_checkpoint`] reads the mark.

    A run that is killed while it saves leaves a folder without the mark, which is never resumed from.
    """

    was_stopped = False  # by a signal, before its end
    _saved = 0  # ns: when a checkpoint was last marked, or since when one would be of this run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the mark from checkpoints that this run will write again."""
        if args.save_total_limit == 1:
            raise ValueError(
                "`save_total_limit` is 1: a run killed while it saves would leave nothing complete. Use at least 2."
            )
        self.was_stopped = False
        if args.enable_jit_checkpoint:
            with tempfile.TemporaryFile(dir=str(args.output_dir)) as file:
                self._saved = os.fstat(file.fileno()).st_mtime_ns  # by the clock of that disk
        if state.is_world_process_zero:
            for checkpoint in Path(str(args.output_dir)).glob("checkpoint-*"):
                if _step(checkpoint) > state.global_step:  # about to be written again
                    (checkpoint / COMPLETE).unlink(missing_ok=True)
                    delete_first(checkpoint)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Marks the checkpoint, once every rank has written its part."""
        self._mark(state, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Marks a checkpoint that was saved without a word because the run was told to stop (SIGTERM)."""
        if not args.enable_jit_checkpoint:
            return
        files = list(Path(str(args.output_dir)).glob("checkpoint-*/trainer_state.json"))
        newest = max(files, key=_written, default=None)
        if newest is not None and _written(newest) > self._saved:
            self.was_stopped = state.global_step < state.max_steps
            self._mark(state, newest.parent)

    def _mark(self, state: TrainerState, checkpoint: Path) -> None:
        if dist.is_initialized():
            dist.barrier()
        self._saved = _written(checkpoint / "trainer_state.json")
        if state.is_world_process_zero:
            (checkpoint / COMPLETE).touch()


def _written(file: Path) -> int:
    """When a file was last written, in ns; 0 if there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


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
        self.shown: list[tuple[int, list[int], bool]] = []  # the first that this rank asked: index, new tokens, right
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
        self.shown = []
        was_training = model.training
        model.eval()
        starts = range(0, share, self.batch_size)
        for start in tqdm(starts, desc=f"answers at stage {stage}", leave=False, disable=disable_tqdm or rank() > 0):
            places = slice(start, start + self.batch_size)
            for index, tokens in zip(own[places], self._answers(model, asked[places], stage), strict=False):
                is_correct = self.is_correct(tokens, index)
                totals += torch.tensor([is_correct, len(tokens), 1])
                self.shown += [(index, tokens, is_correct)] * (len(self.shown) < NUM_SHOWN)
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
        if args.eval_strategy == "steps" and state.eval_steps > state.max_steps:
            raise ValueError(
                f"`--eval_steps` is {state.eval_steps} (`logging_steps`, if not given), but the run ends after "
                f"{state.max_steps} steps, so that nothing would be evaluated. Lower it, or leave out "
                "`--eval_strategy`."
            )
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
