"""Three formats of checkpoints load exactly; ours come back as they were, also where multicoco is not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT, GOLDEN, model_inputs
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
)

from multicoco import (
    InternVLChatModel,
    MultiCoCoConfig,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    add_thought_tokens,
    export_internvl,
)


KEY_MAPPING = json.loads((GOLDEN / "internvl" / "key_mapping.json").read_text(encoding="utf-8"))["tensors"]
ORIGINAL_CONFIG = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
TOKENIZER_FILES = ("added_tokens.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
NATIVE_PREFIXES = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head.")
START_ID, LATENT_ID, END_ID = 632, 633, 634  # the first ids after the 632 of the golden tokenizer
RESERVED_IDS = {623, 624, 625, START_ID, LATENT_ID, END_ID}

VISION_300M = dict(norm_type="layer_norm", attention_bias=True, use_qk_norm=False)
VISION_6B = dict(norm_type="rms_norm", attention_bias=False, use_qk_norm=True)
# The same vision tower, in the words of the original's configuration.
ORIGINAL_VISION = {
    "300M": (VISION_300M, dict(norm_type="layer_norm", qkv_bias=True, qk_normalization=False)),
    "6B": (VISION_6B, dict(norm_type="rms_norm", qkv_bias=False, qk_normalization=True)),
}


def text_config(model_type="qwen2", **kwargs):
    return dict(
        model_type=model_type,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=632,
        **kwargs,
    )


def native_config(vision=None, text=None, tie_word_embeddings=False, config_class=InternVLConfig):
    """The sizes of the golden checkpoint."""
    return config_class(
        text_config=text or text_config(tie_word_embeddings=tie_word_embeddings),
        vision_config=dict(
            image_size=[28, 28],
            patch_size=[7, 7],
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            **(vision or VISION_300M),
        ),
        image_token_id=625,
        image_seq_length=4,
        tie_word_embeddings=tie_word_embeddings,
    )


def random_native(seed=0, **kwargs):
    """A plain InternVL whose every tensor differs from its initial value, also norms, biases and layer scales."""
    model = InternVLForConditionalGeneration(native_config(**kwargs)).eval()
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    model.tie_weights()
    return model


ORIGINAL_NAMES = {  # of native modules, longest first where one holds another
    "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "model.vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "model.vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "model.vision_tower.encoder.layer.": "vision_model.encoder.layers.",
    ".attention.projection_layer.": ".attn.proj.",
    ".attention.q_norm.": ".attn.q_norm.",
    ".attention.k_norm.": ".attn.k_norm.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".lambda_1": ".ls1",
    ".lambda_2": ".ls2",
    "model.multi_modal_projector.layer_norm.": "mlp1.0.",
    "model.multi_modal_projector.linear_1.": "mlp1.1.",
    "model.multi_modal_projector.linear_2.": "mlp1.3.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def original_state_dict(model):
    """The weights of a native model under the original's names, with q, k and v joined: the table of the README."""
    weights = {}
    for native, weight in model.state_dict().items():
        if ".vision_tower." in native and ".attention.k_proj." in native or ".attention.v_proj." in native:
            continue
        if ".vision_tower." in native and ".attention.q_proj." in native:
            parts = [model.state_dict()[native.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            native, weight = native.replace(".attention.q_proj.", ".attn.qkv."), torch.cat(parts)
        for new, old in ORIGINAL_NAMES.items():
            native = native.replace(new, old)
        weights[native] = weight.clone()
    return weights


def write_original(folder, model, vision, llm=None, **fields):
    """A checkpoint folder of the original program."""
    config = json.loads(json.dumps({**ORIGINAL_CONFIG, **fields}))
    config["vision_config"].update(vision)
    config["llm_config"].update(llm or {})
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copy(CHECKPOINT / name, folder)
    save_file(original_state_dict(model), folder / "model.safetensors", metadata={"format": "pt"})


def hf_state_dict(model):
    """The names in the files of `OpenGVLab/InternVL3-1B-hf`."""
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith("model.language_model."):
            name = name.replace("model.language_model.", "language_model.model.", 1)
        elif name.startswith("lm_head."):
            name = f"language_model.{name}"
        else:
            name = name.removeprefix("model.")
        weights[name] = weight.clone()
    return weights


def load_exactly(folder, cls=MultiCoCoForConditionalGeneration, **kwargs):
    """Loads, and checks that the report has nothing to say."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert {name: list(found) for name, found in info.items() if found} == {}
    return model.eval()


def assert_same_weights(model, expected):
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    different = [name for name in weights if not torch.equal(weights[name], expected[name].to(weights[name]))]
    assert different == []


def native_part(config):
    """What two configurations must have in common to describe the same network."""
    fields, parts = config.to_dict(), ("vision_config", "text_config")
    fields = {name: fields[name] for name in InternVLConfig.__dataclass_fields__ if name in fields}
    for part in (fields, *(fields[name] for name in parts)):
        for name in ("architectures", "dtype", "transformers_version"):  # of the file, not of the network
            part.pop(name, None)
    fields.pop("model_type", None)
    return fields


def files_in(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def json_config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def saved(shared_model, processor, tmp_path_factory):
    """A checkpoint of our own, with thoughts, in a folder."""
    folder = tmp_path_factory.mktemp("saved")
    shared_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT, trust_remote_code=False)


# ---- the original's format


@pytest.mark.parametrize("cls", [InternVLChatModel, MultiCoCoForConditionalGeneration], ids=["plain", "thoughts"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64], ids=["as_stored", "float32", "float64"])
def test_original_checkpoint_loads_every_tensor_exactly(cls, dtype):
    """Against the file and the recorded table of names, not against our own mapping."""
    model = load_exactly(CHECKPOINT, cls, **({} if dtype is None else {"dtype": dtype}))
    assert model.dtype == (dtype or torch.bfloat16)
    stored, expected = load_file(CHECKPOINT / "model.safetensors"), {}
    for tensor in KEY_MAPPING:
        if tensor["checkpoint"] == "checkpoint":
            parts = stored.pop(tensor["original"]).chunk(tensor["rows_split_in"])
            expected.update(zip(tensor["native"], parts, strict=True))
    assert not stored
    assert_same_weights(model, expected)


def test_the_layout_made_here_is_the_recorded_one_of_the_6b_tower():
    """What the tests below write has the names of the original's own file, and q, k and v in one tensor."""
    made = original_state_dict(random_native(vision=VISION_6B))
    recorded = [tensor["original"] for tensor in KEY_MAPPING if tensor["checkpoint"] == "checkpoint_vit6b_style"]
    of_any_layer = lambda names: {re.sub(r"layers\.\d+", "layers.i", name) for name in names}  # noqa: E731
    assert of_any_layer(made) == of_any_layer(recorded)
    assert made["vision_model.encoder.layers.0.attn.qkv.weight"].shape == (3 * 32, 32)


LANGUAGE_MODELS = {
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16},  # InternVL3.5
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "internlm3": {"architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "head_dim": 16},
}


@pytest.mark.parametrize("vision", ["300M", "6B"])
@pytest.mark.parametrize("language_model", LANGUAGE_MODELS)
def test_towers_and_language_models_of_the_family_load_exactly(tmp_path, make_batch, vision, language_model):
    native_vision, original_vision = ORIGINAL_VISION[vision]
    theta = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000.0}}
    text = text_config(language_model, max_position_embeddings=32768, rms_norm_eps=1e-6, **theta)
    native = random_native(vision=native_vision, text=text)
    write_original(tmp_path, native, original_vision, LANGUAGE_MODELS[language_model])
    model = load_exactly(tmp_path, dtype=torch.float32)
    assert_same_weights(model, native.state_dict())

    batch = make_batch(num_thoughts=(0,), images=((2,),))
    ids = batch["input_ids"].masked_fill(batch["input_ids"] >= START_ID, 7)
    with torch.no_grad():
        expected = native(input_ids=ids, pixel_values=batch["pixel_values"].float()).logits
        logits = model(input_ids=ids, pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_original_checkpoint_in_shards_loads_exactly(tmp_path):
    """Large models are stored in several files; q, k and v are cut from each."""
    native = random_native(vision=VISION_6B)
    write_original(tmp_path, native, ORIGINAL_VISION["6B"][1])
    (tmp_path / "model.safetensors").unlink()
    save_torch_state_dict(original_state_dict(native), tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_weights(load_exactly(tmp_path, dtype=torch.float32), native.state_dict())


def test_original_configuration_is_translated_field_by_field():
    config = MultiCoCoConfig.from_pretrained(CHECKPOINT)
    vision, text = config.vision_config, config.text_config
    assert (config.model_type, text.model_type) == ("multicoco", "qwen2")
    assert (config.image_token_id, config.num_image_token, config.image_seq_length) == (625, 4, 4)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "default")
    assert not config.tie_word_embeddings
    assert (list(vision.image_size), list(vision.patch_size)) == ([28, 28], [7, 7])
    assert (vision.norm_type, vision.use_qk_norm, vision.attention_bias) == ("layer_norm", False, True)
    assert vision.use_mean_pooling  # no final norm
    assert text.rope_parameters["rope_theta"] == 1000000.0
    assert (text.rope_parameters["rope_type"], text.rope_parameters["factor"]) == ("dynamic", 2.0)
    assert text.use_cache
    assert config.latent_token_id is config.num_thoughts is None
    assert config.dtype == torch.bfloat16


# ---- transformers' format


def write_hf(folder, native, names):
    """As transformers saves it ("saved"), or as the files on the Hub are: their names, and no word on tying."""
    if names == "saved":
        native.save_pretrained(folder)
        return
    config = native.config.to_dict()
    del config["tie_word_embeddings"]
    if names == "hub_silent":
        config["text_config"].pop("tie_word_embeddings", None)
    config["architectures"] = ["InternVLForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(hf_state_dict(native), folder / "model.safetensors", metadata={"format": "pt"})


hf_names = pytest.mark.parametrize("names", ["saved", "hub", "hub_silent"])


@hf_names
@pytest.mark.parametrize("vision", [VISION_300M, VISION_6B], ids=["300M", "6B"])
@pytest.mark.parametrize("cls", [InternVLChatModel, MultiCoCoForConditionalGeneration], ids=["plain", "thoughts"])
def test_hf_checkpoint_loads_exactly_with_its_own_head(tmp_path, names, vision, cls):
    """`lm_head` is neither drawn anew nor tied, although the configuration's default is to tie."""
    native = random_native(vision=vision)
    write_hf(tmp_path, native, names)
    stored = load_file(tmp_path / "model.safetensors")
    assert "language_model.lm_head.weight" in stored
    model = load_exactly(tmp_path, cls, dtype=torch.float32)
    assert_same_weights(model, native.state_dict())
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings
    assert native_part(model.config) == native_part(native.config)


@hf_names
def test_hf_checkpoint_keeps_its_head_through_our_own_format(tmp_path, names):
    native = random_native()
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", native, names)
    load_exactly(tmp_path / "hf").save_pretrained(tmp_path / "ours")
    assert_same_weights(load_exactly(tmp_path / "ours"), native.state_dict())


def test_a_tied_checkpoint_stays_tied(tmp_path):
    native = random_native(tie_word_embeddings=True)
    native.save_pretrained(tmp_path / "hf")
    model = load_exactly(tmp_path / "hf", dtype=torch.float32)
    assert_same_weights(model, native.state_dict())
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path / "ours")
    model = load_exactly(tmp_path / "ours", dtype=torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_same_weights(model, native.state_dict())


# ---- our own format


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("source", ["original", "hf", "made"])
def test_our_own_checkpoint_comes_back_as_it_was(tmp_path, tokenizer, make_batch, dtype, source):
    """Logits, thoughts and generation bit by bit, wherever the model came from; the names are native ones."""
    if source == "original":
        model = MultiCoCoForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=dtype)
    elif source == "hf":
        random_native().save_pretrained(tmp_path / "hf")
        model = MultiCoCoForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=dtype)
    else:
        config = native_config(config_class=MultiCoCoConfig)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    add_thought_tokens(model, tokenizer)
    model.eval().save_pretrained(tmp_path / "ours")

    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(name.startswith(NATIVE_PREFIXES) for name in stored)
    again = load_exactly(tmp_path / "ours", dtype="auto")
    assert again.dtype == dtype
    assert_same_weights(again, model.state_dict())
    batch = model_inputs(make_batch(num_thoughts=(3, 1), images=((2,), ())))
    with torch.no_grad():
        expected, output = (item(**batch, return_thoughts=True) for item in (model, again))
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.thoughts, expected.thoughts)
    del batch["labels"]
    expected, generated = (item.generate(**batch, max_new_tokens=4, do_sample=False) for item in (model, again))
    assert torch.equal(generated, expected)


