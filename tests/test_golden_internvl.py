"""The original InternVL program: our classes give its features, logits, loss, gradients, prompts, tiles and answers.

What is recorded, and how precise it is, stands in `golden/internvl/README.md`.
"""

import hashlib
import json

import numpy as np
import PIL
import pytest
import torch
from conftest import CHECKPOINT, FLOAT32_INSIDE, GOLDEN
from PIL import Image
from reference import training
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from multicoco import InternVLChatModel, MultiCoCoConfig, MultiCoCoForConditionalGeneration
from multicoco.configuration_multicoco import CHAT_TEMPLATE, SYSTEM_MESSAGE
from multicoco.processing_multicoco import expand_image_tokens


INTERNVL = GOLDEN / "internvl"


def read(name):
    return json.loads((INTERNVL / name).read_text(encoding="utf-8"))


FACTS, TENSORS = read("forward_cases.json"), load_file(INTERNVL / "forward_cases.safetensors")
CHATS, PROMPTS = read("chat_cases.json")["cases"], read("prompts.json")
TILES, PIXELS = read("preprocess_cases.json"), load_file(INTERNVL / "preprocess_cases.safetensors")
NATIVE_NAMES = {
    tensor["original"]: tensor["native"]
    for tensor in read("key_mapping.json")["tensors"]
    if tensor["checkpoint"] == "checkpoint"
}
# Not the null system message, where ours differs on purpose, with a test of its own below.
QUERIES = [
    query
    for query in PROMPTS["chat_queries"]
    if query["call"] == "chat" and query["name"] != "config_has_system_message_null"
]
PAD, IMAGE_CONTEXT = 620, 625

# Pillow resizes one of the pictures differently before version 13, the version of these files.
needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason="tall.png was resized by Pillow 13; older versions give other bytes",
)


def load(cls, dtype):
    return cls.from_pretrained(CHECKPOINT, dtype=dtype, attn_implementation="eager").eval()


@pytest.fixture(
    scope="module", params=[InternVLChatModel, MultiCoCoForConditionalGeneration], ids=["plain", "thoughts"]
)
def cls(request):
    return request.param


@pytest.fixture(scope="module")
def model(cls):
    return load(cls, torch.float64)


@pytest.fixture(scope="module")
def chat_model(cls):
    """In float32, as the conversations were recorded."""
    return load(cls, torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT, trust_remote_code=False)


@pytest.fixture
def prompts_of(monkeypatch):
    """Lets a model generate as it does, and keeps the ids of its prompts, their masks and the new ids of each call."""

    def record(model):
        calls, generate = [], model.generate

        def spy(*args, **kwargs):
            output = generate(*args, **kwargs)
            new = output[:, kwargs["input_ids"].shape[1] :]
            calls.append((kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), new.tolist()))
            return output

        monkeypatch.setattr(model, "generate", spy)
        return calls

    return record


def tensors(case):
    return {name.removeprefix(f"{case}."): value for name, value in TENSORS.items() if name.startswith(f"{case}.")}


def train_batch():
    names = ("pixel_values", "input_ids", "attention_mask", "position_ids", "image_flags", "labels")
    return {name: TENSORS[f"train_batch.{name}"] for name in names}


