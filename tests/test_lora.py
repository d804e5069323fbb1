"""Thoughts through LoRA adapters on the language model: training, merging, generation, saving, in float64."""

import copy

import pytest
import torch
from conftest import CHECKPOINT, model_inputs
from reference import (
    assert_same_grads,
    loss_and_grads,
    reference_generate,
    reference_logits,
    reference_loss,
    split_rows,
    training,
    widened,
)
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from multicoco import MultiCoCoForConditionalGeneration, add_thought_tokens, export_internvl


peft = pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")

PROJECTIONS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def add_lora(model, **settings):
    """The model with random adapters on all projections of the language model: fresh ones would change nothing."""
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=PROJECTIONS, **settings)
    peft_model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    for name, param in peft_model.named_parameters():
        if "lora_" in name:
            param.data = 0.2 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
    return peft_model.eval()


@pytest.fixture
def lora_model(model):
    return add_lora(model)


@pytest.fixture(scope="module")
def batch(make_batch):
    return make_batch(num_thoughts=(3, 0, 2), images=((1,), (), (2, 1)), padding="left")


@pytest.fixture(scope="module")
def prompts(make_batch):
    return make_batch(num_thoughts=(3, 1), images=((1,), ()), padding="left", answer_lengths=(0, 0))


def logits_of(model, batch):
    inputs = {name: value for name, value in model_inputs(batch).items() if name != "labels"}
    with torch.no_grad(), widened():
        logits = model(**inputs).logits
    return logits[batch["attention_mask"].bool()]


def native_logits_of(model, batch):
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad(), widened():
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=positions,
            pixel_values=batch["pixel_values"],
        ).logits
    return logits[batch["attention_mask"].bool()]


def generate_from(model, prompts, **settings):
    inputs = {name: value for name, value in model_inputs(prompts).items() if name != "labels"}
    with widened():
        tokens = model.generate(**inputs, max_new_tokens=6, **settings)
    return tokens[:, prompts["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("padding", ["aligned", "left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("num_sweeps", [None, 2], ids=["passes", "sweeps"])
def test_loss_and_adapter_gradients_match_full_recompute(lora_model, make_batch, padding, checkpointing, num_sweeps):
    batch = make_batch(num_thoughts=(3, 0, 2), images=((1,), (), (2, 1)), padding=padding)
    base = lora_model.base_model.model
    expected_loss, expected = loss_and_grads(lora_model, lambda: reference_loss(base, batch))
    base.config.thought_sweeps = num_sweeps  # two make all three thoughts exact
    with training(lora_model), training(base, checkpointing):
        loss, grads = loss_and_grads(lora_model, lambda: lora_model(**model_inputs(batch)).loss)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    assert_same_grads(grads, expected)
    assert {name for name, grad in grads.items() if grad.any()} == {
        name for name, _ in lora_model.named_parameters() if "lora_" in name
    }


def test_base_weights_get_no_gradient_and_do_not_move(shared_model, lora_model, batch):
    optimizer = torch.optim.SGD(lora_model.parameters(), lr=0.1)
    before = {name: param.detach().clone() for name, param in lora_model.named_parameters()}
    with training(lora_model):
        lora_model(**model_inputs(batch)).loss.backward()
        optimizer.step()
    for name, param in lora_model.named_parameters():
        if "lora_" in name:
            assert not torch.equal(param, before[name]), name
        else:
            assert param.grad is None, name
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in lora_model.state_dict().items()
        if "lora_" not in name
    }
    assert base.keys() == shared_model.state_dict().keys()
    for name, value in shared_model.state_dict().items():
        assert torch.equal(base[name], value), name


def test_adapters_change_every_thought(shared_model, lora_model, batch):
    with torch.no_grad(), widened():
        _, thoughts = reference_logits(shared_model, *_first_row(batch))
        _, adapted = reference_logits(lora_model.base_model.model, *_first_row(batch))
        output = lora_model(**model_inputs(batch), return_thoughts=True)
    for index, (thought, other) in enumerate(zip(adapted, thoughts, strict=True)):
        torch.testing.assert_close(output.thoughts[0, index], thought, atol=1e-11, rtol=0)
        assert (thought - other).norm() > 0.1 * other.norm()


def _first_row(batch):
    row = split_rows(batch)[0]
    return row["input_ids"], row["pixel_values"]


def test_merged_model_has_the_same_logits(lora_model, batch):
    expected = logits_of(lora_model, batch)
    merged = lora_model.merge_and_unload()
    assert isinstance(merged, MultiCoCoForConditionalGeneration)
    torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-10, rtol=0)


