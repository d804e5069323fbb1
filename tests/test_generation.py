"""`generate` equals one sample at a time without a cache, token for token, whatever is asked of it.

Prompts end in `<|end-latent|>` and hold 0, 1 and 2 images of several tiles. All in float64.
"""

import pytest
import torch
from conftest import model_inputs
from reference import reference_embeds, reference_generate, split_rows, widened
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging


PROMPTS = dict(num_thoughts=(2, 0, 3), images=((2,), (), (1, 3)), text_lengths=(3, 9, 4))
NUM_NEW = 8
CACHES = {
    "dynamic": {},
    "static": dict(cache_implementation="static"),
    "no_cache": dict(use_cache=False),
}
all_caches = pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES.keys())


@pytest.fixture(autouse=True)
def _double_precision():
    with torch.no_grad(), widened():
        yield


@pytest.fixture(scope="session")
def make_prompts(make_batch):
    """Prompts that end in `<|end-latent|>`, as a batch of `make_batch` whose answers are empty."""

    def make(num_thoughts=(2,), images=((1,),), padding="left", **kwargs):
        empty = (0,) * len(num_thoughts)
        return make_batch(num_thoughts, images, padding=padding, answer_lengths=empty, **kwargs)

    return make


@pytest.fixture
def prompts(make_prompts):
    return make_prompts(**PROMPTS)


def inputs_of(batch):
    return {name: value for name, value in model_inputs(batch).items() if name != "labels"}


def single_inputs(sample):
    """What the model takes for one sample of `split_rows`: no padding, and no mask."""
    inputs = {"input_ids": sample["input_ids"][None]}
    if sample["pixel_values"] is not None:
        inputs["pixel_values"] = sample["pixel_values"]
    return inputs


def new_tokens(model, inputs, **settings):
    """Lists of new tokens, and what `generate` returned besides."""
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, **settings}
    output = model.generate(**inputs, return_dict_in_generate=True, **settings)
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return output.sequences[:, start:].tolist(), output


def one_by_one(model, batch, **settings):
    """New tokens of each sample by itself: unpadded, the whole sequence again for each token."""
    tokens = [new_tokens(model, single_inputs(sample), use_cache=False, **settings)[0] for sample in split_rows(batch)]
    return [row for rows in tokens for row in rows]


def expected_greedy(model, batch, num_new=NUM_NEW, **kwargs):
    kwargs = {"suppress": model.generation_config.suppress_tokens, **kwargs}
    return [
        reference_generate(model, sample["input_ids"], sample["pixel_values"], num_new, **kwargs)
        for sample in split_rows(batch)
    ]


def plain_run(model, sample, tokens, **kwargs):
    """One plain forward of the language model over a prompt and given new tokens; the head's logits beside it."""
    embeds, _ = reference_embeds(model, sample["input_ids"], sample["pixel_values"])
    embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.long))])
    output = model.model.language_model(inputs_embeds=embeds[None], use_cache=False, **kwargs)
    return output, model.lm_head(output.last_hidden_state[0])


class GumbelNoise(LogitsProcessor):
    """Adds noise that depends on the step only: greedy search then samples, alike in a batch and one by one."""

    def __init__(self, prompt_length, vocab_size, num_steps=NUM_NEW):
        uniform = torch.rand(num_steps, vocab_size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        self.noise = -torch.log(-torch.log(uniform))
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        return scores + self.noise[input_ids.shape[1] - self.prompt_length]


class Force(LogitsProcessor):
    """Forces one token at one step."""

    def __init__(self, token, length):
        self.token, self.length = token, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] != self.length:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0.0
        return forced


