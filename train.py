"""Trains an InternVL to think: written reasoning first, continuous thoughts stage by stage.

    python train.py recipes/trails/coconut.yaml
    python train.py recipes/trails/coconut.yaml --learning_rate 5e-4 --seed 1          # flags win over the file
    deepspeed --num_gpus 8 train.py --deepspeed ds_configs/zero3.json recipes/aokvqa/coconut.yaml
    torchrun --nproc_per_node 8 train.py recipes/aokvqa/coconut.yaml
    python train.py --model_name_or_path OpenGVLab/InternVL3-1B --train_file mine.jsonl --mode coconut --output_dir out

The file is YAML or JSON with the names of the flags. Everything of transformers' `TrainingArguments` is a flag too
(`--deepspeed`, `--bf16`, `--activation_checkpointing`, `--report_to`, `--push_to_hub`, `--resume_from_checkpoint`).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils import logging

from multicoco.compat import leave
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.processing_multicoco import MultiCoCoProcessor
from multicoco.records import Records
from multicoco.trainer_callbacks import (
    AnswerCallback,
    CompletionCallback,
    CurriculumCallback,
    check_devices,
)
from multicoco.training.arguments import Settings, parse
from multicoco.training.loading import check_folders, find_checkpoint, load_model
from multicoco.training.results import (
    folder_note,
    longest_sample,
    make_judge,
    memory_table,
    results_table,
    schedule_table,
    settings_table,
    write_results,
    write_settings,
)
from multicoco.training.trainer import StageTrainer, check_evaluation


logger = logging.get_logger(f"transformers.{__name__}")


def tokenize(
    records: Records, processor: MultiCoCoProcessor, settings: Settings, *, is_evaluated: bool = False
) -> StageDataset:
    """The samples of records, as the flags say."""
    return StageDataset(
        records,
        processor,
        settings.curriculum,
        seed=settings.training.seed,
        max_length=settings.data.max_length,
        skip_bad_records=settings.data.skip_bad_records,
        num_proc=settings.data.dataset_num_proc,
        overwrite_cache=settings.data.overwrite_cache,
        is_evaluated=is_evaluated,
    )


def make_datasets(settings: Settings, processor: MultiCoCoProcessor) -> tuple[StageDataset, StageDataset | None]:
    """What is trained on, and what is answered at the end of each stage, if anything is."""
    data_args, curriculum = settings.data, settings.curriculum
    skip = data_args.skip_bad_records
    needs_steps, weights = curriculum.needs_steps, data_args.train_weights
    records = data_args.read(data_args.train_file, needs_steps=needs_steps, weights=weights, skip_bad_records=skip)
    train_dataset = tokenize(records, processor, settings)
    if not data_args.eval_file:
        return train_dataset, None
    asked = data_args.read(data_args.eval_file, skip_bad_records=skip, needs_steps=False)
    return train_dataset, tokenize(asked.each_once(), processor, settings, is_evaluated=True)


REPORTS = ("settings.json", "results.json", "results.png", "README.md")  # those of an earlier run speak of its model


def main(words: Sequence[str] | None = None) -> StageTrainer | None:
    """Trains as the flags say; returns the trainer, or `None` if it was only to say what it would do."""
    settings = parse(__doc__, sys.argv[1:] if words is None else words)
    model_args, data_args, curriculum, args, _ = settings
    is_main = args.process_index == 0
    if is_main:
        print(settings_table(settings))
    check_evaluation(args, curriculum, has_data=data_args.eval_file is not None)
    if not model_args.estimate_memory:
        check_devices(args)
    set_seed(args.seed)
    processor = data_args.load_processor(model_args.model_name_or_path)
    check_folders(model_args, args)
    train_dataset, eval_dataset = make_datasets(settings, processor)
    train_dataset.set_stage(0)  # raises if no thought could ever be trained, before a model is loaded
    if model_args.estimate_memory:
        if is_main:
            print(f"\n{memory_table(model_args, args, train_dataset, processor)}")
        return None
    collator = ReasoningCollator(processor, normalize_on_device=data_args.normalize_on_device)
    completion = CompletionCallback()
    callbacks = [CurriculumCallback(curriculum, train_dataset, allow_changed=args.allow_changed), completion]
    if eval_dataset is not None:
        judge = make_judge(eval_dataset, processor)
        callbacks.append(
            AnswerCallback(
                curriculum,
                eval_dataset,
                collator,
                judge,
                batch_size=data_args.answer_batch_size,
                every=data_args.answer_every,
            )
        )
    model: Any = torch.nn.Identity() if model_args.dry_run else load_model(model_args, args, processor)
    trainer = StageTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
        curriculum=curriculum,
    )
    schedule = schedule_table(trainer)
    if is_main:
        print(f"\n{schedule}")
        if model_args.dry_run:
            print(f"\n{longest_sample(train_dataset)}\n{memory_table(model_args, args, train_dataset, processor)}")
    if model_args.dry_run:
        return None
    resume, output_dir = find_checkpoint(args), str(args.output_dir)
    if args.resume_from_checkpoint and resume is None:
        logger.warning(f"No complete checkpoint in {output_dir}: the run begins at its first step.")
    trainer.train(resume_from_checkpoint=resume)
    if completion.was_stopped:
        raise SystemExit(
            f"Stopped at step {trainer.state.global_step}: `--resume_from_checkpoint last` goes on there."
        )
    trainer.save_model(_internal_call=True)  # first: without it nothing may look finished
    trainer.save_state()
    if is_main:
        for name in REPORTS:
            (Path(output_dir) / name).unlink(missing_ok=True)
        write_settings(settings, trainer)
        write_results(trainer.state.log_history, output_dir)
        if table := results_table(trainer.state.log_history):
            print(f"\n{table}")
    if args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save")  # makes the card, and sends the folder
    else:
        trainer.create_model_card()
    if is_main:
        print(folder_note(output_dir))
    return trainer


if __name__ == "__main__":
    main()
    leave()
