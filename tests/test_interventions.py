"""Edited thoughts, hidden prompts and the modes of control equal the plain definition, in float64.

The references here are from scratch: one unpadded sample, no cache, the mask of `answer_sees` written position by
position.
"""

import contextlib
import functools

import pytest
import torch
from conftest import model_inputs
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

from multicoco.configuration_multicoco import feedback_of


HIDDEN = 64
NUM_NEW = 6
CACHES = {
    "dynamic": {},
    "static": dict(cache_implementation="static"),
    "no_cache": dict(use_cache=False),
}
all_caches = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())
both_attentions = pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
all_paddings = pytest.mark.parametrize("padding", ["left", "right", "aligned"])
restrictions = pytest.mark.parametrize("answer_sees", ["no_image", "thoughts_only"])

CONSTANTS = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

# (thought (rows, hidden), index) -> thought; each gives every row the same treatment, whatever its neighbours
EDITS = {
    "zero_all": lambda thought, index: torch.zeros_like(thought),
    "constant": lambda thought, index: CONSTANTS[index].expand_as(thought),
    "fixed_noise": lambda thought, index: thought + 0.3 * CONSTANTS[index],
    "only_the_first": lambda thought, index: 2 * thought if index == 0 else thought,
    "only_the_second": lambda thought, index: -thought if index == 1 else thought,
    "by_index": lambda thought, index: thought * (index + 2),
}
all_edits = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())

BATCHES = {
    "aligned": dict(num_thoughts=(3, 3), images=((1,), (2,))),
    "ragged": dict(num_thoughts=(3, 0, 2), images=((1,), (), (2,))),
    "ragged_left": dict(num_thoughts=(3, 0, 2), images=((1,), (), (2,)), padding="left"),  # indices share columns
    "unaligned_right": dict(num_thoughts=(2, 3, 1), images=((), (), (1,)), padding="right", text_lengths=(4, 3, 2)),
    "split_block": dict(num_thoughts=(3, 2), images=((1,), (1,)), padding="left", split_block=True),
}
all_batches = pytest.mark.parametrize("case", BATCHES.values(), ids=BATCHES.keys())


def inputs_of(batch):
    return {name: value for name, value in model_inputs(batch).items() if name != "labels"}


def prompts_of(make_batch, num_thoughts=(2, 0, 3), images=((2,), (), (1, 3)), padding="left", **kwargs):
    """A batch that ends in `<|end-latent|>`."""
    return make_batch(num_thoughts, images, padding=padding, answer_lengths=(0,) * len(images), **kwargs)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=0)


def allowed_positions(config, ids, num_prompt, answer_sees):
    """(T, T) booleans: who may see whom, straight from the definition; thoughts stand in the prompt only."""
    tokens = ids.tolist()
    latents = [position for position in range(num_prompt) if tokens[position] == config.latent_token_id]
    last = latents[-1] if latents else tokens[:num_prompt].index(config.start_latent_id)
    allowed = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for query in range(len(tokens)):
        for key in range(query + 1):
            if query <= last or answer_sees == "all":
                allowed[query, key] = True
            elif answer_sees == "no_image":
                allowed[query, key] = tokens[key] != config.image_token_id or key >= num_prompt
            else:
                allowed[query, key] = key in latents or key > last
    return allowed


def restricted_logits(model, sample, answer_sees, new_tokens=(), edit_thoughts=None):
    """(T, V) logits of one sample and given new tokens. Its thoughts were thought without the restriction."""
    ids = torch.cat([sample["input_ids"], torch.tensor(new_tokens, dtype=torch.long)])
    embeds, _ = reference_embeds(model, sample["input_ids"], sample["pixel_values"], edit_thoughts)
    embeds = torch.cat([embeds, model.get_input_embeddings()(ids[len(embeds) :])])
    mask = allowed_positions(model.config, ids, len(sample["input_ids"]), answer_sees)
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    output = model.model.language_model(inputs_embeds=embeds[None], attention_mask=mask[None, None], use_cache=False)
    return model.lm_head(output.last_hidden_state[0])


