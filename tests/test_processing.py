"""The processor writes exactly what the images and the budget of thoughts say, in every form that a caller may use."""

import io
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT, GOLDEN
from PIL import Image
from transformers import AutoProcessor, ByT5Tokenizer, InternVLConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from multicoco import MultiCoCoConfig, MultiCoCoProcessor
from multicoco.processing_multicoco import RESERVED_TOKENS, expand_image_tokens, prepare_tokenizer


IMAGES = GOLDEN / "internvl" / "images"
IMG, IMG_END, CONTEXT = 623, 624, 625  # ids in the golden tokenizer
PROMPT = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}


def picture(name):
    return Image.open(IMAGES / f"{name}.png")


def run_lengths(ids):
    """Lengths of the `<IMG_CONTEXT>` runs; each must stand directly between its two markers."""
    ids, lengths = list(ids), []
    for position, token in enumerate(ids):
        if token == IMG:
            end = ids.index(IMG_END, position)
            assert ids[position + 1 : end] == [CONTEXT] * (end - position - 1)
            lengths.append(end - position - 1)
    assert sum(lengths) == ids.count(CONTEXT)
    return lengths


def real_ids(inputs, row):
    return inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


def same_inputs(one, other):
    assert one.keys() == other.keys()
    for name in ("input_ids", "attention_mask", "pixel_values"):
        if name in one:
            torch.testing.assert_close(torch.as_tensor(one[name]), torch.as_tensor(other[name]), rtol=0, atol=0)
    assert list(one.get("num_patches_list", [])) == list(other.get("num_patches_list", []))


def len_or_none(images):
    return str(len(images or []))


@pytest.fixture
def own_processor():
    """A processor that a test may change."""
    return MultiCoCoProcessor.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("num_thoughts", [None, 0, 3], ids=["no_block", "empty_block", "three_thoughts"])
def test_batch_equals_single_samples(processor, num_thoughts):
    texts = ["<image>\nWhat is it?", "No picture here.", "Compare <image> with <image>, then say which.", ""]
    names = [["square"], [], ["tall", "wide"], []]
    if num_thoughts is None:
        texts, names = texts[:3], names[:3]  # an empty text is a prompt only with a block
    images = [[picture(name) for name in sample] for sample in names]
    batch = processor(images=images, text=texts, num_thoughts=num_thoughts, padding=True, return_tensors="pt")
    first_tile, first_image = 0, 0
    for row, (text, sample) in enumerate(zip(texts, images, strict=True)):
        alone = processor(images=sample or None, text=text, num_thoughts=num_thoughts, return_tensors="pt")
        assert real_ids(batch, row) == alone["input_ids"][0].tolist()
        counts = batch["num_patches_list"][first_image : first_image + len(sample)].tolist()
        assert counts == torch.as_tensor(alone.get("num_patches_list", [])).tolist()
        assert run_lengths(real_ids(batch, row)) == [4 * count for count in counts]
        if sample:
            tiles = batch["pixel_values"][first_tile : first_tile + sum(counts)]
            torch.testing.assert_close(tiles, alone["pixel_values"], rtol=0, atol=0)
        first_tile, first_image = first_tile + sum(counts), first_image + len(sample)
    assert first_tile == len(batch["pixel_values"])
    assert first_image == len(batch["num_patches_list"])


