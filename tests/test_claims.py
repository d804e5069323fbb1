"""One test for each claim about systems like this one: it fails if our verdict on the claim were wrong.

That A-OKVQA's three rationales are steps of one chain is held in `test_recipes.py`: each is an alternative of its own.
"""

import ast
import contextlib
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, FLOAT32_INSIDE, GOLDEN, model_inputs
from PIL import Image
from reference import (
    loss_and_grads,
    reference_generate,
    reference_logits,
    reference_loss,
    split_rows,
    training,
    widened,
)
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, Trainer, TrainerCallback, TrainingArguments

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor, add_thought_tokens
from multicoco import modeling_multicoco as modeling
from multicoco.curriculum import CurriculumArguments
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.processing_multicoco import RESERVED_TOKENS, prepare_tokenizer
from multicoco.records import load_records
from multicoco.trainer_callbacks import CurriculumCallback


ROOT = Path(__file__).parents[1]
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "eos_token_id": 622, "pad_token_id": 620}


def without_labels(batch):
    return {name: value for name, value in model_inputs(batch).items() if name != "labels"}


def largest_difference(one, other):
    return (one - other).abs().max().item()


def golden(case):
    tensors = load_file(GOLDEN / "internvl" / "forward_cases.safetensors")
    return {name.removeprefix(f"{case}."): value for name, value in tensors.items() if name.startswith(f"{case}.")}


@pytest.fixture(scope="module")
def original_model():
    """The golden checkpoint as it is, without thought tokens, with the attention that the golden values come from."""
    return MultiCoCoForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float64, attn_implementation="eager"
    ).eval()


# Fusion and passes.
def test_claim_fusion_is_bypassed(original_model):
    """
    Claim: calling the language model on fused embeddings bypasses InternVL's cross-modal fusion. False: overwriting
    the embeddings *is* the fusion, and gives the logits of the original program.
    """
    case = golden("train_batch")
    pixel_values = case["pixel_values"].double()
    with torch.no_grad():
        embeds = original_model.fuse(case["input_ids"], pixel_values, tiles=[0, 1, 2, 4])  # 3 is the blank tile
        hidden = original_model.model.language_model(
            inputs_embeds=embeds, attention_mask=case["attention_mask"], position_ids=case["position_ids"]
        ).last_hidden_state
        by_hand = original_model.lm_head(hidden)
        output = original_model(
            pixel_values,
            case["input_ids"],
            case["attention_mask"],
            case["position_ids"],
            case["image_flags"],
            labels=case["labels"],
        )
    real = case["attention_mask"].bool()
    for logits in (by_hand, output.logits):
        torch.testing.assert_close(logits[real], case["logits"][real], atol=FLOAT32_INSIDE, rtol=0)
    torch.testing.assert_close(output.loss.double(), case["loss"], atol=0, rtol=2e-6)
    kinds = {name.split(".")[1] for name in original_model.state_dict() if name.startswith("model.")}
    assert kinds == {"vision_tower", "multi_modal_projector", "language_model"}  # nothing else that could fuse


@pytest.mark.parametrize("cache", ["growing", "of_training"])
@pytest.mark.parametrize("num_thoughts", [1, 3])
def test_claim_vision_is_lost_after_the_first_pass(model, make_batch, num_thoughts, cache):
    """
    Claim: visual features must be embedded again in every latent pass, or vision is lost. False with a cache: the
    tower runs once, and loss and all gradients, also those of the pixels, equal a recompute of the whole prefix.
    """
    batch = make_batch(num_thoughts=(num_thoughts,) * 2, images=((2,), (1,)))
    calls = []
    model.model.vision_tower.register_forward_pre_hook(lambda *args: calls.append(len(calls)))
    pixels = batch["pixel_values"]
    results = []
    for loss_fn in (lambda: reference_loss(model, batch), lambda: model(**model_inputs(batch)).loss):
        batch["pixel_values"] = pixels.clone().requires_grad_()
        calls.clear()
        with training(model) if cache == "of_training" else contextlib.nullcontext():  # no dropout: both modes agree
            loss, grads = loss_and_grads(model, loss_fn)
        results.append((loss, {**grads, "pixel_values": batch["pixel_values"].grad}))
    assert len(calls) == 1
    (expected_loss, expected), (loss, grads) = results
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    assert grads["pixel_values"].abs().amax(dim=(1, 2, 3)).min() > 1e-4  # every tile of every sample
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_claim_gradient_reaches_pixels_through_every_thought(model, make_batch, index):
    """
    Claim (its second half): the thoughts are cut off from the image. False: detaching any single thought changes the
    gradient of the answer's loss with respect to the pixels, and leaves the loss as it is.
    """
    batch = make_batch(num_thoughts=(3, 3), images=((1,), (2,)))
    losses, grads = [], []
    for edit in (None, lambda thought, number: thought.detach() if number == index else thought):
        inputs = model_inputs(batch)
        inputs["pixel_values"] = batch["pixel_values"].clone().requires_grad_()
        with widened():
            loss = model(**inputs, edit_thoughts=edit).loss
            loss.backward()
        losses.append(loss.detach())
        grads.append(inputs["pixel_values"].grad)
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=0)
    change = (grads[1] - grads[0]).flatten(1).norm(dim=1) / grads[0].flatten(1).norm(dim=1)
    assert change.min() > 1e-3  # of every tile


