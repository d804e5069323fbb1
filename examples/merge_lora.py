"""Adds the adapters of `train.py --lora_rank` to their base model: one ordinary checkpoint, as fast as any other.

    python examples/merge_lora.py --adapters out --output_dir out-merged
    python examples/merge_lora.py --adapters out/checkpoint-500 --output_dir out-plain --export

With `--export` it becomes a plain InternVL for transformers and servers, which reasons in words only.
"""

import argparse

import torch
from peft import PeftConfig, PeftModel

from multicoco import (
    MultiCoCoConfig,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    add_thought_tokens,
    export_internvl,
)


def main(arguments: list[str] | None = None) -> None:
    """Writes the merged model and its processor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", required=True, help="Folder of a run or of one of its checkpoints.")
    parser.add_argument("--output_dir", required=True, help="Where the merged model goes.")
    parser.add_argument("--export", action="store_true", help="Write a plain InternVL.")
    args = parser.parse_args(arguments)

    base = PeftConfig.from_pretrained(args.adapters).base_model_name_or_path
    processor = MultiCoCoProcessor.from_pretrained(args.adapters)
    model = MultiCoCoForConditionalGeneration.from_pretrained(base, dtype=torch.float32)  # bfloat16 would lose some
    add_thought_tokens(model, processor.tokenizer)  # does nothing if the base has them
    model = PeftModel.from_pretrained(model, args.adapters).merge_and_unload()
    trained = MultiCoCoConfig.from_pretrained(args.adapters)
    model.config.set_trained(**trained.trained)
    processor.num_thoughts = trained.num_thoughts
    model.to(MultiCoCoConfig.from_pretrained(base).dtype)
    if args.export:
        export_internvl(model, args.output_dir, processor)
    else:
        model.save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