def test_padding_is_on_the_left_by_default(processor):
    batch = processor(text=["short", "a much longer text than that"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][0, 0] == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    right = processor(text=["a", "b b b"], padding=True, padding_side="right", return_tensors="pt")
    assert right["attention_mask"][:, 0].tolist() == [1, 1]


def test_runs_keep_the_text_around_them(processor):
    inputs = processor(images=[picture("gray"), picture("tall")], text="one <image>two<image>", max_patches=2)
    ids, tokenizer = inputs["input_ids"][0], processor.tokenizer
    first, second = (position for position, token in enumerate(ids) if token == IMG)
    first_end, second_end = (position for position, token in enumerate(ids) if token == IMG_END)
    assert tokenizer.decode(ids[:first]) == "one "
    assert tokenizer.decode(ids[first_end + 1 : second]) == "two"
    assert second_end == len(ids) - 1
    assert run_lengths(ids) == [4 * count for count in inputs["num_patches_list"]]


def _array(image):
    return np.asarray(image.convert("RGB"))


def _bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


FORMS = {
    "nested": lambda path: [[Image.open(path)]],
    "flat": lambda path: [Image.open(path)],
    "single": Image.open,
    "tuple": lambda path: (Image.open(path),),
    "str_path": str,
    "path": lambda path: path,
    "nested_path": lambda path: [[path]],
    "bytes": lambda path: path.read_bytes(),
    "bytearray": lambda path: [bytearray(path.read_bytes())],
    "array_channels_last": lambda path: _array(Image.open(path)),
    "array_channels_first": lambda path: [_array(Image.open(path)).transpose(2, 0, 1)],
    "float_array": lambda path: [_array(Image.open(path)) / 255.0],
    "tensor": lambda path: [torch.tensor(_array(Image.open(path))).permute(2, 0, 1)],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_an_image_gives_the_same_pixels(processor, form):
    path = IMAGES / "wide.png"
    expected = processor(images=[[Image.open(path)]], text=["<image> x"], return_tensors="pt")
    same_inputs(processor(images=form(path), text="<image> x", return_tensors="pt"), expected)


@pytest.mark.parametrize("name", ["rgba", "gray", "palette"], ids=["RGBA", "L", "P"])
@pytest.mark.parametrize("form", ["pil", "path", "bytes"])
def test_other_colour_modes_equal_their_rgb_conversion(processor, name, form):
    path = IMAGES / f"{name}.png"
    given = {"pil": Image.open, "path": str, "bytes": Path.read_bytes}[form](path)
    expected = processor(images=Image.open(path).convert("RGB"), text="<image>", return_tensors="pt")
    same_inputs(processor(images=given, text="<image>", return_tensors="pt"), expected)


def test_transparency_is_dropped_and_not_laid_over_a_colour(processor):
    pixels = np.zeros((20, 20, 4), dtype=np.uint8)
    pixels[..., 0] = 200  # red, and wholly transparent
    opaque = pixels.copy()
    opaque[..., 3] = 255
    transparent, opaque = (processor(images=Image.fromarray(array), text="<image>") for array in (pixels, opaque))
    np.testing.assert_array_equal(transparent["pixel_values"], opaque["pixel_values"])


def test_flat_images_are_dealt_out_by_the_placeholders(processor):
    pictures = [picture(name) for name in ("square", "tall", "wide")]
    texts = ["<image><image> a", "b", "<image> c"]
    flat = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    nested = processor(images=[pictures[:2], [], pictures[2:]], text=texts, padding=True, return_tensors="pt")
    same_inputs(flat, nested)


def test_text_only_has_no_pixel_values(processor):
    for images in (None, [], [[]]):
        inputs = processor(images=images, text="just text", return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask"}
        assert set(processor(images=images, text="just text")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("num_thoughts", [0, 1, 5])
def test_the_block_of_thoughts_ends_the_prompt(processor, num_thoughts):
    start, latent, end = processor.tokenizer.convert_tokens_to_ids(
        ["<|start-latent|>", "<|latent|>", "<|end-latent|>"]
    )
    plain = processor(images=picture("gray"), text="<image>\nHow many?")["input_ids"][0]
    ids = processor(images=picture("gray"), text="<image>\nHow many?", num_thoughts=num_thoughts)["input_ids"][0]
    assert ids == [*plain, start, *[latent] * num_thoughts, end]


def test_default_budget_of_the_processor_is_for_chats_only(own_processor):
    own_processor.num_thoughts = 2
    messages = [{"role": "user", "content": "Why?"}]
    latent = own_processor.tokenizer.convert_tokens_to_ids("<|latent|>")
    count = lambda **kwargs: own_processor.apply_chat_template(messages, **kwargs)["input_ids"][0].count(latent)  # noqa: E731
    assert count(**PROMPT) == 2
    assert count(**PROMPT, num_thoughts=4) == 4
    assert count(**PROMPT, num_thoughts=0) == 0
    assert count(tokenize=True, return_dict=True) == 0  # no assistant's turn to put them in
    assert latent not in own_processor(text="Why?")["input_ids"][0]


SOURCES = {
    "pil": lambda path: {"image": Image.open(path)},
    "str_in_image": lambda path: {"image": str(path)},
    "str_path": lambda path: {"path": str(path)},
    "path": lambda path: {"path": path},
    "file_in_url": lambda path: {"url": str(path)},
    "bytes": lambda path: {"image": path.read_bytes()},
    "array": lambda path: {"image": _array(Image.open(path))},
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_typed_parts_equal_the_text_with_placeholder(processor, source):
    path = IMAGES / "square.png"
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image", **source(path)}, {"type": "text", "text": "What?"}]},
    ]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    expected = processor(images=[[path]], text=[text], num_thoughts=2, return_tensors="pt")
    same_inputs(
        processor.apply_chat_template(messages, **PROMPT, num_thoughts=2, return_tensors="pt"),
        expected,
    )


def test_string_contents_equal_typed_parts(processor):
    pictures = [picture("square"), picture("tall")]
    typed = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": pictures[0]},
                {"type": "image", "image": pictures[1]},
                {"type": "text", "text": "Which?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "The second."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    strings = [
        {"role": "user", "content": "<image>\n<image>\nWhich?"},
        {"role": "assistant", "content": "The second."},
        {"role": "user", "content": "Why?"},
    ]
    same_inputs(
        processor.apply_chat_template(
            strings, **PROMPT, num_thoughts=1, return_tensors="pt", processor_kwargs={"images": pictures}
        ),
        processor.apply_chat_template(typed, **PROMPT, num_thoughts=1, return_tensors="pt"),
    )


def test_template_gives_text_without_tokenizing(processor):
    messages = [{"role": "user", "content": [{"type": "image", "image": "unread.png"}, {"type": "text", "text": "?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\n<image>\n?<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n你是书生·万象")
    own = [{"role": "system", "content": "Be brief."}, *messages]
    assert processor.apply_chat_template(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert processor.apply_chat_template([own, messages]) == [
        processor.apply_chat_template(own),
        processor.apply_chat_template(messages),
    ]


@pytest.mark.parametrize("num_thoughts", [None, 2])
def test_batch_of_conversations_equals_single_ones(processor, num_thoughts):
    ask = lambda text, *names: [  # noqa: E731
        {
            "role": "user",
            "content": [
                *({"type": "image", "image": picture(name)} for name in names),
                {"type": "text", "text": text},
            ],
        }
    ]
    conversations = [ask("What is this?", "gray"), ask("And without?"), ask("Compare them.", "tall", "square")]
    batch = processor.apply_chat_template(
        conversations,
        **PROMPT,
        num_thoughts=num_thoughts,
        return_tensors="pt",
        processor_kwargs={"padding": True, "max_patches": 3},
    )
    tiles, counts = [], []
    for row, conversation in enumerate(conversations):
        alone = processor.apply_chat_template(
            conversation,
            **PROMPT,
            num_thoughts=num_thoughts,
            return_tensors="pt",
            processor_kwargs={"max_patches": 3},
        )
        assert real_ids(batch, row) == alone["input_ids"][0].tolist()
        counts += torch.as_tensor(alone.get("num_patches_list", [])).tolist()
        tiles += list(alone.get("pixel_values", []))
    assert batch["num_patches_list"].tolist() == counts
    torch.testing.assert_close(batch["pixel_values"], torch.stack(tiles), rtol=0, atol=0)


def test_expand_image_tokens_writes_runs_for_given_tiles(processor):
    run = lambda tiles: "<img>" + "<IMG_CONTEXT>" * (4 * tiles) + "</img>"  # noqa: E731
    assert processor.expand_image_tokens("<image>a<image>", [2, 1]) == f"{run(2)}a{run(1)}"
    assert processor.expand_image_tokens(["<image>a", "b", "<image><image>"], [[1], [], [3, 2]]) == [
        f"{run(1)}a",
        "b",
        f"{run(3)}{run(2)}",
    ]
    assert expand_image_tokens("<image>", [2], num_image_token=1) == "<img><IMG_CONTEXT><IMG_CONTEXT></img>"
    assert processor.expand_image_tokens("none", []) == "none"


def test_own_tiles_give_the_ids_of_the_processor(processor):
    inputs = processor(images=[picture("big"), picture("gray")], text="a <image> b <image>", max_patches=4)
    text = processor.expand_image_tokens("a <image> b <image>", inputs["num_patches_list"])
    assert processor.tokenizer(text)["input_ids"] == inputs["input_ids"][0]


def test_saved_processor_loads_equal(own_processor, tmp_path):
    own_processor.num_thoughts = 3
    own_processor.chat_template = own_processor.chat_template.replace("<image>\n", "Picture: <image>\n")
    own_processor.save_pretrained(tmp_path)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture("wide")}, {"type": "text", "text": "?"}]}
    ]
    expected = own_processor.apply_chat_template(messages, **PROMPT, return_tensors="pt")
    latent = own_processor.tokenizer.convert_tokens_to_ids("<|latent|>")
    assert (expected["input_ids"] == latent).sum() == 3
    for cls in (MultiCoCoProcessor, AutoProcessor):
        loaded = cls.from_pretrained(tmp_path)
        assert isinstance(loaded, MultiCoCoProcessor)
        assert (loaded.num_thoughts, loaded.num_image_token) == (3, 4)
        assert loaded.chat_template == own_processor.chat_template
        assert len(loaded.tokenizer) == len(own_processor.tokenizer)
        same_inputs(loaded.apply_chat_template(messages, **PROMPT, return_tensors="pt"), expected)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = tmp_path / "again"
    MultiCoCoProcessor.from_pretrained(tmp_path).save_pretrained(again)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == files


def test_budget_given_on_loading_replaces_the_saved_one(own_processor, tmp_path):
    own_processor.save_pretrained(tmp_path)
    assert MultiCoCoProcessor.from_pretrained(tmp_path).num_thoughts is None
    assert MultiCoCoProcessor.from_pretrained(tmp_path, num_thoughts=2).num_thoughts == 2
    assert MultiCoCoProcessor.from_pretrained(CHECKPOINT, num_thoughts=2).num_thoughts == 2


HF_IMAGE_PROCESSOR = {  # the fields of an `-hf` checkpoint's file
    "crop_to_patches": False,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "image_processor_type": "GotOcr2ImageProcessorFast",
    "max_patches": 12,
    "min_patches": 1,
    "processor_class": "InternVLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 28, "width": 28},
}


def write_hf_folder(tmp_path, place):
    values = MultiCoCoConfig.from_pretrained(CHECKPOINT).to_dict()
    names = ("vision_config", "text_config", "image_token_id", "image_seq_length", "downsample_ratio")
    InternVLConfig(**{name: values[name] for name in names}, tie_word_embeddings=False).save_pretrained(tmp_path)
    if place == "preprocessor_config":
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF_IMAGE_PROCESSOR))
        own = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    else:
        own = {"processor_class": "InternVLProcessor", "image_processor": HF_IMAGE_PROCESSOR, "image_seq_length": 4}
    (tmp_path / "processor_config.json").write_text(json.dumps(own))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(CHECKPOINT / name, tmp_path / name)


@pytest.fixture(params=["preprocessor_config", "processor_config"])
def hf_folder(request, tmp_path):
    """A folder as of `OpenGVLab/InternVL3-*-hf`: native configuration, tokenizer, image processor in either file."""
    write_hf_folder(tmp_path, request.param)
    return tmp_path


def test_hf_folder_gives_the_same_inputs_as_the_original_folder(processor, hf_folder):
    loaded = MultiCoCoProcessor.from_pretrained(hf_folder)
    assert loaded.num_image_token == 4
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture("tall")}, {"type": "text", "text": "Hm?"}]}
    ]
    expected = processor.apply_chat_template(messages, **PROMPT, num_thoughts=2, return_tensors="pt")
    assert expected["num_patches_list"].tolist() != [1]
    same_inputs(loaded.apply_chat_template(messages, **PROMPT, num_thoughts=2, return_tensors="pt"), expected)


