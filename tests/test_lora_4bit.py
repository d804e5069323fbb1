"""QLoRA by `train.py --load_in_4bit`: trained, resumed, merged, exported and scored; run by `make test-extras`."""

import json
import shutil

import pytest
import torch
from conftest import CHECKPOINT
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor, load_checkpoint, score, train
from multicoco.training.arguments import ModelArguments
from multicoco.training.loading import find_kind


pytest.importorskip("bitsandbytes", reason="4 bits need the package bitsandbytes (`pip install multicoco[qlora]`)")
peft = pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")

from multicoco.examples import merge_lora  # noqa: E402


FLAGS = ("--lora_rank", "2", "--load_in_4bit")
ROUNDED = 0.05  # of the largest logit: what bfloat16 weights may move


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """A base model without thought tokens, and eight records without pictures."""
    folder = tmp_path_factory.mktemp("qlora")
    MultiCoCoForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    records = [
        {"id": str(n), "images": [], "question": "How many?", "steps": ["One."], "answer": str(n)} for n in range(8)
    ]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def run(folder, name, *flags):
    """Four steps, with a checkpoint at the second."""
    settings = {
        "model_name_or_path": folder / "base",
        "train_file": folder / "mine.jsonl",
        "output_dir": folder / name,
        "c_thought": 1,
        "max_latent_stage": 1,
        "final_stage": False,
        "epochs_per_stage": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return train.main([*words, *map(str, flags)])


@pytest.fixture(scope="module")
def trainer(folder):
    return run(folder, "whole", *FLAGS, "--eval_file", folder / "mine.jsonl")  # which is answered outside autocast


def logits_of(model, ids=(5, 6, 632, 633, 634, 7)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits.float()


def test_the_language_model_is_in_4_bits_and_adapters_in_float32(trainer):
    kept = {type(weight).__name__: set() for weight in trainer.model.parameters()}
    for name, weight in trainer.model.named_parameters():
        kept[type(weight).__name__].add(name)
    assert len(kept["Params4bit"]) == 14  # seven products of two layers
    assert all("language_model.layers" in name for name in kept["Params4bit"])
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert [tuple(weight.shape) for name, weight in trained.items() if "lora_" not in name] == [(3, 64)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("place", ["whole", "whole/checkpoint-4"])
def test_the_loaded_model_has_the_logits_of_the_trained_one(folder, trainer, place):
    """Added to the base as it is, adapters of another such run had logits that were off by 8.5."""
    expected = logits_of(trainer.model)
    loaded = load_checkpoint(folder / place, dtype="float32")
    torch.testing.assert_close(logits_of(loaded), expected, atol=1e-4, rtol=0)
    for weight in loaded.parameters():
        assert type(weight) is torch.nn.Parameter


def test_merged_it_is_an_ordinary_model_in_bfloat16_equal_to_rounding(folder, trainer):
    merge_lora.main(["--adapters", str(folder / "whole"), "--output_dir", str(folder / "merged")])
    merged, info = MultiCoCoForConditionalGeneration.from_pretrained(
        folder / "merged", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert merged.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((folder / "merged" / "config.json").read_text())
    expected = logits_of(trainer.model)
    assert (logits_of(merged) - expected).abs().max() < ROUNDED * expected.abs().max()
    exact = load_checkpoint(folder / "whole", dtype="float32").state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, exact[name].to(torch.bfloat16)), name
    assert torch.equal(logits_of(load_checkpoint(folder / "whole")), logits_of(merged))


def test_it_is_exported_and_scored(folder, trainer):
    merge_lora.main(["--adapters", str(folder / "whole"), "--output_dir", str(folder / "plain"), "--export"])
    native, info = InternVLForConditionalGeneration.from_pretrained(
        folder / "plain", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    ids = (5, 6, 7, 8)
    torch.testing.assert_close(logits_of(native, ids), logits_of(load_checkpoint(folder / "whole"), ids))
    words = ["--data", str(folder / "mine.jsonl"), "--max_new_tokens", "3", "--model", str(folder / "whole")]
    (row,) = score.main(words)
    assert (row["num_thoughts"], row["samples"]) == (1, 8)


def test_a_resumed_run_is_the_uninterrupted_one(folder, trainer):
    shutil.copytree(folder / "whole" / "checkpoint-2", folder / "again" / "checkpoint-2")
    run(folder, "again", *FLAGS, "--eval_file", folder / "mine.jsonl", "--resume_from_checkpoint", "last")
    resumed, whole = (load_file(folder / name / "adapter_model.safetensors") for name in ("again", "whole"))
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    with pytest.raises(ValueError, match="--load_in_4bit True.*--load_in_4bit False"):
        find_kind(ModelArguments("base", lora_rank=2), str(folder / "whole" / "checkpoint-2"))


@pytest.mark.parametrize("embeddings", ["rows", "whole"])
def test_beside_bfloat16_nothing_that_is_trained_is_rounded(folder, embeddings):
    """The answers of `--eval_file` are generated outside autocast: types must fit there too."""
    flags = ("--bf16", "--activation_checkpointing", "--eval_file", folder / "mine.jsonl", "--max_steps", "2")
    adapted = run(folder, embeddings, *FLAGS, "--lora_embeddings", embeddings, *flags).model
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {torch.float32}
    frozen = {
        weight.dtype
        for name, weight in adapted.named_parameters()
        if not (weight.requires_grad or name.endswith(".bias"))  # bitsandbytes casts those of its layers
    }
    assert frozen == {torch.uint8, torch.bfloat16 if embeddings == "rows" else torch.float32}
    expected = logits_of(adapted)
    loaded = logits_of(load_checkpoint(folder / embeddings, dtype="float32"))
    assert (loaded - expected).abs().max() < ROUNDED * expected.abs().max()
    assert MultiCoCoProcessor.from_pretrained(folder / embeddings).num_thoughts is not None