def close(actual, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def original_grads(model):
    """Gradients under the names, and in the shapes, of the original: its `qkv` is our q, k and v joined."""
    return {
        original: torch.cat([model.get_parameter(name).grad for name in names])
        for original, names in NATIVE_NAMES.items()
    }


def open_image(name):
    return Image.open(INTERNVL / "images" / name)


def cut(processor, images):
    """Tiles `(N, 3, H, W)` of all images, float32, and how many each has; `None` without images."""
    if not images:
        return None, None
    cuts = [
        processor.image_processor(open_image(image["file"]).convert("RGB"), max_patches=image["max_num"])
        for image in images
    ]
    tiles = [torch.from_numpy(np.stack(list(item["pixel_values"]))) for item in cuts]
    counts = [len(item) for item in tiles]
    assert counts == [image["tiles"] for image in images]
    return torch.cat(tiles), counts


# ---- features


def test_vision_tower_equals_the_original(model):
    golden = tensors("features")
    with torch.no_grad():
        output = model.model.vision_tower(golden["pixel_values"].double())
    close(output.last_hidden_state, golden["vit_last_hidden_state"], atol=1e-12)


@pytest.mark.parametrize("layer", [-1, -2])
def test_extract_feature_equals_the_original_at_every_recorded_layer(model, monkeypatch, layer):
    golden = tensors("features")
    monkeypatch.setattr(model.config, "vision_feature_layer", layer)
    with torch.no_grad():
        features = model.extract_feature(golden["pixel_values"])
    close(features, golden[f"select_layer_{layer}.ps_v2"], atol=1e-12)


def test_a_larger_tile_interpolates_positions_like_the_original(model):
    """The original interpolates in float32, transformers in the dtype of the model: hence not 1e-12."""
    golden = tensors("features")
    with torch.no_grad():
        close(model.extract_feature(golden["pixel_values_42"]), golden["from_42"], atol=1e-6)


def test_pixel_shuffle_keeps_rows_and_columns_as_version_2_of_the_original(model):
    golden = tensors("pixel_shuffle")
    shuffled = model.model.pixel_shuffle(golden["input"], scale_factor=0.5)
    close(shuffled, golden["v2"])
    assert not torch.equal(shuffled, golden["v1"])


def test_the_number_of_tokens_per_tile_comes_from_the_configuration(model):
    assert model.num_image_token == PROMPTS["template"]["num_image_token"]
    assert model.img_context_token_id == PROMPTS["template"]["img_context_token_id"] == IMAGE_CONTEXT


# ---- forward


@pytest.mark.parametrize("flags", ["flat", "column"])
def test_train_batch_features_logits_and_loss_equal_the_original(model, flags):
    """Three tiles, a text with one dummy tile, one tile; padding is not compared."""
    golden, batch = tensors("train_batch"), train_batch()
    if flags == "column":
        batch["image_flags"] = batch["image_flags"][:, None]
    with torch.no_grad():
        close(model.extract_feature(batch["pixel_values"]), golden["features"], atol=1e-12)
        output = model(**batch)
        counted = model(**batch, num_patches_list=[3, 1])  # of the images; the dummy is none
    real = batch["attention_mask"].bool()
    close(output.logits[real], golden["logits"][real], atol=FLOAT32_INSIDE)
    close(output.loss.double(), golden["loss"], rtol=2e-6)
    close(counted.logits, output.logits)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_train_batch_in_float32_equals_the_original(cls, attn_implementation):
    golden, batch = tensors("train_batch"), train_batch()
    model = cls.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        output = model(**batch)
    real = batch["attention_mask"].bool()
    close(output.logits[real].double(), golden["logits"][real], atol=5e-5)
    close(output.loss.double(), golden["loss"], atol=5e-5)


@pytest.mark.parametrize("mode", ["eval", "training", "checkpointing"])
def test_train_batch_gradients_equal_the_original(model, mode):
    """Every recorded gradient, and the norm of the gradient of every parameter of the checkpoint."""
    model.zero_grad()
    if mode == "eval":
        model(**train_batch()).loss.backward()
    else:
        with training(model, checkpointing=mode == "checkpointing"):
            model(**train_batch()).loss.backward()
    grads = original_grads(model)
    model.zero_grad()

    recorded = {
        name.removeprefix("grad."): value for name, value in tensors("train_batch").items() if name.startswith("grad.")
    }
    assert len(recorded) == 15
    for name, expected in recorded.items():
        assert (grads[name] - expected).norm() <= 1e-4 * expected.norm(), name
    norms = FACTS["train_batch"]["grad_norms"]
    assert norms.keys() == grads.keys()
    for name, expected in norms.items():
        assert float(grads[name].norm()) == pytest.approx(expected, rel=1e-4, abs=1e-8), name
    # The embedding is overwritten by a feature, so it is not trained.
    assert not grads["language_model.model.embed_tokens.weight"][IMAGE_CONTEXT].any()


def test_a_tile_reaches_its_own_sample_only(model):
    """As in the original, tile 0 moves sample 0, and no other; the dummy tile moves none."""
    expected = FACTS["train_batch"]["sensitivity"]
    batch = train_batch()
    real = batch["attention_mask"].bool()

    def change(tile):
        pixel_values = batch["pixel_values"].clone()
        pixel_values[tile] *= -1
        with torch.no_grad():
            return (model(**{**batch, "pixel_values": pixel_values}).logits - model(**batch).logits).abs()

    changes = change(0)
    assert float(changes[0][real[0]].max()) == pytest.approx(
        expected["negate_tile_0_changes_sample0_logits_by"], abs=1e-6
    )
    assert not changes[1:].any()
    assert not change(3).any()


def test_one_sample_alone_equals_itself_in_the_batch(model):
    golden, batch = tensors("train_batch"), train_batch()
    first_tile = 0
    for row, num_tiles in enumerate(FACTS["train_batch"]["tiles_per_sample"]):
        real = batch["attention_mask"][row].bool()
        tiles = slice(first_tile, first_tile + num_tiles)
        with torch.no_grad():
            alone = model(
                input_ids=batch["input_ids"][row : row + 1, real],
                pixel_values=batch["pixel_values"][tiles],
                image_flags=batch["image_flags"][tiles],
            )
        close(alone.logits[0], golden["logits"][row, real], atol=FLOAT32_INSIDE)
        first_tile += num_tiles


def test_a_cached_second_pass_sees_the_image_like_the_original(model):
    """Without pixels, from token ids through the cache: nothing is embedded again, and nothing is lost."""
    golden, split = tensors("cached_second_pass"), int(TENSORS["cached_second_pass.split"])
    ids, pixel_values = golden["input_ids"], golden["pixel_values"]

    def second_pass(pixel_values):
        first = model(input_ids=ids[:, :split], pixel_values=pixel_values, use_cache=True)
        mask = torch.ones_like(ids)
        return model(input_ids=ids[:, split:], attention_mask=mask, past_key_values=first.past_key_values).logits

    with torch.no_grad():
        close(model(input_ids=ids, pixel_values=pixel_values).logits, golden["logits_full"], atol=FLOAT32_INSIDE)
        logits, negated = second_pass(pixel_values), second_pass(-pixel_values)
    close(logits, golden["logits_second_pass"], atol=FLOAT32_INSIDE)
    expected = FACTS["cached_second_pass"]["logit_change_at_those_positions_with_negated_images"]
    assert float((negated - logits).abs().max()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("num_tiles", "num_tokens"), [(2, 4), (1, 8)], ids=["too_many_features", "too_few_features"])
def test_a_mismatch_that_the_original_lets_pass_or_crashes_on_is_a_value_error(model, num_tiles, num_tokens):
    ids = torch.tensor([[7, *[IMAGE_CONTEXT] * num_tokens, 8]])
    with pytest.raises(ValueError, match="visual features"):
        model(input_ids=ids, pixel_values=torch.zeros(num_tiles, 3, 28, 28))


def test_pixel_values_with_five_dimensions_are_refused_as_by_the_original(model):
    assert "ValueError" in FACTS["pixel_values_with_5_dimensions"]["result"]
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(1, 2, 3, 28, 28\)"):
        model(input_ids=torch.tensor([[IMAGE_CONTEXT] * 8]), pixel_values=torch.zeros(1, 2, 3, 28, 28))


# ---- chat

chat_case = pytest.mark.parametrize("case", CHATS, ids=[case["name"] for case in CHATS])


@chat_case
def test_chat_answers_like_the_original(chat_model, processor, tokenizer, prompts_of, case):
    """The same prompt ids, greedy ids, text and history; here `generate` returns the prompt before the new ids."""
    assert case["call"] == "chat"
    pixel_values, counts = cut(processor, case["images"])
    calls = prompts_of(chat_model)
    settings = {"max_new_tokens": case["max_new_tokens"], "do_sample": False}
    history = case["history"] and [tuple(turn) for turn in case["history"]]
    response, returned = chat_model.chat(
        tokenizer,
        pixel_values,
        case["question"],
        settings,
        history=history,
        return_history=True,
        num_patches_list=counts,
    )
    (prompt_ids, _, new_ids), *_ = calls
    assert prompt_ids[0] == case["prompt_ids"]
    assert new_ids[0] == case["new_ids"]
    assert response == case["response"]
    if case["returned_history"] is not None:
        assert [list(turn) for turn in returned] == case["returned_history"]
    assert returned[-1][1] == response
    assert settings == {"max_new_tokens": case["max_new_tokens"], "do_sample": False}  # the caller's own, unchanged
    if case["images"]:
        only_text = chat_model.chat(tokenizer, pixel_values, case["question"], settings, history, False, counts)
        assert only_text == response


def test_batch_chat_answers_like_the_original_does_one_by_one(chat_model, processor, tokenizer, prompts_of):
    """Three questions of 1, 3 and 4 tiles, left padded; the recorded answers are those of `chat`."""
    cases = [case for case in CHATS if case["images"] and case["history"] is None]
    images = [image for case in cases for image in case["images"]]
    assert [image["tiles"] for image in images] == [1, 3, 4]
    pixel_values, counts = cut(processor, images)
    calls = prompts_of(chat_model)
    answers = chat_model.batch_chat(
        tokenizer,
        pixel_values,
        [case["question"] for case in cases],
        {"max_new_tokens": 10, "do_sample": False},
        num_patches_list=counts,
    )
    (prompt_ids, masks, new_ids), *_ = calls
    for case, ids, mask, new, answer in zip(cases, prompt_ids, masks, new_ids, answers, strict=True):
        assert [token for token, real in zip(ids, mask, strict=True) if real] == case["prompt_ids"]
        assert new[: len(case["new_ids"])] == case["new_ids"]
        if case["stopped_at_eos"]:
            assert set(new[len(case["new_ids"]) :]) <= {PAD}
        if case["stopped_at_eos"] or case["max_new_tokens"] == 10:
            assert answer == case["response"]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query["name"])