def test_original_folder_follows_its_configuration(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "max_dynamic_patch": 2, "dynamic_image_size": True}))
    limited = MultiCoCoProcessor.from_pretrained(tmp_path / "own")
    assert limited(images=picture("big"), text="<image>")["num_patches_list"][0] <= 3
    path.write_text(json.dumps({**config, "dynamic_image_size": False}))
    whole = MultiCoCoProcessor.from_pretrained(tmp_path / "own")
    assert whole(images=picture("big"), text="<image>")["num_patches_list"] == [1]


def test_torchvision_is_not_imported(processor):
    processor(images=picture("square"), text="<image>", return_tensors="pt")
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("max_patches", [1, 2, 4, 12])
def test_max_patches_limits_the_tiles_of_an_image(processor, max_patches):
    inputs = processor(images=picture("big"), text="<image>", max_patches=max_patches)
    (count,) = inputs["num_patches_list"]
    assert count == 1 if max_patches == 1 else 1 <= count <= max_patches + 1  # and the thumbnail
    assert len(inputs["pixel_values"]) == count
    assert run_lengths(inputs["input_ids"][0]) == [4 * count]


def test_min_patches_cuts_a_small_image(processor):
    small = Image.new("RGB", (14, 14), "red")
    assert processor(images=small, text="<image>", max_patches=4)["num_patches_list"] == [1]
    assert processor(images=small, text="<image>", min_patches=2, max_patches=4)["num_patches_list"][0] > 2