def test_a_checkpoint_saved_twice_is_the_same(saved, tmp_path):
    load_exactly(saved, dtype="auto").save_pretrained(tmp_path)
    assert json_config(tmp_path) == json_config(saved)
    assert_same_weights(load_exactly(tmp_path, dtype="auto"), load_file(saved / "model.safetensors"))


def test_configuration_comes_back_as_it_was(tmp_path):
    fields = dict(
        start_latent_id=3,
        latent_token_id=1,
        end_latent_id=2,
        c_thought=1,
        max_latent_stage=5,
        stage=4,
        num_thoughts=7,
        mode="pause_loop",
        thought_feedback="latent",
        system_message="Think.",
    )
    config = native_config(vision=VISION_6B, config_class=MultiCoCoConfig)
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    again = MultiCoCoConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in fields} == fields
    assert native_part(again) == native_part(config)
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)) is MultiCoCoConfig


def test_stage_and_thoughts_are_in_the_checkpoint_and_its_processor(model, processor, tmp_path):
    model.config.stage, model.config.num_thoughts = 2, 4
    model.save_pretrained(tmp_path)
    again = load_exactly(tmp_path)
    assert (again.config.stage, again.config.num_thoughts) == (2, 4)
    MultiCoCoProcessor(processor.image_processor, processor.tokenizer, 4, num_thoughts=4).save_pretrained(tmp_path)
    again = MultiCoCoProcessor.from_pretrained(tmp_path)
    message = [{"role": "user", "content": "Hello"}]
    ids = again.apply_chat_template(message, add_generation_prompt=True, tokenize=True)[0]
    assert ids.count(LATENT_ID) == 4