class Collector(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces += value.flatten().tolist()

    def end(self):
        self.ended = True


# Greedy search


@all_caches
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_greedy_batch_equals_the_plain_definition(model, prompts, cache, attn_implementation):
    expected = expected_greedy(model, prompts)
    model.set_attn_implementation(attn_implementation)
    tokens, _ = new_tokens(model, inputs_of(prompts), **cache)
    assert tokens == expected
    assert len({tuple(row) for row in expected}) == len(expected)  # else one answer for all would pass


def test_rescaled_thoughts_equal_the_plain_definition(model, prompts, monkeypatch):
    plain = expected_greedy(model, prompts)
    monkeypatch.setattr(model.config, "thought_feedback", "rms_match")
    expected = expected_greedy(model, prompts)
    assert new_tokens(model, inputs_of(prompts))[0] == expected
    assert expected != plain


def test_thoughts_and_images_decide_the_tokens(shared_model, prompts):
    """Else equal tokens would say nothing about either."""
    inputs = inputs_of(prompts)
    tokens, _ = new_tokens(shared_model, inputs)
    blank, _ = new_tokens(shared_model, inputs, edit_thoughts=lambda thought, index: torch.zeros_like(thought))
    swapped, _ = new_tokens(shared_model, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
    changed = lambda other: [row != other_row for row, other_row in zip(tokens, other, strict=True)]  # noqa: E731
    assert changed(blank) == changed(swapped) == [True, False, True]  # the second prompt has neither


@all_caches
def test_logits_of_every_step_equal_one_plain_forward(shared_model, prompts, cache):
    tokens, output = new_tokens(shared_model, inputs_of(prompts), output_logits=True, **cache)
    logits = torch.stack(output.logits, dim=1)  # (B, new, V)
    for row, sample in enumerate(split_rows(prompts)):
        _, expected = plain_run(shared_model, sample, tokens[row][:-1])
        torch.testing.assert_close(logits[row], expected[-NUM_NEW:], atol=1e-11, rtol=0)


@pytest.mark.parametrize("padded", [True, False], ids=["mask_of_ones", "no_mask"])
def test_prompts_of_equal_length_need_no_mask(shared_model, make_prompts, padded):
    batch = make_prompts((2, 2), ((1,), (1,)), text_lengths=(4, 4))
    assert batch["attention_mask"].all()
    inputs = inputs_of(batch)
    if not padded:
        del inputs["attention_mask"]
    assert new_tokens(shared_model, inputs)[0] == expected_greedy(shared_model, batch)


@all_caches
def test_prompts_without_any_thought_or_image_are_exact(shared_model, make_prompts, cache):
    batch = make_prompts((0, 0), ((), ()))
    assert new_tokens(shared_model, inputs_of(batch), **cache)[0] == expected_greedy(shared_model, batch)


@all_caches
def test_split_thoughts_are_exact(shared_model, make_prompts, cache):
    batch = make_prompts((3, 2), ((1,), (2,)), split_block=True)
    assert new_tokens(shared_model, inputs_of(batch), **cache)[0] == expected_greedy(shared_model, batch)


@all_caches
def test_rows_that_end_early_are_filled_with_padding(shared_model, prompts, cache):
    free = expected_greedy(shared_model, prompts)
    eos = [free[0][2], free[1][5]]
    expected = expected_greedy(shared_model, prompts, eos=eos)
    assert sorted(map(len, expected)) == [3, 6, NUM_NEW]  # the rows do end at different steps
    tokens, _ = new_tokens(shared_model, inputs_of(prompts), eos_token_id=eos, pad_token_id=620, **cache)
    assert tokens == [row + [620] * (NUM_NEW - len(row)) for row in expected]


@all_caches
def test_generation_stops_when_all_rows_have_ended(shared_model, prompts, cache):
    eos = [row[2] for row in expected_greedy(shared_model, prompts)]
    expected = expected_greedy(shared_model, prompts, eos=eos)
    assert max(map(len, expected)) == 3
    tokens, _ = new_tokens(shared_model, inputs_of(prompts), eos_token_id=eos, pad_token_id=620, **cache)
    assert tokens == [row + [620] * (3 - len(row)) for row in expected]


@all_caches
def test_calls_after_each_other_are_independent(shared_model, make_prompts, prompts, cache):
    other = make_prompts((1, 2), ((3,), ()), seed=5)
    first, _ = new_tokens(shared_model, inputs_of(prompts), **cache)
    second, _ = new_tokens(shared_model, inputs_of(other), **cache)
    again, _ = new_tokens(shared_model, inputs_of(prompts), **cache)
    assert first == again
    assert second == expected_greedy(shared_model, other)


def test_generate_leaves_its_inputs_as_they_were(shared_model, prompts):
    inputs = inputs_of(prompts)
    before = {
        name: value.clone() if isinstance(value, torch.Tensor) else list(value) for name, value in inputs.items()
    }
    new_tokens(shared_model, inputs, num_beams=2)
    for name, value in before.items():
        assert torch.equal(inputs[name], value) if isinstance(value, torch.Tensor) else inputs[name] == value


def test_positional_ids_and_a_generation_config_are_taken(shared_model, prompts):
    inputs = inputs_of(prompts)
    config = GenerationConfig(
        max_new_tokens=NUM_NEW, do_sample=False, suppress_tokens=shared_model.generation_config.suppress_tokens
    )
    sequences = shared_model.generate(inputs.pop("input_ids"), config, **inputs)
    assert sequences[:, prompts["input_ids"].shape[1] :].tolist() == expected_greedy(shared_model, prompts)


# Beams, several sequences, sampling


@all_caches
@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_beams_equal_beams_of_single_samples_without_cache(shared_model, prompts, cache, num_return_sequences):
    settings = dict(num_beams=3, num_return_sequences=num_return_sequences, output_scores=True)
    tokens, output = new_tokens(shared_model, inputs_of(prompts), **settings, **cache)
    assert tokens == one_by_one(shared_model, prompts, **settings)
    scores = [
        new_tokens(shared_model, single_inputs(sample), use_cache=False, **settings)[1].sequences_scores
        for sample in split_rows(prompts)
    ]
    torch.testing.assert_close(output.sequences_scores, torch.cat(scores), atol=1e-10, rtol=0)


def test_the_score_of_a_beam_is_its_likelihood_under_the_plain_definition(shared_model, prompts):
    tokens, output = new_tokens(
        shared_model, inputs_of(prompts), num_beams=3, output_scores=True, suppress_tokens=None, length_penalty=0.0
    )
    for row, sample in enumerate(split_rows(prompts)):
        _, logits = plain_run(shared_model, sample, tokens[row][:-1])
        logprobs = logits[-NUM_NEW:].log_softmax(dim=-1)
        expected = logprobs.gather(1, torch.tensor(tokens[row])[:, None]).sum()
        torch.testing.assert_close(output.sequences_scores[row], expected, atol=1e-10, rtol=0)


SAMPLING = {
    "plain": {},
    "top_k": dict(top_k=20),
    "top_p": dict(top_p=0.7, top_k=0),
    "temperature": dict(temperature=2.5, top_k=0),
    "all": dict(top_k=50, top_p=0.9, temperature=1.5),
}


@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("cache", [{}, CACHES["static"]], ids=["dynamic", "static"])
def test_sampling_with_a_seed_equals_sampling_without_cache(shared_model, prompts, settings, cache):
    for sample in split_rows(prompts):
        results = []
        for choice in (cache, CACHES["no_cache"]):
            torch.manual_seed(11)
            results.append(new_tokens(shared_model, single_inputs(sample), do_sample=True, **settings, **choice)[0])
        assert results[0] == results[1]


def test_sampling_depends_on_the_seed(shared_model, prompts):
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        results.append(new_tokens(shared_model, inputs_of(prompts), do_sample=True)[0])
    assert results[0] != results[1]


@all_caches
def test_sampling_with_shared_noise_equals_one_by_one(shared_model, prompts, cache):
    """Also shows that a custom logits processor is honoured: the noise decides."""
    vocab_size = shared_model.config.text_config.vocab_size
    noisy = lambda length: LogitsProcessorList([GumbelNoise(length, vocab_size)])  # noqa: E731
    length = prompts["input_ids"].shape[1]
    tokens, _ = new_tokens(shared_model, inputs_of(prompts), logits_processor=noisy(length), **cache)
    expected = [
        new_tokens(
            shared_model,
            single_inputs(sample),
            use_cache=False,
            logits_processor=noisy(len(sample["input_ids"])),
        )[0][0]
        for sample in split_rows(prompts)
    ]
    assert tokens == expected
    assert all(row != greedy for row, greedy in zip(tokens, expected_greedy(shared_model, prompts), strict=True))


@pytest.mark.parametrize("cache", [{}, CACHES["static"]], ids=["dynamic", "static"])
def test_several_sampled_sequences_equal_those_without_cache(shared_model, prompts, cache):
    results = []
    for choice in (cache, CACHES["no_cache"]):
        torch.manual_seed(2)
        settings = dict(do_sample=True, num_return_sequences=3, output_logits=True)
        results.append(new_tokens(shared_model, inputs_of(prompts), **settings, **choice))
    (tokens, output), (expected, _) = results
    assert tokens == expected
    assert len({tuple(row) for row in tokens}) > len(prompts["images"])  # the copies of a prompt do differ
    logits = torch.stack(output.logits, dim=1)
    for row, sample in enumerate(split_rows(prompts)):  # every copy has the images and thoughts of its prompt
        for copy in range(3 * row, 3 * row + 3):
            _, expected = plain_run(shared_model, sample, tokens[copy][:-1])
            torch.testing.assert_close(logits[copy], expected[-NUM_NEW:], atol=1e-11, rtol=0)


def test_sampled_beams_equal_those_without_cache(shared_model, prompts):
    results = []
    for choice in ({}, CACHES["no_cache"]):
        torch.manual_seed(4)
        settings = dict(do_sample=True, num_beams=3, num_return_sequences=2)
        results.append(new_tokens(shared_model, inputs_of(prompts), **settings, **choice)[0])
    assert results[0] == results[1]


# Other ways in and out


@pytest.mark.parametrize("settings", [{}, dict(num_beams=3, num_return_sequences=2)], ids=["greedy", "beams"])
@all_caches
def test_embeddings_with_a_latent_mask_give_the_same_tokens(shared_model, prompts, cache, settings):
    inputs = {
        "inputs_embeds": shared_model.fuse(prompts["input_ids"], prompts["pixel_values"]),
        "latent_mask": prompts["input_ids"] == shared_model.config.latent_token_id,
        "attention_mask": prompts["attention_mask"],
    }
    tokens, _ = new_tokens(shared_model, inputs, **settings, **cache)
    assert tokens == one_by_one(shared_model, prompts, **settings)


def test_embeddings_without_a_latent_mask_are_used_as_they_are(shared_model, prompts):
    """Thoughts that the caller has placed already must not be replaced."""
    for sample, expected in zip(split_rows(prompts), expected_greedy(shared_model, prompts), strict=True):
        embeds, _ = reference_embeds(shared_model, sample["input_ids"], sample["pixel_values"])
        assert new_tokens(shared_model, {"inputs_embeds": embeds[None]})[0] == [expected]


def test_a_latent_mask_says_where_thoughts_are_fed(shared_model, prompts):
    """A latent token outside the mask is an ordinary token."""
    sample = split_rows(prompts)[2]
    tokens, _ = new_tokens(
        shared_model, single_inputs(sample), latent_mask=torch.zeros(1, len(sample["input_ids"]), dtype=torch.bool)
    )
    plain = shared_model.fuse(sample["input_ids"][None], sample["pixel_values"])
    expected, _ = new_tokens(shared_model, {"inputs_embeds": plain})
    assert tokens == expected
    assert tokens != new_tokens(shared_model, single_inputs(sample))[0]


def test_a_streamer_sees_the_same_tokens(shared_model, prompts):
    sample = split_rows(prompts)[2]
    streamer = Collector()
    tokens, _ = new_tokens(shared_model, single_inputs(sample), streamer=streamer)
    assert streamer.pieces == sample["input_ids"].tolist() + tokens[0]
    assert streamer.ended
    assert tokens[0] == expected_greedy(shared_model, prompts)[2]


@all_caches
def test_min_new_tokens_holds_the_end_back(shared_model, prompts, cache):
    eos = [row[0] for row in expected_greedy(shared_model, prompts)]
    assert all(len(row) == 1 for row in expected_greedy(shared_model, prompts, eos=eos))
    settings = dict(eos_token_id=eos, pad_token_id=620, min_new_tokens=4)
    tokens, _ = new_tokens(shared_model, inputs_of(prompts), **settings, **cache)
    expected = one_by_one(shared_model, prompts, **settings)
    length = max(map(len, expected))
    assert length >= 4
    assert tokens == [row + [620] * (length - len(row)) for row in expected]
    assert not any(token in eos for row in tokens for token in row[:4])


@all_caches
def test_repetition_penalty_equals_one_by_one(shared_model, prompts, cache):
    settings = dict(repetition_penalty=3.0, max_new_tokens=12)
    tokens, _ = new_tokens(shared_model, inputs_of(prompts), **settings, **cache)
    assert tokens == one_by_one(shared_model, prompts, **settings)
    assert tokens != expected_greedy(shared_model, prompts, 12)  # the penalty does change them


def test_hidden_states_and_attentions_of_the_prompt_are_whole(model, prompts):
    """Several passes are joined to what one plain forward returns."""
    model.set_attn_implementation("eager")
    num_layers = model.config.text_config.num_hidden_layers
    tokens, output = new_tokens(model, inputs_of(prompts), output_hidden_states=True, output_attentions=True)
    batch_size, length = prompts["input_ids"].shape
    num_heads = model.config.text_config.num_attention_heads
    assert len(output.hidden_states) == len(output.attentions) == NUM_NEW
    assert [state.shape for state in output.hidden_states[0]] == [(batch_size, length, 64)] * (num_layers + 1)
    assert [part.shape for part in output.attentions[0]] == [(batch_size, num_heads, length, length)] * num_layers
    for row, sample in enumerate(split_rows(prompts)):
        plain, _ = plain_run(model, sample, [], output_hidden_states=True, output_attentions=True)
        real = prompts["attention_mask"][row].bool()
        for states, expected in zip(output.hidden_states[0], plain.hidden_states, strict=True):
            torch.testing.assert_close(states[row, real], expected[0], atol=1e-11, rtol=0)
        for weights, expected in zip(output.attentions[0], plain.attentions, strict=True):
            weights = weights[row][:, real]
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]).double(), atol=1e-12, rtol=0)
            torch.testing.assert_close(weights[..., real], expected[0], atol=1e-11, rtol=0)


