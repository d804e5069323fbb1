"""Bad input is one `ValueError` before anything is computed, and its message says where, what, and how to mend it."""

import re
import socket

import numpy as np
import pytest
import torch
from conftest import GOLDEN, model_inputs
from PIL import Image
from transformers import DynamicCache

from multicoco.processing_multicoco import RESERVED_TOKENS


IMAGES = GOLDEN / "internvl" / "images"
SQUARE = IMAGES / "square.png"
GENERATE = {"max_new_tokens": 2, "eos_token_id": 622, "pad_token_id": 620}
CHAT = {"max_new_tokens": 2}
PROMPT = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
# The message must tell the reader what to do.
CURE = re.compile(
    r"\b(pass|put|give|write|leave|remove|use|order|let|load|concatenate|shorten|raise|set|add|check|place|must|needs)\b",
    re.IGNORECASE,
)


def assert_refused(call, *fragments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the fragments are the match
        call()
    message = str(caught.value)
    assert type(caught.value) is ValueError
    for fragment in fragments:
        assert fragment in message
    assert CURE.search(message), f"no cure in: {message}"


@pytest.fixture
def refused(computed):
    """[`assert_refused`], and that no module of the shared model ran."""

    def refused(call, *fragments):
        computed.clear()
        assert_refused(call, *fragments)
        assert computed == []

    return refused


def forward(model, inputs):
    return model(**inputs)


def generate(model, inputs):
    return model.generate(**{name: value for name, value in inputs.items() if name != "labels"}, **GENERATE)


CALLS = [forward, generate]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("change", [lambda mask: mask[:, 1:], lambda mask: mask[:1]], ids=["shorter", "one_row"])
def test_an_attention_mask_of_another_shape(shared_model, make_batch, refused, call, change):
    inputs = model_inputs(make_batch(padding="left"))
    inputs["attention_mask"] = change(inputs["attention_mask"])
    expected = f"expected {tuple(inputs['input_ids'].shape)} like `input_ids`"
    refused(lambda: call(shared_model, inputs), "`attention_mask` has shape", expected)


@pytest.mark.parametrize("name", ["labels", "latent_mask"])
def test_labels_and_latents_of_another_shape(shared_model, make_batch, refused, name):
    inputs = model_inputs(make_batch(padding="left"))
    inputs[name] = torch.zeros(1, 3, dtype=torch.bool if name == "latent_mask" else torch.long)
    refused(lambda: shared_model(**inputs), f"`{name}` has shape (1, 3)", "like `input_ids`")


def test_hooks_see_the_tower_and_the_language_model(shared_model, computed, make_batch):
    for call in CALLS:
        computed.clear()
        with torch.no_grad():
            call(shared_model, model_inputs(make_batch(padding="left")))
        assert "model.vision_tower" in computed
        assert "model.language_model" in computed


# Tiles and placeholders. The batch holds images of 2 and 1 tiles, so 8 and 4 tokens; the image of row 0 is at 4 to 11,
# that of row 1 two places further left padded.
def _without_list(inputs):
    return {**inputs, "num_patches_list": None}


def _drop_token(inputs, row, move_to=None):
    """Writes over one image token of a row and, with `move_to`, makes an ordinary token of that row one."""
    input_ids = inputs["input_ids"].clone()
    input_ids[row, (input_ids[row] == 625).nonzero()[0]] = 7
    if move_to is not None:
        first = (input_ids[move_to] == 625).nonzero()[0]
        input_ids[move_to, first - 1] = 625
    return {**inputs, "input_ids": input_ids}


TILES = {
    "swapped_tiles_of_equal_total": (
        lambda inputs: {**inputs, "num_patches_list": [1, 2]},
        ["Sample 0", "`input_ids`", "run of 8", "`num_patches_list`", "12 visual features", "Order the tiles"],
    ),
    "a_run_too_short": (
        lambda inputs: _drop_token(inputs, 1),
        ["Sample 1", "run of 3", "4 visual features (4 per tile)", "truncation"],
    ),
    "a_token_moved_to_another_sample": (
        lambda inputs: _drop_token(inputs, 1, move_to=0),
        ["Sample 0", "run of 9", "12 visual features"],
    ),
    "list_with_an_empty_image": (
        lambda inputs: {**inputs, "num_patches_list": [2, 0, 1]},
        ["`num_patches_list` is [2, 0, 1]", "one positive integer", "Leave out"],
    ),
    "tiles_of_another_size": (
        lambda inputs: {**inputs, "pixel_values": inputs["pixel_values"][..., :14, :14]},
        ["`pixel_values` has shape (3, 3, 14, 14)", "(sum of tiles, 3, 28, 28)"],
    ),
    "fewer_tiles_than_listed": (
        lambda inputs: {**inputs, "pixel_values": inputs["pixel_values"][:2]},
        ["`num_patches_list` [2, 1] counts 3 tiles", "`pixel_values` has 2"],
    ),
    "more_tiles_than_listed": (
        lambda inputs: {**inputs, "num_patches_list": [2]},
        ["`num_patches_list` [2] counts 2 tiles", "`pixel_values` has 3"],
    ),
    "an_image_more_than_runs": (
        lambda inputs: {
            **inputs,
            "pixel_values": inputs["pixel_values"][[0, 1, 2, 2]],
            "num_patches_list": [2, 1, 1],
        },
        ["`num_patches_list` has 3 images", "<IMG_CONTEXT>", "for 2"],
    ),
    "listed_but_no_pixels": (
        lambda inputs: {**inputs, "pixel_values": None},
        ["`num_patches_list` [2, 1] counts 3 tiles", "`pixel_values` has 0"],
    ),
    "no_list_a_count_between_tiles": (
        lambda inputs: _drop_token(_without_list(inputs), 1),
        ["Sample 1", "`input_ids` holds 3 <IMG_CONTEXT>", "not a multiple of the 4", "truncation"],
    ),
    "no_list_equal_totals_but_moved_token": (
        lambda inputs: _drop_token(_without_list(inputs), 1, move_to=0),
        ["Sample 0", "`input_ids` holds 9 <IMG_CONTEXT>", "not a multiple of the 4"],
    ),
    "no_list_fewer_tiles": (
        lambda inputs: {**_without_list(inputs), "pixel_values": inputs["pixel_values"][:2]},
        ["`input_ids` holds [8, 4] <IMG_CONTEXT>", "2 tiles in `pixel_values` give 8", "let the processor place"],
    ),
    "no_list_more_tiles": (
        lambda inputs: {**_without_list(inputs), "pixel_values": inputs["pixel_values"][[0, 1, 2, 2]]},
        ["`input_ids` holds [8, 4] <IMG_CONTEXT>", "4 tiles in `pixel_values` give 16"],
    ),
    "no_pixels_at_all": (
        lambda inputs: {**_without_list(inputs), "pixel_values": None},
        ["[8, 4] <IMG_CONTEXT>", "0 tiles in `pixel_values`"],
    ),
    "pixels_without_image_tokens": (
        lambda inputs: {**_without_list(inputs), "input_ids": inputs["input_ids"].clamp(max=624)},
        ["`input_ids` holds [0, 0] <IMG_CONTEXT>", "3 tiles in `pixel_values` give 12"],
    ),
    "five_dimensional_pixels": (
        lambda inputs: {**inputs, "pixel_values": inputs["pixel_values"][None]},
        ["`pixel_values` has shape (1, 3, 3, 28, 28)", "(sum of tiles, 3, 28, 28)", "Concatenate"],
    ),
    "three_dimensional_pixels": (
        lambda inputs: {**inputs, "pixel_values": inputs["pixel_values"][0]},
        ["`pixel_values` has shape (3, 28, 28)", "(sum of tiles, 3, 28, 28)"],
    ),
    "wrong_image_flags_length": (
        lambda inputs: {**inputs, "image_flags": torch.ones(2, dtype=torch.long)},
        ["`image_flags` has 2 entries", "3 tiles"],
    ),
    "image_flags_hide_a_needed_tile": (
        lambda inputs: {**_without_list(inputs), "image_flags": torch.tensor([1, 1, 0])},
        ["[8, 4] <IMG_CONTEXT>", "2 tiles"],
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("spoil", "fragments"), TILES.values(), ids=TILES.keys())
def test_tiles_that_do_not_match_the_text(shared_model, make_batch, refused, call, spoil, fragments):
    inputs = spoil(model_inputs(make_batch(num_thoughts=(2, 2), images=((2,), (1,)), padding="left")))
    refused(lambda: call(shared_model, inputs), *fragments)


def _put_latent(where):
    def spoil(inputs):
        input_ids = inputs["input_ids"].clone()
        row, position = where(input_ids)
        input_ids[row, position] = 633
        return {**inputs, "input_ids": input_ids}

    return spoil


def _first_image(input_ids):
    return int((input_ids[0] == 625).nonzero()[0])


LATENTS = {
    "at_position_0": (_put_latent(lambda ids: (0, 0)), ["Sample 0", "position 0", "first token", "Put text first"]),
    "first_real_token": (
        _put_latent(lambda ids: (1, int((ids[1] != 620).nonzero()[0]))),
        ["Sample 1", "position 2", "first token", "Put text first"],
    ),
    "in_padding": (_put_latent(lambda ids: (1, 1)), ["Sample 1", "position 1", "padding", "`attention_mask`"]),
    "before_image": (
        _put_latent(lambda ids: (0, _first_image(ids) - 2)),
        ["Sample 0", "position 2", "before or inside an image", "Put all images before"],
    ),
    "before_image_directly": (
        _put_latent(lambda ids: (0, _first_image(ids) - 1)),
        ["Sample 0", "position 3", "before or inside an image"],
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("spoil", "fragments"), LATENTS.values(), ids=LATENTS.keys())
def test_latents_without_a_state_or_before_an_image(shared_model, make_batch, refused, call, spoil, fragments):
    assert shared_model.config.latent_token_id == 633
    inputs = spoil(model_inputs(make_batch(num_thoughts=(2, 2), images=((2,), (1,)), padding="left")))
    refused(lambda: call(shared_model, inputs), "<|latent|>", "`input_ids`", *fragments)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("listed", [True, False], ids=["with_list", "without_list"])
def test_latent_inside_an_image_run(shared_model, make_batch, refused, call, listed):
    inputs = model_inputs(make_batch(num_thoughts=(2, 2), images=((2,), (1,)), padding="left"))
    input_ids = inputs["input_ids"]
    first = _first_image(input_ids)
    # The run is split, not shortened: the total stays right.
    split = torch.cat([input_ids[:, : first + 3], input_ids[:, first + 2 : first + 3], input_ids[:, first + 3 :]], 1)
    split[0, first + 3] = 633
    split[1, first + 3] = 8
    inputs = {
        "input_ids": split,
        "attention_mask": torch.cat([torch.ones(2, 1, dtype=torch.long), inputs["attention_mask"]], 1),
        "pixel_values": inputs["pixel_values"],
        "num_patches_list": [2, 1] if listed else None,
    }
    inputs["attention_mask"][1, :2] = 0
    # Whichever of the two faults is told, it is told of the right sample.
    refused(lambda: call(shared_model, inputs), "Sample 0", "`input_ids`")


@pytest.mark.parametrize("call", CALLS)
def test_latent_in_right_padding(shared_model, make_batch, refused, call):
    inputs = model_inputs(make_batch(num_thoughts=(2, 1), images=((), ()), padding="right"))
    inputs["input_ids"][1, -1] = shared_model.config.latent_token_id
    inputs["attention_mask"][1, -1] = 0
    refused(lambda: call(shared_model, inputs), "Sample 1", "padding")


@pytest.mark.parametrize("call", CALLS)
def test_latent_mask_is_checked_like_latent_tokens(shared_model, make_batch, refused, call):
    inputs = model_inputs(make_batch(num_thoughts=(2, 2), images=((2,), (1,)), padding="left"))
    inputs["latent_mask"] = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    inputs["latent_mask"][1, 0] = True
    refused(lambda: call(shared_model, inputs), "Sample 1", "position 0", "padding")


@pytest.mark.parametrize("call", CALLS)
def test_unknown_answer_sees(shared_model, make_batch, refused, call):
    inputs = {**model_inputs(make_batch(padding="left")), "answer_sees": "everything"}
    refused(lambda: call(shared_model, inputs), "`answer_sees`", "all, no_image, thoughts_only", "'everything'")


@pytest.mark.parametrize("call", CALLS)
def test_answer_sees_without_a_block(shared_model, make_batch, refused, call):
    inputs = model_inputs(make_batch(num_thoughts=(0, 0), images=((1,), (1,)), padding="left"))
    inputs["input_ids"] = inputs["input_ids"].masked_fill(
        inputs["input_ids"] == shared_model.config.start_latent_id, 5
    )
    refused(
        lambda: call(shared_model, {**inputs, "answer_sees": "no_image"}), "`answer_sees='no_image'`", "every sample"
    )


@pytest.mark.parametrize("call", CALLS)
def test_four_dimensional_mask_with_thoughts(shared_model, make_batch, refused, call):
    inputs = model_inputs(make_batch(padding="left"))
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    refused(lambda: call(shared_model, inputs), "`attention_mask`")


def test_both_input_ids_and_inputs_embeds(shared_model, make_batch, refused):
    inputs = model_inputs(make_batch(images=((), ())))
    embeds = torch.zeros(*inputs["input_ids"].shape, 64, dtype=torch.float64)
    refused(lambda: shared_model(**inputs, inputs_embeds=embeds), "`input_ids`", "`inputs_embeds`", "one of")
    del inputs["input_ids"]
    refused(lambda: shared_model(**inputs), "`input_ids`", "`inputs_embeds`", "one of")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("with_ids", [False, True], ids=["embeds_only", "embeds_and_ids"])
def test_inputs_embeds_with_pixel_values(shared_model, make_batch, refused, call, with_ids):
    inputs = model_inputs(make_batch(padding="left"))
    inputs["inputs_embeds"] = torch.zeros(*inputs["input_ids"].shape, 64, dtype=torch.float64)
    if not with_ids:
        del inputs["input_ids"]
    refused(lambda: call(shared_model, inputs), "`inputs_embeds`")


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_labels_that_are_all_ignored(shared_model, make_batch, refused, training):
    inputs = model_inputs(make_batch())
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][:, 0] = 5  # shifted away: the first token has nothing before it
    shared_model.train(training)
    try:
        refused(lambda: shared_model(**inputs), "`labels` are all -100", "at least one")
    finally:
        shared_model.eval()


def test_labels_that_are_all_ignored_on_one_rank_are_a_zero_share(shared_model, make_batch):
    """With `num_items_in_batch` other ranks or micro-batches hold the labels, so this one gives 0 and no error."""
    inputs = model_inputs(make_batch())
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    assert shared_model(**inputs, num_items_in_batch=torch.tensor(7)).loss == 0


def test_reentrant_checkpointing(model, make_batch):
    ran = []
    model.model.vision_tower.register_forward_pre_hook(lambda *args: ran.append("vision_tower"))
    model.model.language_model.register_forward_pre_hook(lambda *args: ran.append("language_model"))
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    assert_refused(lambda: model(**model_inputs(make_batch())), "reentrant", "'use_reentrant': False")
    assert ran == []
    model.activation_checkpointing_disable()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(**model_inputs(make_batch())).loss.backward()


def test_cache_in_checkpointed_training(model, make_batch):
    ran = []
    model.model.language_model.register_forward_pre_hook(lambda *args: ran.append("language_model"))
    model.model.vision_tower.register_forward_pre_hook(lambda *args: ran.append("vision_tower"))
    model.train()
    model.activation_checkpointing_enable()
    inputs = model_inputs(make_batch())
    assert_refused(
        lambda: model(**inputs, past_key_values=DynamicCache()), "`past_key_values`", "checkpointing", "Pass the whole"
    )
    assert ran == []
    cache = DynamicCache()
    with torch.no_grad():  # nothing is replayed, so a cache is right
        model(**inputs, past_key_values=cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def test_prefill_in_chunks_with_thoughts(shared_model, make_batch, refused):
    inputs = model_inputs(make_batch(padding="left"))
    del inputs["labels"]
    refused(
        lambda: shared_model.generate(**inputs, **GENERATE, prefill_chunk_size=4), "`prefill_chunk_size`", "passes"
    )


# `chat` and `batch_chat`
TILE = torch.zeros(1, 3, 28, 28)
CHATS = {
    "reserved_token": (lambda chat: chat(None, "a <IMG_CONTEXT> b"), ["Sample 0", "<IMG_CONTEXT>"]),
    "reserved_token_in_history": (
        lambda chat: chat(None, "b", history=[("a", "so <|latent|>")]),
        ["Sample 0", "<|latent|>"],
    ),
    "placeholder_without_image": (lambda chat: chat(None, "<image> b"), ["Sample 0", "1 <image>", "0 images"]),
    "fewer_images": (lambda chat: chat(TILE, "<image> <image> b"), ["Sample 0", "2 <image>", "1 images"]),
    "more_images": (
        lambda chat: chat(TILE.repeat(2, 1, 1, 1), "<image> b", num_patches_list=[1, 1]),
        ["Sample 0", "1 <image>", "2 images"],
    ),
    "image_without_placeholder_after_history": (
        lambda chat: chat(TILE, "b", history=[("a", "b")]),
        ["Sample 0", "0 <image>", "1 images"],
    ),
    "other_number_of_tiles": (
        lambda chat: chat(TILE, "<image> b", num_patches_list=[2]),
        ["`num_patches_list` [2] counts 2", "has 1"],
    ),
    "image_without_tiles": (
        lambda chat: chat(TILE, "<image> <image>", num_patches_list=[1, 0]),
        ["Sample 0", "image 1", "0 tiles", "at least 1"],
    ),
    "tiles_but_no_pixels": (
        lambda chat: chat(None, "<image> b", num_patches_list=[1]),
        ["[4] <IMG_CONTEXT>", "0 tiles in `pixel_values`"],
    ),
    "five_dimensional": (lambda chat: chat(TILE[None], "b"), ["`pixel_values` has shape (1, 1, 3, 28, 28)"]),
    "negative_budget": (lambda chat: chat(None, "b", num_thoughts=-1), ["`num_thoughts`", "at least 0", "-1"]),
    "float_budget": (lambda chat: chat(None, "b", num_thoughts=2.0), ["`num_thoughts`", "integer", "2.0"]),
}


@pytest.mark.parametrize(("ask", "fragments"), CHATS.values(), ids=CHATS.keys())
def test_chat_refuses(shared_model, processor, refused, ask, fragments):
    def chat(pixel_values, question, **kwargs):
        return shared_model.chat(processor.tokenizer, pixel_values, question, CHAT, **kwargs)

    refused(lambda: ask(chat), *fragments)


BATCH_CHATS = {
    "reserved_token": (lambda chat: chat(TILE.repeat(2, 1, 1, 1), ["a", "<img>"]), ["Sample 1", "<img>"]),
    "fewer_images": (
        lambda chat: chat(TILE.repeat(2, 1, 1, 1), ["a", "b"], num_patches_list=[2]),
        ["Sample 1", "1 <image>", "0 images"],
    ),
    "more_images": (
        lambda chat: chat(TILE.repeat(3, 1, 1, 1), ["a", "b"], num_patches_list=[1, 1, 1]),
        ["Sample 1", "1 <image>", "2 images"],
    ),
    "other_number_of_tiles": (
        lambda chat: chat(TILE.repeat(3, 1, 1, 1), ["a", "b"], num_patches_list=[1, 1]),
        ["`num_patches_list` [1, 1] counts 2", "has 3"],
    ),
    "placeholder_without_image": (lambda chat: chat(None, ["a", "<image> b"]), ["Sample 1", "1 <image>", "0 images"]),
    "negative_budget": (lambda chat: chat(None, ["a", "b"], num_thoughts=-3), ["`num_thoughts`", "-3"]),
}


@pytest.mark.parametrize(("ask", "fragments"), BATCH_CHATS.values(), ids=BATCH_CHATS.keys())
def test_batch_chat_refuses(shared_model, processor, refused, ask, fragments):
    def chat(pixel_values, questions, **kwargs):
        return shared_model.batch_chat(processor.tokenizer, pixel_values, questions, CHAT, **kwargs)

    refused(lambda: ask(chat), *fragments)


@pytest.mark.parametrize("method", ["chat", "batch_chat"])
def test_chat_refuses_the_tokenizer_of_another_checkpoint(shared_model, processor, refused, method):
    class OtherTokenizer:
        def convert_tokens_to_ids(self, token):
            return 3

    question = "a" if method == "chat" else ["a"]
    refused(
        lambda: getattr(shared_model, method)(OtherTokenizer(), None, question, CHAT),
        "`config.image_token_id` is 625",
        "the id 3",
        "tokenizer of the checkpoint",
    )


# The processor
def _saying(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("token", RESERVED_TOKENS)
def test_reserved_tokens_in_a_text(processor, token):
    assert_refused(lambda: processor(text=["fine", f"so {token}."]), "Sample 1", "`text`", token, "Remove")
    assert_refused(lambda: processor.expand_image_tokens(f"so {token}.", []), "Sample 0", token)
    conversations = [_saying("fine"), _saying(f"so {token}.")]
    assert_refused(lambda: processor.apply_chat_template(conversations, **PROMPT), "Sample 1", token)
    typed = _saying([{"type": "text", "text": f"so {token}."}])
    assert_refused(lambda: processor.apply_chat_template(typed, **PROMPT), "Sample 0", token)


@pytest.fixture
def spoiled_images(tmp_path):
    """Images that cannot be read, as what is given and what the message must name."""
    (tmp_path / "cut.png").write_bytes((IMAGES / "big.png").read_bytes()[:200])
    (tmp_path / "notes.png").write_text("these are notes, not a picture")
    (tmp_path / "nothing.png").write_bytes(b"")
    return {
        "missing": (str(tmp_path / "missing.png"), str(tmp_path / "missing.png")),
        "missing_path": (tmp_path / "missing.png", str(tmp_path / "missing.png")),
        "folder": (str(tmp_path), str(tmp_path)),
        "truncated": (tmp_path / "cut.png", "cut.png"),
        "text_file": (str(tmp_path / "notes.png"), "notes.png"),
        "empty_file": (str(tmp_path / "nothing.png"), "nothing.png"),
        "truncated_bytes": ((tmp_path / "cut.png").read_bytes(), "bytes"),
        "garbage_bytes": (b"\x00\xff garbage \x89PNG", "bytes"),
        "no_bytes": (b"", "bytes"),
        "none": (None, "NoneType"),
        "number": (7, "int"),
        "one_dimensional": (np.zeros(9, dtype=np.uint8), "ndarray"),
    }


SPOILED = ["missing", "missing_path", "folder", "truncated", "text_file", "empty_file"]
SPOILED += ["truncated_bytes", "garbage_bytes", "no_bytes", "none", "number", "one_dimensional"]


@pytest.mark.parametrize("kind", SPOILED)
def test_unreadable_image(processor, spoiled_images, kind):
    image, name = spoiled_images[kind]
    call = lambda: processor(images=[[SQUARE], [SQUARE, image]], text=["<image> a", "<image> b <image>"])  # noqa: E731
    assert_refused(call, "Sample 1, image 1", name, "cannot be read")


@pytest.mark.parametrize("kind", ["missing", "truncated", "text_file"])
def test_unreadable_image_in_a_chat(processor, spoiled_images, kind):
    image, name = spoiled_images[kind]
    messages = _saying([{"type": "image", "path": image}, {"type": "text", "text": "What?"}])
    assert_refused(lambda: processor.apply_chat_template(messages, **PROMPT), "Sample 0, image 0", name)


@pytest.mark.parametrize(
    "image",
    [Image.new("RGB", (0, 5)), Image.new("L", (3, 0)), np.zeros((0, 5, 3), dtype=np.uint8)],
    ids=["no_width", "no_height", "array"],
)
def test_empty_image(processor, image):
    assert_refused(lambda: processor(images=[SQUARE, image], text="<image><image>"), "Sample 0, image 1", "empty")


@pytest.mark.parametrize(
    ("images", "texts", "fragments"),
    [
        ([[SQUARE], [SQUARE]], ["<image>", "none"], ["Sample 1", "0 <image>", "1 images"]),
        ([[SQUARE], []], ["<image>", "<image>"], ["Sample 1", "1 <image>", "0 images"]),
        ([[SQUARE, SQUARE], [SQUARE]], ["<image>", "<image><image>"], ["Sample 0", "1 <image>", "2 images"]),
        ([[SQUARE]], ["<image>", "b"], ["`images` has 1 lists", "2 texts"]),
        ([SQUARE, SQUARE], ["<image>", "b"], ["`images` has 2 images", "[1, 0] <image>"]),
        ([SQUARE], ["<image>", "<image>"], ["`images` has 1 images", "[1, 1] <image>"]),
        (None, ["a", "<image>"], ["Sample 1", "1 <image>", "0 images"]),
        (SQUARE, "none", ["`images` has 1 images", "[0] <image>"]),
    ],
    ids=[
        "nested_more_images",
        "nested_fewer_images",
        "nested_equal_totals",
        "nested_fewer_lists",
        "flat_more_images",
        "flat_fewer_images",
        "no_images",
        "single_image",
    ],
)
def test_placeholders_that_do_not_match_the_images(processor, images, texts, fragments):
    assert_refused(lambda: processor(images=images, text=texts), *fragments)


def test_placeholders_that_do_not_match_the_images_of_a_chat(processor):
    part = {"type": "image", "path": str(SQUARE)}
    text = {"type": "text", "text": "<image> again?"}
    assert_refused(
        lambda: processor.apply_chat_template(_saying([part, text]), **PROMPT), "Sample 0", "2 <image>", "1 images"
    )
    assert_refused(
        lambda: processor.apply_chat_template(_saying("<image> a"), **PROMPT), "Sample 0", "1 <image>", "0 images"
    )


@pytest.mark.parametrize(
    ("text", "counts", "fragments"),
    [
        ("<image>", [], ["Sample 0", "1 <image>", "0 images"]),
        (["a", "<image>"], [[], [1, 1]], ["Sample 1", "1 <image>", "2 images"]),
        (["<image>"], [[0]], ["Sample 0", "`num_patches_list`", "image 0", "0 tiles"]),
        ("<image>", [-1], ["Sample 0", "`num_patches_list`", "-1 tiles"]),
        (["a", "b"], [[]], ["`num_patches_list` has 1 lists", "2 texts"]),
    ],
    ids=["fewer", "more", "zero_tiles", "negative_tiles", "fewer_lists"],
)
def test_expand_image_tokens_refuses(processor, text, counts, fragments):
    assert_refused(lambda: processor.expand_image_tokens(text, counts), *fragments)


def test_too_long_input_is_not_cut(processor):
    call = lambda **kwargs: processor(images=SQUARE, text=["<image> a"], num_thoughts=3, **kwargs)  # noqa: E731
    length = len(call()["input_ids"][0])
    fragments = ["Sample 0", f"{length} tokens", "`max_length` 12", "`max_patches`"]
    assert_refused(lambda: call(max_length=12), *fragments)
    assert_refused(lambda: call(max_length=12, padding="max_length"), *fragments)
    assert_refused(lambda: processor(text=["a", "b " * 30], max_length=20), "Sample 1", "`max_length` 20")
    messages = _saying([{"type": "image", "path": str(SQUARE)}, {"type": "text", "text": "What?"}])
    call = lambda: processor.apply_chat_template(messages, **PROMPT, processor_kwargs={"max_length": 12})  # noqa: E731
    assert_refused(call, "Sample 0", "`max_length` 12")


def test_a_url_that_does_not_answer_is_refused(processor):
    """What a failed download raises is no `OSError`; a server would answer 500."""
    with socket.socket() as closed:  # bound and not listening: nothing answers there
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/street.jpg"
        with pytest.raises(ValueError, match="cannot be read as an image"):
            processor(images=[url], text="<image>")


@pytest.mark.parametrize("truncation", [True, "longest_first"])
def test_truncation_that_would_cut_is_refused(processor, truncation):
    text = "a b c " * 20
    call = lambda: processor(text=text, truncation=truncation, max_length=12)  # noqa: E731
    assert_refused(call, "Sample 0", "more than `max_length` 12", "visual tokens or thoughts")
    call = lambda: processor.apply_chat_template(  # noqa: E731
        _saying(text), **PROMPT, processor_kwargs={"truncation": truncation, "max_length": 12}
    )
    assert_refused(call, "Sample 0", "more than `max_length` 12")


@pytest.mark.parametrize("num_thoughts", [-1, True, 2.0, "2"])
def test_budget_that_is_not_a_count(processor, num_thoughts):
    fragments = ["`num_thoughts`", "at least 0", repr(num_thoughts)]
    assert_refused(lambda: processor(text="a", num_thoughts=num_thoughts), *fragments)
    call = lambda: processor.apply_chat_template(_saying("a"), **PROMPT, num_thoughts=num_thoughts)  # noqa: E731
    assert_refused(call, *fragments)
    assert_refused(
        lambda: type(processor)(processor.image_processor, processor.tokenizer, num_thoughts=num_thoughts), *fragments
    )


@pytest.mark.parametrize(
    "kwargs",
    [{"tokenize": True}, {}],
    ids=["no_generation_prompt", "neither"],
)
def test_budget_without_a_place_for_it(processor, kwargs):
    assert_refused(
        lambda: processor.apply_chat_template(_saying("a"), num_thoughts=2, **kwargs),
        "`num_thoughts` needs `add_generation_prompt=True`",
    )


@pytest.mark.parametrize("name", ["max_patches", "min_patches"])
@pytest.mark.parametrize("count", [0, -2])
def test_budget_of_tiles_below_one(processor, name, count):
    call = lambda: processor(images=SQUARE, text="<image>", **{name: count})  # noqa: E731
    assert_refused(call, f"`{name}`", "at least 1", str(count))


def test_fewer_tiles_allowed_than_demanded(processor):
    """Silently giving fewer tiles than `min_patches` would be a guess."""
    call = lambda: processor(images=SQUARE, text="<image>", min_patches=5, max_patches=2)  # noqa: E731
    assert_refused(call, "`min_patches`", "`max_patches`", "5", "2")


@pytest.mark.parametrize("kind", ["video", "audio", "document"])
def test_content_of_another_type(processor, kind):
    messages = _saying([{"type": kind, "path": "clip.mp4"}, {"type": "text", "text": "What?"}])
    for kwargs in (PROMPT, {}):
        call = lambda kwargs=kwargs: processor.apply_chat_template([_saying("a"), messages], **kwargs)  # noqa: E731
        assert_refused(call, "Sample 1", f"'{kind}'", "'text' or 'image'", "frames")


def test_videos_and_audio(processor):
    assert_refused(lambda: processor(text="a", videos=["clip.mp4"]), "`videos`", "frames")
    assert_refused(lambda: processor(text="a", audio=["clip.wav"]), "`audio`")


@pytest.mark.parametrize("text", [None, [], b"a", 3, ["a", 3], [["a"]]], ids=repr)
def test_text_that_is_no_text(processor, text):
    assert_refused(lambda: processor(text=text), "`text`", "string")


@pytest.mark.parametrize("conversation", [[], [[]]], ids=["nothing", "no_message"])
def test_empty_conversation(processor, conversation):
    assert_refused(lambda: processor.apply_chat_template(conversation, **PROMPT), "`conversation`")


@pytest.mark.parametrize("ask", ["generate", "chat"])
def test_budget_above_the_trained_one_is_a_warning(model, processor, make_batch, monkeypatch, ask):
    warnings = []
    monkeypatch.setattr("multicoco.modeling_multicoco.logger.warning_once", warnings.append)
    model.config.num_thoughts = 2
    for num_thoughts in (2, 3):
        if ask == "generate":
            generate(model, model_inputs(make_batch(num_thoughts=(1, num_thoughts), images=((), ()), padding="left")))
        else:
            model.chat(processor.tokenizer, None, "a", CHAT, num_thoughts=num_thoughts)
        assert len(warnings) == max(0, num_thoughts - 2)
    assert "3" in warnings[0]
    assert "trained with 2" in warnings[0]