def test_max_length_is_a_limit_that_counts_everything(processor):
    call = lambda **kwargs: processor(images=picture("gray"), text="<image> a", num_thoughts=2, **kwargs)  # noqa: E731
    ids = call()["input_ids"][0]
    assert call(max_length=len(ids))["input_ids"][0] == ids
    with pytest.raises(ValueError, match=f"{len(ids)} tokens, more than `max_length` {len(ids) - 1}"):
        call(max_length=len(ids) - 1)
    padded = call(max_length=len(ids) + 3, padding="max_length", return_tensors="pt")
    assert padded["input_ids"].shape == (1, len(ids) + 3)
    assert real_ids(padded, 0) == ids


def test_return_tensors(processor):
    lists = processor(images=picture("gray"), text="<image> a")
    tensors = processor(images=picture("gray"), text="<image> a", return_tensors="pt")
    assert isinstance(lists["input_ids"], list)
    assert isinstance(lists["input_ids"][0], list)
    assert tensors["input_ids"].dtype == torch.int64
    assert tensors["pixel_values"].dtype == torch.float32
    same_inputs(lists, tensors)
    assert all(type(count) is int for count in lists["num_patches_list"])
    assert isinstance(lists["num_patches_list"], list)
    assert tensors["num_patches_list"].dtype == torch.int64
    assert tensors["num_patches_list"].shape == (1,)


