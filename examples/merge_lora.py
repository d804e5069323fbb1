"""Adds the adapters of `train.py --lora_rank` to their base model: one ordinary checkpoint, as fast as any other.

    python examples/merge_lora.py --adapters out --output_dir out-merged
    python examples/merge_lora.py --adapters out/checkpoint-500 --output_dir out-plain --export

With `--export` it becomes a plain InternVL for transformers and servers, which reasons in words only. Adapters that
were trained by `--load_in_4bit` are added to the weights that 4 bits stand for, and saved in bfloat16.
"""

import argparse
import os
from pathlib import Path

from peft import PeftConfig

from multicoco import MultiCoCoProcessor, export_internvl, load_checkpoint, replace_checkpoint


def check_output(output_dir: str, adapters: str, base: str) -> None:
    """Refuses to merge over what cannot be made again."""
    if Path(output_dir, "adapter_config.json").exists():
        raise ValueError(
            f"`--output_dir` {output_dir} holds adapters: merged there they would be lost, or laid over the merged "
            "model once more. Give another folder."
        )
    if os.path.realpath(output_dir) == os.path.realpath(base):
        raise ValueError(
            f"`--output_dir` {output_dir} is the base model of the adapters in {adapters}, which would then be added "
            "to it twice. Give another folder."
        )


def main(arguments: list[str] | None = None) -> None:
    """Writes the merged model and its processor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", required=True, help="Folder of a run or of one of its checkpoints.")
    parser.add_argument("--output_dir", required=True, help="Where the merged model goes.")
    parser.add_argument("--base_model", help="What the adapters are added to, if it is not where they say.")
    parser.add_argument("--export", action="store_true", help="Write a plain InternVL.")
    args = parser.parse_args(arguments)

    base = args.base_model or PeftConfig.from_pretrained(args.adapters).base_model_name_or_path
    check_output(args.output_dir, args.adapters, base)
    model = load_checkpoint(args.adapters, base_model=args.base_model)
    processor = MultiCoCoProcessor.from_pretrained(args.adapters)
    processor.num_thoughts = model.config.num_thoughts
    with replace_checkpoint(args.output_dir) as folder:
        if args.export:
            export_internvl(model, folder, processor)
        else:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