def test_no_pickle_is_written(saved, model, tmp_path):
    export_internvl(model, tmp_path)
    suffixes = {path.suffix for folder in (saved, tmp_path) for path in files_in(folder)}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".py", ".txt"}


# ---- errors


def write_config(folder, changes, with_tokenizer=True):
    config = json.loads(json.dumps(ORIGINAL_CONFIG))
    for name, value in changes.items():
        parent, _, field = name.rpartition(".")
        (config[parent] if parent else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES if with_tokenizer else ():
        shutil.copy(CHECKPOINT / name, folder)


OTHER_ARCHITECTURES = {
    "llama": ({"model_type": "llama"}, "`model_type` of .* is 'llama', expected 'multicoco', 'internvl'"),
    "no_model_type": ({"model_type": None}, "`model_type` of .* is None"),
    "internlm2": (
        {"llm_config.architectures": ["InternLM2ForCausalLM"]},
        "`llm_config.architectures` is 'InternLM2ForCausalLM', expected one of Qwen2ForCausalLM",
    ),
    "unnamed": ({"llm_config.architectures": None}, "`llm_config.architectures` is None"),
    "pixel_shuffle_v1": ({"ps_version": "v1"}, "`ps_version` is 'v1', expected 'v2'"),
    "template": ({"template": "internlm2-chat"}, "`template` is 'internlm2-chat', expected 'internvl2_5'"),
    "norm": ({"vision_config.norm_type": "batch_norm"}, "`vision_config.norm_type` must be layer_norm or rms_norm"),
}


@pytest.mark.parametrize(("changes", "message"), OTHER_ARCHITECTURES.values(), ids=OTHER_ARCHITECTURES.keys())
@pytest.mark.parametrize("cls", [MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor])
def test_another_architecture_is_one_error_that_names_the_field(tmp_path, changes, message, cls):
    write_config(tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(tmp_path)


def test_original_configuration_without_its_tokenizer_is_an_error(tmp_path):
    write_config(tmp_path, {}, with_tokenizer=False)
    with pytest.raises(ValueError, match="`image_token_id`: no <IMG_CONTEXT> in .* needs its tokenizer files"):
        MultiCoCoForConditionalGeneration.from_pretrained(tmp_path)


def test_original_tokenizer_without_image_token_is_an_error(tmp_path):
    write_config(tmp_path, {}, with_tokenizer=False)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 622}))
    with pytest.raises(ValueError, match="`image_token_id`: no <IMG_CONTEXT>"):
        MultiCoCoConfig.from_pretrained(tmp_path)