def assert_greedy(model, batch, tokens, answer_sees="all", edit_thoughts=None):
    """Each token of each sample is the best one after those before it, by a pass from scratch."""
    for sample, row in zip(split_rows(batch), tokens, strict=True):
        scores = restricted_logits(model, sample, answer_sees, row[:-1], edit_thoughts)[-len(row) :]
        scores[:, model.generation_config.suppress_tokens] = -torch.inf
        assert row == scores.argmax(dim=-1).tolist()


def generated_tokens(model, batch, **kwargs):
    inputs = inputs_of(batch)
    output = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, **kwargs)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def after_block(model, batch):
    """(B, T): real positions after the last thought (after the start marker where there is none)."""
    block = torch.isin(batch["input_ids"], torch.tensor([model.config.start_latent_id, model.config.latent_token_id]))
    later = block.flip(1).cumsum(1).flip(1)
    return (later == 0) & batch["attention_mask"].bool()


@contextlib.contextmanager
def recorded_widths(module):
    """The number of tokens in each call of a language model."""
    widths = []
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        yield widths
    finally:
        handle.remove()


# Edited thoughts


@all_batches
@all_edits
def test_forward_with_edited_thoughts_equals_full_recompute(shared_model, make_batch, case, edit):
    batch = make_batch(**case)
    with torch.no_grad(), widened():
        output = shared_model(**inputs_of(batch), edit_thoughts=edit, return_thoughts=True)
        for row, sample in enumerate(split_rows(batch)):
            logits, thoughts = reference_logits(shared_model, sample["input_ids"], sample["pixel_values"], edit)
            assert_close(output.logits[row, batch["attention_mask"][row].bool()], logits)
            assert len(thoughts) == case["num_thoughts"][row]
            for number, thought in enumerate(thoughts):
                assert_close(output.thoughts[row, number], thought)


@all_caches
@all_edits
def test_generation_with_edited_thoughts_equals_full_recompute(shared_model, make_batch, cache, edit):
    batch = prompts_of(make_batch)
    with torch.no_grad(), widened():
        tokens = generated_tokens(shared_model, batch, edit_thoughts=edit, **cache)
        assert_greedy(shared_model, batch, tokens, edit_thoughts=edit)


def test_generation_with_edited_thoughts_returns_the_edited_ones(shared_model, make_batch):
    batch = prompts_of(make_batch)
    with torch.no_grad(), widened():
        output = shared_model.generate(
            **inputs_of(batch), max_new_tokens=2, num_beams=2, edit_thoughts=EDITS["constant"], return_thoughts=True
        )
    for row, count in enumerate((2, 0, 3)):
        assert torch.equal(output.thoughts[row, :count], CONSTANTS[:count])
        assert not output.thoughts[row, count:].any()


def test_an_edit_changes_later_thoughts_and_the_answer_but_nothing_before(shared_model, make_batch):
    batch = make_batch(num_thoughts=(3, 3))
    with torch.no_grad(), widened():
        plain = shared_model(**inputs_of(batch), return_thoughts=True)
        edited = shared_model(**inputs_of(batch), return_thoughts=True, edit_thoughts=EDITS["only_the_second"])
    changed = (plain.thoughts != edited.thoughts).any(dim=-1)
    assert changed.tolist() == [[False, True, True]] * 2
    for row, ids in enumerate(batch["input_ids"]):
        second = (ids == shared_model.config.latent_token_id).nonzero()[1, 0]
        real = batch["attention_mask"][row].bool()
        changed = (plain.logits[row] != edited.logits[row]).any(dim=-1)
        assert not changed[:second].any()
        assert changed[second:][real[second:]].all()