def test_chat_reads_the_prompt_of_the_original(chat_model, processor, tokenizer, prompts_of, monkeypatch, query):
    monkeypatch.setattr(chat_model.config, "system_message", query["system"])
    pixel_values, counts = cut(processor, query["images"])
    calls = prompts_of(chat_model)
    chat_model.chat(
        tokenizer,
        pixel_values,
        query["question"],
        {"max_new_tokens": 1, "do_sample": False},
        history=query["history"],
        num_patches_list=counts,
    )
    assert calls[0][0] == [query["input_ids"]]
    assert calls[0][0][0].count(IMAGE_CONTEXT) == query["num_img_context"]


def test_batch_chat_reads_the_prompts_of_the_original(chat_model, processor, tokenizer, prompts_of):
    query = next(query for query in PROMPTS["chat_queries"] if query["call"] == "batch_chat")
    pixel_values, counts = cut(processor, query["images"])
    calls = prompts_of(chat_model)
    chat_model.batch_chat(tokenizer, pixel_values, query["question"], {"max_new_tokens": 1}, num_patches_list=counts)
    ids, masks, _ = calls[0]
    assert ids == query["input_ids"]
    assert masks == query["attention_mask"]


def test_a_null_system_message_means_that_of_the_template(chat_model, tokenizer, prompts_of, tmp_path):
    """
    The shipped InternVL3 configurations hold `"system_message": null`. The original writes "None" into the prompt; we
    write the message that the model was trained on.
    """
    query = next(item for item in PROMPTS["chat_queries"] if item["name"] == "config_has_system_message_null")
    assert "system\nNone<|im_end|>" in query["query"]
    original = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**original, "system_message": None}))
    (tmp_path / "tokenizer_config.json").write_bytes((CHECKPOINT / "tokenizer_config.json").read_bytes())
    assert MultiCoCoConfig.from_pretrained(tmp_path).system_message is None

    calls = prompts_of(chat_model)
    chat_model.chat(tokenizer, None, query["question"], {"max_new_tokens": 1})
    prompt = query["query"].replace("None", PROMPTS["template"]["system_message"], 1)
    assert calls[0][0] == [tokenizer(prompt)["input_ids"]]


