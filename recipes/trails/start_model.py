"""Makes the tiny model that the Trails recipe starts from: random weights, in the format of a real checkpoint.

    python recipes/trails/start_model.py --output_dir data/trails-start --seed 0

Tokenizer, processor, configuration and weights are what an InternVL3 checkpoint has, only smaller, so that the way
from here on is the way of a real fine-tune. Nothing is downloaded.
"""

import argparse
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from multicoco import (
    IMAGE_CONTEXT_TOKEN,
    TURN_END_TOKEN,
    TURN_START_TOKEN,
    MultiCoCoConfig,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    add_thought_tokens,
    chat_template,
)
from multicoco.recipes.trails.prepare import (
    CELL_PIXELS,
    COLOURS,
    MOVE_NAMES,
    PHRASINGS,
    STYLES,
    cell_name,
)


SHORT_SYSTEM_MESSAGE = "Follow the arrows."  # InternVL's own would be more than half of the prompt
PAD_TOKEN = "<|endoftext|>"

# The recipe's phrases, each one token, so that the prompt is short; else an answer with its mark; a word or a run of
# signs, with a space before it; else a single character. A line break behind a step is a token of its own, so pieces
# that end in one are tokenized alone as they are in the whole.
PHRASES = (
    f"system\n{SHORT_SYSTEM_MESSAGE}",
    "user\n",
    "assistant\n",
    "Start at",
    " and follow",
    " arrow. Which colour do you reach?",
    " arrows. Which colour do you reach?",
)
PIECES = "|".join(map(re.escape, PHRASES)) + r"|#+ [\p{L}\p{N}]+| ?[\p{L}\p{N}]+| ?[^\s\p{L}\p{N}]+|\s"

# With the library's defaults (0.02, layer scale 0.1, position embeddings of zero) a model this small does not learn.
INITIALIZER_RANGE = 0.08


def recipe_words(size: int, max_arrows: int, style: str = "cells") -> list[str]:
    """Every token of the recipe as it stands in the text, with its space or line break, in a fixed order."""
    if style not in STYLES:
        raise ValueError(f"`style` must be one of {', '.join(STYLES)}, got {style!r}.")
    names = [cell_name(row, column) for row in range(size) for column in range(size)]
    words = [*PHRASES, *names, *(f" {name}" for name in names)]
    words += [f" {num_arrows}" for num_arrows in range(1, max_arrows + 1)]
    words += [f"### {colour}" for colour in COLOURS]
    if style == "sentences":
        texts = (phrasing.format(cell="A1", move=move, next="A1") for phrasing in PHRASINGS for move in MOVE_NAMES)
        words += (word for text in texts for word in re.findall(r" ?\w+|\W", text))
    return words


def make_tokenizer(size: int, max_arrows: int, style: str = "cells") -> PreTrainedTokenizerFast:
    """A tokenizer that has each word of the recipe as one token, and bytes for any other text, as Qwen's has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 characters that stand for the bytes
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [as_bytes.pre_tokenize_str(word)[0][0] for word in recipe_words(size, max_arrows, style)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*alphabet, *words]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))  # a word of the vocabulary, or bytes
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), behavior="isolated"), as_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=TURN_END_TOKEN,
        additional_special_tokens=[TURN_START_TOKEN],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_processor(size: int, max_arrows: int, style: str = "cells") -> MultiCoCoProcessor:
    """The processor: one tile, the whole picture pixel by pixel, with one visual token for each cell."""
    pixels = CELL_PIXELS * size
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": pixels, "width": pixels},
        crop_to_patches=True,
        min_patches=1,
        max_patches=1,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    return MultiCoCoProcessor(
        image_processor,
        make_tokenizer(size, max_arrows, style),
        num_image_token=size * size,
        chat_template=chat_template(SHORT_SYSTEM_MESSAGE),
    )


def make_model(processor: MultiCoCoProcessor, seed: int) -> MultiCoCoForConditionalGeneration:
    """A two-layer vision tower and a two-layer Qwen2, with random weights of a scale at which they learn."""
    tokenizer = processor.tokenizer
    config = MultiCoCoConfig(
        vision_config={
            "image_size": processor.image_processor.size["height"],
            "patch_size": CELL_PIXELS // 2,  # 2 x 2 patches become one visual token
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
            "initializer_range": INITIALIZER_RANGE,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": -(-len(tokenizer) // 8) * 8,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN),
        image_seq_length=processor.num_image_token,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,  # of the projector between the two
        system_message=SHORT_SYSTEM_MESSAGE,
    )
    generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MultiCoCoForConditionalGeneration(config)
        model.generation_config = generation_config
        torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=INITIALIZER_RANGE)
        # They start as the line break, behind which a model looks back at the last cell, as behind a thought. (The
        # mean of all rows, the usual start, is next to zero in a random model.)
        add_thought_tokens(model, tokenizer, init_from="\n")
    return model


def make_start_model(
    output_dir: str | Path, size: int = 4, max_arrows: int = 5, seed: int = 0, style: str = "cells"
) -> None:
    """Saves model and processor; the same seed makes the same files."""
    processor = make_processor(size, max_arrows, style)
    make_model(processor, seed).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def main() -> None:
    """Makes the checkpoint that the flags describe."""
    parser = argparse.ArgumentParser(
        description="Make the tiny random checkpoint that the Trails recipe starts from.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", default="data/trails-start", help="Folder of the checkpoint.")
    parser.add_argument("--size", type=int, default=4, help="Cells along each side of a board, as in prepare.py.")
    parser.add_argument("--max_arrows", type=int, default=5, help="Most arrows of a question, as in prepare.py.")
    parser.add_argument("--seed", type=int, default=0, help="Other seeds give other weights.")
    parser.add_argument("--style", choices=STYLES, default="cells", help="What steps are, as in prepare.py.")
    args = parser.parse_args()
    make_start_model(**vars(args))
    print(f"{args.output_dir}: made")


if __name__ == "__main__":
    main()