def test_an_edit_sees_each_index_once_and_what_the_row_would_be_fed(shared_model, make_batch):
    batch = make_batch(num_thoughts=(3, 3), images=((1,), (2,)))
    seen = []

    def record(thought, index):
        seen.append((index, thought))
        return thought

    with torch.no_grad(), widened():
        thoughts = shared_model(**inputs_of(batch), edit_thoughts=record, return_thoughts=True).thoughts
        plain = shared_model(**inputs_of(batch), return_thoughts=True).thoughts
    assert [index for index, _ in seen] == [0, 1, 2]
    assert torch.equal(torch.stack([thought for _, thought in seen], dim=1), thoughts)
    assert torch.equal(thoughts, plain)


SWAPS = {
    "all": lambda thought, index: thought.roll(1, dims=0),
    "only_the_first": lambda thought, index: thought.roll(1, dims=0) if index == 0 else thought,
    "only_the_last": lambda thought, index: thought.roll(1, dims=0) if index == 2 else thought,
}


def jointly_edited_embeds(model, samples, edit):
    """Input embeddings of unpadded samples that think in lockstep, so that an edit may mix them."""
    latents = [(sample["input_ids"] == model.config.latent_token_id).nonzero().flatten() for sample in samples]
    blank = lambda thought, index: torch.zeros_like(thought)  # noqa: E731
    embeds = [reference_embeds(model, sample["input_ids"], sample["pixel_values"], blank)[0] for sample in samples]
    for index in range(len(latents[0])):
        states = []
        for row, positions in zip(embeds, latents, strict=True):
            prefix = row[None, : positions[index]]
            states.append(model.model.language_model(inputs_embeds=prefix, use_cache=False).last_hidden_state[0, -1])
        for row, positions, thought in zip(embeds, latents, edit(torch.stack(states), index), strict=True):
            row[positions[index]] = thought
    return embeds


@pytest.mark.parametrize("edit", SWAPS.values(), ids=SWAPS.keys())
@pytest.mark.parametrize("padding", ["left", "aligned"])
def test_thoughts_swapped_between_samples_equal_full_recompute(shared_model, make_batch, edit, padding):
    batch = make_batch((3, 3, 3), ((1,), (), (2,)), padding=padding, answer_lengths=(4, 4, 4))
    with torch.no_grad(), widened():
        logits = shared_model(**inputs_of(batch), edit_thoughts=edit).logits
        embeds = jointly_edited_embeds(shared_model, split_rows(batch), edit)
        for row, sample_embeds in enumerate(embeds):
            plain = shared_model.model.language_model(inputs_embeds=sample_embeds[None], use_cache=False)
            expected = shared_model.lm_head(plain.last_hidden_state[0])
            assert_close(logits[row, batch["attention_mask"][row].bool()], expected)


@all_caches
def test_generation_with_swapped_thoughts_equals_full_recompute(shared_model, make_batch, cache):
    batch = prompts_of(make_batch, (3, 3), ((1,), (2,)))
    with torch.no_grad(), widened():
        tokens = generated_tokens(shared_model, batch, edit_thoughts=SWAPS["all"], **cache)
        for row, embeds in enumerate(jointly_edited_embeds(shared_model, split_rows(batch), SWAPS["all"])):
            expected = shared_model.generate(inputs_embeds=embeds[None], max_new_tokens=NUM_NEW, do_sample=False)
            assert tokens[row] == expected[0].tolist()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@all_batches
def test_gradients_through_an_edit_match_full_recompute(model, make_batch, case, checkpointing):
    batch = make_batch(**case)
    scales = torch.linspace(0.5, 1.5, 8, dtype=torch.float64).requires_grad_()
    edit = lambda thought, index: thought * scales[index]  # noqa: E731
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch, edit))
    expected_scales, scales.grad = scales.grad, None
    with training(model, checkpointing):
        loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch), edit_thoughts=edit).loss)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)
    assert expected_scales.any()
    torch.testing.assert_close(scales.grad, expected_scales, atol=1e-11, rtol=1e-9)


