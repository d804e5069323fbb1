"""The backbone thinks: who calls `model.base_model` and a head of its own, packs rows or wants one plain pass, gets
what `model(...)` computes, in float64."""

import copy
import functools
import inspect
import json
import logging
import subprocess
import sys
import types

import pytest
import torch
from conftest import CHECKPOINT, GOLDEN, TRAILS, model_inputs
from reference import (
    assert_same_grads,
    loss_and_grads,
    reference_embeds,
    reference_logits,
    reference_loss,
    split_rows,
    training,
    widened,
)
from transformers import DynamicCache, GenerationConfig, InternVLForConditionalGeneration, InternVLModel

from multicoco import InternVLChatModel, MultiCoCoConfig, MultiCoCoForConditionalGeneration
from multicoco.configuration_multicoco import CONTROL_FEEDBACK
from multicoco.modeling_internvl_chat import as_counts, translate_device_map


CASES = {
    "aligned": dict(num_thoughts=(2, 2), images=((1,), (2,))),
    "ragged": dict(num_thoughts=(3, 0, 1), images=((1, 2), (), (1,)), padding="left"),
    "split": dict(num_thoughts=(2, 2), padding="right", split_block=True),
}
all_batches = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def without_labels(batch):
    return {name: value for name, value in model_inputs(batch).items() if name != "labels"}


def warnings_of(caplog, model, **inputs):
    """What a forward warns of; the once of `warning_once` begins anew."""
    logger = logging.getLogger("transformers.multicoco.modeling_multicoco")
    type(logger).warning_once.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger=logger.name), torch.no_grad():
        model(**inputs)
        model(**inputs)
    return [record.getMessage() for record in caplog.records if record.name == logger.name]


# ---- a head from outside


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing"])
@all_batches
def test_a_head_on_the_backbone_gives_the_logits_of_the_model(model, make_batch, case, mode):
    batch = without_labels(make_batch(**case))
    with training(model, mode == "checkpointing") if mode != "eval" else torch.no_grad():
        hidden_states = model.base_model(**batch, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden_states), model(**batch).logits, atol=0, rtol=0)
    assert model.base_model is model.model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@all_batches
def test_loss_and_gradients_through_a_head_from_outside_are_the_definition(model, make_batch, case, checkpointing):
    """As trl computes it: it shifts the states of the backbone and applies the weight of the head itself."""
    batch = make_batch(**case)
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch))

    def loss():
        states = model.base_model(**without_labels(batch), use_cache=False).last_hidden_state[:, :-1]
        logits = states @ model.get_output_embeddings().weight.T
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    with training(model, checkpointing):
        found_loss, grads = loss_and_grads(model, loss)
    torch.testing.assert_close(found_loss, expected_loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)


def test_a_head_on_the_backbone_of_adapters_gives_the_logits_of_the_model(model, make_batch):
    peft = pytest.importorskip("peft", reason="needs the package peft")
    target = r"model\.language_model\..*\.(q|k|v|o)_proj"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False))
    batch = without_labels(make_batch(**CASES["ragged"]))
    plain = wrapped.get_base_model()
    for mode in (False, True):
        wrapped.train(mode)
        hidden_states = plain.base_model(**batch, use_cache=False).last_hidden_state
        torch.testing.assert_close(plain.lm_head(hidden_states), wrapped(**batch).logits, atol=0, rtol=0)


@all_batches
def test_output_of_the_backbone_holds_what_the_whole_returns(model, make_batch, case):
    batch = without_labels(make_batch(**case))
    with torch.no_grad():
        inner = model.model(**batch, return_thoughts=True, output_hidden_states=True)
        outer = model(**batch, return_thoughts=True, output_hidden_states=True)
    assert torch.equal(inner.thoughts, outer.thoughts)
    assert torch.equal(inner.hidden_states[-1], outer.hidden_states[-1])
    features = [] if "pixel_values" not in batch else [model.extract_feature(batch["pixel_values"])]
    for output in (inner, outer):
        assert (output.image_hidden_states is None) == (not features)
        for expected in features:
            torch.testing.assert_close(output.image_hidden_states, expected, atol=1e-12, rtol=0)
    with torch.no_grad():
        states = model.model(**batch, return_dict=False)[0]
    assert torch.equal(states, inner.last_hidden_state)