def test_claim_true_without_cache_from_token_ids(original_model):
    """
    Where the claim is true: a later pass that starts from token ids without the cache has plain embeddings at the
    placeholders, and its logits are others. With the cache the second pass equals the whole, as in the original.
    """
    case = golden("cached_second_pass")
    split, input_ids = int(case["split"]), case["input_ids"]
    pixel_values = case["pixel_values"].double()
    with torch.no_grad():
        first = original_model(input_ids=input_ids[:, :split], pixel_values=pixel_values, use_cache=True)
        second = original_model(
            input_ids=input_ids[:, split:],
            past_key_values=first.past_key_values,
            attention_mask=torch.ones_like(input_ids),
        ).logits
        embeds = original_model.get_input_embeddings()(input_ids)
        plain = original_model(inputs_embeds=embeds).logits[:, split:]
        whole = original_model(input_ids=input_ids, pixel_values=pixel_values).logits
    torch.testing.assert_close(whole, case["logits_full"], atol=FLOAT32_INSIDE, rtol=0)
    torch.testing.assert_close(second, case["logits_second_pass"], atol=FLOAT32_INSIDE, rtol=0)
    torch.testing.assert_close(second, whole[:, split:], atol=1e-6, rtol=0)
    recorded = json.loads((GOLDEN / "internvl" / "forward_cases.json").read_text())["cached_second_pass"]
    expected = recorded["control_full_recomputation_without_placing_features"]
    assert largest_difference(plain, whole[:, split:]) == pytest.approx(expected, abs=1e-4)


def test_claim_dropped_cache_is_noticed(model, make_batch):
    """Each chunk run without the past of the earlier ones gives other logits: the cache is what holds the image."""
    batch = make_batch(num_thoughts=(2,), images=((1,),))
    (row,) = split_rows(batch)
    with torch.no_grad(), widened():
        expected = model(**without_labels(batch)).logits[0]
        logits, _ = reference_logits(model, row["input_ids"], row["pixel_values"])
        torch.testing.assert_close(expected, logits, atol=1e-11, rtol=0)
        embeds = model.fuse(batch["input_ids"], batch["pixel_values"])
        columns = (batch["input_ids"][0] == model.config.latent_token_id).nonzero().flatten().tolist()
        length = embeds.shape[1]
        positions, states = torch.arange(length)[None], []
        for start, stop in zip([0, *columns], [*columns, length], strict=True):
            chunk = embeds[:, start:stop]
            if start:
                chunk = torch.cat([states[-1][:, -1:], chunk[:, 1:]], dim=1)
            states.append(
                model.model.language_model(
                    inputs_embeds=chunk, position_ids=positions[:, start:stop], use_cache=False
                ).last_hidden_state
            )
        dropped = model.lm_head(torch.cat(states, dim=1))[0]
    torch.testing.assert_close(dropped[: columns[0]], expected[: columns[0]], atol=1e-11, rtol=0)
    assert largest_difference(dropped[columns[0] :], expected[columns[0] :]) > 0.1