def test_assisted_generation_gives_the_same_tokens(shared_model, prompts):
    for sample, expected in zip(split_rows(prompts), expected_greedy(shared_model, prompts), strict=True):
        assert new_tokens(shared_model, single_inputs(sample), assistant_model=shared_model)[0] == [expected]


def test_prompt_lookup_gives_the_same_tokens(shared_model, prompts):
    for sample, expected in zip(split_rows(prompts), expected_greedy(shared_model, prompts), strict=True):
        assert new_tokens(shared_model, single_inputs(sample), prompt_lookup_num_tokens=3)[0] == [expected]


def test_prompt_lookup_may_propose_an_image(shared_model, prompts):
    """A new token that also stands before an image makes the image's tokens the candidates; none is accepted."""
    sample = split_rows(prompts)[2]
    ids = sample["input_ids"].tolist()
    before_image = ids[ids.index(623) - 1]
    force = LogitsProcessorList([Force(before_image, len(ids) + 1)])
    settings = dict(logits_processor=force, suppress_tokens=None)
    expected, _ = new_tokens(shared_model, single_inputs(sample), **settings)
    assert expected[0][1] == before_image
    tokens, _ = new_tokens(shared_model, single_inputs(sample), prompt_lookup_num_tokens=3, **settings)
    assert tokens == expected