@pytest.mark.parametrize("images", [None, [picture("gray")], [picture("tall"), picture("big")]], ids=len_or_none)
def test_inputs_can_be_moved_one_by_one(processor, images):
    """As clients move them; a cast to another float leaves what counts alone."""
    inputs = processor(images=images, text="<image>" * len(images or []) + "a", return_tensors="pt")
    moved = {name: value.to("cpu") for name, value in inputs.items()}
    assert moved.keys() == inputs.keys()
    cast = processor(images=images, text="<image>" * len(images or []) + "a", return_tensors="pt").to(
        "cpu", torch.bfloat16
    )
    assert [cast[name].dtype for name in ("input_ids", "attention_mask")] == [torch.int64] * 2
    if images:
        assert torch.equal(cast["num_patches_list"], inputs["num_patches_list"])
        assert (cast["num_patches_list"].dtype, len(cast["num_patches_list"])) == (torch.int64, len(images))


def test_settings_of_images_are_heard_in_every_format(own_processor, tmp_path):
    """They were dropped in silence for checkpoints of others."""
    own_processor.save_pretrained(tmp_path)
    for folder in (CHECKPOINT, tmp_path):
        processor = MultiCoCoProcessor.from_pretrained(folder, max_patches=3)
        assert processor.image_processor.max_patches == 3
        assert int(processor(images=picture("big"), text="<image>", return_tensors="pt")["num_patches_list"]) <= 4


@pytest.fixture(params=["original", "hf", "own"])
def folder_of_each_format(request, processor, tmp_path):
    """A folder of each kind of checkpoint that a processor is made from."""
    if request.param == "hf":
        write_hf_folder(tmp_path, "processor_config")
    if request.param == "own":
        processor.save_pretrained(tmp_path)
    return CHECKPOINT if request.param == "original" else tmp_path


def test_an_argument_that_nobody_knows_is_refused_in_every_format(folder_of_each_format):
    """A typo such as `max_pathces` passed in silence, and the saved number of tiles was used."""
    with pytest.raises(ValueError, match=r"does not know \['max_pathces'\].*spelling.*`image_processor`"):
        MultiCoCoProcessor.from_pretrained(folder_of_each_format, max_pathces=3, max_patches=3)


