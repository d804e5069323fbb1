"""`memory.py`: its formula against what autograd saves and against measured peaks; `train.py --estimate_memory`."""

import contextlib
import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor, train
from multicoco.benchmarks import memory as benchmark
from multicoco.benchmarks.memory import FAMILY, NO_THOUGHTS, make_batch, make_config, make_internvl3
from multicoco.curriculum import CurriculumArguments
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.recipes.trails.prepare import prepare
from multicoco.recipes.trails.start_model import make_start_model
from multicoco.records import load_records
from multicoco.training.arguments import ModelArguments
from multicoco.training.loading import load_model
from multicoco.training.memory import PARTS, BatchShape, estimate_memory, worst_batches


ROOT = Path(__file__).parent.parent
RUNS = {
    "float32": {},
    "autocast": {"bf16": True},
    "DeepSpeed-bf16": {"bf16": True, "zero_stage": 2},
}
KINDS = {
    "plain": ({}, {}),
    "grouped-heads": ({"num_key_value_heads": 1}, {}),
    "rms-tower": ({}, {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}),
    "padded": ({}, {}),
    "frozen": ({}, {}),
}


def saved_bytes(config, batch, run, frozen):
    """Bytes of all storages that autograd keeps from one forward, without the weights themselves."""
    torch.manual_seed(0)
    model = MultiCoCoForConditionalGeneration(config).train()
    model.to(torch.bfloat16 if "zero_stage" in run else torch.float32)
    if frozen:
        model.model.language_model.requires_grad_(False)
        model.model.vision_tower.requires_grad_(False)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}  # the tensors too, so that no storage is used again

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if run == RUNS["autocast"] else contextlib.nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**make_batch(config, batch)).loss
    total = sum(size for size, _ in kept.values())
    del loss
    return total


@pytest.mark.parametrize("part", ["text", "vision"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_layer_saves_what_the_formula_says(run, kind, part):
    """Two models that differ by one layer: the difference of the counted bytes is that of the estimates."""
    text, vision = KINDS[kind]
    frozen = kind == "frozen"
    flags = {"freeze_llm": True, "freeze_backbone": True} if frozen else {}
    batch = dataclasses.replace(NO_THOUGHTS, padded=kind == "padded")
    counted, expected = [], []
    for num_layers in (1, 2):
        sizes = {"text": dict(text), "vision": dict(vision)}
        sizes[part]["num_hidden_layers"] = num_layers
        config = make_config(**sizes)
        counted.append(saved_bytes(config, batch, run, frozen))
        estimate = estimate_memory(config, batch, **run, **flags)
        expected.append(estimate.language + estimate.vision + estimate.key_values + estimate.casts)
    difference = counted[1] - counted[0]
    # Means and deviations of a layer norm are float32 on CUDA, but bfloat16 on CPU in a bfloat16 model.
    tolerance = 0.01 if part == "vision" and run.get("zero_stage") else 0
    assert expected[1] - expected[0] == pytest.approx(difference, rel=tolerance, abs=0)
    assert (difference == 0) == (frozen and part == "vision")


@pytest.mark.parametrize("padded", [False, True])
def test_sweeps_save_what_the_formula_says(padded):
    """One sweep more saves one pass more over all thoughts but the last; more than change something are not made."""
    batch, counted, expected = dataclasses.replace(NO_THOUGHTS, thoughts=6, padded=padded), [], []
    for num_sweeps in (1, 2, 5, 9):
        config = make_config()
        config.thought_sweeps = num_sweeps
        counted.append(saved_bytes(config, batch, {}, False))
        estimate = estimate_memory(config, batch)
        expected.append(estimate.language + estimate.vision + estimate.key_values)
    assert counted[2] == counted[3]
    assert expected[2] == expected[3]
    for which in (1, 2):
        growth = counted[which] - counted[0]
        assert expected[which] - expected[0] == pytest.approx(growth, rel=0.03)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "6 thoughts",
        "6 thoughts, padded",
        "6 thoughts, checkpointing",
        "LoRA, 6 thoughts, checkpointing",
        "--bf16, 6 thoughts",
        "mostly weights, accumulating",
    ],
)
def test_estimate_is_within_20_percent_of_the_measured_peak(name):
    measured, estimate = benchmark.measure(benchmark.CASES[name])
    assert estimate.peak == pytest.approx(measured, rel=0.2)
    assert estimate.peak <= estimate.total


@pytest.mark.parametrize(
    "flags",
    [{}, {"lora_rank": 4}, {"freeze_llm": True}, {"freeze_backbone": True, "freeze_mlp": True}],
    ids=["all", "lora", "no-llm", "only-llm"],
)
def test_counts_are_those_of_the_model_that_is_trained(flags, tmp_path):
    config = make_config()
    model = MultiCoCoForConditionalGeneration(config)
    estimate = estimate_memory(config, NO_THOUGHTS, **flags)
    assert estimate.num_parameters == sum(weight.numel() for weight in model.parameters())
    model.save_pretrained(tmp_path)
    args = TrainingArguments(output_dir=tmp_path / "out", use_cpu=True, report_to="none")
    whole = {"lora_embeddings": "whole"} if "lora_rank" in flags else {}  # rows need less
    model = load_model(ModelArguments(str(tmp_path), **flags, **whole), args, None)
    assert estimate.num_trainable == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert estimate.weights == 4 * sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", ["1B", "8B"])