def test_generation_equals_plain_definition_and_merged_model(lora_model, prompts):
    base = lora_model.base_model.model
    tokens = generate_from(lora_model, prompts)
    beams = generate_from(lora_model, prompts, num_beams=3)
    with torch.no_grad(), widened():
        wanted = [
            reference_generate(
                base,
                row["input_ids"],
                row["pixel_values"],
                6,
                suppress=base.generation_config.suppress_tokens,
            )
            for row in split_rows(prompts)
        ]
    assert tokens == wanted
    merged = lora_model.merge_and_unload()
    assert generate_from(merged, prompts) == wanted
    assert generate_from(merged, prompts, num_beams=3) == beams


def test_saved_adapter_loads_with_the_same_logits(shared_model, lora_model, batch, tmp_path):
    expected = logits_of(lora_model, batch)
    lora_model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in files
    assert not files & {"model.safetensors", "pytorch_model.bin"}
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(shared_model), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits_of(loaded.eval(), batch), expected)


def test_merged_model_is_saved_and_loaded_as_an_ordinary_checkpoint(lora_model, batch, tmp_path):
    merged = lora_model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded, info = MultiCoCoForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(merged, batch), atol=1e-12, rtol=0)


@pytest.mark.parametrize("wrapped", [False, True], ids=["model_inside", "peft_model"])
def test_export_refuses_unmerged_adapters(lora_model, wrapped, tmp_path):
    with pytest.raises(ValueError, match="merge_and_unload"):
        export_internvl(lora_model if wrapped else lora_model.base_model.model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_export_of_a_merged_model_has_its_logits(lora_model, make_batch, tmp_path):
    batch = make_batch(num_thoughts=(0, 0), images=((1,), (2,)))
    expected = logits_of(lora_model, batch)
    export_internvl(lora_model.merge_and_unload(), tmp_path)
    native = InternVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(native_logits_of(native, batch), expected, atol=1e-10, rtol=0)


class TestTrainableEmbeddings:
    """With `modules_to_save`, the rows of the thought tokens can be learned beside the adapters."""

    @pytest.fixture
    def lora_model(self, model):
        return add_lora(model, modules_to_save=["embed_tokens", "lm_head"])

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
    def test_gradients_match_full_recompute(self, lora_model, batch, checkpointing):
        base = lora_model.base_model.model
        expected_loss, expected = loss_and_grads(lora_model, lambda: reference_loss(base, batch))
        with training(lora_model), training(base, checkpointing):
            loss, grads = loss_and_grads(lora_model, lambda: lora_model(**model_inputs(batch)).loss)
        torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
        assert_same_grads(grads, expected)
        embeddings = next(grad for name, grad in grads.items() if "embed_tokens.modules_to_save" in name)
        assert embeddings[base.config.start_latent_id].any()  # it begins the first thought
        assert not embeddings[base.config.latent_token_id].any()  # a thought takes its place

    def test_saved_rows_load_and_merge_with_the_same_logits(self, shared_model, lora_model, batch, tmp_path):
        optimizer = torch.optim.SGD(lora_model.parameters(), lr=0.05)
        with training(lora_model):
            lora_model(**model_inputs(batch)).loss.backward()
            optimizer.step()
        expected = logits_of(lora_model, batch)
        assert (logits_of(shared_model, batch) - expected).abs().max() > 0.1
        lora_model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(shared_model), tmp_path, autocast_adapter_dtype=False)
        assert torch.equal(logits_of(loaded.eval(), batch), expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-10, rtol=0)
        row = merged.config.start_latent_id
        assert not torch.equal(
            merged.get_input_embeddings().weight[row], shared_model.get_input_embeddings().weight[row]
        )


