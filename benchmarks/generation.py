r"""What thoughts cost in `generate`: against native InternVL over the same tokens, and against Coconut's own way.

    python benchmarks/generation.py                                            # CPU, about 2 minutes on 2 idle cores
    python benchmarks/generation.py --quick                                    # does it run? No figure to quote.
    python benchmarks/generation.py --device cuda --shape internvl3-1b --dtype bfloat16

Native InternVL reads the latents of the prompt as ordinary words, in one prefill. Coconut's program has no cache and a
batch of one: the whole sequence runs again for every thought and every token. That row is measured on one sample and
scaled by the batch; its image is encoded once and its head reads one position, both kinder than the original.
"""

import functools
import statistics

import torch
from transformers import HfArgumentParser
from transformers.utils import logging

from multicoco.benchmarks.passes import (
    HEADER,
    SHAPES,
    BenchmarkArguments,
    Row,
    cells,
    describe,
    make_batch,
    make_models,
    measure,
    print_method,
    print_table,
    recompute_thoughts,
    run_prefix,
    time_ratio,
)


FASTER_GOAL = 10.0


@torch.no_grad()
def generate_without_cache(model, sample: dict, max_new_tokens: int) -> torch.LongTensor:
    """Greedy new ids `(1, max_new_tokens)` of one sample, everything run again for each of them."""
    embeds, attention_mask = recompute_thoughts(model, sample), sample["attention_mask"]
    new_ids = []
    for _ in range(max_new_tokens):
        new_ids.append(model.lm_head(run_prefix(model, embeds, attention_mask)[:, -1:]).argmax(dim=-1))
        embeds = torch.cat([embeds, model.get_input_embeddings()(new_ids[-1])], dim=1)
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
    return torch.cat(new_ids, dim=1)


def first_sample(batch: dict) -> dict:
    """The first sample of a batch, without its padding."""
    real = batch["attention_mask"][0].bool()
    num_tiles = batch["num_patches_list"][0]
    return {
        "input_ids": batch["input_ids"][:1, real],
        "attention_mask": batch["attention_mask"][:1, real],
        "pixel_values": batch["pixel_values"][:num_tiles],
    }


def main(args: BenchmarkArguments) -> None:
    native, model = make_models(args)
    native.eval(), model.eval()
    shape = SHAPES[args.shape]
    batch_size = args.batch_size or shape.generate_batch_size
    new_tokens = shape.max_new_tokens
    batch = make_batch(args, model.config, batch_size, with_answer=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    settings = dict(do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)
    describe(args, model, batch, f"generate, {new_tokens} new tokens")

    native_generate = functools.partial(native.generate, **inputs, **settings)
    generate = functools.partial(model.generate, **inputs, num_patches_list=batch["num_patches_list"], **settings)
    generate_uncached = functools.partial(generate_without_cache, model, first_sample(batch), new_tokens)
    prompt_length = inputs["input_ids"].shape[1]
    if native_generate().shape != (batch_size, prompt_length + new_tokens):
        raise RuntimeError("Native `generate` did not give the tokens that were asked for.")
    ids = generate()[0, prompt_length:]
    equal = int((generate_uncached()[0] == ids).sum())

    native_row = Row("native", native_generate)
    ours = Row("multicoco", generate, "native", time_goal=1.05)
    uncached = Row(f"Coconut's way, 1 sample x {batch_size}", generate_uncached, "native", scale=batch_size)
    rows = [native_row, ours, uncached]
    measure(rows, args.repetitions, args.device)

    lines = []
    for row in rows:
        tokens = batch_size * new_tokens / statistics.median(row.milliseconds) * 1000
        lines.append([*cells(row, rows), f"{tokens:.1f}"])
    print_table(["generate", *HEADER, "tokens/s"], lines)
    faster = time_ratio(uncached, ours)
    print(
        f"\nmulticoco is {faster:.1f}x faster than Coconut's way: >= {FASTER_GOAL:.0f} "
        f"{'met' if faster >= FASTER_GOAL else 'missed'}. Of the sample's {new_tokens} new tokens, {equal} are equal."
    )
    print_method(args)


if __name__ == "__main__":
    logging.set_verbosity_error()
    (arguments,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    main(arguments)