IDS = dict(start_latent_id=0, latent_token_id=1, end_latent_id=2)
INVALID = {
    "one_id_only": (dict(latent_token_id=1), "`latent_token_id`, `start_latent_id`, `end_latent_id` must be all"),
    "two_ids_only": ({**IDS, "end_latent_id": None}, "must be all None or three different ids"),
    "same_id_twice": ({**IDS, "end_latent_id": 1}, "three different ids"),
    "start_outside": ({**IDS, "start_latent_id": 632}, "`start_latent_id` must be an id within the vocabulary of 632"),
    "latent_outside": ({**IDS, "latent_token_id": 9999}, "`latent_token_id` must be an id within .* got 9999"),
    "end_negative": ({**IDS, "end_latent_id": -1}, "`end_latent_id` must be an id within .* got -1"),
    "id_text": ({**IDS, "latent_token_id": "<|latent|>"}, "`latent_token_id` must be"),
    "id_float": ({**IDS, "latent_token_id": 5.5}, "`latent_token_id` must be"),
    "c_thought_zero": (dict(c_thought=0), "`c_thought` must be an integer of at least 1, got 0"),
    "c_thought_bool": (dict(c_thought=True), "`c_thought` must be an integer of at least 1, got True"),
    "c_thought_text": (dict(c_thought="2"), "`c_thought` must be an integer of at least 1, got '2'"),
    "c_thought_none": (dict(c_thought=None), "`c_thought` must be an integer of at least 1, got None"),
    "max_latent_stage": (dict(max_latent_stage=-1), "`max_latent_stage` must be an integer of at least 0, got -1"),
    "step_loss_weight": (dict(step_loss_weight=-0.5), "`step_loss_weight` must be a number of at least 0, got -0.5"),
    "thought_sweeps": (dict(thought_sweeps=0), "`thought_sweeps` must be"),
    "max_latent_stage_none": (dict(max_latent_stage=None), "`max_latent_stage` must be .* got None"),
    "stage": (dict(stage=-1), "`stage` must be an integer of at least 0, got -1"),
    "stage_none": (dict(stage=None), "`stage` must be an integer of at least 0, got None"),
    "num_thoughts": (dict(num_thoughts=-1), "`num_thoughts` must be an integer of at least 0, got -1"),
    "num_thoughts_float": (dict(num_thoughts=2.0), "`num_thoughts` must be an integer of at least 0, got 2.0"),
    "thought_feedback": (
        dict(thought_feedback="mlp"),
        "`thought_feedback` must be one of identity, rms_match, latent, latent_one_pass, got 'mlp'",
    ),
    "mode": (dict(mode="thinking"), "`mode` must be one of coconut, cot, .* got 'thinking'"),
    "ratio_uneven": (dict(downsample_ratio=0.3), "`downsample_ratio` must divide the 4 x 4 patches .* got 0.3"),
    "ratio_zero": (dict(downsample_ratio=0.0), "`downsample_ratio` must divide"),
    "ratio_above_one": (dict(downsample_ratio=2.0), "`downsample_ratio` must divide"),
    "not_square": (dict(image_size=[28, 14]), "`vision_config.image_size` must be square"),
    "patches_not_square": (dict(patch_size=[7, 14]), "`vision_config.image_size` must be square"),
    "not_a_multiple": (dict(image_size=[30, 30]), "`vision_config.image_size` must be .* multiple"),
}