class TestTrainableRows:
    """With `trainable_token_indices`, only the rows of the thought tokens are learned, as `train.py` does."""

    @pytest.fixture(params=["untied", "tied"])
    def base(self, model, request):
        if request.param == "tied":
            model.lm_head.weight = model.get_input_embeddings().weight
            model.config.tie_word_embeddings = True
        return model

    @pytest.fixture
    def lora_model(self, base):
        ids = [base.config.start_latent_id, base.config.latent_token_id, base.config.end_latent_id]
        return add_lora(base, trainable_token_indices={"language_model.embed_tokens": ids})

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
    def test_gradients_match_full_recompute(self, lora_model, batch, checkpointing):
        base = lora_model.base_model.model
        expected_loss, expected = loss_and_grads(lora_model, lambda: reference_loss(base, batch))
        with training(lora_model), training(base, checkpointing):
            loss, grads = loss_and_grads(lora_model, lambda: lora_model(**model_inputs(batch)).loss)
        torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
        assert_same_grads(grads, expected)
        (rows,) = (grad for name, grad in grads.items() if "lora_" not in name and grad.any())
        assert rows.shape == (3, base.config.text_config.hidden_size)
        assert rows[0].any()  # it begins the first thought
        assert rows[2].any()  # it ends the last one

    def test_they_are_saved_loaded_merged_and_exported_with_the_same_logits(
        self, base, lora_model, make_batch, batch, tmp_path
    ):
        optimizer = torch.optim.SGD(lora_model.parameters(), lr=0.05)
        before = base.state_dict()["model.language_model.embed_tokens.token_adapter.base_layer.weight"].clone()
        with training(lora_model):
            lora_model(**model_inputs(batch)).loss.backward()
            optimizer.step()
        expected = logits_of(lora_model, batch)
        lora_model.save_pretrained(tmp_path / "adapters")
        saved = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
        width = base.config.text_config.hidden_size
        assert [value.shape for name, value in saved.items() if "lora_" not in name] == [(3, width)]
        fresh = copy.deepcopy(lora_model).unload()
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapters", autocast_adapter_dtype=False)
        assert torch.equal(logits_of(loaded.eval(), batch), expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(logits_of(merged, batch), expected, atol=1e-10, rtol=0)
        ids = [merged.config.start_latent_id, merged.config.latent_token_id, merged.config.end_latent_id]
        changed = (merged.get_input_embeddings().weight != before).any(dim=1).nonzero()[:, 0].tolist()
        is_tied = base.config.tie_word_embeddings
        assert changed == (ids if is_tied else [ids[0], ids[2]])  # a thought takes the place of the other
        assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == is_tied
        plain = make_batch(num_thoughts=(0, 0), images=((1,), (2,)))
        expected = logits_of(merged, plain)
        export_internvl(merged, tmp_path / "plain")
        native = InternVLForConditionalGeneration.from_pretrained(tmp_path / "plain", dtype=torch.float64)
        torch.testing.assert_close(native_logits_of(native, plain), expected, atol=1e-10, rtol=0)


def test_adapter_fits_a_base_model_that_was_given_its_tokens_anew(processor, batch, tmp_path):
    """New token rows are the mean of the others, not drawn, so an adapter need not carry them."""
    adapted = MultiCoCoForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float64)
    add_thought_tokens(adapted, processor.tokenizer)
    adapted = add_lora(adapted)
    adapted.save_pretrained(tmp_path)
    again = MultiCoCoForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float64)
    add_thought_tokens(again, processor.tokenizer)
    again = peft.PeftModel.from_pretrained(again, tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(logits_of(again, batch), logits_of(adapted, batch))
