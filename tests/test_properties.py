"""Any input is either exact or one `ValueError`: the processor and what the model takes, on drawn inputs.

Each property has an oracle that says by a plain loop whether an input is valid, so a wrong refusal fails as well as a
wrong result. `MULTICOCO_EXAMPLES` is the number of inputs for each property; by default a few hundred, which take well
under a minute together. The 10,000 of the contract: `MULTICOCO_EXAMPLES=10000 pytest tests/test_properties.py`. The
draws are the same in every run. Collating is not part of this file.
"""

import os
import unicodedata

import pytest
import torch
from conftest import model_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import reference_logits, split_rows, widened

from multicoco.processing_multicoco import RESERVED_TOKENS


def examples(default):
    """What all properties have in common; the fixtures they take are never changed."""
    return settings(
        max_examples=int(os.environ.get("MULTICOCO_EXAMPLES", default)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# The processor.
PIECES = ["<image>", "<image>\n", "", " ", "\n", "How many?", "书生", "é", "e\u0301", "😀", "\u200b", "0", "<", "|>"]
PIECES += ["<IMG_CON", "TEXT>", "<ima", "ge>", "<|im_start|>user\n", "<|im_end|>\n", "<|endoftext|>", "[UNK]"]


@st.composite
def texts_and_images(draw):
    """Texts with mostly as many images as placeholders, and the images nested or flat."""
    piece = st.sampled_from(PIECES) if draw(st.integers(0, 5)) else st.sampled_from(PIECES + list(RESERVED_TOKENS))
    texts = draw(st.lists(st.lists(piece, max_size=6).map("".join), min_size=1, max_size=3))
    counts = [text.count("<image>") for text in texts]
    if draw(st.integers(0, 5)) == 0:
        sample = draw(st.integers(0, len(texts) - 1))
        counts[sample] = max(0, counts[sample] + draw(st.sampled_from([-1, 1])))
    size = st.integers(1, 70)
    nested = [[(draw(size), draw(size)) for _ in range(count)] for count in counts]
    form = draw(st.sampled_from(["nested", "flat"]))
    return texts, nested, form


def tiles_of(processor, size, max_patches):
    width, height = size
    kwargs = {"crop_to_patches": True, "max_patches": max_patches}
    return processor.image_processor.get_number_of_image_patches(height, width, kwargs)


def parse_prompt(processor, ids):
    """The texts between the image runs, the length of each run, and the number of thoughts (`None`: no block)."""
    tokens = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in RESERVED_TOKENS}
    image_start, image_end, image = tokens["<img>"], tokens["</img>"], tokens["<IMG_CONTEXT>"]
    start, latent, end = tokens["<|start-latent|>"], tokens["<|latent|>"], tokens["<|end-latent|>"]
    num_thoughts = None
    if ids and ids[-1] == end:
        num_thoughts = ids.count(latent)
        block = [start, *[latent] * num_thoughts, end]
        assert ids[-len(block) :] == block
        ids = ids[: -len(block)]
    assert not {start, latent, end} & set(ids)
    parts, runs = [[]], []
    position = 0
    while position < len(ids):
        if ids[position] == image_start:
            stop = ids.index(image_end, position)
            assert ids[position + 1 : stop] == [image] * (stop - position - 1)
            runs.append(stop - position - 1)
            parts.append([])
            position = stop
        else:
            assert ids[position] not in (image, image_end)
            parts[-1].append(ids[position])
        position += 1
    return [processor.tokenizer.decode(part) for part in parts], runs, num_thoughts


@examples(700)
@given(
    drawn=texts_and_images(),
    num_thoughts=st.one_of(st.none(), st.integers(0, 4), st.sampled_from([-1, True, 1.5])),
    max_patches=st.one_of(st.integers(1, 6), st.just(0)),
    max_length=st.one_of(st.none(), st.none(), st.integers(0, 60)),
    padding_side=st.sampled_from(["left", "right"]),
)
def test_processor_is_exact_or_refuses(processor, drawn, num_thoughts, max_patches, max_length, padding_side):
    texts, nested, form = drawn
    images = [Image.new("RGB", size, "teal") for sample in nested for size in sample]
    if form == "nested":
        pictures = iter(images)
        images = [[next(pictures) for _ in sample] for sample in nested]

    wanted = [text.count("<image>") for text in texts]
    given_counts = [len(sample) for sample in nested]
    matched = given_counts == wanted if form == "nested" else sum(given_counts) == sum(wanted)
    valid = matched and not any(token in text for text in texts for token in RESERVED_TOKENS)
    valid = valid and (num_thoughts is None or (type(num_thoughts) is int and num_thoughts >= 0))
    valid = valid and max_patches >= 1

    kwargs = {} if max_length is None else {"max_length": max_length}
    call = lambda **kwargs: processor(  # noqa: E731
        images=images,
        text=texts,
        num_thoughts=num_thoughts,
        max_patches=max_patches,
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
        **kwargs,
    )
    if not valid:
        with pytest.raises(ValueError, match=".") as caught:
            call(**kwargs)
        assert type(caught.value) is ValueError
        return
    inputs = call()
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    if max_length is not None and longest > max_length:
        with pytest.raises(ValueError, match="`max_length`"):
            call(**kwargs)
        return
    if max_length is not None:
        torch.testing.assert_close(call(**kwargs)["input_ids"], inputs["input_ids"], rtol=0, atol=0)

    flat_sizes = iter([size for sample in nested for size in sample])
    sizes = [[next(flat_sizes) for _ in range(count)] for count in wanted]
    expected = [tiles_of(processor, size, max_patches) for sample in sizes for size in sample]
    if expected:
        assert inputs["num_patches_list"].tolist() == expected
        assert inputs["pixel_values"].shape == (sum(expected), 3, 28, 28)
    else:
        assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].dtype == inputs["attention_mask"].dtype == torch.int64
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (len(texts), longest)
    tiles = iter(expected)
    for row, text in enumerate(texts):
        mask = inputs["attention_mask"][row]
        length = int(mask.sum())
        ids = inputs["input_ids"][row]
        ids = ids[longest - length :] if padding_side == "left" else ids[:length]
        assert ids.tolist() == inputs["input_ids"][row][mask.bool()].tolist()  # the padding is on one side only
        parts, runs, thoughts = parse_prompt(processor, ids.tolist())
        assert parts == [unicodedata.normalize("NFC", part) for part in text.split("<image>")]
        assert runs == [processor.num_image_token * next(tiles) for _ in range(wanted[row])]
        assert thoughts == num_thoughts


