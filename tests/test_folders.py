"""What lies in the folder of a run: one model, the last; adapters that every command reads; nothing half written."""

import io
import json
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINT

from multicoco import (
    MultiCoCoConfig,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    diagnose,
    last_complete_checkpoint,
    load_checkpoint,
    load_records,
    replace_checkpoint,
    score,
    train,
)
from multicoco.evaluation.checkpoints import ADAPTERS, MODEL, base_of, files_of
from multicoco.evaluation.predictions import describe
from multicoco.evaluation.subject import AskArguments, Subject
from multicoco.training.arguments import ModelArguments
from multicoco.training.loading import find_kind


pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")

from multicoco.examples import chat, merge_lora  # noqa: E402


LORA = ("--lora_rank", "2")
REPORTS = ("settings.json", "results.json", "README.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """A base model without thought tokens, and four records without pictures."""
    folder = tmp_path_factory.mktemp("folders")
    MultiCoCoForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    records = [
        {"id": str(n), "images": [], "question": "How many?", "steps": ["One."], "answer": str(n)} for n in range(4)
    ]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def run(folder, name, *flags):
    """One step on all records at a rate at which a model is another one afterwards."""
    settings = {
        "model_name_or_path": folder / "base",
        "train_file": folder / "mine.jsonl",
        "output_dir": folder / name,
        "c_thought": 1,
        "max_latent_stage": 1,
        "final_stage": False,
        "epochs_stage_0": 0,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return train.main([*words, *map(str, flags)])


def copy(folder, name, other):
    shutil.copytree(folder / name, folder / other)
    return folder / other


def logits_of(model):
    config = model.config
    ids = [5, 6, config.start_latent_id, config.latent_token_id, config.latent_token_id, config.end_latent_id, 7]
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


def assert_is(model, other):
    torch.testing.assert_close(logits_of(model), logits_of(other), atol=1e-4, rtol=0)


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(folder):
    """A whole model, with a checkpoint, after training."""
    return run(folder, "whole", "--save_strategy", "steps", "--save_steps", 1)


@pytest.fixture(scope="module")
def adapted(folder):
    """Adapters, with a checkpoint, after training; the latents began as the token `a`."""
    return run(folder, "adapted", *LORA, "--save_strategy", "steps", "--save_steps", 1, "--init_latents_from", "a")


# --- one model, the last -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapted", "whole"], ids=["adapters, then a model", "a model, then adapters"])
def test_a_folder_holds_the_model_that_was_trained_last(folder, whole, adapted, name, caplog):
    """`from_pretrained` laid the old adapters over the new model: logits were off by 16.8, and by 18.9."""
    out = copy(folder, name, f"once {name}")
    (out / "model-mine.safetensors").write_bytes(b"a user's own")
    flags, form, other = ((), MODEL, ADAPTERS) if name == "adapted" else (LORA, ADAPTERS, MODEL)
    old = [path.name for path in files_of(out, other)]
    trainer = run(folder, out.name, *flags, "--save_strategy", "steps", "--save_steps", 1)
    for place in (out, out / "checkpoint-1"):
        assert files_of(place, form)
        assert not files_of(place, other)
        assert_is(load_checkpoint(place), trainer.model)
    assert (logits_of(trainer.model) - logits_of((adapted if name == "adapted" else whole).model)).abs().max() > 0.1
    assert (out / "model-mine.safetensors").exists()
    told = [message for message in caplog.messages if all(name in message for name in old)]
    assert any("To keep them, give another folder" in message for message in told)  # before it trains
    assert any("They are removed" in message for message in told)


def test_old_shards_and_a_new_model_and_the_other_way_round(folder, whole, adapted, tmp_path):
    """transformers reads `model.safetensors` where it lies beside an index, whichever is newer."""
    first, second = whole.model, load_checkpoint(folder / "adapted")
    assert (logits_of(first) - logits_of(second)).abs().max() > 0.1
    for model, size in ((first, "50GB"), (second, "200KB"), (first, "50GB")):
        with replace_checkpoint(tmp_path) as unfinished:
            model.save_pretrained(unfinished, max_shard_size=size)
        assert (len(files_of(tmp_path, MODEL)) > 1) == (size == "200KB")
        assert_is(MultiCoCoForConditionalGeneration.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("place", ["adapters", "base"])
def test_adapters_are_not_merged_over_themselves_or_their_base(folder, adapted, place):
    """Merged in place they were added twice: logits were off by 4.0."""
    out = folder / ("adapted" if place == "adapters" else "base")
    before = names_in(out), out.stat().st_mtime_ns
    with pytest.raises(ValueError, match="holds adapters" if place == "adapters" else "is the base model"):
        merge_lora.main(["--adapters", str(folder / "adapted"), "--output_dir", str(out)])
    assert (names_in(out), out.stat().st_mtime_ns) == before


def test_a_folder_with_both_is_refused_by_all_that_load_it(folder, whole, adapted):
    """As earlier versions left it: `score.py` printed an accuracy for it."""
    both = copy(folder, "whole", "both")
    for path in files_of(folder / "adapted", ADAPTERS):
        shutil.copy(path, both)
    told = "holds a whole model and adapters"
    with pytest.raises(ValueError, match=told):
        load_checkpoint(both)
    with pytest.raises(ValueError, match=told):
        score.main(["--model", str(both), "--data", str(folder / "mine.jsonl")])
    with pytest.raises(ValueError, match=told):
        run(folder, "of both", "--model_name_or_path", both)


def test_adapters_are_no_base_and_are_not_saved_over_theirs(folder, whole, adapted):
    with pytest.raises(ValueError, match="holds adapters, which are no model to begin with"):
        run(folder, "of adapters", "--model_name_or_path", folder / "adapted")
    with pytest.raises(ValueError, match="holds adapters, which are no model to begin with"):  # it promised a schedule
        run(folder, "of adapters", "--model_name_or_path", folder / "adapted", "--dry_run")
    for name, base in (("base", "base"), ("whole", "whole/checkpoint-1")):
        with pytest.raises(ValueError, match="is where the base model of the adapters"):
            run(folder, name, *LORA, "--model_name_or_path", folder / base)
        assert not files_of(folder / name, ADAPTERS)
    with pytest.raises(ValueError, match="sends what lies in"):
        run(folder, "adapted", "--push_to_hub")


# --- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("whole", {"lora_rank": 2}, ["--lora_rank 0", "--lora_rank 2"]),
        ("adapted", {}, ["--lora_rank 2", "--lora_rank 0"]),
        ("adapted", {"lora_rank": 3}, ["--lora_rank 2", "--lora_rank 3", "--lora_alpha 4", "--lora_alpha 6"]),
        ("adapted", {"lora_rank": 2, "lora_embeddings": "whole"}, ["lora_embeddings rows", "lora_embeddings whole"]),
    ],
    ids=["model as adapters", "adapters as model", "another rank", "other embeddings"],
)
def test_a_checkpoint_of_another_kind_is_refused_with_its_flags(folder, whole, adapted, name, flags, told):
    """It raised two screens of keys."""
    checkpoint = last_complete_checkpoint(folder / name)
    with pytest.raises(ValueError, match="resume_from_checkpoint") as error:
        find_kind(ModelArguments("base", **flags), checkpoint)
    assert all(flag in str(error.value) for flag in told)
    assert find_kind(ModelArguments("base", lora_rank=2 if name == "adapted" else 0), checkpoint)


def test_train_refuses_a_checkpoint_of_another_kind(folder, whole):
    with pytest.raises(ValueError, match="was trained with `--lora_rank 0`"):
        run(folder, "whole", *LORA, "--resume_from_checkpoint", "last")


def test_adapters_are_not_taken_to_another_base(folder, whole, adapted):
    """They were added to it: other weights, and the loss went on from there."""
    with pytest.raises(ValueError, match="`model_name_or_path` was .*base, is .*whole.*--allow_changed model_name_or"):
        run(folder, "adapted", *LORA, "--model_name_or_path", folder / "whole", "--resume_from_checkpoint", "last")


def test_a_checkpoint_of_adapters_says_its_stage_also_where_no_callback_is_asked(adapted, tmp_path):
    """As on SIGTERM (`--enable_jit_checkpoint`): it had no config.json, so that nothing could load it."""
    adapted.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    assert MultiCoCoConfig.from_pretrained(tmp_path / "checkpoint-1").trained == adapted.model.config.trained


def test_what_is_no_checkpoint_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="nowhere is no checkpoint of a run.*`last`"):
        run(folder, "no checkpoint", "--resume_from_checkpoint", folder / "nowhere")


# --- a full disk -------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(size):
    """No file may grow beyond this many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_nothing_that_looks_finished(folder, whole):
    """Results, settings and configuration were there, without weights."""
    with full_disk(300_000), pytest.raises(Exception, match="(?i)too large"):
        run(folder, "full", "--model_name_or_path", folder / "whole")
    assert names_in(folder / "full") <= {"runs"}


def test_a_full_disk_leaves_the_model_that_was_there(folder, whole):
    out = copy(folder, "whole", "full before")
    before = {name: (out / name).read_bytes() for name in names_in(out) if (out / name).is_file()}
    with full_disk(300_000), pytest.raises(Exception, match="(?i)too large"):
        run(folder, out.name, "--model_name_or_path", folder / "whole")
    assert {name: (out / name).read_bytes() for name in names_in(out) if (out / name).is_file()} == before


# --- adapters in every command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(folder, adapted):
    merge_lora.main(["--adapters", str(folder / "adapted"), "--output_dir", str(folder / "merged")])
    return folder / "merged"


def test_adapters_hold_three_rows_and_no_matrix(folder, adapted, merged):
    trained = [weight for name, weight in adapted.model.named_parameters() if weight.requires_grad]
    config, width = adapted.model.config, adapted.model.config.text_config.hidden_size
    rank_2 = sum(
        2 * (module.in_features + module.out_features)
        for name, module in load_checkpoint(merged).named_modules()
        if name.endswith("_proj") and "language_model" in name
    )
    assert sum(map(torch.Tensor.numel, trained)) == rank_2 + 3 * width
    assert (folder / "adapted" / "adapter_model.safetensors").stat().st_size < 4 * (rank_2 + 3 * width) + 10_000
    base = MultiCoCoForConditionalGeneration.from_pretrained(folder / "adapted" / "_start")
    rows = [config.start_latent_id, config.latent_token_id, config.end_latent_id]
    mine, before = (model.get_input_embeddings().weight for model in (load_checkpoint(merged), base))
    assert not torch.equal(mine[rows[0]], before[rows[0]])  # it begins each block
    assert torch.equal(mine[: min(rows)], before[: min(rows)])


@pytest.mark.parametrize("place", ["adapted", "adapted/checkpoint-1", "merged"])
def test_what_is_loaded_has_the_logits_of_what_was_trained(folder, adapted, merged, place):
    model = load_checkpoint(folder / place)
    assert_is(model, adapted.model)
    assert model.config.trained == adapted.model.config.trained
    assert MultiCoCoProcessor.from_pretrained(folder / place).num_thoughts == 1


def test_whole_embeddings_and_a_tied_head_are_loaded_too(folder, trails_start):
    """`--lora_embeddings whole` on untied embeddings, and rows on tied ones."""
    untied = run(folder, "embeddings", *LORA, "--lora_embeddings", "whole")
    assert_is(load_checkpoint(folder / "embeddings"), untied.model)
    tied = run(folder, "tied", *LORA, "--model_name_or_path", trails_start)
    model = load_checkpoint(folder / "tied")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_is(model, tied.model)
    start = MultiCoCoForConditionalGeneration.from_pretrained(trails_start)
    row = model.config.start_latent_id
    assert not torch.equal(model.lm_head.weight[row], start.lm_head.weight[row])


def test_a_model_in_bfloat16_is_as_it_will_be_loaded(folder, adapted, tmp_path):
    """`model.to(dtype)` would round the rotary embedding's frequencies too."""
    model = load_checkpoint(folder / "adapted", dtype="bfloat16")
    model.save_pretrained(tmp_path)
    again = MultiCoCoForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits_of(model), logits_of(again))


