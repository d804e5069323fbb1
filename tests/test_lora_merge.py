"""Fine-tuning by `train.py` with adapters and batches of like length: resumed, merged and exported."""

import json
import shutil

import pytest
import torch
from conftest import CHECKPOINT, GOLDEN
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor, train


peft = pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")

from multicoco.examples import merge_lora  # noqa: E402
from multicoco.training.trainer import EpochLengthSampler  # noqa: E402


PICTURE = GOLDEN / "internvl" / "images" / "wide.png"
SAVED_AT = 11  # of 24 steps, in the middle of an epoch of 8


def train_adapters(folder, name, *flags):
    settings = {
        "model_name_or_path": folder / "base",
        "train_file": folder / "mine.jsonl",
        "output_dir": folder / name,
        "max_patches": 4,
        "c_thought": 1,
        "max_latent_stage": 2,
        "final_stage": False,
        "epochs_per_stage": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lora_rank": 2,
        "thought_feedback": "rms_match",
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVED_AT,
        "save_total_limit": 4,
        "report_to": "none",
    }
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return train.main([*words, *map(str, flags)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """A base model without thought tokens, and 32 records, every other one with a picture of several tiles."""
    folder = tmp_path_factory.mktemp("lora")
    MultiCoCoForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    shutil.copy(PICTURE, folder / "street.png")
    records = [
        {
            "id": str(number),
            "images": ["street.png"] if number % 2 else [],
            "question": "How many?",
            "steps": ["One left.", "One right."],
            "answer": str(number),
        }
        for number in range(32)
    ]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


@pytest.fixture(scope="module")
def trainer(folder):
    return train_adapters(folder, "whole")


@pytest.fixture(scope="module")
def inputs(folder, trainer):
    processor = MultiCoCoProcessor.from_pretrained(folder / "whole")
    return processor(images=[PICTURE], text="<image>\nHow many?", num_thoughts=2, return_tensors="pt")


def logits_of(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_samples_of_like_length_are_grouped_in_another_order_each_epoch(trainer):
    dataset = trainer.train_dataset
    dataset.set_stage(0)
    lengths = [len(sample["input_ids"]) for sample in dataset]
    tiles = sum(dataset[1]["num_patches_list"])
    assert tiles > 1
    assert lengths[1] - lengths[0] >= tiles * dataset.num_image_token  # every tile counts
    sampler = EpochLengthSampler(dataset, batch_size=4, seed=0)

    def padding(order):
        batches = [[lengths[index] for index in order[start : start + 4]] for start in range(0, len(order), 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    orders = []
    for epoch in range(20):
        dataset.set_stage(0, epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(dataset)))
        assert list(sampler) == orders[-1]  # whoever asks in this epoch
    assert len({tuple(order) for order in orders}) == 20
    generator = torch.Generator().manual_seed(0)
    at_random = [torch.randperm(len(dataset), generator=generator).tolist() for _ in range(20)]
    assert sum(map(padding, orders)) < 0.7 * sum(map(padding, at_random))


def test_a_resumed_run_is_the_uninterrupted_one(folder, trainer):
    resumed = folder / "resumed"
    shutil.copytree(folder / "whole" / f"checkpoint-{SAVED_AT}", resumed / f"checkpoint-{SAVED_AT}")
    log = train_adapters(folder, "resumed", "--resume_from_checkpoint", "last").state.log_history
    losses, expected = (
        {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
        for history in (log, trainer.state.log_history)
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    adapters, whole = (load_file(folder / name / "adapter_model.safetensors") for name in ("resumed", "whole"))
    assert adapters.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(
            adapters[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_weights_of_the_base_model_stay(folder, trainer):
    before = load_file(folder / "whole" / "_start" / "model.safetensors")
    after = {}
    for name, value in trainer.model.base_model.model.state_dict().items():
        if "lora_" not in name and "trainable_tokens" not in name:
            after[name.replace(".base_layer", "").replace(".token_adapter", "")] = value
    assert after.keys() >= before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_the_merged_checkpoint_has_the_logits_of_the_adapters(folder, trainer, inputs):
    merge_lora.main(["--adapters", str(folder / "whole"), "--output_dir", str(folder / "merged")])
    merged, info = MultiCoCoForConditionalGeneration.from_pretrained(
        folder / "merged", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = logits_of(trainer.model, inputs)
    torch.testing.assert_close(logits_of(merged, inputs), expected, atol=1e-4, rtol=0)
    with trainer.model.disable_adapter():
        assert (logits_of(trainer.model, inputs) - expected).abs().max() > 1e-2  # they had learned something
    config = MultiCoCoConfig.from_pretrained(folder / "merged")
    assert (config.mode, config.stage, config.num_thoughts, config.max_latent_stage) == ("coconut", 2, 2, 2)
    assert config.thought_feedback == "rms_match"
    assert MultiCoCoProcessor.from_pretrained(folder / "merged").num_thoughts == 2


def test_a_checkpoint_is_exported_as_a_plain_internvl(folder, trainer):
    checkpoint = folder / "whole" / f"checkpoint-{SAVED_AT}"
    merge_lora.main(["--adapters", str(checkpoint), "--output_dir", str(folder / "plain"), "--export"])
    merge_lora.main(["--adapters", str(checkpoint), "--output_dir", str(folder / "merged_checkpoint")])
    native, info = InternVLForConditionalGeneration.from_pretrained(folder / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    ours = MultiCoCoForConditionalGeneration.from_pretrained(folder / "merged_checkpoint", dtype="auto")
    processor = MultiCoCoProcessor.from_pretrained(folder / "plain")
    assert processor.num_thoughts is None
    for path in (folder / "plain").glob("*.jinja"):
        assert "latent" not in path.read_text(encoding="utf-8")  # a server would write thoughts as words
    inputs = processor(images=[PICTURE], text="<image>\nHow many?", return_tensors="pt")
    expected = logits_of(ours, inputs)
    del inputs["num_patches_list"]
    torch.testing.assert_close(logits_of(native, inputs), expected, atol=1e-4, rtol=0)