# What the model takes. A row is a list of segments; each segment is (kind, count).
IMAGE_TOKENS = 4
START, END = 632, 634
TEXT_SEGMENT = st.tuples(st.just("text"), st.integers(1, 3))
IMAGE_SEGMENT = st.tuples(st.just("image"), st.integers(1, 2))
LATENT_SEGMENT = st.tuples(st.just("latent"), st.integers(1, 2))


@st.composite
def well_formed_row(draw):
    """Text and images, then thoughts with or without text between them, then text."""
    segments = [("text", 1)]
    for _ in range(draw(st.integers(0, 2))):
        segments += [draw(IMAGE_SEGMENT), *draw(st.lists(TEXT_SEGMENT, max_size=1))]
    segments += [("start", 1)]
    for _ in range(draw(st.integers(0, 2))):
        segments += [draw(LATENT_SEGMENT), *draw(st.lists(TEXT_SEGMENT, max_size=1))]
    return [*segments, ("end", 1), draw(TEXT_SEGMENT)]


ANY_SEGMENT = st.one_of(
    TEXT_SEGMENT, IMAGE_SEGMENT, LATENT_SEGMENT, st.tuples(st.just("broken_image"), st.integers(1, 7))
)
ANY_ROW = st.lists(ANY_SEGMENT, min_size=1, max_size=5)


@st.composite
def batches(draw):
    """Rows, padding, holes in the mask, tiles and their list: most of it right, some of it not."""
    rows = draw(st.lists(well_formed_row(), min_size=1, max_size=3))
    if draw(st.integers(0, 3)) == 0:
        rows[draw(st.integers(0, len(rows) - 1))] = draw(ANY_ROW)
    side = draw(st.sampled_from(["left", "right", "mixed"]))
    lefts = [side == "left" or (side == "mixed" and draw(st.booleans())) for _ in rows]
    flaw = draw(st.sampled_from([None] * 8 + ["tile_more", "tile_less", "swap", "latent_in_padding", "hole", "list"]))
    return {
        "rows": rows,
        "lefts": lefts,
        "width": draw(st.integers(0, 2)),
        "listed": draw(st.booleans()),
        "flaw": flaw,
        "seed": draw(st.integers(0, 2**16)),
    }