def test_a_constant_edit_cuts_the_image_out_of_the_thoughts(shared_model, make_batch):
    """The edited thought is all that later thoughts get of it: no gradient flows through the one it replaces."""
    batch = make_batch((1,), ((1,),), padding="left")
    inputs = inputs_of(batch)
    for edit, flows in ((None, True), (lambda thought, index: CONSTANTS[index].expand_as(thought), False)):
        pixel_values = inputs["pixel_values"].clone().requires_grad_()
        with widened():
            output = shared_model(**{**inputs, "pixel_values": pixel_values}, edit_thoughts=edit, return_thoughts=True)
            grads = torch.autograd.grad(output.thoughts.sum() + 0 * pixel_values.sum(), pixel_values)[0]
        assert bool(grads.any()) == flows


# What the answer sees

RESTRICTED = {
    "images": dict(num_thoughts=(2, 3, 2), images=((1,), (2,), (1, 1))),
    "empty_block": dict(num_thoughts=(2, 0, 0), images=((1,), (2,), ())),
    "all_empty": dict(num_thoughts=(0, 0), images=((1,), (2,))),
    "split_block": dict(num_thoughts=(3, 2), images=((1,), (1,)), split_block=True),
}
all_restricted = pytest.mark.parametrize("case", RESTRICTED.values(), ids=RESTRICTED.keys())


@all_restricted
@all_paddings
@both_attentions
@restrictions
def test_restricted_answers_equal_a_plain_pass_with_a_written_mask(
    model, make_batch, case, padding, attn_implementation, answer_sees
):
    model.set_attn_implementation(attn_implementation)
    batch = make_batch(**case, padding=padding)
    with torch.no_grad(), widened():
        output = model(**inputs_of(batch), answer_sees=answer_sees, return_thoughts=True)
        free = model(**inputs_of(batch), return_thoughts=True)
        for row, sample in enumerate(split_rows(batch)):
            expected = restricted_logits(model, sample, answer_sees)
            assert_close(output.logits[row, batch["attention_mask"][row].bool()], expected)
    if free.thoughts is not None:  # thinking itself is not restricted
        assert_close(output.thoughts, free.thoughts)
    seen = after_block(model, batch)
    has_image = torch.tensor([bool(counts) for counts in case["images"]])[:, None]
    restricted = seen & has_image if answer_sees == "no_image" else seen
    differs = ((output.logits - free.logits).abs() > 1e-6).any(dim=-1)
    assert differs[restricted].all()  # the restriction bites, and where it should
    assert not differs[batch["attention_mask"].bool() & ~restricted].any()


@all_caches
@both_attentions
@restrictions
@pytest.mark.parametrize("num_thoughts", [(2, 0, 3), (0, 0, 0)], ids=["ragged", "none"])
def test_restricted_generation_equals_full_recompute(
    model, make_batch, cache, attn_implementation, answer_sees, num_thoughts
):
    model.set_attn_implementation(attn_implementation)
    batch = prompts_of(make_batch, num_thoughts)
    with torch.no_grad(), widened():
        tokens = generated_tokens(model, batch, answer_sees=answer_sees, **cache)
        assert_greedy(model, batch, tokens, answer_sees)
        free = generated_tokens(model, batch)
    changed = [row != free_row for row, free_row in zip(tokens, free, strict=True)]
    assert any(changed)
    assert answer_sees == "thoughts_only" or not changed[1]  # the second prompt has no image