# ---- prompts


def messages_of(case):
    """The messages of a recorded prompt, without the empty turn that is asked for, and whether it is asked for."""
    system = [] if case["system"] is None else [{"role": "system", "content": case["system"]}]
    spoken = [message for message in case["messages"] if message["content"] is not None]
    return system + spoken, len(spoken) < len(case["messages"])


@pytest.mark.parametrize("case", PROMPTS["template_prompts"], ids=lambda case: case["name"])
@pytest.mark.parametrize("through", ["processor", "tokenizer"])
def test_chat_template_writes_the_prompts_of_the_original(processor, tokenizer, case, through):
    messages, is_open = messages_of(case)
    if through == "processor":
        prompt = processor.apply_chat_template(messages, add_generation_prompt=is_open)
    else:
        prompt = tokenizer.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=is_open, tokenize=False
        )
    assert prompt == case["prompt"]


def test_the_default_system_message_is_that_of_the_original():
    assert SYSTEM_MESSAGE == PROMPTS["template"]["system_message"]


@pytest.mark.parametrize(
    "query",
    [query for query in QUERIES if len({image["max_num"] for image in query["images"]}) <= 1],  # one limit a call
    ids=lambda query: query["name"],
)
def test_processor_reads_the_prompt_of_the_original(processor, query):
    """From messages and pictures: the same ids, runs and tile counts as the original's `chat`."""
    question = query["question"]
    if query["images"] and not query["history"] and "<image>" not in question:
        question = f"<image>\n{question}"
    messages = [] if query["system"] is None else [{"role": "system", "content": query["system"]}]
    for past_question, past_answer in query["history"] or []:
        messages += [{"role": "user", "content": past_question}, {"role": "assistant", "content": past_answer}]
    messages.append({"role": "user", "content": question})
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [open_image(image["file"]) for image in query["images"]]
    kwargs = {"max_patches": query["images"][0]["max_num"]} if images else {}
    inputs = processor(images=images or None, text=prompt, **kwargs)
    assert inputs["input_ids"] == [query["input_ids"]]
    assert inputs.get("num_patches_list", []) == [image["tiles"] for image in query["images"]]