# ---- one whole sequence


@all_batches
def test_one_plain_pass_over_embedded_thoughts_equals_the_passes(model, make_batch, case):
    batch = make_batch(**case)
    inputs = without_labels(batch)
    with torch.no_grad(), widened():
        embeds = model.embed_thoughts(**model_inputs(batch))
        nowhere = torch.zeros(embeds.shape[:2], dtype=torch.bool)
        calls = []
        hook = model.model.language_model.register_forward_hook(lambda *args: calls.append(1))
        plain = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], latent_mask=nowhere).logits
        hook.remove()
        logits = model(**inputs).logits
        assert len(calls) == 1
        for row, sample in enumerate(split_rows(batch)):
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(plain[row, real], logits[row, real], atol=1e-12, rtol=0)
            expected, _ = reference_embeds(model, sample["input_ids"], sample["pixel_values"])
            torch.testing.assert_close(embeds[row, real], expected, atol=1e-10, rtol=0)


# ---- packed rows


def packed(batch):
    """All samples of a batch without padding in one row, with positions that start again and no mask."""
    rows = split_rows(batch)
    labels = [torch.cat([torch.tensor([-100]), row["labels"][1:]]) for row in rows]  # the first follows on nothing
    inputs = {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
        "labels": torch.cat(labels)[None],
    }
    return inputs | {name: batch[name] for name in ("pixel_values", "num_patches_list") if name in batch}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing"])
@all_batches
def test_packed_rows_equal_each_sample_alone(model, make_batch, case, mode, implementation):
    batch = make_batch(**case)
    inputs = packed(batch)
    model.set_attn_implementation(implementation)
    if mode == "eval":
        with torch.no_grad(), widened():
            logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
            wanted = [reference_logits(model, row["input_ids"], row["pixel_values"])[0] for row in split_rows(batch)]
            torch.testing.assert_close(logits[0], torch.cat(wanted), atol=1e-10, rtol=0)
        return
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch))
    with training(model, mode == "checkpointing"):
        loss, grads = loss_and_grads(model, lambda: model(**inputs).loss)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)


def test_a_head_on_the_backbone_of_packed_rows_gives_the_logits_of_the_model(model, make_batch):
    inputs = packed(make_batch(**CASES["ragged"]))
    del inputs["labels"]
    for mode in (False, True):
        model.train(mode)
        hidden_states = model.base_model(**inputs, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden_states), model(**inputs).logits, atol=0, rtol=0)


def test_packed_rows_are_refused_where_they_would_be_wrong(model, make_batch):
    inputs = packed(make_batch(num_thoughts=(2, 1), images=((), ())))
    with pytest.raises(ValueError, match="`answer_sees='no_image'` cannot be used with packed rows"):
        model(**inputs, answer_sees="no_image")
    start = int((inputs["position_ids"][0] == 0).nonzero()[1])
    inputs["input_ids"][0, start] = model.config.latent_token_id
    with pytest.raises(ValueError, match=f"at position {start} .* is the first token of its sample"):
        model(**inputs)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="`position_ids` restart, so the rows are packed"):
        model(**packed(make_batch(num_thoughts=(2, 1), images=((), ()))))


