"""Parallel thoughts equal their definition, in float64: for each sweep the whole sample again, without a cache."""

import re

import pytest
import torch
from conftest import model_inputs
from reference import (
    add_texts,
    assert_same_grads,
    loss_and_grads,
    reference_embeds,
    reference_loss,
    reference_text_losses,
    split_rows,
    training,
    widened,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

from multicoco import MultiCoCoConfig
from multicoco.training.arguments import parse
from multicoco.training.loading import load_model


CASES = {
    "aligned": dict(num_thoughts=(4, 4), images=((1,), ())),
    "ragged": dict(num_thoughts=(4, 0, 2), images=((1,), (), (2,))),
    "left": dict(num_thoughts=(2, 0, 4), images=((1,), (), (1,)), padding="left"),
    "right": dict(num_thoughts=(2, 4), images=((1,), ()), padding="right"),
    "split_block": dict(num_thoughts=(3, 4), padding="left", split_block=True),
}
LOGITS = dict(atol=1e-11, rtol=0)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def batch(request, make_batch):
    return make_batch(**request.param)


def double(thought, index):
    return 2 * thought if index == 1 else thought


def swept(model, input_ids, pixel_values, num_sweeps, edit_thoughts=None):
    """Logits (T, V) and thoughts (n, D) of one unpadded sample by the definition."""
    edit = (lambda thought, index: thought) if edit_thoughts is None else edit_thoughts
    is_thought = input_ids == model.config.latent_token_id
    embeds, thoughts = reference_embeds(model, input_ids, pixel_values, edit_thoughts)
    plain = model.get_input_embeddings()(input_ids[is_thought])
    places = is_thought.nonzero().flatten().tolist()
    decode = lambda fed: model.model.language_model(inputs_embeds=fed[None], use_cache=False).last_hidden_state[0]  # noqa: E731

    def feed(found):
        rows = list(embeds)
        for place, thought in zip(places, found, strict=True):
            rows[place] = thought
        return torch.stack(rows)

    found = [*thoughts[:1], *(edit(latent, index + 1) for index, latent in enumerate(plain[1:]))]
    for _ in range(num_sweeps):
        states = decode(feed(found))
        found = []
        for index, place in enumerate(places):
            state = states[place - 1]
            if model.config.thought_feedback == "rms_match":
                state = state * plain[index].norm() / state.norm()
            found.append(edit(state, index))
    return model.lm_head(decode(feed(found))), found


def swept_loss(model, batch, num_sweeps):
    losses, texts = [], batch["step_ids"].tolist() if "step_ids" in batch else [[]] * len(batch["labels"])
    for row, of_row in zip(split_rows(batch), texts, strict=True):
        logits, thoughts = swept(model, row["input_ids"], row["pixel_values"], num_sweeps)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], row["labels"][1:], reduction="none"))
        steps = reference_text_losses(model, thoughts, of_row)
        if steps:  # their mean counts as much as the words of the row
            num_labels = int((row["labels"][1:] != -100).sum())
            losses.append(model.config.step_loss_weight * num_labels * torch.stack(steps).mean()[None])
    return torch.cat(losses).sum() / (batch["labels"] != -100).sum()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_as_many_sweeps_as_thoughts_equal_passes_in_sequence(model, batch, checkpointing):
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch))
    model.config.thought_sweeps = 3  # of four thoughts the first takes none
    with training(model, checkpointing):
        loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
    torch.testing.assert_close(loss, expected_loss, **LOGITS)
    assert_same_grads(grads, expected)


@pytest.mark.parametrize(
    ("feedback", "checkpointing"), [("identity", True), ("rms_match", False)], ids=["checkpointing", "rms_match"]
)
def test_fewer_sweeps_equal_their_definition(model, batch, feedback, checkpointing):
    model.config.thought_feedback, model.config.thought_sweeps = feedback, 1 + checkpointing
    expected_loss, expected = loss_and_grads(model, lambda: swept_loss(model, batch, 1 + checkpointing))
    exact, _ = loss_and_grads(model, lambda: reference_loss(model, batch))
    assert (expected_loss - exact).abs() > 1e-5
    with training(model, checkpointing):
        loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
    torch.testing.assert_close(loss, expected_loss, **LOGITS)
    assert_same_grads(grads, expected)