@restrictions
@pytest.mark.parametrize("cache", [{}, CACHES["static"]], ids=["dynamic", "static"])
def test_restricted_beams_equal_those_of_single_samples_without_cache(shared_model, make_batch, answer_sees, cache):
    batch = prompts_of(make_batch)
    settings = dict(num_beams=3, num_return_sequences=2, answer_sees=answer_sees)
    with torch.no_grad(), widened():
        tokens = generated_tokens(shared_model, batch, **settings, **cache)
        expected = []
        for sample in split_rows(batch):
            inputs = {"input_ids": sample["input_ids"][None], "pixel_values": sample["pixel_values"]}
            output = shared_model.generate(
                **inputs, max_new_tokens=NUM_NEW, do_sample=False, use_cache=False, **settings
            )
            expected += output[:, len(sample["input_ids"]) :].tolist()
    assert tokens == expected


@restrictions
def test_restrictions_and_edits_work_together(shared_model, make_batch, answer_sees):
    batch = make_batch((2, 3), ((1,), (2,)), padding="left")
    edit = EDITS["by_index"]
    with torch.no_grad(), widened():
        logits = shared_model(**inputs_of(batch), answer_sees=answer_sees, edit_thoughts=edit).logits
        for row, sample in enumerate(split_rows(batch)):
            expected = restricted_logits(shared_model, sample, answer_sees, edit_thoughts=edit)
            assert_close(logits[row, batch["attention_mask"][row].bool()], expected)
        prompts = prompts_of(make_batch)
        tokens = generated_tokens(shared_model, prompts, answer_sees=answer_sees, edit_thoughts=edit)
        assert_greedy(shared_model, prompts, tokens, answer_sees, edit)


@restrictions
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_of_restricted_answers_match_a_plain_pass(model, make_batch, answer_sees, checkpointing):
    batch = make_batch((2, 0, 3), ((1,), (2,), ()), padding="left")

    def expected_loss():
        losses = []
        for sample in split_rows(batch):
            logprobs = restricted_logits(model, sample, answer_sees).log_softmax(dim=-1)
            for position, label in enumerate(sample["labels"].tolist()):
                if label != -100:
                    losses.append(-logprobs[position - 1, label])
        return torch.stack(losses).mean()

    loss, expected = loss_and_grads(model, expected_loss)
    with training(model, checkpointing):
        actual, grads = loss_and_grads(model, lambda: model(**model_inputs(batch), answer_sees=answer_sees).loss)
    torch.testing.assert_close(actual, loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)


def with_layers(model, num_layers):
    """Only the first layers of the language model."""
    model.model.language_model.layers = model.model.language_model.layers[:num_layers]
    model.config.text_config.num_hidden_layers = num_layers
    model.config.text_config.layer_types = model.config.text_config.layer_types[:num_layers]
    return model


SEALED = {  # (layers, thoughts): whether pinned thoughts are all that comes through
    "one_layer": (1, (2, 3), True),
    "empty_block": (2, (0, 0), True),
    # Its input is pinned, but the *position* of a thought has seen the prompt: its keys from layer 2 on carry it.
    "two_layers": (2, (2, 3), False),
}


@pytest.mark.parametrize("case", ["forward", *CACHES])
@pytest.mark.parametrize(("num_layers", "num_thoughts", "sealed"), SEALED.values(), ids=SEALED.keys())
def test_what_comes_through_pinned_thoughts(model, make_batch, case, num_layers, num_thoughts, sealed):
    """Sealed is meant exactly: with another image, every bit after the thoughts stays as it was."""
    model = with_layers(model, num_layers)
    make = prompts_of if case != "forward" else lambda make, *args: make(*args, padding="left")
    batch = make(make_batch, num_thoughts, ((1,), (2,)))
    other = {**batch, "pixel_values": batch["pixel_values"].flip(0) + 1.0}
    after = after_block(model, batch)

    def answer_logits(batch, **kwargs):
        if case == "forward":
            return model(**inputs_of(batch), **kwargs).logits[after]
        settings = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return torch.stack(model.generate(**inputs_of(batch), **settings, **CACHES[case], **kwargs).logits)

    pinned = dict(edit_thoughts=EDITS["constant"], answer_sees="thoughts_only")
    with torch.no_grad(), widened():
        assert torch.equal(answer_logits(batch, **pinned), answer_logits(other, **pinned)) == sealed
        assert not torch.equal(answer_logits(batch), answer_logits(other))
        if any(num_thoughts):  # thoughts that are not pinned carry the image
            seen = dict(answer_sees="thoughts_only")
            assert not torch.equal(answer_logits(batch, **seen), answer_logits(other, **seen))