@pytest.mark.parametrize("form", ["mask", "empty_cache", "through_the_backbone"])
def test_packed_rows_are_seen_in_every_company(model, make_batch, form):
    batch = make_batch(**CASES["ragged"])
    inputs = packed(batch)
    del inputs["labels"]
    with torch.no_grad(), widened():
        wanted = torch.cat([reference_logits(model, r["input_ids"], r["pixel_values"])[0] for r in split_rows(batch)])
        company = {"mask": {"attention_mask": torch.ones_like(inputs["input_ids"])}}.get(form, {})
        company |= {"empty_cache": {"past_key_values": DynamicCache(config=model.model.language_model.config)}}.get(
            form, {}
        )
        logits = model(**inputs, **company).logits if form != "through_the_backbone" else None
        if logits is None:
            logits = model.lm_head(model.model(**inputs, use_cache=True).last_hidden_state)
        torch.testing.assert_close(logits[0], wanted, atol=1e-10, rtol=0)
    numbered = (inputs["position_ids"] == 0).cumsum(dim=1)  # axolotl's form of a mask
    del inputs["position_ids"]
    with pytest.raises(ValueError, match="`attention_mask` numbers samples"):
        model(**inputs, attention_mask=numbered)


@pytest.mark.parametrize("form", ["padded", "packed", "generated"])
def test_layers_that_see_a_window_get_their_own_mask(tmp_path, make_batch, model, form):
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"] |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    values["text_config"]["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    windowed = MultiCoCoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()
    batch = make_batch(**CASES["ragged"])
    with torch.no_grad(), widened():
        rows = split_rows(batch)
        wanted = [reference_logits(windowed, row["input_ids"], row["pixel_values"])[0] for row in rows]
        inputs = packed(batch) if form == "packed" else model_inputs(batch)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        logits = windowed(**inputs, use_cache=form == "generated").logits
    if form == "packed":
        torch.testing.assert_close(logits[0], torch.cat(wanted), atol=1e-10, rtol=0)
        return
    for row, expected in enumerate(wanted):
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real], expected, atol=1e-10, rtol=0)


def test_masks_are_made_by_the_attention_of_the_language_model(model, make_batch):
    """Its parts may have different ones; what takes no mask is the language model's."""
    model.set_attn_implementation({"text_config": "eager"})
    batch = make_batch(**CASES["ragged"])
    inputs = packed(batch)
    del inputs["labels"]
    with torch.no_grad(), widened():
        wanted = [reference_logits(model, row["input_ids"], row["pixel_values"])[0] for row in split_rows(batch)]
        torch.testing.assert_close(model(**inputs).logits[0], torch.cat(wanted), atol=1e-10, rtol=0)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="the rows are packed"):
        model(**inputs)
    with pytest.raises(ValueError, match="which flash_attention_2 does not take"):
        model(**without_labels(batch), answer_sees="no_image")


# ---- what no template reaches


def test_ids_without_a_block_are_said_once_with_the_cure(model, make_batch, caplog):
    batch = without_labels(make_batch(num_thoughts=(2, 2)))
    ids = batch["input_ids"]
    block = (model.config.start_latent_id, model.config.latent_token_id, model.config.end_latent_id)
    words = {**batch, "input_ids": torch.where(torch.isin(ids, torch.tensor(block)), 7, ids)}
    half = {**batch, "input_ids": torch.cat([ids[:1], words["input_ids"][1:]])}
    embeds = {"inputs_embeds": model.get_input_embeddings()(words["input_ids"])}
    assert warnings_of(caplog, model, **words) == []  # a checkpoint that was never trained to think
    for budget in (0, 2):
        model.config.num_thoughts = budget
        assert warnings_of(caplog, model, **batch) == []
        for inputs in (words, half):
            (said,) = warnings_of(caplog, model, **inputs)
            assert f"`num_thoughts` {budget}" in said
            assert "apply_chat_template" in said
        (said,) = warnings_of(caplog, model, **embeds)
        assert "`inputs_embeds` came without `latent_mask`" in said
        nowhere = torch.zeros(ids.shape, dtype=torch.bool)
        assert warnings_of(caplog, model, **embeds, latent_mask=nowhere) == []