def test_what_loaders_hand_on_is_understood_in_every_format(folder_of_each_format):
    """The tokenizer hears its settings, and what auto classes, pipelines and trainers hand to all is let through."""
    settings = {"padding_side": "right", "model_max_length": 77, "pad_token": "<|im_end|>"}
    for_all = {"trust_remote_code": True, "use_fast": True, "dtype": "auto", "_from_auto": True, "revision": "main"}
    processor = MultiCoCoProcessor.from_pretrained(folder_of_each_format, **settings, **for_all)
    assert {name: getattr(processor.tokenizer, name) for name in settings} == settings
    MultiCoCoProcessor.from_pretrained(
        folder_of_each_format, _from_pipeline="image-text-to-text", attn_implementation="sdpa"
    )
    given = MultiCoCoProcessor.from_pretrained(folder_of_each_format, tokenizer=processor.tokenizer)
    assert given.tokenizer is processor.tokenizer


@pytest.mark.parametrize("missing", ["image_processor", "tokenizer"])
def test_a_part_that_is_missing_is_named(own_processor, missing):
    parts = {"image_processor": own_processor.image_processor, "tokenizer": own_processor.tokenizer, missing: None}
    with pytest.raises(ValueError, match=f"`{missing}` is None.*`MultiCoCoProcessor.from_pretrained`"):
        MultiCoCoProcessor(**parts)


def test_an_image_processor_of_another_kind_is_replaced_with_a_word(own_processor, tmp_path, caplog):
    """Not when a folder is loaded, where an auto class makes torchvision's if that is installed."""
    other = CLIPImageProcessorPil(image_mean=[0.25, 0.5, 0.75])
    logger = logging.getLogger("multicoco.processing_multicoco")
    type(logger).warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=logger.name):
        parts = [other, own_processor.tokenizer]
        loaded = MultiCoCoProcessor.from_args_and_dict(parts, own_processor.to_dict())
        assert not caplog.records
        given = MultiCoCoProcessor(*parts)
    (said,) = caplog.records
    assert "`image_processor` is a CLIPImageProcessorPil" in said.getMessage()
    for processor in (loaded, given):
        assert isinstance(processor.image_processor, GotOcr2ImageProcessorPil)
        assert processor.image_processor.image_mean == other.image_mean


def test_a_program_with_fixed_names_can_leave_out_the_counts(own_processor, tmp_path):
    """trl's GRPO and RLOO hand every key on to a function that does not know this one. The next user gets it again."""
    own_processor.return_num_patches_list = False
    own_processor.save_pretrained(tmp_path)
    names = {"input_ids", "attention_mask", "pixel_values"}
    assert set(own_processor(images=picture("big"), text="<image>", return_tensors="pt")) == names
    saved = MultiCoCoProcessor.from_pretrained(tmp_path)
    assert set(saved(images=picture("big"), text="<image>", return_tensors="pt")) == {*names, "num_patches_list"}


EMPTIES = [[], (), [[]], [[], []], [None], [[None]], [None, []]]


@pytest.mark.parametrize("empty", EMPTIES, ids=str)
@pytest.mark.parametrize("name", ["videos", "audio", "images"])
def test_empty_lists_are_none(processor, name, empty):
    """Evaluations give a list for each kind of input, whatever the question has."""
    texts = ["Why?"] * max(1, len(empty))
    same_inputs(processor(text=texts, **{name: empty}), processor(text=texts))
    given = {"videos": empty, "audio": empty, "images": [picture("gray")]}
    same_inputs(processor(text="<image> a", **given), processor(text="<image> a", images=[picture("gray")]))
    if name == "images":
        with pytest.raises(ValueError, match="Sample 0: `text` has 1 <image> but 0 images"):
            processor(text=["<image> a", *texts[1:]], images=empty)


def test_none_stands_for_the_images_of_a_text_without_any(processor):
    texts = ["a", "<image> b", "c", "<image><image> d"]
    images = [picture(name) for name in ("gray", "tall", "wide")]
    nested = processor(images=[[], images[:1], [], images[1:]], text=texts, padding=True, return_tensors="pt")
    for given in ([None, images[0], None, images[1:]], [None, images[:1], [], images[1:]]):
        same_inputs(processor(images=given, text=texts, padding=True, return_tensors="pt"), nested)
    with pytest.raises(ValueError, match="Sample 0, image 1 .*cannot be read"):  # but not for one of several
        processor(images=[[images[0], None]], text="<image><image>")