# Thoughts


@pytest.mark.parametrize("padding", ["left", "right", "aligned"])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=2), *CACHES.values()],
    ids=["greedy", "beams", "sampling", *CACHES.keys()],
)
def test_thoughts_of_generate_equal_those_of_forward(shared_model, make_prompts, padding, settings):
    batch = make_prompts(padding=padding, **PROMPTS)
    expected = shared_model(**inputs_of(batch), return_thoughts=True).thoughts
    _, output = new_tokens(shared_model, inputs_of(batch), return_thoughts=True, **settings)
    assert output.thoughts.shape == (3, 3, 64)
    torch.testing.assert_close(output.thoughts, expected, atol=1e-11, rtol=0)
    for row, sample in enumerate(split_rows(batch)):
        _, thoughts = reference_embeds(shared_model, sample["input_ids"], sample["pixel_values"])
        assert len(thoughts) == PROMPTS["num_thoughts"][row]
        assert not output.thoughts[row, len(thoughts) :].any()
        for number, thought in enumerate(thoughts):
            torch.testing.assert_close(output.thoughts[row, number], thought, atol=1e-11, rtol=0)


def test_asking_for_thoughts_changes_no_token(shared_model, prompts):
    inputs = inputs_of(prompts)
    output = shared_model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False, return_thoughts=True)
    assert output.sequences[:, inputs["input_ids"].shape[1] :].tolist() == expected_greedy(shared_model, prompts)