# What a thought is.
def test_claim_thoughts_are_not_detached(model, make_batch):
    """A detached thought leaves the loss as it is and changes the gradients; ours are those of the definition."""
    batch = make_batch(num_thoughts=(2, 2), images=((1,), ()))
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch))
    loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
    detached = lambda: model(**model_inputs(batch), edit_thoughts=lambda thought, index: thought.detach()).loss  # noqa: E731
    detached_loss, detached_grads = loss_and_grads(model, detached)
    torch.testing.assert_close(detached_loss, loss, atol=0, rtol=0)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    norm = lambda values: torch.stack([value.norm() for value in values]).norm()  # noqa: E731
    difference = lambda one: norm([one[name] - expected[name] for name in expected]) / norm(expected.values())  # noqa: E731
    assert difference(grads) < 1e-9
    assert difference(detached_grads) > 1e-3


def test_claim_thought_is_the_state_after_the_final_norm(model, make_batch):
    """A thought taken before the final norm gives other logits; ours are those of the state after it."""
    batch = make_batch(num_thoughts=(2, 2), images=((1,), ()))
    inputs, before_norm = without_labels(batch), []
    model.model.language_model.norm.register_forward_pre_hook(lambda module, args: before_norm.append(args[0]))
    with torch.no_grad(), widened():
        output = model(**inputs, return_thoughts=True)
        early = model(**inputs, edit_thoughts=lambda thought, index: before_norm[-1][:, -1]).logits
        for row, sample in enumerate(split_rows(batch)):
            real = batch["attention_mask"][row].bool()
            logits, _ = reference_logits(model, sample["input_ids"], sample["pixel_values"])
            torch.testing.assert_close(output.logits[row, real], logits, atol=1e-11, rtol=0)
            first = int((batch["input_ids"][row] == model.config.latent_token_id).nonzero()[0])
            assert largest_difference(early[row, first:][real[first:]], output.logits[row, first:][real[first:]]) > 0.1


# Tiles and placeholders.
def spoiled_by_one_token(batch, sample):
    input_ids = batch["input_ids"].clone()
    input_ids[sample, (input_ids[sample] == 625).nonzero()[0]] = 7
    return input_ids


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_claim_tile_count_must_equal_placeholder_count(shared_model, make_batch, call):
    """
    Claim: tiles must match the `<IMG_CONTEXT>` count, and truncating or repeating features is wrong. True: one too
    few or too many is an error, never a cut.
    """
    batch = make_batch(images=((2,), (1,)), padding="left")
    inputs = without_labels(batch)
    run = shared_model if call == "forward" else lambda **kwargs: shared_model.generate(**kwargs, **GENERATE)
    for listed in (batch["num_patches_list"], None):
        for tiles in ([0, 1], [0, 1, 2, 2]):
            with pytest.raises(ValueError, match="tiles"):
                run(**{**inputs, "pixel_values": batch["pixel_values"][tiles], "num_patches_list": listed})
        with pytest.raises(ValueError, match="Sample 1: `input_ids` holds"):
            run(**{**inputs, "input_ids": spoiled_by_one_token(batch, 1), "num_patches_list": listed})


def test_claim_flattened_assignment_mixes_samples(shared_model, make_batch):
    """
    Claim: the flattened assignment mixes the patches of different samples. False while both sides are in sample
    order: a tile changes its own sample, others by exactly nothing.
    """
    batch = make_batch(num_thoughts=(1, 1, 1), images=((2,), (), (1, 1)))
    inputs = without_labels(batch)
    owner = [0, 0, 2, 2]
    with torch.no_grad():
        before = shared_model(**inputs).logits
        for tile, sample in enumerate(owner):
            pixel_values = batch["pixel_values"].clone()
            pixel_values[tile] *= -1
            after = shared_model(**{**inputs, "pixel_values": pixel_values}).logits
            changed = [largest_difference(after[row], before[row]) for row in range(3)]
            assert changed[sample] > 0.1
            assert [change for row, change in enumerate(changed) if row != sample] == [0.0, 0.0]


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_claim_equal_totals_hide_swapped_samples(shared_model, make_batch, call):
    """Where that claim is true: counts that differ by sample while the totals agree. They are refused by sample."""
    batch = make_batch(images=((2,), (1,)), padding="left")
    inputs = without_labels(batch)
    run = shared_model if call == "forward" else lambda **kwargs: shared_model.generate(**kwargs, **GENERATE)
    swapped = batch["pixel_values"][[2, 0, 1]]
    with pytest.raises(ValueError, match="Sample 0: .* run of 8 .* 12 visual features"):
        run(**{**inputs, "pixel_values": swapped, "num_patches_list": [1, 2]})
    moved = spoiled_by_one_token(batch, 1)  # sample 1 lost a token to sample 0, the total is right
    moved[0, (moved[0] == 625).nonzero()[0] - 1] = 625
    for listed in ([2, 1], None):
        with pytest.raises(ValueError, match="Sample 0: `input_ids` holds"):
            run(**{**inputs, "input_ids": moved, "num_patches_list": listed})