def test_a_class_that_does_not_think_says_so_of_a_checkpoint_that_does(caplog):
    logger = logging.getLogger("transformers.multicoco.modeling_internvl_chat")
    type(logger).warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=logger.name):
        MultiCoCoForConditionalGeneration.from_pretrained(TRAILS)
        InternVLChatModel.from_pretrained(CHECKPOINT)
        assert not [record for record in caplog.records if record.name == logger.name]
        InternVLChatModel.from_pretrained(TRAILS)
    (said,) = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert "was trained with 5 thoughts, which InternVLChatModel does not feed" in said


def test_generating_without_a_block_is_said_once_and_decoding_says_nothing(model, make_batch, caplog):
    model.config.num_thoughts = 2
    logger = logging.getLogger("transformers.multicoco.modeling_multicoco")
    type(logger).warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger=logger.name):
        model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=3)
        assert sum("without a thought block" in record.getMessage() for record in caplog.records) == 1
        type(logger).warning_once.cache_clear()
        caplog.clear()
        batch = make_batch(num_thoughts=(2, 2), padding="left", answer_lengths=(0, 0))
        model.generate(**without_labels(batch), max_new_tokens=3)
        assert [record.getMessage() for record in caplog.records if "thought block" in record.getMessage()] == []


def test_a_block_that_was_cut_inside_is_refused(model, make_batch):
    """trl cuts prompt + completion on the right, without a look at what is there."""
    batch = without_labels(make_batch(num_thoughts=(3, 3), images=((), ())))
    stop = int((batch["input_ids"][0] == model.config.latent_token_id).nonzero()[1]) + 1
    with pytest.raises(ValueError, match="without its <|end-latent|>: the sequence was cut inside"):
        model(**{name: value[:, :stop] for name, value in batch.items()})


# ---- other callers


@pytest.mark.parametrize("cls", [InternVLChatModel, MultiCoCoForConditionalGeneration])
def test_both_orders_of_arguments_are_understood(cls, make_batch):
    model = cls.from_pretrained(CHECKPOINT, dtype=torch.float64).eval()
    batch = make_batch(num_thoughts=(0, 0), images=((1,), (2,)))
    ids = batch["input_ids"].clamp(max=631)
    mask, pixels = batch["attention_mask"], batch["pixel_values"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    flags, labels = torch.ones(len(pixels), 1), torch.where(mask.bool(), ids, -100)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels, attention_mask=mask, labels=labels)
        for output in (
            model(ids, pixels, mask, positions, labels=labels),
            model(ids, attention_mask=mask, pixel_values=pixels, labels=labels),
            model(pixels, ids, mask, positions, flags, None, labels),
            model(pixels, ids, attention_mask=mask, labels=labels),
        ):
            assert torch.equal(output.logits, expected.logits)
            assert torch.equal(output.loss, expected.loss)
        text = model(input_ids=ids[:, :2]).logits
        for output in (model(ids[:, :2]), model(None, ids[:, :2])):
            assert torch.equal(output.logits, text)
    native = [*inspect.signature(InternVLForConditionalGeneration.forward).parameters][:-1]
    assert [*inspect.signature(cls.forward).parameters][: len(native)] == native
    backbone = [*inspect.signature(InternVLModel.forward).parameters][:-1]
    assert [*inspect.signature(cls.backbone_class.forward).parameters][: len(backbone)] == backbone


