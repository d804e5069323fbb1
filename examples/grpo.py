"""Rewards right answers: trl's GRPOTrainer, as it is, on records; needs `pip install trl`.

    python examples/grpo.py --model out/trails-coconut --data data/trails/train.jsonl --output_dir out/trails-grpo
    python examples/grpo.py --model out --data mine.jsonl --output_dir out-grpo --beta 0.04 --learning_rate 1e-6

The model thinks before each answer that it samples, and the gradient of the reward flows through the thoughts. With
`--beta` it is held near where it began, at the price of a second copy. Thoughts are not sampled: the same prompt gives
the same thoughts, and the answers differ by their words.
"""

import argparse
from typing import Any

from datasets import Dataset, Image, List
from trl import GRPOConfig, GRPOTrainer

from multicoco import (
    IMAGE_PLACEHOLDER,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    final_answer,
    load_records,
    question_text,
)


def make_dataset(records: list[dict]) -> Dataset:
    """The columns that trl reads, and `answer` for the reward. trl puts the images first, as records do."""
    prompts = [
        question_text(record).removeprefix(f"{IMAGE_PLACEHOLDER}\n" * len(record["images"])) for record in records
    ]
    columns = {
        "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
        "images": [record["images"] for record in records],
        "answer": [record["answer"] for record in records],
    }
    return Dataset.from_dict(columns).cast_column("images", List(Image()))


def exact_match(completions: list[list[dict]], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for a completion whose last `### ` is followed by the answer, else 0."""
    texts = [completion[-1]["content"] for completion in completions]
    # Of a text without the mark `final_answer` is all of it: the bare answer earns nothing.
    return [float(text.strip() != final_answer(text) == right) for text, right in zip(texts, answer, strict=True)]


def main(arguments: list[str] | None = None) -> GRPOTrainer:
    """Trains, saves, and returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub name of a model that thinks.")
    parser.add_argument("--data", required=True, help="Records, see docs/data.md; `steps` are not needed.")
    parser.add_argument("--output_dir", required=True, help="Where the model goes.")
    parser.add_argument(
        "--num_thoughts", type=int, help="Thoughts before each answer; the checkpoint's own by default."
    )
    parser.add_argument("--beta", type=float, default=0.0, help="Weight of the distance from the model at the start.")
    parser.add_argument("--max_steps", type=int, default=100, help="Steps of the optimizer.")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="Answers a step, of `batch_size / num_generations` records."
    )
    parser.add_argument("--num_generations", type=int, default=8, help="Answers sampled for each record.")
    parser.add_argument("--learning_rate", type=float, default=1e-5, help="Peak, after which it falls to 0.")
    parser.add_argument("--max_completion_length", type=int, default=64, help="Longest answer, in tokens.")
    parser.add_argument("--use_cpu", action="store_true", help="Leave a GPU alone.")
    args = parser.parse_args(arguments)

    processor = MultiCoCoProcessor.from_pretrained(args.model)
    model = MultiCoCoForConditionalGeneration.from_pretrained(args.model, dtype="float32")
    processor.return_num_patches_list = False  # trl counts tiles by itself, and refuses names that it does not know
    if args.num_thoughts is not None:
        model.config.num_thoughts = processor.num_thoughts = args.num_thoughts  # saved with them
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=exact_match,
        args=GRPOConfig(
            output_dir=args.output_dir,
            beta=args.beta,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            num_generations=args.num_generations,
            learning_rate=args.learning_rate,
            max_completion_length=args.max_completion_length,
            use_cpu=args.use_cpu,
            bf16=not args.use_cpu,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=make_dataset(load_records(args.data, needs_steps=False)),
        processing_class=processor,
    )
    trainer.train()
    processor.return_num_patches_list = True  # as it was: `save_model` saves the processor too
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