@pytest.mark.parametrize(("changes", "message"), INVALID.values(), ids=INVALID.keys())
@pytest.mark.parametrize("through", ["made", "loaded"])
def test_an_invalid_configuration_is_one_error_that_names_the_field(tmp_path, changes, message, through):
    values = native_config(config_class=MultiCoCoConfig).to_dict()
    for name, value in changes.items():
        (values["vision_config"] if name in ("image_size", "patch_size") else values)[name] = value
    if through == "loaded":
        (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        MultiCoCoConfig(**values) if through == "made" else MultiCoCoConfig.from_pretrained(tmp_path)


def test_every_field_of_the_configuration_has_its_check():
    """A new field must be added to the cases above, or here with its reason."""
    free = {"system_message"}  # any text
    ours = set(MultiCoCoConfig.__dataclass_fields__) - set(InternVLConfig.__dataclass_fields__)
    assert ours - free == {name for changes, _ in INVALID.values() for name in changes} & ours


@pytest.mark.parametrize(
    ("image_size", "patch_size", "ratio", "expected"),
    [(448, 14, 0.5, 256), (28, 7, 0.5, 4), (448, 14, 1.0, 1024), (56, 7, 0.25, 4)],
)
def test_visual_tokens_per_tile_follow_from_the_configuration(image_size, patch_size, ratio, expected):
    """Whatever `image_seq_length` says, which is then corrected."""
    vision_config = {"image_size": [image_size] * 2, "patch_size": [patch_size] * 2}
    config = MultiCoCoConfig(vision_config=vision_config, downsample_ratio=ratio, image_seq_length=7)
    assert config.num_image_token == config.image_seq_length == expected


# ---- export


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_export_is_a_plain_internvl_with_equal_logits_and_generation(tmp_path, tokenizer, make_batch, tied):
    """Loaded by transformers' own class, of which the folder needs no code; also back into ours."""
    random_native(tie_word_embeddings=tied).save_pretrained(tmp_path / "hf")
    model = load_exactly(tmp_path / "hf", dtype=torch.float32)
    add_thought_tokens(model, tokenizer)
    model.config.num_thoughts, model.config.stage = 2, 1
    before = json.dumps(model.config.to_dict(), default=str)
    export_internvl(model, tmp_path / "plain")
    assert json.dumps(model.config.to_dict(), default=str) == before

    config = json_config(tmp_path / "plain")
    assert (config["model_type"], config["architectures"]) == ("internvl", ["InternVLForConditionalGeneration"])
    ours = {"auto_map", "latent_token_id", "num_thoughts", "stage", "mode", "c_thought", "thought_feedback"}
    assert not ours & config.keys()
    assert not list((tmp_path / "plain").glob("*.py"))
    plain = load_exactly(tmp_path / "plain", InternVLForConditionalGeneration, dtype="auto")
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")) is InternVLForConditionalGeneration
    assert_same_weights(plain, model.state_dict())
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tied

    batch = make_batch(num_thoughts=(0, 0), images=((2, 1), (1,)), padding="left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    inputs["pixel_values"] = inputs["pixel_values"].float()
    real = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)  # transformers' default ignores the mask
    with torch.no_grad():
        expected = model(**inputs).logits
        logits = plain(**inputs, position_ids=positions).logits
    torch.testing.assert_close(logits[real], expected[real], atol=1e-6, rtol=0)
    expected, generated = (item.generate(**inputs, max_new_tokens=6, do_sample=False) for item in (model, plain))
    assert torch.equal(generated, expected)
    assert not RESERVED_IDS & set(generated[:, inputs["input_ids"].shape[1] :].flatten().tolist())

    assert_same_weights(load_exactly(tmp_path / "plain"), model.state_dict())


def test_export_asks_to_merge_adapters_and_then_keeps_them(model, tmp_path, make_batch):
    peft = pytest.importorskip("peft", reason="needs the `peft` extra")
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=2)
    ).eval()
    batch = model_inputs(make_batch(num_thoughts=(0,), images=((1,),)))
    with torch.no_grad():
        expected = adapted(**batch).logits
    with pytest.raises(ValueError, match="merge_and_unload"):
        export_internvl(model, tmp_path)
    assert not files_in(tmp_path)
    export_internvl(adapted.merge_and_unload(), tmp_path)
    plain = load_exactly(tmp_path, InternVLForConditionalGeneration, dtype=torch.float64)
    with torch.no_grad():
        logits = plain(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


# ---- thought tokens


def tiny_model(tied=False, vocab_size=632):
    text = {**text_config(tie_word_embeddings=tied), "vocab_size": vocab_size}
    config = native_config(text=text, tie_word_embeddings=tied, config_class=MultiCoCoConfig)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return model.eval()


def embeddings(model):
    return model.get_input_embeddings().weight, model.lm_head.weight


tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@tying
@pytest.mark.parametrize("vocab_size", [632, 633, 700], ids=["full", "one_spare_row", "padded"])
def test_thought_tokens_get_ids_and_rows_and_change_no_other_row(tokenizer, tied, vocab_size):
    """A padded vocabulary is not shrunk: its spare rows are used, and the rest stays."""
    model = tiny_model(tied, vocab_size)
    old = [weight.detach().clone() for weight in embeddings(model)]
    add_thought_tokens(model, tokenizer)
    config = model.config
    assert (config.start_latent_id, config.latent_token_id, config.end_latent_id) == (START_ID, LATENT_ID, END_ID)
    assert tokenizer.convert_ids_to_tokens([START_ID, LATENT_ID, END_ID]) == [
        "<|start-latent|>",
        "<|latent|>",
        "<|end-latent|>",
    ]
    size = max(vocab_size, 635)
    assert config.text_config.vocab_size == size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    for weight, before in zip(embeddings(model), old, strict=True):
        assert weight.shape == (size, 64)
        assert torch.equal(weight[:START_ID], before[:START_ID])
        assert torch.equal(weight[635:], before[635:])
    assert model(input_ids=torch.tensor([[5, START_ID, LATENT_ID, END_ID, 6]])).logits.shape == (1, 5, size)


@tying
def test_new_rows_start_at_the_mean_of_the_known_rows(tokenizer, tied):
    """The spare rows of a padded vocabulary, which no token uses, do not count."""
    model = tiny_model(tied, vocab_size=700)
    means = [weight[:START_ID].mean(dim=0) for weight in embeddings(model)]
    add_thought_tokens(model, tokenizer)
    for weight, mean in zip(embeddings(model), means, strict=True):
        for token_id in (START_ID, LATENT_ID, END_ID):
            torch.testing.assert_close(weight[token_id], mean, atol=1e-14, rtol=0)


@tying
def test_new_rows_copy_the_token_they_are_told_to(tokenizer, tied):
    model = tiny_model(tied)
    source = tokenizer.convert_tokens_to_ids("<|im_end|>")
    add_thought_tokens(model, tokenizer, init_from="<|im_end|>")
    for weight in embeddings(model):
        assert all(torch.equal(weight[token_id], weight[source]) for token_id in (START_ID, LATENT_ID, END_ID))


def test_the_mean_is_taken_in_float32_for_a_model_in_bfloat16(tokenizer):
    model = tiny_model().to(torch.bfloat16)
    means = [weight.float().mean(dim=0).to(torch.bfloat16) for weight in embeddings(model)]
    add_thought_tokens(model, tokenizer)
    assert all(torch.equal(weight[LATENT_ID], mean) for weight, mean in zip(embeddings(model), means, strict=True))


@tying
@pytest.mark.parametrize("vocab_size", [632, 700], ids=["full", "padded"])
def test_adding_thought_tokens_twice_changes_nothing(tmp_path, tokenizer, tied, vocab_size):
    """Also with another `init_from`, after training, and after saving and loading with a fresh tokenizer."""
    model = tiny_model(tied, vocab_size)
    add_thought_tokens(model, tokenizer)
    model.get_input_embeddings().weight.data[LATENT_ID] += 1.0  # trained
    model.save_pretrained(tmp_path)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    config, num_tokens = model.config.to_dict(), len(tokenizer)
    add_thought_tokens(model, tokenizer, init_from="<|im_end|>")
    assert_same_weights(model, weights)
    assert (model.config.to_dict(), len(tokenizer)) == (config, num_tokens)

    again = load_exactly(tmp_path, dtype="auto")
    add_thought_tokens(again, AutoTokenizer.from_pretrained(CHECKPOINT, trust_remote_code=False))
    assert_same_weights(again, weights)


def test_a_tokenizer_that_knows_the_tokens_already_gives_the_same_result(processor, tokenizer):
    """The processor adds them when it is loaded."""
    assert len(processor.tokenizer) == 635
    models = tiny_model(), tiny_model()
    for model, known in zip(models, (processor.tokenizer, tokenizer), strict=True):
        add_thought_tokens(model, known)
    assert_same_weights(models[0], models[1].state_dict())
    assert models[0].config.to_dict() == models[1].config.to_dict()


def test_the_tokenizer_of_another_model_is_refused(tokenizer):
    model = tiny_model()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    other = AutoTokenizer.from_pretrained(GOLDEN / "coconut" / "tokenizer")
    with pytest.raises(ValueError, match="`config.image_token_id` is 625, but the tokenizer gives this token the id"):
        add_thought_tokens(model, other)
    assert model.config.latent_token_id is None
    assert_same_weights(model, weights)

    add_thought_tokens(model, tokenizer)
    shifted = AutoTokenizer.from_pretrained(CHECKPOINT, trust_remote_code=False)
    shifted.add_tokens(["<other>"], special_tokens=True)
    with pytest.raises(ValueError, match="`config.start_latent_id` is 632, but the tokenizer .* 633"):
        add_thought_tokens(model, shifted)


@pytest.mark.parametrize("text", ["Hello, how are you?", ""], ids=["many", "none"])
def test_init_from_must_be_one_token(tokenizer, text):
    model = tiny_model()
    with pytest.raises(ValueError, match="`init_from` must be one token of the checkpoint, but .* has the ids"):
        add_thought_tokens(model, tokenizer, init_from=text)
    assert model.config.latent_token_id is None


def test_generation_never_shows_the_reserved_tokens(tmp_path, tokenizer):
    """Though the model would: their logits are made the highest. Also after saving and loading."""
    model = tiny_model()
    model.generation_config.suppress_tokens = [17]  # the model's own is kept
    add_thought_tokens(model, tokenizer)
    prompt = torch.tensor([[5, START_ID, LATENT_ID, END_ID]])
    with torch.no_grad():
        state = model(input_ids=prompt, return_thoughts=True, output_hidden_states=True).hidden_states[-1][0, -1]
        for token_id in (*RESERVED_IDS, 17):
            model.lm_head.weight[token_id] = 10 * state
    assert int(model(input_ids=prompt).logits[0, -1].argmax()) in {*RESERVED_IDS, 17}
    model.save_pretrained(tmp_path)
    for item in (model, load_exactly(tmp_path, dtype="auto")):
        assert item.generation_config.suppress_tokens == sorted({*RESERVED_IDS, 17})
        new = item.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert not {*RESERVED_IDS, 17} & set(new.tolist())


# ---- remote code

CLEAN_PROCESS = """
import importlib.abc
import json
import sys


class Blocker(importlib.abc.MetaPathFinder):  # the editable install would make it importable
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "multicoco":
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.meta_path.insert(0, Blocker())
try:
    import multicoco
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("multicoco can be imported")

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer,
)

torch.set_num_threads(1)
folder, again, inputs_file, output_file = sys.argv[1:]
inputs = load_file(inputs_file)
inputs["num_patches_list"] = inputs["num_patches_list"].tolist()
settings = {"trust_remote_code": True}
messages = json.loads(open(inputs_file + ".json").read())
outputs, facts = {}, {}

config = AutoConfig.from_pretrained(folder, **settings)
facts["config"] = [type(config).__name__, config.model_type, config.latent_token_id, config.num_thoughts]
processor = AutoProcessor.from_pretrained(folder, **settings)
prompt = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
facts["processor"] = [type(processor).__name__, prompt.pop("num_patches_list").tolist()]
outputs.update({f"processor.{name}": value for name, value in prompt.items()})
tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
facts["tokenizer"] = tokenizer("<|start-latent|><|latent|><IMG_CONTEXT>Hello")["input_ids"]


def record(name, auto_class, source):
    model, info = auto_class.from_pretrained(source, dtype="auto", output_loading_info=True, **settings)
    facts[name] = [type(model).__name__, type(model).__module__.partition(".")[0], [k for k, v in info.items() if v]]
    with torch.no_grad():
        output = model.eval()(**inputs, return_thoughts=True)
    outputs[f"{name}.logits"], outputs[f"{name}.thoughts"] = output.logits, output.thoughts
    outputs[f"{name}.generated"] = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return model


record("AutoModel", AutoModel, folder)
record("AutoModelForCausalLM", AutoModelForCausalLM, folder)
model = record("AutoModelForImageTextToText", AutoModelForImageTextToText, folder)
model.save_pretrained(again)
processor.save_pretrained(again)
record("again", AutoModel, again)
facts["again_processor"] = type(AutoProcessor.from_pretrained(again, **settings)).__name__
facts["imported"] = sorted(name for name in sys.modules if name.partition(".")[0] == "multicoco")
save_file({name: value.contiguous() for name, value in outputs.items()}, output_file)
print(json.dumps(facts))
"""


def test_auto_classes_load_the_folder_where_multicoco_cannot_be_imported(model, processor, make_batch, tmp_path):
    """A process of its own, in another folder, with empty caches: the same logits, thoughts, ids and prompts."""
    folder, elsewhere = tmp_path / "saved", tmp_path / "elsewhere"
    elsewhere.mkdir()
    model.config.num_thoughts = 2
    model.save_pretrained(folder)
    processor = MultiCoCoProcessor(processor.image_processor, processor.tokenizer, 4, num_thoughts=2)
    processor.save_pretrained(folder)

    batch = model_inputs(make_batch(num_thoughts=(2, 1), images=((2, 1), (1,)), padding="left"))
    del batch["labels"]
    inputs_file, output_file = tmp_path / "inputs", tmp_path / "outputs"
    save_file({**batch, "num_patches_list": torch.tensor(batch["num_patches_list"])}, inputs_file)
    picture = str(GOLDEN / "internvl" / "images" / "wide.png")
    parts = [{"type": "image", "path": picture}, {"type": "text", "text": "What is in the picture?"}]
    messages = [{"role": "user", "content": parts}]
    (tmp_path / "inputs.json").write_text(json.dumps(messages))
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_MODULES_CACHE": str(tmp_path / "hf_modules"),
        "HF_HUB_OFFLINE": "1",
    }
    arguments = [folder, tmp_path / "again", inputs_file, output_file]
    run = subprocess.run(
        [sys.executable, "-I", "-c", CLEAN_PROCESS, *map(str, arguments)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    facts = json.loads(run.stdout.strip().splitlines()[-1])
    outputs = load_file(output_file)

    assert facts["imported"] == []
    assert facts["config"] == ["MultiCoCoConfig", "multicoco", LATENT_ID, 2]
    assert facts["tokenizer"] == processor.tokenizer("<|start-latent|><|latent|><IMG_CONTEXT>Hello")["input_ids"]
    prompt = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert facts["processor"] == ["MultiCoCoProcessor", prompt["num_patches_list"].tolist()]
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(outputs[f"processor.{name}"], prompt[name])
    assert (outputs["processor.input_ids"] == LATENT_ID).sum() == 2

    with torch.no_grad():
        expected = model(**batch, return_thoughts=True)
    generated = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "again"):
        assert facts[name] == ["MultiCoCoForConditionalGeneration", "transformers_modules", []]
        assert torch.equal(outputs[f"{name}.logits"], expected.logits)
        assert torch.equal(outputs[f"{name}.thoughts"], expected.thoughts)
        assert torch.equal(outputs[f"{name}.generated"], generated)
    assert facts["again_processor"] == "MultiCoCoProcessor"
    assert {path.suffix for path in files_in(tmp_path / "again")} <= {".safetensors", ".json", ".jinja", ".py", ".txt"}