@pytest.mark.parametrize("case", PROMPTS["training_cases"], ids=lambda case: case["name"])
def test_a_whole_conversation_has_the_training_ids_of_the_original(tokenizer, case):
    """The original tokenizes turn by turn; the template as a whole gives the same ids."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in case["conversations"]]
    text = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False)
    counts = [] if case["text_only"] else [count // 4 for count in case["num_image_token_list"]]
    assert tokenizer(expand_image_tokens(text, counts, num_image_token=4))["input_ids"] == case["input_ids"]


@pytest.mark.parametrize(
    "repeats", sorted({item["repeats"] for item in PROMPTS["img_context_tokenization"]["results"]})
)
def test_repeated_image_tokens_split_exactly_and_spaces_would_break_the_run(tokenizer, repeats):
    recorded = [item for item in PROMPTS["img_context_tokenization"]["results"] if item["repeats"] == repeats]
    joined = tokenizer("<IMG_CONTEXT>" * repeats)["input_ids"]
    spaced = tokenizer(" ".join(["<IMG_CONTEXT>"] * repeats))["input_ids"]
    assert joined == [IMAGE_CONTEXT] * repeats
    assert {item["ids_when_concatenated"] for item in recorded} == {len(joined)}
    assert {item["ids_when_joined_with_spaces"] for item in recorded} == {len(spaced)}


# ---- tiles


def tile_case(case):
    name = f"{case['image'].split('.')[0]}-{case['image_size']}-max{case['max_num']}"
    return pytest.param(case, id=name, marks=[needs_pillow_13] * (not case["same_bytes_with_pillow_11_3"]))


def process(processor, name, image_size, max_num, min_num=1):
    """Through the whole processor, from the picture as it is in the file."""
    inputs = processor(
        images=open_image(name),
        text="<image>",
        size={"height": image_size, "width": image_size},
        min_patches=min_num,
        max_patches=max_num,
    )
    pixel_values = torch.from_numpy(np.stack(list(inputs["pixel_values"])))
    assert inputs["num_patches_list"] == [len(pixel_values)]
    assert inputs["input_ids"][0].count(IMAGE_CONTEXT) == 4 * len(pixel_values)
    return pixel_values


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_pillow_13] * name.startswith("tall")) for name in PIXELS]
)
def test_pixels_equal_the_original_bit_by_bit(processor, name):
    """Gray, palette and transparent pictures too: they are converted to RGB before they are cut."""
    image, limit, _ = name.split("_")
    close(process(processor, f"{image}.png", 28, int(limit.removeprefix("max"))), PIXELS[name])


@pytest.mark.parametrize("case", [tile_case(case) for case in TILES["cases"]])
def test_tiles_equal_the_original(processor, case):
    """Grid, count and the bytes of every tile. Ours always adds a thumbnail to several tiles; leave it out here."""
    pixel_values = process(processor, case["image"], case["image_size"], case["max_num"], case["min_num"])
    columns, rows = case["grid_cols_rows"]
    assert len(pixel_values) == columns * rows + (columns * rows > 1)
    if not case["use_thumbnail"]:
        pixel_values = pixel_values[: columns * rows]
    assert len(pixel_values) == case["num_tiles"]

    expected = case["checksum"]
    mean, std = (torch.tensor(TILES[f"normalize_{name}"])[:, None, None] for name in ("mean", "std"))
    tiles = ((pixel_values * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    assert hashlib.sha256(tiles.numpy().tobytes()).hexdigest() == expected["tiles_uint8_sha256"]
    assert float(pixel_values.double().sum()) == pytest.approx(expected["sum"], rel=1e-5, abs=1e-2)
    assert float(pixel_values.double().mean()) == pytest.approx(expected["mean"], abs=1e-5)
    assert float(pixel_values.double().std()) == pytest.approx(expected["std"], rel=1e-3)
    for *index, value in expected["values"]:
        assert float(pixel_values[tuple(index)]) == pytest.approx(value, abs=1e-6)


def test_every_recorded_size_gets_the_grid_of_the_original():
    for width, height, min_num, max_num, image_size, columns, rows in TILES["grid_cases"]:
        grid = get_optimal_tiled_canvas((height, width), (image_size, image_size), min_num, max_num)
        assert grid == (columns, rows), (width, height, min_num, max_num)


@pytest.mark.parametrize("case", TILES["tiling_before_rgb_conversion"], ids=lambda case: case["image"])
def test_colours_are_converted_before_tiling(processor, case):
    """Cutting first gives other pixels for some modes; ours are those of converting first."""
    image = open_image(case["image"])
    assert image.mode == case["mode"]
    converted = processor(images=image.convert("RGB"), text="<image>", max_patches=6)["pixel_values"]
    as_it_is = processor(images=image, text="<image>", max_patches=6)["pixel_values"]
    np.testing.assert_array_equal(as_it_is, converted)