@pytest.mark.parametrize(("num_layers", "num_thoughts", "sealed"), SEALED.values(), ids=SEALED.keys())
def test_what_gradient_reaches_the_image_past_pinned_thoughts(model, make_batch, num_layers, num_thoughts, sealed):
    model = with_layers(model, num_layers)
    batch = make_batch(num_thoughts, ((1,), (2,)), padding="left")
    after = after_block(model, batch)

    def reaches_image(**kwargs):
        pixel_values = batch["pixel_values"].clone().requires_grad_()
        with widened():
            logits = model(**{**inputs_of(batch), "pixel_values": pixel_values}, **kwargs).logits
            return bool(torch.autograd.grad(logits[after].square().sum(), pixel_values)[0].any())

    assert reaches_image()
    assert reaches_image(answer_sees="thoughts_only") == any(num_thoughts)
    assert reaches_image(answer_sees="thoughts_only", edit_thoughts=EDITS["constant"]) != sealed


@all_caches
@restrictions
@pytest.mark.parametrize("token", ["latent_token_id", "start_latent_id"])
def test_restrictions_go_by_the_prompt_not_by_what_the_model_writes(
    shared_model, make_batch, cache, answer_sees, token
):
    """A thought marker among the new tokens is an ordinary token and moves no boundary."""
    token = getattr(shared_model.config, token)
    batch = prompts_of(make_batch)
    length = batch["input_ids"].shape[1]

    def force(prefix_length, scores):
        if prefix_length == length + 1:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, token] = 0.0
        return scores

    with torch.no_grad(), widened():
        output = shared_model.generate(
            **inputs_of(batch),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            answer_sees=answer_sees,
            suppress_tokens=None,
            logits_processor=[lambda ids, scores: force(ids.shape[1], scores)],
            output_logits=True,
            return_dict_in_generate=True,
            **cache,
        )
        logits = torch.stack(output.logits, dim=1)
        for row, sample in enumerate(split_rows(batch)):
            tokens = output.sequences[row, length:].tolist()
            assert tokens[1] == token
            expected = restricted_logits(shared_model, sample, answer_sees, tokens[:-1])
            assert_close(logits[row], expected[-NUM_NEW:])


def function_of(model, call):
    return model if call == "forward" else functools.partial(model.generate, max_new_tokens=1)


def without_block(model, batch, row):
    """The batch with ordinary tokens instead of the thought block of one row."""
    config = model.config
    markers = torch.tensor([config.start_latent_id, config.latent_token_id, config.end_latent_id])
    ids = batch["input_ids"].clone()
    ids[row] = torch.where(torch.isin(ids[row], markers), 9, ids[row])
    return {**batch, "input_ids": ids}


@restrictions
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_restriction_needs_a_thought_block_in_every_sample(shared_model, make_batch, answer_sees, call):
    batch = without_block(shared_model, prompts_of(make_batch), row=1)
    function = function_of(shared_model, call)
    with torch.no_grad(), pytest.raises(ValueError, match="needs a thought block in every sample"):
        function(**inputs_of(batch), answer_sees=answer_sees)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_an_unknown_restriction_is_an_error(shared_model, make_batch, call):
    function = function_of(shared_model, call)
    with torch.no_grad(), pytest.raises(ValueError, match="`answer_sees` must be one of .*'nothing'"):
        function(**inputs_of(prompts_of(make_batch)), answer_sees="nothing")