@pytest.mark.parametrize("truncation", [True, "longest_first", "only_first"])
def test_truncation_passes_where_it_would_cut_nothing(own_processor, truncation):
    """trl always asks for it; lm-eval does without a limit."""
    call = lambda **kwargs: own_processor(images=picture("gray"), text="<image> a", num_thoughts=2, **kwargs)  # noqa: E731
    expected = call()
    length = len(expected["input_ids"][0])
    same_inputs(call(truncation=truncation, max_length=length), expected)
    same_inputs(call(truncation=truncation), expected)
    with pytest.raises(ValueError, match=f"{length} tokens, more than `max_length` {length - 1}"):
        call(truncation=truncation, max_length=length - 1)
    own_processor.tokenizer.model_max_length = length
    same_inputs(call(truncation=truncation), expected)
    own_processor.tokenizer.model_max_length = length - 1
    same_inputs(call(), expected)  # no limit was asked for
    with pytest.raises(
        ValueError, match=f"{length} tokens, more than the tokenizer's `model_max_length` {length - 1}"
    ):
        call(truncation=truncation)


def test_public_names_of_the_native_processor(processor):
    convert = processor.tokenizer.convert_tokens_to_ids
    assert processor.image_seq_length == processor.num_image_token == 4
    assert (processor.image_token, processor.image_token_id) == ("<IMG_CONTEXT>", convert("<IMG_CONTEXT>"))
    assert (processor.start_image_token, processor.end_image_token) == ("<img>", "</img>")
    ids = [processor.image_token_id, processor.start_image_token_id, processor.end_image_token_id]
    assert processor.image_token_ids == ids == convert(["<IMG_CONTEXT>", "<img>", "</img>"])


def test_decoding_restores_the_text(processor):
    texts = ["Hello, how are you?", "是书生 café 😀"]
    ids = processor.tokenizer(texts)["input_ids"]
    assert processor.batch_decode(ids) == texts
    assert processor.decode(ids[0]) == texts[0]
    block = processor(text="so", num_thoughts=2)["input_ids"][0]
    assert processor.decode(block, skip_special_tokens=True) == "so"
    assert processor.decode(block) == "so<|start-latent|><|latent|><|latent|><|end-latent|>"


@pytest.fixture(params=["tokenizers", "python"])
def tokenizer(request):
    """The fast back end of every InternVL3, and transformers' own in Python, which splits added tokens by itself."""
    if request.param == "tokenizers":
        return MultiCoCoProcessor.from_pretrained(CHECKPOINT).tokenizer
    tokenizer = ByT5Tokenizer()  # needs no file
    prepare_tokenizer(tokenizer)
    return tokenizer


@pytest.mark.parametrize("count", [1, 2, 3, 256, 1024, 3328])
def test_repeated_image_token_splits_exactly(tokenizer, count):
    image_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    ids = tokenizer("<IMG_CONTEXT>" * count, add_special_tokens=False)["input_ids"]
    assert ids == [image_id] * count
    assert image_id != tokenizer.unk_token_id


def test_preparing_a_tokenizer_twice_changes_nothing(tokenizer):
    before = {token: tokenizer.convert_tokens_to_ids(token) for token in RESERVED_TOKENS}
    assert len(set(before.values())) == len(RESERVED_TOKENS)
    length = len(tokenizer)
    assert prepare_tokenizer(tokenizer) == 0
    assert len(tokenizer) == length
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in RESERVED_TOKENS} == before


def test_settings_of_an_original_configuration_reach_the_processor(tmp_path):
    """No dynamic tiling means one tile; a system message of the checkpoint is the prompt's, quotes included."""
    shutil.copytree(CHECKPOINT, tmp_path / "original")
    path = tmp_path / "original" / "config.json"
    config = json.loads(path.read_text())
    message = "Say \"yes\" or 'no'.\nNothing else, C:\\ too."
    path.write_text(json.dumps({**config, "dynamic_image_size": False, "system_message": message}))
    processor = MultiCoCoProcessor.from_pretrained(tmp_path / "original")
    conversation = [{"role": "user", "content": "<image>\nHi"}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt.startswith(f"<|im_start|>system\n{message}<|im_end|>\n<|im_start|>user\n<image>\nHi")
    assert processor(images=[Image.new("RGB", (300, 20))], text=prompt)["num_patches_list"] == [1]
    processor.save_pretrained(tmp_path / "own")
    again = MultiCoCoProcessor.from_pretrained(tmp_path / "own")
    assert again.apply_chat_template(conversation, add_generation_prompt=True) == prompt