@all_caches
def test_a_latent_token_that_the_model_emits_is_an_ordinary_token(shared_model, prompts, cache):
    latent = shared_model.config.latent_token_id
    force = LogitsProcessorList([Force(latent, prompts["input_ids"].shape[1] + 1)])
    tokens, output = new_tokens(
        shared_model, inputs_of(prompts), suppress_tokens=None, logits_processor=force, output_logits=True, **cache
    )
    logits = torch.stack(output.logits, dim=1)
    for row, sample in enumerate(split_rows(prompts)):
        assert tokens[row][1] == latent
        _, expected = plain_run(shared_model, sample, tokens[row][:-1])  # looks every new token up
        torch.testing.assert_close(logits[row], expected[-NUM_NEW:], atol=1e-11, rtol=0)


@pytest.mark.parametrize("settings", [{}, dict(num_beams=3), dict(do_sample=True)], ids=["greedy", "beams", "sample"])
def test_reserved_tokens_never_come_out(model, processor, prompts, settings):
    reserved = processor.tokenizer.convert_tokens_to_ids(
        ["<img>", "</img>", "<IMG_CONTEXT>", "<|start-latent|>", "<|latent|>", "<|end-latent|>"]
    )
    model.lm_head.weight[reserved] += model.lm_head.weight.norm(dim=1).max() * 20 * torch.randn(6, 64).double()
    loud, _ = new_tokens(model, inputs_of(prompts), suppress_tokens=None, **settings)
    assert {token for row in loud for token in row} & set(reserved)  # they would come out
    tokens, _ = new_tokens(model, inputs_of(prompts), max_new_tokens=20, **settings)
    assert not {token for row in tokens for token in row} & set(reserved)