@pytest.mark.parametrize("kept", ["number", "mask", "places"])
def test_labels_as_long_as_the_kept_logits_give_the_loss_of_the_whole(model, make_batch, kept):
    """ms-swift cuts labels to the kept positions; the i-th of them predicts label i + 1, also across gaps."""
    batch = model_inputs(make_batch(num_thoughts=(2,), images=((1,),)))
    labels = batch["labels"]
    expected_loss, expected = loss_and_grads(model, lambda: model(**batch).loss)
    wanted = labels[0] != -100
    if kept == "number":
        keep = labels.shape[1] - int(wanted.nonzero()[0]) + 1
        cut = labels[:, -keep:]
    else:
        mask = torch.cat([wanted[1:], torch.tensor([True])])
        keep = mask if kept == "mask" else mask.nonzero().flatten()
        cut = torch.cat([torch.tensor([-100]), labels[0, wanted]])[None]
    inputs = {**batch, "labels": cut, "logits_to_keep": keep}
    with training(model):
        loss, grads = loss_and_grads(model, lambda: model(**inputs).loss)
        logits = model(**inputs).logits
    torch.testing.assert_close(loss, expected_loss, atol=1e-12, rtol=0)
    assert_same_grads(grads, expected)
    assert logits.shape[1] == cut.shape[1]


def test_logits_to_keep_and_no_cache_pass_through_the_backbone(model, make_batch):
    batch = without_labels(make_batch())
    with torch.no_grad():
        plain = model.model(**batch).last_hidden_state
        kept = model.model(**batch, use_cache=False, logits_to_keep=3)
    assert torch.equal(kept.last_hidden_state, plain)
    assert kept.past_key_values is None


def test_a_wrapped_checkpointing_function_is_looked_into(model, make_batch):
    batch = make_batch()
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch))

    def wrap(use_reentrant):
        function = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=use_reentrant)

        @functools.wraps(function, assigned=())
        def wrapped(func, *args, **kwargs):
            return function(func, *args, **kwargs)

        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=wrapped)

    model.train()
    wrap(False)
    loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)
    wrap(True)
    with pytest.raises(ValueError, match="Activation checkpointing is reentrant"):
        model(**model_inputs(batch))


def test_a_function_that_only_says_it_is_not_reentrant_is_found_out(model, make_batch):
    """ms-swift replaces torch's function by one that has its own `use_reentrant`, whatever transformers asked for."""

    def liar(func, *args, use_reentrant, **kwargs):
        return torch.utils.checkpoint.checkpoint(func, *args, use_reentrant=True, **kwargs)

    model.train()
    model.enable_input_require_grads()
    model._set_gradient_checkpointing(
        enable=True, gradient_checkpointing_func=functools.partial(liar, use_reentrant=False)
    )
    with pytest.raises(ValueError, match="Activation checkpointing is reentrant"):
        model(**model_inputs(make_batch()))


def test_the_flag_of_checkpointed_layers_is_not_left_behind(model, make_batch):
    with training(model, checkpointing=True):
        model(**model_inputs(make_batch())).loss.backward()
    assert not any(layer._can_checkpoint_with_cache for layer in model.model.language_model.layers)


def test_prompt_tuning_is_refused(model, make_batch):
    """It lengthens the sequence in front, so a mask of the thoughts would be laid over other positions."""
    peft = pytest.importorskip("peft", reason="needs the package peft")
    batch = without_labels(make_batch(images=((), ())))
    latent_mask = batch["input_ids"] == model.config.latent_token_id
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        token_dim=64,
        num_transformer_submodules=1,
        num_attention_heads=4,
        num_layers=2,
    )
    tuned = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="`latent_mask` has shape"):
        tuned(**batch, latent_mask=latent_mask)
    with pytest.raises(ValueError, match="`latent_mask` has shape"):
        tuned.generate(**batch, latent_mask=latent_mask, max_new_tokens=2)


def test_a_generation_config_of_another_program_cannot_let_reserved_tokens_out(model, make_batch):
    """trl's own replaces the saved list; a thought token that is sampled would be read as a thought when scored."""
    prompt = without_labels(make_batch(padding="left", answer_lengths=(0, 0)))
    reserved = model.generation_config.suppress_tokens
    with torch.no_grad():
        model.lm_head.weight[model.config.latent_token_id] = 0
        model.lm_head.weight[:] -= 10 * model.lm_head.weight.abs().max()
        model.lm_head.weight[reserved] += 20 * model.lm_head.weight.abs().max()
    theirs = GenerationConfig(max_new_tokens=4, do_sample=False, suppress_tokens=[model.config.image_token_id])
    new = model.generate(**prompt, generation_config=theirs)[:, prompt["input_ids"].shape[1] :]
    assert not set(new.flatten().tolist()) & set(reserved)
    free = model.generate(**prompt, generation_config=theirs, suppress_tokens=[])  # a keyword is the caller's word
    assert set(free[:, prompt["input_ids"].shape[1] :].flatten().tolist()) & set(reserved)