def test_with_a_step_loss_what_the_last_sweep_feeds_is_decoded(model, make_batch):
    batch = add_texts(make_batch(**CASES["ragged"]), ((2, 3), (), (4,)))
    model.config.thought_sweeps, model.config.c_thought, model.config.step_loss_weight = 1, 2, 0.7
    expected_loss, expected = loss_and_grads(model, lambda: swept_loss(model, batch, 1))
    with training(model):
        loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
    torch.testing.assert_close(loss, expected_loss, **LOGITS)
    assert_same_grads(grads, expected)


def test_logits_and_thoughts_equal_the_definition(model, batch):
    """Each row by itself, so what others have beside it changes nothing; edited, and with a cache."""
    inputs = model_inputs(batch)
    model.config.thought_sweeps = 2
    with torch.no_grad(), widened():
        outputs = [model(**inputs, edit_thoughts=double, return_thoughts=True, use_cache=use) for use in (True, False)]
        for row, sample in enumerate(split_rows(batch)):
            logits, thoughts = swept(model, sample["input_ids"], sample["pixel_values"], 2, double)
            real = batch["attention_mask"][row].bool()
            for output in outputs:
                torch.testing.assert_close(output.logits[row, real], logits, **LOGITS)
                found = output.thoughts[row]
                assert not found[len(thoughts) :].any()
                if thoughts:
                    torch.testing.assert_close(found[: len(thoughts)], torch.stack(thoughts), **LOGITS)
    assert outputs[0].past_key_values.get_seq_length() == batch["input_ids"].shape[1]


def test_so_many_thoughts_are_exact(model, make_batch):
    """T sweeps: the first T + 1 of every row, and no other."""
    batch = model_inputs(make_batch(**CASES["left"]))
    with torch.no_grad(), widened():
        exact = model(**batch, return_thoughts=True).thoughts
        for num_sweeps in (1, 2):
            model.config.thought_sweeps = num_sweeps
            thoughts = model(**batch, return_thoughts=True).thoughts
            is_exact = (thoughts - exact).abs().amax(dim=-1) < 1e-11
            assert is_exact[2].tolist() == [number <= num_sweeps + 1 for number in range(1, 5)]
            assert is_exact[:2].all()


@pytest.mark.parametrize("case", ["aligned", "left"])
def test_the_number_of_passes_does_not_grow_with_thoughts(model, make_batch, case):
    """T + 2 with T sweeps, one more if first thoughts are scattered, and never more sweeps than change something."""
    batch, calls = model_inputs(make_batch(**CASES[case])), []
    model.model.language_model.register_forward_pre_hook(lambda *args: calls.append(1))
    for num_sweeps, expected in ((1, 3), (2, 4), (3, 5), (9, 5)):
        model.config.thought_sweeps = num_sweeps
        calls.clear()
        model(**batch)
        assert len(calls) == expected + (case == "left")


def prompts(make_batch, **kwargs):
    batch = make_batch(**{**CASES["left"], "answer_lengths": (0, 0, 0), **kwargs})
    return batch, {name: value for name, value in model_inputs(batch).items() if name != "labels"}


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_thinks_as_forward_does(model, make_batch, cache, num_beams):
    batch, inputs = prompts(make_batch)
    model.config.thought_sweeps = 2
    settings = dict(max_new_tokens=4, do_sample=False, num_beams=num_beams, return_thoughts=True, output_logits=True)
    with torch.no_grad(), widened():
        output = model.generate(**inputs, **settings, **cache)
        torch.testing.assert_close(output["thoughts"], model(**inputs, return_thoughts=True).thoughts, **LOGITS)
        new_tokens = output["sequences"][:, inputs["input_ids"].shape[1] :]
        if num_beams > 1:
            expected = model.generate(**inputs, **settings, use_cache=False)["sequences"]
            assert torch.equal(output["sequences"], expected)
            return
        for row, sample in enumerate(split_rows(batch)):
            ids = torch.cat([sample["input_ids"], new_tokens[row, :-1]])
            logits, _ = swept(model, ids, sample["pixel_values"], 2)
            found = torch.stack([step[row] for step in output["logits"]])
            torch.testing.assert_close(found, logits[-4:], **LOGITS)