# Several turns


@pytest.fixture(params=[0, 2], ids=["plain_turn", "turn_with_thoughts"])
def next_turn(request, shared_model):
    config = shared_model.config
    block = [config.start_latent_id, *[config.latent_token_id] * request.param, config.end_latent_id]
    return torch.tensor([[17, 91, 254, *block]])


def test_a_cache_from_generate_continues_a_conversation(shared_model, prompts, next_turn):
    inputs = inputs_of(prompts)
    _, first = new_tokens(shared_model, inputs)
    ids = torch.cat([first.sequences, next_turn.expand(3, -1)], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]), value=1)
    inputs = {**inputs, "input_ids": ids, "attention_mask": mask}
    tokens, _ = new_tokens(shared_model, inputs, past_key_values=first.past_key_values)
    batch = {**prompts, "input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, -100)}
    assert tokens == expected_greedy(shared_model, batch)


def test_a_cache_from_forward_continues_a_conversation(shared_model, prompts, next_turn):
    inputs = inputs_of(prompts)
    past = shared_model(**inputs, use_cache=True).past_key_values
    ids = torch.cat([inputs["input_ids"], next_turn.expand(3, -1)], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, next_turn.shape[1]), value=1)
    batch = {**prompts, "input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, -100)}
    continued = shared_model(
        input_ids=ids[:, -next_turn.shape[1] :], attention_mask=mask, past_key_values=past, use_cache=True
    ).logits
    for row, sample in enumerate(split_rows(batch)):
        _, expected = plain_run(shared_model, sample, [])
        torch.testing.assert_close(continued[row], expected[-next_turn.shape[1] :], atol=1e-11, rtol=0)


def test_only_the_new_part_of_a_conversation_need_be_passed(shared_model, prompts, next_turn):
    inputs = inputs_of(prompts)
    past = shared_model(**inputs, use_cache=True).past_key_values
    ids = torch.cat([inputs["input_ids"], next_turn.expand(3, -1)], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, next_turn.shape[1]), value=1)
    batch = {**prompts, "input_ids": ids, "attention_mask": mask, "labels": torch.full_like(ids, -100)}
    tokens, _ = new_tokens(
        shared_model,
        {"input_ids": ids[:, -next_turn.shape[1] :], "attention_mask": mask},
        past_key_values=past,
    )
    assert tokens == expected_greedy(shared_model, batch)


