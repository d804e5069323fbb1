"""The original Coconut program, text only: our passes give its loss, logits, embeddings, gradients and tokens.

What is recorded, and how precise it is, stands in `golden/coconut/README.md`.
"""

import json

import pytest
import torch
from conftest import GOLDEN
from reference import loss_and_grads, training, widened
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration


COCONUT = GOLDEN / "coconut"
FORWARD = json.loads((COCONUT / "forward_cases.json").read_text(encoding="utf-8"))
TENSORS = load_file(COCONUT / "forward_cases.safetensors")
GENERATE = json.loads((COCONUT / "generate_cases.json").read_text(encoding="utf-8"))["cases"]
EOS, LATENT = 2, 159


forward_case = pytest.mark.parametrize("case", FORWARD["cases"])
generate_case = pytest.mark.parametrize("case", GENERATE, ids=[case["name"] for case in GENERATE])
attention = pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])


@pytest.fixture(scope="module")
def model():
    """The original's language model beside a vision tower that these cases never call."""
    config = MultiCoCoConfig(
        text_config=json.loads((COCONUT / "model" / "config.json").read_text(encoding="utf-8")),
        vision_config=dict(
            image_size=[8, 8],
            patch_size=[4, 4],
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        image_seq_length=1,
        image_token_id=0,  # in no case
        start_latent_id=157,
        latent_token_id=LATENT,
        end_latent_id=158,
        tie_word_embeddings=False,
    )
    # Not `.to(float64)`: it would cast the rotary frequencies too, which the original keeps in float32.
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64).eval()
    assert isinstance(model, MultiCoCoForConditionalGeneration)
    weights = load_file(COCONUT / "model" / "model.safetensors")
    missing, unexpected = model.load_state_dict(
        {native_name(name): weight for name, weight in weights.items()}, strict=False
    )
    assert not unexpected
    assert all(name.startswith(("model.vision_tower.", "model.multi_modal_projector.")) for name in missing)
    model.generation_config.eos_token_id = None  # a test that stops at the end token says so
    model.generation_config.pad_token_id = EOS
    return model


@pytest.fixture
def attend(model):
    """Sets the attention of the shared model, and sets it back."""
    before = model.config._attn_implementation
    yield model.set_attn_implementation
    model.set_attn_implementation(before)


def native_name(name):
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def tensors(case):
    return {name.removeprefix(f"{case}."): value for name, value in TENSORS.items() if name.startswith(f"{case}.")}


def inputs(golden, with_positions=True):
    names = ["input_ids", "attention_mask", "labels", *(["position_ids"] if with_positions else [])]
    return {name: golden[name] for name in names}


def singles(case):
    """The samples of a case as they were before collation, each a batch of one without padding."""
    for features in FORWARD["cases"][case]["features"]:
        yield {name: torch.tensor([features[name]]) for name in ("input_ids", "attention_mask", "labels")}


def golden_grads(golden):
    return {native_name(name): golden[f"grad.{short}"] for short, name in FORWARD["grad_names"].items()}


def close(actual, expected, atol=1e-11):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def assert_forward_equals(output, golden, atol_logits=1e-11, atol_embeds=1e-11, atol_loss=1e-11):
    """Logits of padding are not compared: they are whatever attention makes of a row that is masked as a whole."""
    real = golden["attention_mask"].bool()
    close(output.loss.to(golden["loss"]), golden["loss"].squeeze(), atol_loss)  # float32 unless widened
    close(output.logits[real], golden["logits"][real], atol_logits)
    latent = golden["input_ids"] == LATENT
    assert (output.thoughts is None) == (not latent.any())
    for row in latent.any(dim=1).nonzero().flatten().tolist():
        fed = golden["inputs_embeds"][row, latent[row]]
        close(output.thoughts[row, : len(fed)], fed, atol_embeds)
        assert not output.thoughts[row, len(fed) :].any()


@forward_case
@attention
@pytest.mark.parametrize("with_positions", [True, False], ids=["positions_given", "positions_counted"])
def test_loss_logits_and_fed_embeddings_equal_the_original(model, attend, case, attn_implementation, with_positions):
    """Also eager with left padding, which is NaN in float64 as shipped: its softmax is widened here."""
    attend(attn_implementation)
    golden = tensors(case)
    with torch.no_grad(), widened():
        assert_forward_equals(model(**inputs(golden, with_positions), return_thoughts=True), golden)


@forward_case
@attention
@pytest.mark.parametrize("mode", ["eval", "training", "checkpointing"])
def test_gradients_equal_the_original(model, attend, case, attn_implementation, mode):
    attend(attn_implementation)
    golden = tensors(case)
    if mode == "eval":
        loss, grads = loss_and_grads(model, lambda: model(**inputs(golden)).loss)
    else:
        with training(model, checkpointing=mode == "checkpointing"):
            loss, grads = loss_and_grads(model, lambda: model(**inputs(golden)).loss)
    close(loss, golden["loss"].squeeze())
    for name, expected in golden_grads(golden).items():
        close(grads[name], expected)
    assert not grads["model.language_model.embed_tokens.weight"][LATENT].any()  # a thought stands in its place
    assert not any("vision_tower" in name or "projector" in name for name in grads)