def test_a_cache_that_goes_on_holds_no_key_of_a_sweep(model, make_batch):
    """A turn after a turn: the cache of the first, whatever its kind, is that of one forward over all that was fed."""
    inputs = model_inputs(make_batch(num_thoughts=(3,), images=((1,),)))
    inputs.pop("labels")
    model.config.thought_sweeps = 1
    length = inputs["input_ids"].shape[1]
    caches = DynamicCache(config=model.config.text_config), StaticCache(model.config.text_config, max_cache_len=99)
    with torch.no_grad(), widened():
        fed = model.model(**inputs, return_inputs_embeds=True).inputs_embeds
        expected = DynamicCache(config=model.config.text_config)
        model.model.language_model(inputs_embeds=fed, past_key_values=expected)
        for cache in caches:
            model(**inputs, past_key_values=cache, use_cache=True)
            assert int(cache.get_seq_length()) == length
            for layer, other in zip(cache.layers, expected.layers, strict=True):
                torch.testing.assert_close(layer.keys[..., :length, :], other.keys, **LOGITS)
                assert not layer.keys[..., length:, :].any()
        ids = torch.cat([inputs["input_ids"], torch.tensor([[9, 8, 7]])], dim=1)
        new = ids[:, length:]
        model.config.thought_sweeps = 9
        whole = dict(input_ids=ids, pixel_values=inputs["pixel_values"])
        first = model(**inputs, use_cache=True).past_key_values
        torch.testing.assert_close(
            model(input_ids=new, past_key_values=first).logits, model(**whole).logits[:, length:], **LOGITS
        )


def test_controls_are_what_they_are_without_sweeps(model, make_batch):
    batch = model_inputs(make_batch(**CASES["left"]))
    for feedback in ("latent", "latent_one_pass"):
        model.config.thought_feedback, model.config.thought_sweeps = feedback, None
        expected = model(**batch).loss
        model.config.thought_sweeps = 1
        torch.testing.assert_close(model(**batch).loss, expected)


def test_what_the_answer_sees_holds_in_sweeps(model, make_batch):
    batch = model_inputs(make_batch(**CASES["left"]))
    expected = model(**batch, answer_sees="no_image").loss
    model.config.thought_sweeps = 3
    torch.testing.assert_close(model(**batch, answer_sees="no_image").loss, expected)
    assert (model(**batch).loss - expected).abs() > 1e-6


def test_sweeps_are_refused_where_they_would_be_wrong(model, make_batch):
    inputs = model_inputs(make_batch(num_thoughts=(3,), images=((1,),)))
    model.config.thought_sweeps = 1
    length = inputs["input_ids"].shape[1]
    positions = torch.tensor([[*range(length - 2), 0, 1]])
    with pytest.raises(ValueError, match="`config.thought_sweeps` cannot be used with packed rows"):
        model(**inputs, position_ids=positions)
    cache = DynamicCache(config=model.config.text_config)
    cache.layers = [UnknownLayer() for _ in model.model.language_model.layers]
    with pytest.raises(ValueError, match="has a UnknownLayer, and with `config.thought_sweeps`"):
        model(**inputs, past_key_values=cache, use_cache=True)
    model.config.thought_sweeps = 0
    with pytest.raises(ValueError, match="`config.thought_sweeps` must be an integer of at least 1, got 0"):
        model(**inputs)
    for wrong in (0, 1.5, True):
        message = f"`thought_sweeps` must be an integer of at least 1, got {wrong}"
        with pytest.raises(ValueError, match=re.escape(message)):
            MultiCoCoConfig(thought_sweeps=wrong)


class UnknownLayer(DynamicLayer):
    """A kind of which nobody knows whether a pass leaves something in it."""


def test_training_sets_the_number_of_sweeps(model, processor, tmp_path):
    """As given, else as in the checkpoint; 0 is one pass after another. A checkpoint says what it was trained with."""
    model.config.thought_sweeps = 2
    start = str(tmp_path / "start")
    model.save_pretrained(start)
    for given, expected in (([], 2), (["--thought_sweeps", "3"], 3), (["--thought_sweeps", "0"], None)):
        words = [
            "--model_name_or_path",
            str(tmp_path / "start"),
            "--train_file",
            "none",
            "--output_dir",
            str(tmp_path),
        ]
        model_args, _, _, args, _ = parse(None, [*words, *given])
        config = load_model(model_args, args, processor).config
        assert config.thought_sweeps == config.trained["thought_sweeps"] == expected
