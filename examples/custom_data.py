"""Trains on records that are made in Python, with transformers' own Trainer.

    python examples/custom_data.py --model OpenGVLab/InternVL3-1B --output_dir out-squares

The task: a picture of red and blue squares; count the red ones, count the blue ones, add. Write your own
`make_records` and leave the rest as it is.
"""

import argparse
import random

from PIL import Image, ImageDraw
from transformers import Trainer, TrainingArguments

from multicoco import (
    CurriculumArguments,
    CurriculumCallback,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    ReasoningCollator,
    StageDataset,
    add_thought_tokens,
)


def make_records(count: int, seed: int = 0) -> list[dict]:
    """A picture, a question, the written steps in order, and an answer: all that a record needs."""
    draw = random.Random(seed)
    records = []
    for _ in range(count):
        image = Image.new("RGB", (448, 448), "white")
        colours = draw.choices(["red", "blue", "white"], k=9)
        for place, colour in enumerate(colours):
            left, top = 150 * (place % 3) + 20, 150 * (place // 3) + 20
            ImageDraw.Draw(image).rectangle((left, top, left + 100, top + 100), fill=colour)
        red, blue = colours.count("red"), colours.count("blue")
        records.append(
            {
                "images": [image],
                "question": "How many squares are there?",
                "steps": [f"{red} squares are red.", f"{blue} squares are blue.", f"{red} + {blue} = {red + blue}."],
                "answer": str(red + blue),
            }
        )
    return records


def main(arguments: list[str] | None = None) -> Trainer:
    """Trains, saves, and returns the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub name.")
    parser.add_argument("--output_dir", required=True, help="Where the model goes.")
    parser.add_argument("--count", type=int, default=1000, help="Records.")
    parser.add_argument("--epochs_per_stage", type=int, default=1, help="Epochs before the next step is replaced.")
    args = parser.parse_args(arguments)

    processor = MultiCoCoProcessor.from_pretrained(args.model)
    model = MultiCoCoForConditionalGeneration.from_pretrained(args.model)
    add_thought_tokens(model, processor.tokenizer)
    curriculum = CurriculumArguments(c_thought=1, epochs_per_stage=args.epochs_per_stage)
    dataset = StageDataset(make_records(args.count), processor, curriculum)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=curriculum.num_epochs,
            per_device_train_batch_size=8,
            learning_rate=1e-5,
            save_strategy="no",
            remove_unused_columns=False,  # the collator reads `images`
        ),
        train_dataset=dataset,
        data_collator=ReasoningCollator(processor),
        processing_class=processor,
        callbacks=[CurriculumCallback(curriculum, dataset)],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