@pytest.mark.parametrize("settings", [{"num_beams": 2, "num_return_sequences": 2}, {"num_beams": 3}], ids=str)
def test_claim_num_patches_list_must_reach_the_model(shared_model, make_batch, settings):
    """
    Claim: `num_patches_list` must reach the model. True for beams and returned sequences, where the tiles of a sample
    are repeated together: a batch of unequal images equals its samples one by one.
    """
    batch = make_batch(images=((2, 1), (1,)), padding="left")
    beams = settings.get("num_return_sequences", 1)
    with widened():
        output = shared_model.generate(**without_labels(batch), **settings, **GENERATE)
        for row, (sample, counts) in enumerate(zip(split_rows(batch), ([2, 1], [1]), strict=True)):
            alone = shared_model.generate(
                input_ids=sample["input_ids"][None],
                pixel_values=sample["pixel_values"],
                num_patches_list=counts,
                **settings,
                **GENERATE,
            )
            new = output[row * beams : (row + 1) * beams, batch["input_ids"].shape[1] :]
            assert new.tolist() == alone[:, len(sample["input_ids"]) :].tolist()


def test_claim_num_patches_list_writes_the_prompt_of_a_chat(shared_model, processor, monkeypatch):
    """The same claim for `chat`: the list says how many placeholders each image gets."""
    tiles = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    prompts = []
    generate = shared_model.generate

    def keep(**kwargs):
        prompts.append(kwargs["input_ids"][0].tolist())
        return generate(**kwargs)

    monkeypatch.setattr(shared_model, "generate", keep)
    for counts in ([2, 1], [1, 2]):
        shared_model.chat(
            processor.tokenizer,
            tiles,
            "<image> or <image>?",
            {"max_new_tokens": 1},
            num_patches_list=counts,
        )
        ids = prompts[-1]
        starts = [position for position, token in enumerate(ids) if token == 623]
        assert [ids.index(624, start) - start - 1 for start in starts] == [4 * count for count in counts]


@pytest.fixture(params=["tokenizers", "python"])
def tokenizer(request):
    """Both back ends of transformers 5."""
    if request.param == "tokenizers":
        return MultiCoCoProcessor.from_pretrained(CHECKPOINT).tokenizer
    tokenizer = ByT5Tokenizer()  # needs no file
    prepare_tokenizer(tokenizer)
    return tokenizer


def test_claim_repeated_image_tokens_collapse(tokenizer):
    """
    Claim: `<IMG_CONTEXT><IMG_CONTEXT>` becomes one unknown token, spaces are needed. False: it splits exactly, and
    spaces would break the run.
    """
    image_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for count in (2, 17, 256, 3328):
        assert encode("<IMG_CONTEXT>" * count) == [image_id] * count
    spaced = encode(" ".join(["<IMG_CONTEXT>"] * 4))
    assert len(spaced) == 7
    assert spaced != [image_id] * 4
    assert tokenizer.unk_token_id not in spaced


def test_claim_repeated_image_tokens_collapse_in_the_original():
    """The original's own tokenizers were counted the same way, on both back ends."""
    recorded = json.loads((GOLDEN / "internvl" / "prompts.json").read_text())["img_context_tokenization"]["results"]
    assert {entry["tokenizer"] for entry in recorded} >= {"slow", "fast"}
    for entry in recorded:
        assert entry["ids_when_concatenated"] == entry["repeats"]
        assert entry["ids_when_joined_with_spaces"] == 2 * entry["repeats"] - 1