def test_continuous_batching_refuses_what_it_cannot_feed(model):
    latent, image = model.config.latent_token_id, model.config.image_token_id
    for ids, name in (([5, latent, 6], "latent_token_id"), ([5, image, 6], "image_token_id")):
        for call in (
            lambda ids=ids: model.generate_batch([[5, 6], ids], max_new_tokens=2),
            lambda ids=ids: model.generate(torch.tensor([[9, *ids]]), cache_implementation="paged", max_new_tokens=2),
        ):
            with pytest.raises(ValueError, match=f"`config.{name}`.*continuous batching|<IMG_CONTEXT>"):
                call()
    model.config.num_thoughts = 2
    with pytest.raises(ValueError, match="`config.num_thoughts` is 2, and continuous batching feeds tokens only"):
        model.init_continuous_batching()


def test_counts_of_tiles_are_understood_in_every_form():
    for form in (
        [3, 1, 2],
        (3, 1, 2),
        torch.tensor([3, 1, 2]),
        [[3, 1], [2]],
        [torch.tensor([3, 1]), torch.tensor([2])],
        torch.tensor([[3, 1], [2, 0]]),  # filled up by a pipeline
        [[3, 1], [], [2]],
    ):
        assert as_counts(form) == [3, 1, 2]
    assert as_counts(None) is None
    assert as_counts([]) == as_counts(torch.zeros(0, dtype=torch.long)) == []


def test_names_of_the_original_in_a_device_map_become_native_ones():
    theirs = {
        "vision_model": 0,
        "mlp1": 0,
        "language_model.model.tok_embeddings": 0,
        "language_model.model.embed_tokens": 0,
        "language_model.output": 0,
        "language_model.lm_head": 0,
        "language_model.model.norm": 0,
        "language_model.model.rotary_emb": 0,
        "language_model.model.layers.0": 0,
        "language_model.model.layers.1": 1,
    }
    assert translate_device_map(theirs) == {
        "model.vision_tower": 0,
        "model.multi_modal_projector": 0,
        "model.language_model.embed_tokens": 0,
        "lm_head": 0,
        "model.language_model.norm": 0,
        "model.language_model.rotary_emb": 0,
        "model.language_model.layers.0": 0,
        "model.language_model.layers.1": 1,
    }
    native = {"model.vision_tower": 0, "model.language_model": 1, "lm_head": 1}
    assert translate_device_map(native) == native
    assert translate_device_map({"": "cpu"}) == {"": "cpu"}


# ---- checkpoints


@pytest.mark.parametrize(("mode", "feedback"), [("pause", "latent_one_pass"), ("pause_loop", "latent")])
def test_older_files_say_by_their_mode_what_is_fed(model, tmp_path, mode, feedback):
    """Version 0.1 had no other word for it; now the mode is provenance alone."""
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    for old in ({"mode": mode, "thought_feedback": "identity"}, {"mode": mode, "thought_feedback": "rms_match"}):
        path.write_text(json.dumps({**values, **old}))
        assert MultiCoCoConfig.from_pretrained(tmp_path).thought_feedback == feedback == CONTROL_FEEDBACK[mode]
    path.write_text(json.dumps({**values, "mode": "coconut", "thought_feedback": "rms_match"}))
    assert MultiCoCoConfig.from_pretrained(tmp_path).thought_feedback == "rms_match"