@pytest.mark.parametrize("case", [name for name, case in FORWARD["cases"].items() if any(case["n_latents"])])
def test_a_detached_thought_would_be_seen_in_the_gradients(model, case):
    golden = tensors(case)
    _, grads = loss_and_grads(
        model, lambda: model(**inputs(golden), edit_thoughts=lambda thought, index: thought.detach()).loss
    )
    expected = golden_grads(golden)
    close(grads["lm_head.weight"], expected.pop("lm_head.weight"))
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() > 0.05 * grad.norm(), name


@forward_case
def test_without_widened_casts_the_difference_is_rounding(model, attend, case):
    """The tolerances that the README gives for sdpa in float64 as transformers ships it."""
    attend("sdpa")
    golden = tensors(case)
    with torch.no_grad():
        output = model(**inputs(golden), return_thoughts=True)
    assert_forward_equals(output, golden, atol_logits=5e-5, atol_embeds=3e-5, atol_loss=2e-6)
    model.zero_grad()
    model(**inputs(golden)).loss.backward()
    for name, expected in golden_grads(golden).items():
        close(model.get_parameter(name).grad, expected, atol=1e-4)
    model.zero_grad()


@forward_case
def test_a_batch_takes_as_many_passes_as_in_the_original(model, case):
    calls = []
    handle = model.model.language_model.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        model(**inputs(tensors(case)))
    handle.remove()
    assert len(calls) == FORWARD["cases"][case]["forward_passes"]


@forward_case
def test_single_samples_equal_the_original_and_make_up_the_batch(model, case):
    """Alone, each sample has the original's loss; weighted by their labels, all have that of the batch."""
    facts = FORWARD["cases"][case]
    total = sum(facts["label_tokens_per_sample"])
    with torch.no_grad(), widened():
        losses = [model(**sample).loss for sample in singles(case)]
        shares = [model(**sample, num_items_in_batch=total).loss for sample in singles(case)]
        batch = model(**inputs(tensors(case))).loss
    close(torch.stack(losses), torch.tensor(facts["single_sample_loss"], dtype=torch.float64))
    weights = torch.tensor(facts["single_sample_label_tokens"], dtype=torch.float64) / total
    close((torch.stack(losses) * weights).sum(), batch)
    close(torch.stack(shares).sum(), batch)


def stopped_as_original(tokens):
    """The original's end: the first new token is never tested, and the end token is not appended."""
    for index, token in enumerate(tokens[1:], start=1):
        if token == EOS:
            return tokens[:index]
    return tokens


def new_tokens(model, case, **kwargs):
    prompt = torch.tensor([case["prompt_ids"]])
    output = model.generate(prompt, max_new_tokens=case["max_new_tokens"], do_sample=False, **kwargs)
    assert output[0, : prompt.shape[1]].tolist() == case["prompt_ids"]
    return output[0, prompt.shape[1] :].tolist()


@generate_case
@attention
def test_greedy_tokens_equal_the_original(model, attend, case, attn_implementation):
    """
    Without an end token of its own, `generate` runs to `max_new_tokens`; the original's way to end is then applied to
    the ids. So a token that the original emits after an untested end token, or a latent token that it emits as an
    ordinary one, is compared too.
    """
    attend(attn_implementation)
    tokens = new_tokens(model, case)
    assert len(tokens) == case["max_new_tokens"]
    assert stopped_as_original(tokens) == case["new_tokens"]


@generate_case
def test_with_an_end_token_generation_stops_where_the_original_does(model, case):
    """transformers tests every token and appends the end token; the original tests all but the first and does not."""
    tokens = new_tokens(model, case, eos_token_id=EOS)
    expected = case["new_tokens"] + ([EOS] if case["stopped_at_eos"] else [])
    if EOS in expected:
        expected = expected[: expected.index(EOS) + 1]  # differs only where the first token is the end token
    assert tokens == expected


def test_one_batch_of_all_prompts_gives_the_original_tokens(model):
    """The original decodes one prompt at a time; here other prompts and left padding change nothing."""
    width = max(len(case["prompt_ids"]) for case in GENERATE)
    masks = [[0] * (width - len(case["prompt_ids"])) + [1] * len(case["prompt_ids"]) for case in GENERATE]
    ids = [[EOS] * (width - len(case["prompt_ids"])) + case["prompt_ids"] for case in GENERATE]
    output = model.generate(torch.tensor(ids), attention_mask=torch.tensor(masks), max_new_tokens=12, do_sample=False)
    for case, tokens in zip(GENERATE, output[:, width:].tolist(), strict=True):
        assert stopped_as_original(tokens[: case["max_new_tokens"]]) == case["new_tokens"]


@pytest.mark.parametrize("case", [c for c in GENERATE if c["thought_vectors"]], ids=lambda case: case["name"])
def test_thoughts_of_generation_equal_the_original(model, case):
    with widened():
        output = model.generate(torch.tensor([case["prompt_ids"]]), max_new_tokens=1, return_thoughts=True)
    close(output["thoughts"], torch.tensor([case["thought_vectors"]], dtype=torch.float64))


@generate_case
def test_generation_returns_as_many_thoughts_as_the_prompt_has_latents(model, case):
    """Also where the model emits latent tokens: these are ordinary tokens."""
    output = model.generate(torch.tensor([case["prompt_ids"]]), max_new_tokens=12, return_thoughts=True)
    shape = (1, case["n_latents"], model.config.text_config.hidden_size)
    assert output["thoughts"] is None if case["n_latents"] == 0 else output["thoughts"].shape == shape