def test_claim_pixel_values_must_have_five_dimensions(shared_model, make_batch, processor):
    """
    Claim: `pixel_values` must be `[B, P, C, H, W]`, as concatenation makes one mega-image. False: tiles are flat and
    each is encoded by itself; five dimensions are refused.
    """
    batch = make_batch(images=((2,), (1,)))
    tiles = batch["pixel_values"]
    with torch.no_grad():
        together = shared_model.extract_feature(tiles)
        alone = torch.cat([shared_model.extract_feature(tile[None]) for tile in tiles])
    assert together.shape == (3, 4, 64)
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"`pixel_values` has shape \(1, 3, 3, 28, 28\)"):
        shared_model(**{**model_inputs(batch), "pixel_values": tiles[None]})
    picture = Image.new("RGB", (56, 28))
    inputs = processor(images=[[picture], [picture]], text=["<image>"] * 2, padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (sum(inputs["num_patches_list"]), 3, 28, 28)


# Thoughts and images.
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("offset", [-2, -1, 2, 7], ids=["before", "directly_before", "inside", "last_of_run"])
def test_claim_latents_must_not_precede_or_split_images(shared_model, make_batch, call, offset):
    """Claim: latents must never precede or split image runs. True: refused, whether tokens or a mask say it."""
    batch = make_batch(num_thoughts=(0,), images=((2,),), padding="left")
    inputs = without_labels(batch)
    run = shared_model if call == "forward" else lambda **kwargs: shared_model.generate(**kwargs, **GENERATE)
    position = int((batch["input_ids"][0] == 625).nonzero()[0]) + offset
    latent_mask = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    latent_mask[0, position] = True
    with pytest.raises(ValueError, match=f"Sample 0: .* position {position} .* before or inside an image"):
        run(**inputs, latent_mask=latent_mask)
    input_ids = batch["input_ids"].clone()
    input_ids[0, position] = shared_model.config.latent_token_id
    with pytest.raises(ValueError, match="Sample 0"):
        run(**{**inputs, "input_ids": input_ids})


def test_claim_latents_must_not_precede_images_in_a_prompt(processor):
    """The same claim for the processor: the block stands after all images, and no text can put it elsewhere."""
    latent = processor.tokenizer.convert_tokens_to_ids("<|latent|>")
    picture = Image.new("RGB", (28, 28))
    ids = processor(images=[picture, picture], text="<image> so <image> then", num_thoughts=2)["input_ids"][0]
    assert ids.index(latent) > max(position for position, token in enumerate(ids) if token == 625)
    for token in RESERVED_TOKENS:
        with pytest.raises(ValueError, match="only the processor may write"):
            processor(images=picture, text=f"{token} <image>", num_thoughts=2)


def test_claim_num_image_token_is_always_256(tmp_path):
    """
    Claim: a tile is 256 tokens. Not always: `(image_size // patch_size)**2 * downsample_ratio**2`, and that many come
    out of the tower and out of the processor.
    """
    found = {}
    for image_size in (28, 56):
        folder = tmp_path / str(image_size)
        shutil.copytree(CHECKPOINT, folder)
        config = json.loads((folder / "config.json").read_text())
        config["force_image_size"] = config["vision_config"]["image_size"] = image_size
        (folder / "config.json").write_text(json.dumps(config))
        config = MultiCoCoConfig.from_pretrained(folder)
        model = MultiCoCoForConditionalGeneration(config).eval()
        processor = MultiCoCoProcessor.from_pretrained(folder)
        with torch.no_grad():
            features = model.extract_feature(torch.zeros(1, 3, image_size, image_size))
        ids = processor(images=Image.new("RGB", (image_size, image_size)), text="<image>", max_patches=1)["input_ids"]
        found[image_size] = (config.num_image_token, model.num_image_token, features.shape[1], ids[0].count(625))
    assert found == {28: (4,) * 4, 56: (16,) * 4}
    full = {"image_size": [448, 448], "patch_size": [14, 14]}
    assert MultiCoCoConfig(vision_config=full, downsample_ratio=0.5).num_image_token == 256


# Tokens.
def test_claim_added_tokens_need_embeddings_and_stable_ids(original_model, tmp_path):
    """
    Claim: embeddings must be resized and initialised when tokens are added, and adding twice shifts ids. True, so one
    function does it once: rows are added and finite, ids lie in the configuration, a second call changes nothing.
    """
    model, processor = copy.deepcopy(original_model), MultiCoCoProcessor.from_pretrained(CHECKPOINT)
    rows = model.get_input_embeddings().weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    add_thought_tokens(model, processor.tokenizer)
    config, tokenizer = model.config, processor.tokenizer
    ids = [config.start_latent_id, config.latent_token_id, config.end_latent_id]
    assert ids == tokenizer.convert_tokens_to_ids(["<|start-latent|>", "<|latent|>", "<|end-latent|>"])
    assert max(ids) < model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0]
    for weight, old in ((model.get_input_embeddings().weight, rows), (model.lm_head.weight, head)):
        assert torch.equal(weight[: len(old)], old)
        torch.testing.assert_close(weight[ids], old.mean(dim=0).expand(3, -1))
    state, length = copy.deepcopy(model.state_dict()), len(tokenizer)
    add_thought_tokens(model, tokenizer)
    assert [config.start_latent_id, config.latent_token_id, config.end_latent_id] == ids
    assert len(tokenizer) == length
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = MultiCoCoForConditionalGeneration.from_pretrained(tmp_path)
    add_thought_tokens(again, MultiCoCoProcessor.from_pretrained(tmp_path).tokenizer)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }
    assert again.config.latent_token_id == ids[1]


