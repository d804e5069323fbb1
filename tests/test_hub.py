"""Runs are pushed to a local Hub, wiped and loaded back in a clean process; their card says what they are."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINT, GOLDEN
from hub_server import LocalHub
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from multicoco import MultiCoCoForConditionalGeneration, model_card, train
from multicoco.evaluation.intervals import wilson_interval
from multicoco.training.card import make_card


PICTURE = GOLDEN / "internvl" / "images" / "square.png"
CODE = {"configuration_multicoco.py", "modeling_multicoco.py", "processing_multicoco.py"}

# Everything that pushes, in one process: `train.py --push_to_hub`, the methods, the stock trainer, and adapters.
PUSH = """
import sys
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments
from multicoco import train
from multicoco.training.card import write_card

picture, logits_file, output_dir, *flags = sys.argv[1:]
trainer = train.main([*flags, "--output_dir", output_dir, "--hub_model_id", "me/trained"])
model, processor = trainer.model.eval(), trainer.processing_class
inputs = processor(images=[picture], text="<image>\\nHow many?", num_thoughts=2, return_tensors="pt")
save_file({"logits": model(**inputs).logits.detach()}, logits_file)
model.push_to_hub("me/pushed")
processor.push_to_hub("me/pushed")
ModelCard.load(write_card(output_dir, model_id="me/pushed")).push_to_hub("me/pushed")
arguments = TrainingArguments(output_dir + "-stock", hub_model_id="me/stock", report_to="none", use_cpu=True)
Trainer(model=model, args=arguments, processing_class=processor).push_to_hub()
train.main([*flags, "--output_dir", output_dir + "-lora", "--hub_model_id", "me/adapters", "--lora_rank", "2"])
"""

# A process that has never seen multicoco: only what lies on the Hub.
LOAD = """
import re, sys
sys.modules["multicoco"] = None  # an import of the installed package fails
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

