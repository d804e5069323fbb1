"""Latent passes equal the plain definition, in float64: loss, logits, thoughts and every gradient."""

import pytest
import torch
from conftest import model_inputs
from reference import (
    assert_same_grads,
    loss_and_grads,
    reference_logits,
    reference_loss,
    split_rows,
    training,
    widened,
)

from multicoco.configuration_multicoco import FEEDBACKS
from multicoco.passes import thought_of


CASES = {
    "no_thoughts": dict(num_thoughts=(0, 0)),
    "one_thought": dict(num_thoughts=(1,), images=((1,),)),
    "aligned": dict(num_thoughts=(3, 3, 3), images=((1,), (), (2,))),
    "ragged": dict(num_thoughts=(3, 0, 1), images=((1,), (), (2,))),
    "ragged_left": dict(num_thoughts=(3, 0, 1), images=((1,), (), (2,)), padding="left"),
    "unaligned_right": dict(num_thoughts=(2, 3, 1), images=((1,), (), (2,)), padding="right"),
    "split_block": dict(num_thoughts=(3, 2), padding="left", split_block=True),
    "several_images": dict(num_thoughts=(2, 2, 1), images=((2, 1), (), (1, 3)), padding="left"),
    "text_only": dict(num_thoughts=(2, 1), images=((), ()), padding="right"),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def batch(request, make_batch):
    return make_batch(**request.param)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_loss_and_gradients_match_full_recompute(model, batch, checkpointing):
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch))
    with training(model, checkpointing):
        loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_rescaled_thoughts_match_full_recompute(model, make_batch, checkpointing, monkeypatch):
    monkeypatch.setattr(model.config, "thought_feedback", "rms_match")
    batch = make_batch(**CASES["unaligned_right"])
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch))
    with training(model, checkpointing):
        loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)
    latent = model.get_input_embeddings().weight[model.config.latent_token_id]
    thoughts = model(**model_inputs(batch), return_thoughts=True).thoughts
    torch.testing.assert_close(thoughts[1].norm(dim=-1), latent.norm().expand(3), atol=1e-11, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_logits_and_thoughts_match_full_recompute(model, batch, attn_implementation):
    model.set_attn_implementation(attn_implementation)
    with torch.no_grad(), widened():
        output = model(**model_inputs(batch), return_thoughts=True)
        for row, sample in enumerate(split_rows(batch)):
            logits, thoughts = reference_logits(model, sample["input_ids"], sample["pixel_values"])
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(output.logits[row, real], logits, atol=1e-11, rtol=0)
            if thoughts:
                torch.testing.assert_close(
                    output.thoughts[row, : len(thoughts)], torch.stack(thoughts), atol=1e-11, rtol=0
                )
                assert not output.thoughts[row, len(thoughts) :].any()


@pytest.mark.parametrize("thought_feedback", FEEDBACKS)
def test_every_feedback_has_a_rule(thought_feedback):
    """A name without one was fed by the rule of another."""
    state, latent = torch.ones(2, 3), torch.full((2, 3), 0.5)
    thought_of(state, latent, thought_feedback)
    with pytest.raises(ValueError, match="no rule"):
        thought_of(state, latent, "another")