def test_claim_resizing_shrinks_a_padded_vocabulary(original_model):
    """The same claim: real vocabularies are padded beyond the tokenizer, and the padding must stay."""
    model, processor = copy.deepcopy(original_model), MultiCoCoProcessor.from_pretrained(CHECKPOINT)
    model.resize_token_embeddings(700, mean_resizing=False)
    add_thought_tokens(model, processor.tokenizer)
    assert len(processor.tokenizer) < 700
    assert model.get_input_embeddings().weight.shape[0] == model.config.text_config.vocab_size == 700


# Generation.
def test_claim_generation_must_think_like_training(shared_model, make_batch):
    """
    Claim: generation must run the same latent loop as training. True: one function serves both, so the thoughts of
    `forward` and `generate` are equal, and the tokens are those of the definition.
    """
    batch = make_batch(num_thoughts=(3, 1), images=((2,), ()), padding="left")
    inputs = without_labels(batch)
    suppressed = shared_model.generation_config.suppress_tokens
    with torch.no_grad(), widened():
        trained = shared_model(**inputs, return_thoughts=True).thoughts
        output = shared_model.generate(**inputs, **GENERATE, return_thoughts=True)
        torch.testing.assert_close(output["thoughts"], trained, atol=1e-11, rtol=0)
        blank = shared_model(**inputs, edit_thoughts=lambda thought, index: torch.zeros_like(thought)).logits[:, -1]
        assert largest_difference(blank, shared_model(**inputs).logits[:, -1]) > 1e-3  # the thoughts do reach them
        for row, sample in enumerate(split_rows(batch)):
            _, thoughts = reference_logits(shared_model, sample["input_ids"], sample["pixel_values"])
            torch.testing.assert_close(trained[row, : len(thoughts)], torch.stack(thoughts), atol=1e-11, rtol=0)
            expected = reference_generate(
                shared_model, sample["input_ids"], sample["pixel_values"], 4, suppress=[*suppressed, 622]
            )
            assert output["sequences"][row, batch["input_ids"].shape[1] :].tolist() == expected


# Code.
CORE = ["configuration_multicoco.py", "processing_multicoco.py", "modeling_multicoco.py"]