picture, output = sys.argv[1:]
for name in ("me/trained", "me/pushed", "me/stock"):
    auto = AutoModel if name == "me/trained" else AutoModelForImageTextToText
    model = auto.from_pretrained(name, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    for item in (model, model.config, processor):
        assert type(item).__module__.startswith("transformers_modules"), type(item)
    inputs = processor(images=[picture], text="<image>\\nHow many?", num_thoughts=2, return_tensors="pt")
    save_file({"logits": model(**inputs).logits.detach()}, f"{output}/{name.replace('/', '-')}.safetensors")
card = ModelCard.load("me/trained").text
block = re.search("```python\\n(.*?)```", card, flags=re.DOTALL)[1].replace("street.jpg", picture)
exec(block.replace("max_new_tokens=128", "max_new_tokens=4"))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after all pushes, and the folder they were made from."""
    folder = tmp_path_factory.mktemp("hub")
    base = folder / "base"
    shutil.copytree(CHECKPOINT, base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.org/l\n---\n")
    shutil.copy(PICTURE, folder / "street.png")
    lines = [
        json.dumps({"id": str(number), "images": ["street.png"], "question": "How many?", **answer})
        for number, answer in enumerate([{"steps": ["One left.", "One right."], "answer": "2"}] * 4)
    ]
    (folder / "mine.jsonl").write_text("\n".join(lines))
    settings = {
        "model_name_or_path": base,
        "train_file": folder / "mine.jsonl",
        "eval_file": folder / "mine.jsonl",
        "max_patches": 1,
        "c_thought": 1,
        "max_latent_stage": 1,
        "final_stage": False,
        "epochs_per_stage": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "report_to": "none",
    }
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    with LocalHub() as hub:
        run(hub, folder, PUSH, PICTURE, folder / "logits.safetensors", folder / "out", *flags, "--push_to_hub")
        yield hub, folder


def run(hub, folder, script, *arguments):
    """Runs a script against the Hub from an empty folder, with an empty cache."""
    cwd = folder / f"process-{len(list(folder.glob('process-*')))}"
    cwd.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "home"), "HF_TOKEN": "hf_local", "NO_PROXY": "*"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-5000:]
    return process.stdout


# --- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["me/trained", "me/pushed", "me/stock"],
    ids=["train.py --push_to_hub", "push_to_hub()", "Trainer.push_to_hub()"],
)
def test_weights_processor_code_and_card_are_pushed(pushed, name):
    hub, _ = pushed
    files = set(hub.files(name))
    assert files >= {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md", *CODE}
    assert not [path for path in files if "start" in path]  # the base model with its new tokens, kept for the ranks
    assert hub.unknown_requests == []


def test_a_run_is_sent_once_and_whole(pushed):
    hub, folder = pushed
    assert len(hub.messages("me/trained")) == 2  # the first commit of any repository, and ours
    assert hub.files("me/trained")["results.json"] == (folder / "out" / "results.json").read_bytes()


def test_a_clean_process_loads_it_with_the_same_logits(pushed, tmp_path):
    hub, folder = pushed
    run(hub, folder, LOAD, PICTURE, tmp_path)
    expected = load_file(folder / "logits.safetensors")["logits"]
    for name in ("me-trained", "me-pushed", "me-stock"):
        logits = load_file(tmp_path / f"{name}.safetensors")["logits"]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_the_card_on_the_hub_says_what_the_run_was(pushed):
    hub, folder = pushed
    card = ModelCard(hub.files("me/trained")["README.md"].decode())
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert (data.license, data.license_name, data.license_link) == ("other", "qwen", "https://x.org/l")
    assert {"multicoco", "coconut"} <= set(data.tags)
    assert data.base_model is None  # a folder of ours is no model of the Hub
    last = json.loads((folder / "out" / "results.json").read_text())[-1]
    assert [result.metric_value for result in data.eval_results] == [pytest.approx(last["eval/accuracy"], abs=1e-6)]
    low, high = wilson_interval(last["eval/accuracy"], last["eval/samples"])
    row = f"| 1 | 1 | {last['eval/accuracy']:.1%} | {low:.1%} - {high:.1%} | 4 |"
    assert row in card.text
    assert 'from_pretrained("me/trained", trust_remote_code=True' in card.text
    assert str(folder) not in card.content  # nobody's paths
    assert 'from_pretrained("me/pushed", trust_remote_code=True' in hub.files("me/pushed")["README.md"].decode()


def test_adapters_are_pushed_and_loaded_as_their_card_says(pushed):
    pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")
    hub, folder = pushed
    files = hub.files("me/adapters")
    assert set(files) >= {"adapter_model.safetensors", "adapter_config.json", "config.json", "README.md"}
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft"
    block = re.search("```python\n(.*?)```", card.text, flags=re.DOTALL)[1]
    block = block.replace("the base model", str(folder / "base")).replace("me/adapters", str(folder / "out-lora"))
    scope = {}
    exec(block, scope)
    assert isinstance(scope["model"], MultiCoCoForConditionalGeneration)
    assert (scope["model"].config.num_thoughts, scope["processor"].num_thoughts) == (1, 1)
    trained, config = load_file(folder / "out-lora" / "adapter_model.safetensors"), scope["model"].config
    rows = next(value for name, value in trained.items() if "embed_tokens" in name)
    weight = scope["model"].get_input_embeddings().weight
    ids = [config.start_latent_id, config.latent_token_id, config.end_latent_id]
    torch.testing.assert_close(weight[ids], rows.to(weight.dtype))


def test_a_run_without_a_push_has_its_card_too(pushed, tmp_path, monkeypatch):
    _, folder = pushed
    monkeypatch.setattr(sys, "argv", ["train.py"])
    settings = json.loads((folder / "out" / "settings.json").read_text())
    flags = ["--output_dir", tmp_path / "alone", "--max_steps", 1, "--save_strategy", "no", "--report_to", "none"]
    for name in ("model_name_or_path", "max_patches"):
        flags += [f"--{name}", settings[name]]
    flags += ["--train_file", *settings["train_file"]]
    train.main([str(flag) for flag in flags])
    card = ModelCard.load(tmp_path / "alone" / "README.md")
    assert card.data.license_name == "qwen"
    assert "None were measured." in card.text


# --- the card of a folder ----------------------------------------------------------------------------------------


@pytest.fixture
def make_run(shared_model, tmp_path):
    """A folder as a run leaves it, with what the card reads."""

    def make(name, mode="coconut", accuracy=0.75, **settings):
        folder = tmp_path / name
        config = type(shared_model.config)(**{**shared_model.config.to_dict(), "mode": mode, "stage": 3})
        config.num_thoughts = 6
        config.save_pretrained(folder)
        rows = [{"eval/stage": 3, "eval/accuracy": accuracy, "eval/num_thoughts": 6, "eval/samples": 80}]
        (folder / "results.json").write_text(json.dumps(rows))
        (folder / "settings.json").write_text(json.dumps(settings))
        return folder

    return make


def test_base_model_and_data_of_the_hub_stand_in_the_metadata(make_run):
    folder = make_run("out", model_name_or_path="OpenGVLab/InternVL3-1B", train_file="me/street", learning_rate=1e-5)
    card = ModelCard(str(make_card(folder, license="mit", tags=["street"])))
    assert (card.data.base_model, card.data.datasets) == ("OpenGVLab/InternVL3-1B", ["me/street"])
    assert (card.data.license, card.data.tags) == ("mit", ["multicoco", "coconut", "street"])
    assert "| learning rate | 1e-05 |" in card.text


def test_a_licence_that_is_not_found_is_not_made_up(make_run):
    card = make_card(make_run("out", model_name_or_path="OpenGVLab/InternVL3-1B"))
    assert card.data.license == "unknown"
    assert "look it up" in card.text


def test_scores_take_the_place_of_the_last_answers_in_the_metadata(make_run):
    folder = make_run("out")
    row = {"mode": "coconut", "samples": 90, "scored": 80, "new_tokens": 3.25, "low": 0.4, "high": 0.6}
    rows = [
        {**row, "model": str(folder), "num_thoughts": 0, "accuracy": 0.5},
        {**row, "model": str(folder), "num_thoughts": 6, "accuracy": 0.875},
        {**row, "model": "/some/where/pause", "mode": "pause", "num_thoughts": 6, "accuracy": 0.25},
    ]
    (folder / "scores").mkdir()
    report = {"settings": {"data": "/some/where/val.jsonl", "metric": "exact"}, "scores": rows}
    (folder / "scores" / "scores.json").write_text(json.dumps(report))
    card = ModelCard(str(make_card(folder)))
    assert [result.metric_value for result in card.data.eval_results] == [0.5, 0.875]
    assert {result.dataset_name for result in card.data.eval_results} == {"val.jsonl"}
    assert "| this model | `coconut` | 6 | 87.5% | 40.0% - 60.0% | 3.2 | 80 |" in card.text
    assert "| `pause` | `pause` | 6 | 25.0% |" in card.text
    assert "/some/where" not in card.content
    assert "No control" not in card.text


def test_what_was_measured_of_an_earlier_model_is_not_in_the_card(make_run, caplog):
    """A second run into `out` had the scores and the verdict of the first one's model in its card."""
    folder = make_run("out")
    row = {"mode": "coconut", "samples": 90, "scored": 80, "new_tokens": 3.25, "low": 0.4, "high": 0.6}
    rows = [{**row, "model": str(folder), "num_thoughts": 6, "accuracy": 0.875}]
    (folder / "scores.json").write_text(json.dumps({"settings": {"metric": "exact"}, "scores": rows}))
    (folder / "diagnosis.json").write_text(json.dumps({"thoughts": {"verdict": "not shown to be used"}}))
    for path in (folder / "scores.json", folder / "diagnosis.json"):
        os.utime(path, (1, 1))
    (folder / "model.safetensors").touch()
    text = make_card(folder).text
    assert "87.5%" not in text
    assert "not shown to be used" not in text
    assert sum("is older than the weights" in message for message in caplog.messages) == 2


def test_controls_stand_beside_the_run_and_their_absence_is_said(make_run, monkeypatch):
    folder, control = make_run("out"), make_run("out-pause", mode="pause", accuracy=0.5)
    model_card.main([str(folder)])
    assert "No control" in (folder / "README.md").read_text()
    model_card.main([str(folder), "--controls", str(control), "--model_id", "me/x"])
    text = (folder / "README.md").read_text()
    low, high = wilson_interval(0.5, 80)
    assert f"| `out-pause` | `pause` | 50.0% | {low:.1%} - {high:.1%} | 80 |" in text
    assert "No control" not in text
    assert "# x" in text


def test_the_verdict_of_the_diagnosis_is_quoted(make_run):
    folder = make_run("out")
    (folder / "diagnosis").mkdir()
    (folder / "diagnosis" / "diagnosis.json").write_text(json.dumps({"thoughts": {"verdict": "not shown to be used"}}))
    text = make_card(folder).text
    assert "they are **not shown to be used**" in text
    assert "No control" not in text


def test_what_is_no_run_is_refused(make_run, tmp_path):
    with pytest.raises(ValueError, match="no config.json, expected the folder of a finished run"):
        make_card(tmp_path)
    (unfinished := make_run("unfinished") / "results.json").unlink()
    with pytest.raises(ValueError, match="`controls` names .*unfinished, which has no results.json"):
        make_card(make_run("out"), controls=[unfinished.parent])