@restrictions
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_restriction_of_a_continued_cache_is_an_error(shared_model, make_batch, answer_sees, call):
    """What lies in the cache is not known by token, so it cannot be hidden."""
    batch = prompts_of(make_batch)
    inputs = inputs_of(batch)
    config = shared_model.config
    turn = torch.tensor([[17, config.start_latent_id, config.latent_token_id, config.end_latent_id]]).expand(3, -1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, turn.shape[1]), value=1)
    with torch.no_grad():
        past = shared_model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="`answer_sees=.*past_key_values"):
            function_of(shared_model, call)(
                input_ids=turn, attention_mask=mask, past_key_values=past, answer_sees=answer_sees
            )


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_restriction_needs_the_ids_of_the_prompt(shared_model, make_batch, call):
    batch = prompts_of(make_batch)
    function = function_of(shared_model, call)
    with torch.no_grad():
        embeds = shared_model.fuse(batch["input_ids"], batch["pixel_values"])
        latent_mask = batch["input_ids"] == shared_model.config.latent_token_id
        with pytest.raises(ValueError, match="needs `input_ids`"):
            function(
                inputs_embeds=embeds,
                latent_mask=latent_mask,
                attention_mask=batch["attention_mask"],
                answer_sees="no_image",
            )


# Modes


def latent_row(model):
    """The edit that feeds the latent token's own embedding: what the definition of `pause` is."""
    weight = model.get_input_embeddings().weight
    return lambda thought, index: weight[model.config.latent_token_id].expand_as(thought)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("mode", ["pause", "pause_loop"])
@all_batches
def test_pause_equals_a_plain_forward_with_the_latent_embedding(model, make_batch, case, mode, checkpointing):
    batch = make_batch(**case)
    expected_loss, expected = loss_and_grads(model, lambda: reference_loss(model, batch, latent_row(model)))
    model.config.thought_feedback = feedback_of(mode, "identity")
    with training(model, checkpointing):
        loss, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)
    assert grads["model.language_model.embed_tokens.weight"][model.config.latent_token_id].any()


@pytest.mark.parametrize("mode", ["pause", "pause_loop"])
@all_batches
def test_logits_of_pause_are_those_of_transformers_own_forward(model, make_batch, case, mode):
    """With all positions taken from the embedding table, nothing is left that a plain InternVL would not do."""
    model.config.thought_feedback = feedback_of(mode, "identity")
    batch = make_batch(**case)
    with torch.no_grad(), widened():
        logits = model(**inputs_of(batch)).logits
        for row, sample in enumerate(split_rows(batch)):
            plain = model.model(input_ids=sample["input_ids"][None], pixel_values=sample["pixel_values"])
            expected = model.lm_head(plain.last_hidden_state[0])
            assert_close(logits[row, batch["attention_mask"][row].bool()], expected)


@all_caches
@pytest.mark.parametrize("mode", ["pause", "pause_loop"])
def test_generation_of_pause_equals_full_recompute(model, make_batch, cache, mode):
    model.config.thought_feedback = feedback_of(mode, "identity")
    batch = prompts_of(make_batch)
    with torch.no_grad(), widened():
        assert_greedy(model, batch, generated_tokens(model, batch, **cache), edit_thoughts=latent_row(model))


@restrictions
@pytest.mark.parametrize("mode", ["pause", "pause_loop"])
def test_restrictions_of_pause_equal_a_plain_pass(model, make_batch, mode, answer_sees):
    model.config.thought_feedback = feedback_of(mode, "identity")
    batch = make_batch((2, 3, 0), ((1,), (2,), ()), padding="left")
    with torch.no_grad(), widened():
        logits = model(**inputs_of(batch), answer_sees=answer_sees).logits
        for row, sample in enumerate(split_rows(batch)):
            expected = restricted_logits(model, sample, answer_sees, edit_thoughts=latent_row(model))
            assert_close(logits[row, batch["attention_mask"][row].bool()], expected)