def test_a_later_turn_may_bring_an_image(shared_model, make_prompts):
    """The features in the second turn must be those of its own image, not of the first one."""
    first, both = (make_prompts((0,), images) for images in (((1,),), ((1, 1),)))
    image_end = first["input_ids"].tolist()[0].index(624) + 1
    assert torch.equal(first["input_ids"][:, :image_end], both["input_ids"][:, :image_end])
    inputs = inputs_of(both)
    past = shared_model(
        input_ids=inputs["input_ids"][:, :image_end], pixel_values=inputs["pixel_values"][:1], use_cache=True
    ).past_key_values
    tokens, _ = new_tokens(shared_model, inputs, past_key_values=past)
    assert tokens == expected_greedy(shared_model, both)


# Errors, all before anything is computed


@pytest.fixture
def untouched(model):
    """Fails if a module of the model runs."""
    calls = []
    modules = (model.model.language_model, model.model.vision_tower, model.get_input_embeddings())
    handles = [module.register_forward_pre_hook(lambda module, args: calls.append(module)) for module in modules]
    yield
    for handle in handles:
        handle.remove()
    assert not calls


@pytest.mark.usefixtures("untouched")
class TestErrorsBeforeCompute:
    def test_tiles_that_do_not_match_a_sample_although_the_totals_agree(self, model, make_prompts):
        inputs = inputs_of(make_prompts((1, 1), ((2,), (1,))))
        inputs["num_patches_list"] = [1, 2]
        with pytest.raises(ValueError, match=r"Sample 0: .*8 <IMG_CONTEXT>.*12 visual features"):
            new_tokens(model, inputs)

    def test_fewer_tiles_than_tokens(self, model, make_prompts):
        inputs = inputs_of(make_prompts((1, 1), ((2,), (1,))))
        inputs["pixel_values"] = inputs["pixel_values"][:2]
        with pytest.raises(ValueError, match="`num_patches_list`.*3 tiles.*has 2"):
            new_tokens(model, inputs)

    def test_wrong_total_without_num_patches_list(self, model, make_prompts):
        inputs = inputs_of(make_prompts((1, 1), ((2,), (1,))))
        del inputs["num_patches_list"]
        inputs["pixel_values"] = inputs["pixel_values"][:2]
        with pytest.raises(ValueError, match=r"\[8, 4\] <IMG_CONTEXT>.*2 tiles"):
            new_tokens(model, inputs)

    def test_a_cut_image(self, model, make_prompts):
        inputs = inputs_of(make_prompts((1,), ((2,),)))
        image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0]
        inputs["input_ids"][0, image] = 7
        del inputs["num_patches_list"]
        with pytest.raises(ValueError, match="Sample 0: .*7 <IMG_CONTEXT>"):
            new_tokens(model, inputs)

    def test_images_without_pixels(self, model, make_prompts):
        inputs = inputs_of(make_prompts((1,), ((2,),)))
        with pytest.raises(ValueError, match="<IMG_CONTEXT>"):
            new_tokens(model, {"input_ids": inputs["input_ids"]})

    def test_a_latent_in_the_padding(self, model, prompts):
        inputs = inputs_of(prompts)
        row = int((inputs["attention_mask"] == 0).sum(dim=1).argmax())
        inputs["input_ids"][row, 0] = model.config.latent_token_id
        with pytest.raises(ValueError, match=f"Sample {row}: .*position 0 .*padding"):
            new_tokens(model, inputs)

    @pytest.mark.parametrize("padded", [True, False], ids=["after_padding", "at_position_0"])
    def test_a_latent_as_the_first_token(self, model, prompts, padded):
        inputs = inputs_of(prompts)
        real = inputs["attention_mask"].bool()
        row = int((real.sum(dim=1) < real.shape[1]).nonzero()[0]) if padded else int(real.sum(dim=1).argmax())
        position = int(real[row].int().argmax())
        assert (position > 0) == padded
        inputs["input_ids"][row, position] = model.config.latent_token_id
        with pytest.raises(ValueError, match=f"Sample {row}: .*position {position} .*first token"):
            new_tokens(model, inputs)

    def test_a_latent_before_an_image(self, model, make_prompts):
        inputs = inputs_of(make_prompts((1,), ((1,),)))
        inputs["input_ids"][0, 1] = model.config.latent_token_id
        with pytest.raises(ValueError, match="Sample 0: .*position 1 .*before or inside an image"):
            new_tokens(model, inputs)

    @pytest.mark.parametrize("where", ["argument", "config", "model"])
    def test_prefill_in_chunks_with_thoughts(self, model, prompts, where):
        inputs = inputs_of(prompts)
        if where == "argument":
            call = lambda: new_tokens(model, inputs, prefill_chunk_size=4)  # noqa: E731
        elif where == "config":
            config = GenerationConfig(max_new_tokens=2, prefill_chunk_size=4)
            call = lambda: model.generate(**inputs, generation_config=config)  # noqa: E731
        else:
            model.generation_config.prefill_chunk_size = 4
            call = lambda: new_tokens(model, inputs)  # noqa: E731
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            call()


def test_a_budget_above_the_trained_one_warns_once_and_generates(model, make_prompts, caplog):
    model.config.num_thoughts = 2
    logger = logging.get_logger("transformers.multicoco.modeling_multicoco")
    logger.warning_once.cache_clear()
    batch = make_prompts((2, 5), ((1,), ()))
    for prompts, warnings in ((make_prompts((2, 0), ((1,), ())), 0), (batch, 1), (batch, 1)):
        with caplog.at_level("WARNING"):
            tokens, _ = new_tokens(model, inputs_of(prompts))
        assert tokens == expected_greedy(model, prompts)
        assert len([record for record in caplog.records if "`num_thoughts` is 5" in record.getMessage()]) == warnings