def test_adapters_are_scored_diagnosed_and_talked_to_like_the_merged_model(folder, merged, monkeypatch, tmp_path):
    """`score.py --model out` ended with "no file named model.safetensors"."""
    found = {}
    for name in ("adapted", "merged"):
        words = ["--model", str(folder / name), "--data", str(folder / "mine.jsonl"), "--max_new_tokens", "3"]
        score.main([*words, "--output_dir", str(tmp_path / name)])
        (path,) = (tmp_path / name / "predictions").iterdir()
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        report = diagnose.main([*words, "--output_dir", str(tmp_path), "--report", str(tmp_path / "report.html")])
        monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
        talk = chat.main(["--model", str(folder / name), "--max_new_tokens", "3"])
        found[name] = [line["text"] for line in lines], report["experiments"], talk
    assert found["adapted"] == found["merged"]


def test_predictions_of_adapters_are_stale_when_their_base_is_another(folder, adapted):
    out = copy(folder, "adapted", "stale")
    base = Path(base_of(out)) / "model.safetensors"
    arguments = AskArguments(data=str(folder / "mine.jsonl"))
    subject = Subject(str(out), load_records(folder / "mine.jsonl"), arguments, torch.device("cpu"))
    before, times = describe(subject, None), base.stat()
    os.utime(base, (1, 1))
    assert describe(subject, None) != before
    os.utime(base, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert describe(subject, None) == before


def name_start_as_base(out):
    """As runs wrote it before: the base with thought tokens, in the run's folder."""
    path = out / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": f"gone/{out.name}/_start"}))


def test_a_run_that_was_moved_is_read_and_one_without_its_base_says_what_to_do(folder, adapted, merged):
    """It ended with "Repo id must be in the form"."""
    moved = copy(folder, "adapted", "moved")
    for place in (moved, moved / "checkpoint-1"):
        name_start_as_base(place)
        assert_is(load_checkpoint(place), adapted.model)
    shutil.rmtree(moved / "_start")
    for command in (score, diagnose):
        with pytest.raises(ValueError, match=r"'gone/moved/_start'.*--base_model FOLDER"):
            command.main(["--model", str(moved), "--data", str(folder / "mine.jsonl")])
    with pytest.raises(ValueError, match="merge_lora.py --adapters"):
        chat.main(["--model", str(moved)])
    words = ["--adapters", str(moved), "--output_dir", str(folder / "moved and merged")]
    merge_lora.main([*words, "--base_model", str(folder / "base")])
    assert base_of(folder / "moved and merged") is None
    assert_is(load_checkpoint(folder / "moved and merged"), adapted.model)


def test_a_base_is_asked_for_only_with_adapters(folder, merged):
    with pytest.raises(ValueError, match="is no folder of adapters"):
        load_checkpoint(merged, base_model=folder / "base")
    assert MultiCoCoConfig.from_pretrained(merged).latent_token_id is not None