def build(drawn, config):
    """The tensors of a drawn batch, and for each row the tiles of its images."""
    generator = torch.Generator().manual_seed(drawn["seed"])
    integer = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    texts = {"text": lambda: integer(5, 600), "start": lambda: START, "end": lambda: END}
    rows, images = [], []
    for segments in drawn["rows"]:
        ids, tiles = [], []
        for kind, count in segments:
            if kind == "image":
                ids += [config.image_token_id] * (IMAGE_TOKENS * count)
                tiles.append(count)
            elif kind == "broken_image":
                ids += [config.image_token_id] * count
                tiles += [count // IMAGE_TOKENS] * (count >= IMAGE_TOKENS)
            elif kind == "latent":
                ids += [config.latent_token_id] * count
            else:
                ids += [texts[kind]() for _ in range(count)]
        rows.append(ids)
        images.append(tuple(tiles))
    width = max(len(ids) for ids in rows) + drawn["width"]
    input_ids, mask = torch.full((len(rows), width), 620), torch.zeros(len(rows), width, dtype=torch.long)
    for row, (ids, left) in enumerate(zip(rows, drawn["lefts"], strict=True)):
        start = width - len(ids) if left else 0
        input_ids[row, start : start + len(ids)] = torch.tensor(ids)
        mask[row, start : start + len(ids)] = 1
    num_patches_list = [count for counts in images for count in counts]
    num_tiles, flaw = sum(num_patches_list), drawn["flaw"]
    row = integer(0, len(rows))
    padding = (mask[row] == 0).nonzero().flatten().tolist()
    ordinary = ((mask[row] == 1) & (input_ids[row] < 620)).nonzero().flatten().tolist()
    if flaw == "tile_more":
        num_tiles += 1
    elif flaw == "tile_less":
        num_tiles = max(0, num_tiles - 1)
    elif flaw == "swap":
        num_patches_list = num_patches_list[::-1]
    elif flaw == "list" and num_patches_list:
        num_patches_list = [*num_patches_list[:-1], num_patches_list[-1] + 1]
    elif flaw == "latent_in_padding" and padding:
        input_ids[row, padding[integer(0, len(padding))]] = config.latent_token_id
    elif flaw == "hole" and ordinary:
        mask[row, ordinary[integer(0, len(ordinary))]] = 0
    batch = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": torch.full_like(input_ids, -100),
        "images": tuple(images),
    }
    if num_tiles:
        shape = (num_tiles, 3, *config.vision_config.image_size)
        batch["pixel_values"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    if drawn["listed"]:
        batch["num_patches_list"] = num_patches_list
    return batch


def is_valid(batch, config):
    """The rules, position by position."""
    counts, runs = [], []
    for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        run = 0
        for position, (token, real) in enumerate(zip(ids, mask, strict=True)):
            if token == config.latent_token_id:
                if not real or position == 0 or not mask[position - 1]:
                    return False
                if config.image_token_id in ids[position:]:
                    return False
            if token == config.image_token_id:
                run += 1
            if run and (position + 1 == len(ids) or ids[position + 1] != config.image_token_id):
                runs.append(run)
                run = 0
        counts.append(ids.count(config.image_token_id))
    num_tiles = len(batch.get("pixel_values", ()))
    if any(count % IMAGE_TOKENS for count in counts) or sum(counts) != IMAGE_TOKENS * num_tiles:
        return False
    if "num_patches_list" in batch:  # each run is filled by whole images, in order
        remaining = list(batch["num_patches_list"])
        for run in runs:
            while run > 0 and remaining:
                run -= IMAGE_TOKENS * remaining.pop(0)
            if run:
                return False
        return not remaining
    return True


def assert_exact_or_refused(model, computed, drawn):
    batch = build(drawn, model.config)
    inputs = model_inputs(batch)
    del inputs["labels"]
    with torch.no_grad(), widened():
        computed.clear()
        if not is_valid(batch, model.config):
            with pytest.raises(ValueError, match=".") as caught:
                model(**inputs)
            assert type(caught.value) is ValueError
            assert computed == []
            return
        output = model(**inputs, return_thoughts=True)
        assert output.logits.shape[:2] == batch["input_ids"].shape
        # By the tokens of each row, as two broken runs side by side can make a whole one.
        tiles = [
            count // IMAGE_TOKENS for count in (batch["input_ids"] == model.config.image_token_id).sum(1).tolist()
        ]
        rows = split_rows({**batch, "images": [(count,) for count in tiles], "num_patches_list": tiles})
        for row, sample in enumerate(rows):
            real = batch["attention_mask"][row].bool()
            if not real.any():  # nothing but padding: there is nothing to compare
                continue
            logits, thoughts = reference_logits(model, sample["input_ids"], sample["pixel_values"])
            torch.testing.assert_close(output.logits[row, real], logits, atol=1e-9, rtol=0)
            if output.thoughts is None:
                assert not thoughts
                continue
            assert not output.thoughts[row, len(thoughts) :].any()
            for thought, expected in zip(output.thoughts[row], thoughts, strict=False):
                torch.testing.assert_close(thought, expected, atol=1e-9, rtol=0)


@examples(350)
@given(drawn=batches())
def test_forward_is_exact_or_refuses(shared_model, computed, drawn):
    assert (shared_model.config.start_latent_id, shared_model.config.end_latent_id) == (START, END)
    assert_exact_or_refused(shared_model, computed, drawn)


@examples(250)
@given(drawn=st.builds(lambda drawn, row: {**drawn, "rows": [row] * len(drawn["rows"])}, batches(), ANY_ROW))
def test_forward_on_arbitrary_rows_is_exact_or_refuses(shared_model, computed, drawn):
    """Without a form: latents first, images last, broken runs, nothing but padding between them."""
    assert_exact_or_refused(shared_model, computed, drawn)


def test_drawn_batches_are_of_both_kinds(shared_model):
    """So that neither half of the properties is empty."""
    seen = []

    @examples(200)
    @given(drawn=batches())
    def collect(drawn):
        batch = build(drawn, shared_model.config)
        has_latent = bool((batch["input_ids"] == shared_model.config.latent_token_id).any())
        seen.append((is_valid(batch, shared_model.config), has_latent, "pixel_values" in batch))

    collect()
    shares = {kind: seen.count(kind) / len(seen) for kind in set(seen)}
    assert shares[True, True, True] > 0.2
    assert sum(share for kind, share in shares.items() if not kind[0]) > 0.15