@pytest.mark.parametrize("mode", ["pause", "pause_loop"])
def test_a_control_that_feeds_states_is_not_saved(model, tmp_path, mode):
    """It would be read as a file of version 0.1, and feed the constant."""
    model.config.mode = mode
    with pytest.raises(ValueError, match=f"`mode` is '{mode}', a control that feeds .* is 'identity'. Set `mode`"):
        model.save_pretrained(tmp_path)
    model.config.thought_feedback = CONTROL_FEEDBACK[mode]
    model.save_pretrained(tmp_path)
    assert MultiCoCoConfig.from_pretrained(tmp_path).thought_feedback == CONTROL_FEEDBACK[mode]


def test_a_class_made_of_ours_is_saved_as_ours(model, tmp_path):
    """FSDP2 exchanges the class of a model by one of torch's; its name and file would go into the folder."""
    model.__class__ = type("FSDPMultiCoCoForConditionalGeneration", (type(model),), {"__module__": "torch"})
    model.save_pretrained(tmp_path)
    names = set(json.loads((tmp_path / "config.json").read_text())["auto_map"].values())
    assert "modeling_multicoco.MultiCoCoForConditionalGeneration" in names
    assert not any("FSDP" in name for name in names)
    files = {path.name for path in tmp_path.glob("*.py")}
    assert {"modeling_multicoco.py", "modeling_internvl_chat.py", "passes.py", "compat.py"} <= files
    assert "__init__.py" not in files


def test_the_mode_changes_nothing_in_the_model(model, make_batch):
    batch = without_labels(make_batch())
    with torch.no_grad():
        expected = model(**batch).logits
        for mode in ("pause", "pause_loop", "cot"):
            model.config.mode = mode
            assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("cls", [InternVLChatModel, MultiCoCoForConditionalGeneration])
def test_a_saved_folder_names_its_own_class_to_every_auto_class(cls, tmp_path):
    model = cls.from_pretrained(CHECKPOINT)
    model.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {name: value.rsplit(".", 1)[1] for name, value in names.items() if "Model" in name} == dict.fromkeys(
        ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"), cls.__name__
    )
    program = f"""
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
torch.save([type(model).__name__, model.state_dict()], {str(tmp_path / "loaded.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)  # a process without our package
    name, state = torch.load(tmp_path / "loaded.pt")
    assert name == cls.__name__
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("layer", [1, -2])
def test_the_layer_that_features_come_from_is_heard(model, make_batch, layer):
    batch = without_labels(make_batch(num_thoughts=(2, 0), images=((1,), (2,))))
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"], vision_feature_layer=layer).pooler_output
        output = model(**batch, vision_feature_layer=layer)
        assert torch.equal(output.image_hidden_states, features)
        assert not torch.allclose(output.logits, model(**batch).logits)
        given = {name: value for name, value in batch.items() if name != "pixel_values"}
        encoded = {"image": types.SimpleNamespace(pooler_output=features)}
        assert torch.equal(model(**given, mm_encoder_outputs=encoded).logits, output.logits)
        more = {"image": types.SimpleNamespace(pooler_output=torch.cat([features, features[:1]]))}
        with pytest.raises(ValueError, match="`mm_encoder_outputs` holds 16 visual features"):
            model(**given, mm_encoder_outputs=more)
        with pytest.raises(ValueError, match="only one of `pixel_values` and `mm_encoder_outputs`"):
            model(**batch, mm_encoder_outputs=encoded)


def test_the_trained_checkpoint_of_version_0_1_loads_with_all_it_says():
    model, info = MultiCoCoForConditionalGeneration.from_pretrained(TRAILS, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    config = model.config
    assert (config.mode, config.thought_feedback, config.num_thoughts) == ("coconut", "identity", 5)
    assert set(copy.deepcopy(model).state_dict()) == set(model.state_dict())
    assert (GOLDEN / "trails" / "model.safetensors").stat().st_size < 3e6