def test_claim_prints_and_silent_excepts_are_defects():
    """Claim: `print` in the hot path and silent `except` are defects. True: the linter is told to refuse both."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert {"T20", "BLE"} <= set(lint["select"])
    assert not {"T20", "BLE"} & set(lint.get("ignore", []))
    for pattern, ignored in lint.get("per-file-ignores", {}).items():
        assert not any(Path(name).match(pattern) for name in CORE) or not {"T20", "BLE"} & set(ignored)


@pytest.mark.parametrize("name", CORE)
def test_claim_prints_and_silent_excepts_are_absent(name):
    """The same claim on the code itself, also where no linter is installed."""
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", node.lineno
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, node.lineno
            assert getattr(node.type, "id", None) not in ("Exception", "BaseException"), node.lineno
            assert not all(isinstance(statement, ast.Pass) for statement in node.body), node.lineno


# Training.
def stage_dataset(processor, folder, **curriculum):
    lines = [
        {"id": index, "question": f"Question {index}?", "steps": ["one", "two"], "answer": "yes"} for index in range(4)
    ]
    path = folder / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = CurriculumArguments(
        **{"c_thought": 1, "max_latent_stage": 2, "final_stage": False, "epochs_per_stage": 1, **curriculum}
    )
    return settings, StageDataset(load_records(path), processor, settings)


@pytest.mark.parametrize("mix", ["none", "linear"])
def test_claim_stage_0_may_hold_latents_when_mixed(processor, tmp_path, mix):
    """Claim: stage 0 must hold no latents, mixing on or off. True: mixing never goes beyond the scheduled stage."""
    _, dataset = stage_dataset(processor, tmp_path, mix=mix)
    latent = processor.tokenizer.convert_tokens_to_ids("<|latent|>")
    most = []
    for stage in range(3):
        counts = []
        for epoch in range(30):
            dataset.set_stage(stage, epoch)
            counts += [dataset[index]["input_ids"].count(latent) for index in range(len(dataset))]
        most.append(max(counts))
    assert most == [0, 1, 2]


class Weights(TrainerCallback):
    """A copy of the weights at the end of each epoch and, after the curriculum has moved, at the start of the next."""

    def __init__(self):
        self.ends, self.starts, self.stages = [], [], []

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        self.starts.append(copy.deepcopy(model.state_dict()))
        self.stages.append((model.config.stage, model.config.num_thoughts))

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.ends.append(copy.deepcopy(model.state_dict()))


def test_claim_state_must_survive_into_the_latent_stages(processor, tmp_path):
    """Claim: what written reasoning taught must survive. True: one model in one run; a new stage touches no weight."""
    model = MultiCoCoForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    add_thought_tokens(model, processor.tokenizer)
    curriculum, dataset = stage_dataset(processor, tmp_path)
    weights = Weights()
    args = TrainingArguments(
        tmp_path / "out", num_train_epochs=3, learning_rate=1e-3, use_cpu=True, remove_unused_columns=False,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks = [CurriculumCallback(curriculum, dataset), weights]
    collator = ReasoningCollator(processor)
    Trainer(model, args, train_dataset=dataset, data_collator=collator, callbacks=callbacks).train()
    assert weights.stages == [(0, 0), (1, 1), (2, 2)]
    for end, start in zip(weights.ends, weights.starts[1:], strict=False):
        assert all(torch.equal(end[name], start[name]) for name in end)
    changed = [name for name in weights.ends[0] if not torch.equal(weights.ends[0][name], weights.starts[0][name])]
    assert "lm_head.weight" in changed  # and the stages do train
    model.save_pretrained(tmp_path / "saved")
    config = MultiCoCoConfig.from_pretrained(tmp_path / "saved")
    assert (config.stage, config.num_thoughts) == (2, 2)


def test_claim_ranks_must_agree_on_data(model, make_batch, monkeypatch):
    """Claim: ranks must agree. On the number of calls: one integer is all that one rank tells the others."""
    batch = without_labels(make_batch(num_thoughts=(1, 1), images=((1,), (2,))))
    calls = []
    model.model.language_model.register_forward_pre_hook(lambda *args: calls.append(1))
    expected = model(**batch).logits
    assert len(calls) == 2

    sent = []

    def reduce(tensor, op):  # another rank has three passes more
        sent.append((tensor.numel(), tensor.is_floating_point(), op))
        tensor += 3

    monkeypatch.setattr(modeling, "is_sharded", lambda model: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    calls.clear()
    torch.testing.assert_close(model(**batch).logits, expected, atol=0, rtol=0)
    assert sent == [(1, False, torch.distributed.ReduceOp.MAX)]
    assert len(calls) == 5


@pytest.mark.parametrize("name", [*CORE, "trainer_callbacks.py", "train.py"])
def test_claim_device_must_be_set_before_process_groups(name):
    """Claim: the device must be set first. True, and Trainer does it: nothing here sets a device itself."""
    calls = [node.func for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.Call)]
    names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", None) for call in calls}
    assert names.isdisjoint({"set_device", "cuda", "init_process_group", "device_count"})


def test_claim_final_accuracy_proves_that_thoughts_are_used(model, make_batch):
    """
    Claim: accuracy proves use. False: a constant in the same sequences and passes can score as high, so the control is
    a mode of the same model, and what it feeds is all that differs.
    """
    batch = model_inputs(make_batch(num_thoughts=(2, 2)))
    constant = model.get_input_embeddings().weight[model.config.latent_token_id]
    fed = model(**batch, edit_thoughts=lambda thought, index: constant.expand_as(thought)).logits
    thinking = model(**batch).logits
    model.config.thought_feedback = "latent"
    torch.testing.assert_close(model(**batch).logits, fed, atol=0, rtol=0)
    assert largest_difference(thinking, fed) > 1e-3