@pytest.mark.parametrize("mode", ["pause", "pause_loop"])
def test_thoughts_of_pause_are_the_latent_embedding_and_can_be_edited(model, make_batch, mode):
    model.config.thought_feedback = feedback_of(mode, "identity")
    batch = make_batch((2, 3), ((1,), (2,)))
    with torch.no_grad(), widened():
        thoughts = model(**inputs_of(batch), return_thoughts=True).thoughts
        latent = model.get_input_embeddings().weight[model.config.latent_token_id]
        assert torch.equal(thoughts[1], latent.expand(3, -1))
        assert torch.equal(thoughts[0], torch.stack([latent, latent, torch.zeros_like(latent)]))
        edit = EDITS["constant"]
        logits = model(**inputs_of(batch), edit_thoughts=edit).logits
        for row, sample in enumerate(split_rows(batch)):
            expected, _ = reference_logits(model, sample["input_ids"], sample["pixel_values"], edit)
            assert_close(logits[row, batch["attention_mask"][row].bool()], expected)


@all_batches
def test_the_latent_embedding_gets_no_gradient_from_thoughts(model, make_batch, case):
    with training(model):
        _, grads = loss_and_grads(model, lambda: model(**model_inputs(make_batch(**case))).loss)
    table = grads["model.language_model.embed_tokens.weight"]
    assert not table[model.config.latent_token_id].any()
    assert table[model.config.start_latent_id].any()


@pytest.mark.parametrize("mode", ["cot", "no_cot", "no_thoughts"])
def test_modes_of_data_only_compute_like_coconut(model, make_batch, mode):
    batch = make_batch((2, 0), ((1,), ()))
    with torch.no_grad(), widened():
        expected = model(**inputs_of(batch)).logits
        model.config.mode = mode
        assert torch.equal(model(**inputs_of(batch)).logits, expected)


# Number of calls


WIDTHS = {
    "none": (dict(num_thoughts=(0, 0)), 1),
    "one": (dict(num_thoughts=(1, 1)), 2),
    "even": (dict(num_thoughts=(3, 3, 3), images=((1,), (), (2,))), 4),
    "ragged": (dict(num_thoughts=(4, 0, 2), images=((1,), (), (2,))), 5),
    "even_left": (dict(num_thoughts=(3, 3), padding="left", answer_lengths=(4, 4)), 4),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize(("case", "calls"), WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("mode", ["coconut", "pause", "pause_loop"])
def test_aligned_thoughts_take_one_call_each_and_no_token_twice(model, make_batch, case, calls, mode, checkpointing):
    model.config.thought_feedback = feedback_of(mode, "identity")
    batch = make_batch(**case)
    with training(model, checkpointing), recorded_widths(model.model.language_model) as widths:
        model(**model_inputs(batch))
    assert len(widths) == (1 if mode == "pause" else calls)
    assert sum(widths) == batch["input_ids"].shape[1]
    assert widths[1:-1] == [1] * (len(widths) - 2)


@pytest.mark.parametrize("cache", [{}, CACHES["static"]], ids=["dynamic", "static"])
@pytest.mark.parametrize(("mode", "passes"), [("coconut", 4), ("pause", 1), ("pause_loop", 4)])
def test_generation_takes_the_passes_once_and_one_call_a_token(model, make_batch, mode, passes, cache):
    model.config.thought_feedback = feedback_of(mode, "identity")
    batch = prompts_of(make_batch, (3, 3), ((1,), (2,)))
    tiles = []
    handle = model.model.vision_tower.register_forward_hook(lambda module, args, output: tiles.append(output))
    with torch.no_grad(), recorded_widths(model.model.language_model) as widths:
        generated_tokens(model, batch, num_beams=2, **cache)
    handle.remove()
    assert len(widths) == passes + NUM_NEW - 1
    assert sum(widths[:passes]) == batch["input_ids"].shape[1]
    assert widths[passes:] == [1] * (NUM_NEW - 1)
    assert len(tiles) == 1