def test_parameters_of_internvl3_are_those_published(name):
    batch = BatchShape(1, 1, 8, 8, 0)
    count = estimate_memory(make_internvl3(FAMILY[name]), batch).num_parameters
    assert count / 1e9 == pytest.approx(FAMILY[name].published, rel=0.005)


README_COLUMNS = [("ZeRO-3 offload", 1), ("ZeRO-2", 8), ("ZeRO-3", 8), ("ZeRO-3", 64), ("ZeRO-3, LoRA r=16", 8)]


def rows_of(page, name):
    """Cells behind the first of all table rows that begin with `name`."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [row[1:] for row in rows if row[0].replace("`", "") == name]


@pytest.mark.parametrize("name", FAMILY)
def test_memory_table_in_readme_is_that_of_the_benchmark(name):
    config = make_internvl3(FAMILY[name])
    cells = [benchmark.format_cell(benchmark.estimate_family(config, *column)) for column in README_COLUMNS]
    assert rows_of("README.md", name) == [cells]


def test_table_prints_the_cells_in_readme(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "FAMILY", {"1B": FAMILY["1B"]})
    benchmark.main(benchmark.MemoryArguments(table=True))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    header, rows = lines[2], {line[2]: line for line in lines[4:]}
    cells = [rows[str(devices)][header.index(run)] for run, devices in README_COLUMNS]
    assert rows_of("README.md", "1B") == [cells]


@pytest.mark.parametrize("name", benchmark.CASES)
def test_estimates_in_the_table_of_benchmarks_are_those_of_the_formula(name):
    case = benchmark.CASES[name]
    expected = benchmark.estimate(case, make_config(case.text, case.vision))
    states = expected.weights + expected.gradients + expected.optimizer
    sizes = [f"{value / 2**20:.2f}" for value in (states, expected.total, expected.peak)]
    assert [row[:3] for row in rows_of("docs/figures.md", name)] == [sizes]


def test_zero_stages_divide_what_they_shard():
    config, batch = make_config(), BatchShape(1, 1, 8, 8, 0)
    one = {stage: estimate_memory(config, batch, bf16=True, zero_stage=stage) for stage in (1, 2, 3)}
    eight = {stage: estimate_memory(config, batch, bf16=True, zero_stage=stage, num_devices=8) for stage in (1, 2, 3)}
    divided = {1: {"optimizer"}, 2: {"optimizer", "gradients"}, 3: {"optimizer", "gradients", "weights"}}
    for stage, parts in divided.items():
        for part in ("weights", "gradients", "optimizer"):
            whole, shard = getattr(one[stage], part), getattr(eight[stage], part)
            assert shard == pytest.approx(whole / 8 if part in parts else whole, rel=1e-4)
    offload = estimate_memory(config, batch, bf16=True, zero_stage=3, offload=True, num_devices=8)
    assert (offload.weights, offload.gradients, offload.optimizer) == (0, 0, 0)
    assert offload.host == pytest.approx(18 * offload.num_parameters / 8, rel=1e-4)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_thoughts_leave_whole_gradients_pending_in_every_zero_stage(zero_stage):
    config, run = make_config(), dict(bf16=True, zero_stage=zero_stage, num_devices=64)
    assert estimate_memory(config, BatchShape(1, 1, 8, 8, 0), **run).pending == 0
    layers = sum(p.numel() for p in MultiCoCoForConditionalGeneration(config).model.language_model.layers.parameters())
    pending = estimate_memory(config, BatchShape(1, 1, 8, 8, 2), **run).pending
    assert pending == 2 * (layers + config.text_config.hidden_size)


def test_the_pause_control_runs_one_pass():
    batch = BatchShape(1, 1, 8, 8, 4)
    assert estimate_memory(make_config(mode="pause"), batch).key_values == 0
    assert estimate_memory(make_config(mode="pause_loop"), batch).key_values > 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"zero_stage": 4}, "`zero_stage` is 4"),
        ({"offload": True, "zero_stage": 2}, "`offload` needs `zero_stage` 3"),
        ({"num_devices": 0}, "`num_devices` is 0"),
        ({"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True}, "All parts are frozen"),
    ],
    ids=["stage", "offload", "devices", "frozen"],
)
def test_a_setting_that_cannot_be_is_one_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(make_config(), NO_THOUGHTS, **kwargs)


def test_a_shape_that_cannot_be_is_one_error():
    with pytest.raises(ValueError, match="`label_tokens` is 0, expected an integer of at least 1"):
        BatchShape(1, 1, 8, 0, 0)


# --- the flag of train.py ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Boards, and a start model without its weights: who reads them fails."""
    folder = tmp_path_factory.mktemp("memory")
    prepare(folder / "trails", num_train=12, num_val=1)
    make_start_model(folder / "start")
    for path in (folder / "start").glob("*.safetensors"):
        path.unlink()
    return folder


def make_dataset(folder, processor, **curriculum):
    records = load_records(folder / "trails" / "train.jsonl")
    return StageDataset(records, processor, CurriculumArguments(c_thought=1, max_latent_stage=2, **curriculum))


@pytest.fixture(scope="module")
def trails_processor(folder):
    return MultiCoCoProcessor.from_pretrained(folder / "start")


@pytest.mark.parametrize("batch_size", [1, 5])
def test_worst_batches_have_the_width_of_the_widest_collated_ones(folder, trails_processor, batch_size):
    dataset, collator = make_dataset(folder, trails_processor), ReasoningCollator(trails_processor)
    for stage, shape in enumerate(worst_batches(dataset, batch_size)):
        dataset.set_stage(stage)
        samples = sorted(
            (dataset[index] for index in range(len(dataset))), key=lambda sample: -len(sample["input_ids"])
        )
        batch = collator(samples[:batch_size])
        width = shape.tiles * dataset.num_image_token + shape.text_tokens + shape.thoughts + shape.label_tokens
        assert (shape.samples, width) == batch["input_ids"].shape
        assert shape.samples * shape.tiles == len(batch["pixel_values"])
        assert shape.label_tokens == max(sum(label != -100 for label in sample["labels"]) for sample in samples)
        assert shape.thoughts == stage if stage < 3 else 2  # the final stage has no more thoughts, and no step


def test_mixed_stages_are_counted_with_the_steps_of_the_earliest(folder, trails_processor):
    plain = worst_batches(make_dataset(folder, trails_processor), 4)
    mixed = worst_batches(make_dataset(folder, trails_processor, mix="linear"), 4)
    assert [shape.label_tokens for shape in mixed] == [plain[0].label_tokens] * len(plain)
    assert [shape.thoughts for shape in mixed] == [shape.thoughts for shape in plain]


def test_the_worst_batch_is_that_of_the_longest_texts_too(processor):
    """In the last stage steps are in no sample, but the step loss feeds them."""
    rows = [("Where is it, and what is it, please tell me now?", "a"), ("Where?", "go up and up and left " * 9)]
    records = [
        {"id": number, "images": [], "question": question, "steps": [step, step], "answer": "red"}
        for number, (question, step) in enumerate(rows)
    ]
    rules = CurriculumArguments(c_thought=1, max_latent_stage=3, final_stage=False, step_loss_weight=1.0)
    dataset = StageDataset(records, processor, rules)
    dataset.set_stage(3)
    texts = ReasoningCollator(processor)([dataset[1]])["step_ids"]
    shape = worst_batches(dataset, 1)[3]
    assert shape.step_labels == (texts != -100).sum()
    assert shape.step_tokens == 3 * texts.shape[2]  # a thought for the last token of each text


@pytest.mark.parametrize("flag", ["--estimate_memory", "--dry_run"])
def test_train_prints_the_worst_stage_and_stops_before_loading(folder, trails_processor, capsys, flag):
    arguments = ["--model_name_or_path", folder / "start", "--train_file", folder / "trails" / "train.jsonl"]
    arguments += ["--output_dir", folder / "out", "--use_cpu", "--report_to", "none", flag]
    arguments += ["--c_thought", 1, "--max_latent_stage", 2, "--per_device_train_batch_size", 3]
    arguments += ["--gradient_accumulation_steps", 2, "--activation_checkpointing"]
    assert train.main([str(argument) for argument in arguments]) is None
    config = MultiCoCoConfig.from_pretrained(folder / "start")
    shapes = worst_batches(make_dataset(folder, trails_processor), 3)
    estimates = [estimate_memory(config, shape, activation_checkpointing=True, accumulate=True) for shape in shapes]
    worst = max(estimates, key=lambda estimate: estimate.peak)
    printed = {}
    dataset, lengths = make_dataset(folder, trails_processor), []
    for stage in range(4):
        dataset.set_stage(stage)
        lengths += [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    out = capsys.readouterr().out
    assert (f"longest sample: {max(lengths)} tokens" in out) == (flag == "--dry_run")
    for line in out.splitlines():
        words = line.rsplit(maxsplit=2)
        if len(words) == 3 and words[2] == "MiB":
            printed[words[0]] = float(words[1])
    expected = {part: getattr(worst, part) for part in PARTS} | {"sum of the parts": worst.total, "peak": worst.peak}
    assert printed == {name: pytest.approx(value / 2**20, abs=0.06) for name, value in expected.items()}
    assert not list((folder / "out").glob("*"))
