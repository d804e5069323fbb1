"""Records, curriculum and batches: the original program's data case by case, and one clear error for each defect."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import CHECKPOINT, GOLDEN
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from reference import reference_loss, widened
from torch.utils.data import DataLoader
from transformers import AddedToken, AutoTokenizer

from multicoco import MultiCoCoProcessor
from multicoco.configuration_multicoco import BLOCK_MODES, MODES
from multicoco.curriculum import CurriculumArguments, compose, draw_stage, draw_surplus
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.modeling_internvl_chat import count_positions
from multicoco.records import load_records, question_text


COCONUT = GOLDEN / "coconut"
CASES = json.loads((COCONUT / "dataset_cases.json").read_text())
COLLATIONS = json.loads((COCONUT / "collator_cases.json").read_text())
SAMPLES = CASES["base_samples"]
START, LATENT, END = (CASES["token_ids"][name] for name in ("start", "latent", "end"))


# --- the original program ----------------------------------------------------------------------------------------


def setting_name(case):
    return "-".join(str(case[name]) for name in ("mode", "scheduled_stage", "max_latent_stage", "c_thought")) + (
        "-padded" if case["pad_latent_to_max"] else ""
    )


def golden_curriculum(case):
    mode = case.get("mode", "coconut").removesuffix("_no_markers").removesuffix("_with_markers")
    return CurriculumArguments(
        mode=mode,
        c_thought=max(case["c_thought"], 1),  # the original writes its mode without thoughts as 0
        max_latent_stage=case["max_latent_stage"],
        pad_latent_to_max=case["pad_latent_to_max"],
    )


def golden_compose(case, sample, stage, is_prompt=False):
    curriculum = golden_curriculum(case)
    question, steps, answer = (sample[f"{name}_tokenized"] for name in ("question", "steps", "answer"))
    num_thoughts, num_gone = curriculum.counts(len(steps), stage)
    if is_prompt:
        steps, answer = [], []
    has_markers = not case.get("no_special_marker", False)
    block_ids = (START, LATENT, END) if has_markers else (None, LATENT, None)
    if "mode" in case and not case["mode"].endswith("_markers"):  # those two are no modes of ours, but can be composed
        assert curriculum.has_block == has_markers
        num_thoughts = num_thoughts if curriculum.has_block else None
    return compose(question, steps[num_gone:], answer, num_thoughts, block_ids)


@pytest.mark.parametrize("case", CASES["train_cases"], ids=setting_name)
def test_training_samples_equal_the_original(case):
    assert len(case["outputs"]) == len(SAMPLES) == 7
    for sample, expected in zip(SAMPLES, case["outputs"], strict=True):
        input_ids, labels = golden_compose(case, sample, case["scheduled_stage"])
        assert input_ids == expected["input_ids"]
        assert labels == expected["labels"]


def test_golden_data_holds_the_modes():
    modes = {case["mode"] for case in CASES["train_cases"]}
    assert modes == {"coconut", "cot", "no_cot", "no_thoughts", "coconut_no_markers"}


def test_answer_only_samples_can_have_markers():
    case = next(case for case in CASES["train_cases"] if case["mode"] == "no_cot")
    with_markers = {**case, "mode": "no_cot_with_markers", "no_special_marker": False}
    for sample, expected in zip(SAMPLES, case["outputs"], strict=True):
        length = len(sample["question_tokenized"])
        input_ids, labels = golden_compose(with_markers, sample, case["scheduled_stage"])
        assert input_ids == expected["input_ids"][:length] + [START, END] + expected["input_ids"][length:]
        assert labels == [-100, -100] + expected["labels"]


TRAINED = {setting_name(case): case["outputs"] for case in CASES["train_cases"]}


def asks_otherwise(asked, trained):
    return asked["input_ids"].count(LATENT) != trained["input_ids"].count(LATENT)


@pytest.mark.parametrize("case", CASES["question_cases"], ids=setting_name)
def test_prompts_equal_the_original_except_where_it_trains_otherwise(case):
    stage = case["scheduled_stage"]
    for sample, asked, trained in zip(SAMPLES, case["outputs"], TRAINED[setting_name(case)], strict=True):
        input_ids, _ = golden_compose(case, sample, stage, is_prompt=True)
        assert input_ids.count(LATENT) == trained["input_ids"].count(LATENT)
        assert trained["input_ids"][: len(input_ids)] == input_ids
        assert (input_ids != asked["input_ids"]) == asks_otherwise(asked, trained)


def test_the_original_asks_otherwise_only_for_short_records_without_padding():
    pairs = differing = 0
    for case in CASES["question_cases"]:
        if case["mode"] != "coconut":
            continue
        for sample, asked, trained in zip(SAMPLES, case["outputs"], TRAINED[setting_name(case)], strict=True):
            num_steps, stage = len(sample["steps_tokenized"]), case["scheduled_stage"]
            is_short = num_steps < stage <= case["max_latent_stage"] and not case["pad_latent_to_max"]
            assert asks_otherwise(asked, trained) == is_short
            pairs, differing = pairs + 1, differing + is_short
    assert (pairs, differing) == (224, 28)  # of the README's 448 and 54; the others are kept apart


@pytest.mark.parametrize("case", CASES["uniform_prob_1_cases"], ids=lambda case: f"c{case['c_thought']}")
@pytest.mark.parametrize("scheduled", [0, 2], ids=["stage_0", "stage_2"])
def test_uniform_mixing_draws_exactly_the_outputs_of_the_original(case, scheduled):
    curriculum = golden_curriculum(case)
    curriculum.mix = "uniform"
    for index, expected in enumerate(case["samples"]):
        sample = next(sample for sample in SAMPLES if sample["idx"] == expected["idx"])
        stages = {draw_stage(curriculum, scheduled, expected["n_steps"], (0, epoch, index)) for epoch in range(150)}
        ours = {json.dumps(golden_compose(case, sample, stage)) for stage in stages}
        theirs = {json.dumps([item["input_ids"], item["labels"]]) for item in expected["outputs_by_random_stage"]}
        assert ours == theirs


@pytest.fixture(scope="module")
def golden_collator():
    tokenizer = AutoTokenizer.from_pretrained(COCONUT / "tokenizer")
    collator = ReasoningCollator(SimpleNamespace(tokenizer=tokenizer))
    assert (collator.latent_token_id, collator.pad_token_id) == (LATENT, COLLATIONS["token_ids"]["pad"])
    return collator


@pytest.mark.parametrize("case", COLLATIONS["cases"], ids=lambda case: case["name"])
def test_batches_equal_the_original(golden_collator, case):
    before = json.dumps(case["features"])
    batch = golden_collator(case["features"])
    expected = case["output"]
    for name in {"input_ids", "attention_mask", "labels"} & set(expected):
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == expected[name], name
    assert ("labels" in batch) == ("labels" in expected)
    assert json.dumps(case["features"]) == before  # the original changes its inputs
    if "position_ids" in expected:
        mask = batch["attention_mask"]
        positions = count_positions(None, mask, mask.shape[1])
        assert positions[mask.bool()].tolist() == torch.tensor(expected["position_ids"])[mask.bool()].tolist()


# --- curriculum --------------------------------------------------------------------------------------------------


def test_schedule_is_a_function_of_the_epoch():
    curriculum = CurriculumArguments(epochs_stage_0=2, epochs_per_stage=3, max_latent_stage=2)
    assert [curriculum.stage(epoch) for epoch in range(14)] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert curriculum.num_epochs == 11
    assert [curriculum.num_thoughts(stage) for stage in range(4)] == [0, 2, 4, 4]
    assert CurriculumArguments(epochs_stage_0=0).stage(0) == 1
    assert CurriculumArguments(final_stage=False, max_latent_stage=2).last_stage == 2


@pytest.mark.parametrize(("first", "stages"), [(1, [1, 1, 2, 2, 3, 3]), (2, [2, 2, 3, 3]), (3, [3, 3])])
def test_stages_between_stage_0_and_the_first_latent_one_are_left_out(first, stages):
    settings = dict(epochs_stage_0=1, epochs_per_stage=2, max_latent_stage=2, first_latent_stage=first)
    curriculum = CurriculumArguments(**settings)
    assert [curriculum.stage(epoch) for epoch in range(curriculum.num_epochs)] == [0, *stages]
    assert curriculum.stage(curriculum.num_epochs) == 3
    for mode in ("cot", "no_cot"):  # as many epochs, all at stage 0
        other = CurriculumArguments(**settings, mode=mode)
        assert [other.stage(epoch) for epoch in range(other.num_epochs)] == [0] * curriculum.num_epochs


@pytest.mark.parametrize("mode", MODES)
def test_all_modes_train_equally_long(mode):
    curriculum, coconut = CurriculumArguments(mode=mode), CurriculumArguments()
    assert curriculum.num_epochs == coconut.num_epochs == 15
    has_stages = mode not in ("cot", "no_cot")
    expected = [coconut.stage(epoch) if has_stages else 0 for epoch in range(15)]
    assert [curriculum.stage(epoch) for epoch in range(15)] == expected
    with_block = mode in BLOCK_MODES
    assert curriculum.num_thoughts(2) == (4 if with_block else None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "plain"},
        {"mix": "often"},
        {"reset_optimizer_every": "day"},
        {"c_thought": 0},
        {"max_latent_stage": -1},
        {"epochs_per_stage": 0},
        {"epochs_stage_0": -1},
        {"mix_prob": 1.5},
        {"first_latent_stage": 0},
        {"first_latent_stage": 5},  # stages are 0 to 4
        {"step_loss_weight": -1.0},
        {"step_loss_weight": float("nan")},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_settings_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"`--{name}` must be .*{value}"):
        CurriculumArguments(**wrong)


def test_surplus_that_could_not_be_drawn_is_refused():
    with pytest.raises(ValueError, match="`--draw_surplus` is true, but `--pad_latent_to_max` false"):
        CurriculumArguments(draw_surplus=True, pad_latent_to_max=False)
    CurriculumArguments(draw_surplus=True, pad_latent_to_max=False, final_stage=False)


def draws(stage, count=3000, num_steps=4, **kwargs):
    curriculum = CurriculumArguments(**kwargs)
    return [draw_stage(curriculum, stage, num_steps, (7, 1, index)) for index in range(count)]


def shares(values):
    return [values.count(stage) / len(values) for stage in range(max(values) + 1)]


def test_without_mixing_every_sample_has_the_scheduled_stage():
    assert set(draws(2, count=50)) == {2}


def test_linear_mixing_weighs_stages_by_i_plus_1():
    assert shares(draws(3, mix="linear")) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.03)


def test_uniform_mixing_weighs_the_steps_of_the_record_equally():
    assert shares(draws(1, mix="uniform")) == pytest.approx([0.2] * 5, abs=0.03)


def test_uniform_mixing_without_a_final_stage_never_takes_its_form():
    """A stage beyond `max_latent_stage` is the final one's form: thoughts, and no written step."""
    settings = {"mix": "uniform", "max_latent_stage": 2, "num_steps": 6}
    assert shares(draws(1, **settings, final_stage=False)) == pytest.approx([1 / 3] * 3, abs=0.03)
    assert max(draws(1, **settings)) == 6


def test_mixing_probability_keeps_the_other_samples_as_scheduled():
    assert shares(draws(1, mix="linear", mix_prob=0.3))[0] == pytest.approx(0.3 / 3, abs=0.03)
    assert set(draws(2, count=50, mix="linear", mix_prob=0.0)) == {2}


@pytest.mark.parametrize("mix", ["none", "linear"])
def test_mixing_never_exceeds_the_scheduled_stage(mix):
    for stage in range(5):
        assert max(draws(stage, count=200, num_steps=6, mix=mix)) == stage


@pytest.mark.parametrize("mode", ["cot", "no_cot"])
def test_modes_without_stages_are_not_mixed(mode):
    assert set(draws(0, count=20, mode=mode, mix="uniform")) == {0}


def test_draws_depend_on_seed_epoch_and_index():
    curriculum = CurriculumArguments(mix="linear")
    rows = [
        [draw_stage(curriculum, 3, 4, (seed, epoch, index)) for index in range(30)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert rows[0] == rows[3]
    assert len({tuple(row) for row in rows}) == 3


@pytest.mark.parametrize("final_stage", [True, False], ids=["final_stage", "no_final_stage"])
def test_every_surplus_of_at_least_one_group_is_drawn_in_the_last_stage_alone(final_stage):
    settings = dict(c_thought=2, max_latent_stage=5, final_stage=final_stage, without_steps="thoughts")
    drawing, plain = CurriculumArguments(**settings, draw_surplus=True), CurriculumArguments(**settings)
    for num_steps in range(8):
        for stage in range(drawing.last_stage + 1):
            most, _ = drawing.counts(num_steps, stage)
            keys = [(7, 1, index) for index in range(150)]
            drawn = {draw_surplus(drawing, stage, num_steps, most, key) for key in keys}
            surplus = {2 * groups for groups in range(num_steps + 1, 6)} if stage == drawing.last_stage else set()
            assert drawn == (surplus or {most})
            assert draw_surplus(plain, stage, num_steps, most, keys[0]) == most


def test_surplus_is_drawn_by_seed_epoch_and_index_alone_and_apart_from_the_stage():
    curriculum = CurriculumArguments(draw_surplus=True, max_latent_stage=6, mix="linear", c_thought=1)
    rows = [
        [draw_surplus(curriculum, 7, 1, 6, (seed, epoch, index)) for index in range(300)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert rows[0] == rows[3]
    assert len({tuple(row) for row in rows}) == 3
    assert shares(rows[0])[2:] == pytest.approx([0.2] * 5, abs=0.09)
    stages = [draw_stage(curriculum, 7, 1, (0, 0, index)) for index in range(300)]
    pairs = {(stage, number) for stage, number in zip(stages, rows[0], strict=True) if stage == 7}
    assert len(pairs) == 5  # of the samples at the last stage too


# --- records -----------------------------------------------------------------------------------------------------


def picture(width=28, height=28, colour=(200, 30, 60)):
    return Image.new("RGB", (width, height), colour)


def png(**kwargs):
    buffer = io.BytesIO()
    picture(**kwargs).save(buffer, format="PNG")
    return buffer.getvalue()


def record(number=0, **fields):
    return {
        "id": f"r{number}",
        "images": ["a.png"],
        "question": "Where does it end?",
        "steps": ["go up", "go left"],
        "answer": "red",
        **fields,
    }


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures, of 1 and 4 tiles."""
    data = tmp_path / "data"
    data.mkdir()
    picture().save(data / "a.png")
    picture(90, 30, (10, 160, 90)).save(data / "b.png")
    picture().save(tmp_path / "outside.png")
    return data


def write(folder, rows, name="train.jsonl"):
    path = folder / name
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_files_of_records_are_read_with_images_relative_to_them(folder, name):
    rows = [record(0), record(1, images=["a.png", "b.png"], choices=["red", "blue"], answers=["red", "crimson"])]
    records = load_records(write(folder, rows, name))
    assert [item["id"] for item in records] == ["r0", "r1"]
    assert records[1] == {**rows[1], "images": [str(folder / "a.png"), str(folder / "b.png")]}


def test_lines_end_at_newlines_only(folder):
    path = folder / "train.jsonl"
    text = json.dumps(record(question="one\u2028two\x85three"), ensure_ascii=False)
    path.write_text("\ufeff" + text + "\r\n\n" + json.dumps(record(1)), encoding="utf-8", newline="")
    assert [item["question"] for item in load_records(path)] == ["one\u2028two\x85three", "Where does it end?"]


def test_records_without_images_or_ids_are_fine(folder):
    rows = [{"question": "1 + 1?", "steps": ["add"], "answer": "2"} for _ in range(2)]
    records = load_records(write(folder, rows))
    assert [item["id"] for item in records] == [0, 1]
    assert all(item["images"] == [] for item in records)


@pytest.mark.parametrize("field", ["images", "image"])
def test_a_single_image_may_stand_alone(folder, field):
    row = {name: value for name, value in record().items() if name != "images"} | {field: "a.png"}
    assert load_records(write(folder, [row]))[0]["images"] == [str(folder / "a.png")]


DEFECTS = {
    "missing_question": (record(question=None), "question", "Fill it in"),
    "blank_answer": (record(answer="  "), "answer", "Fill it in"),
    "answer_of_wrong_type": (record(answer=3), "answer", "Fill it in"),
    "steps_of_wrong_type": (record(steps="go up"), "steps", "Split or fill it in"),
    "blank_step": (record(steps=["go up", ""]), "steps", "fill it in"),
    "empty_steps": (record(steps=[]), "steps", "--mode no_cot"),
    "choices_of_wrong_type": (record(choices=[1, 2]), "choices", "fill it in"),
    "missing_image": (record(images=["none.png"]), "images", "relative to the file"),
    "image_written_out_as_text": (record(images=["data:image/png;base64," + "A" * 5000]), "images", "does not exist"),
    "image_of_wrong_type": (record(images=[3]), "images", "expected a path"),
    "path_leaving_the_folder": (record(images=["../outside.png"]), "images", "--allow_outside"),
    "thought_in_question": (record(question="a <|latent|>"), "question", "Remove or rephrase"),
    "marker_in_step": (record(steps=["<|end-latent|>"]), "steps", "Remove or rephrase"),
    "visual_token_in_answer": (record(answer="<IMG_CONTEXT>"), "answer", "Remove or rephrase"),
    "placeholder_in_choice": (record(choices=["<image>"]), "choices", "Remove or rephrase"),
    "end_of_turn_in_step": (record(steps=["a<|im_end|>"]), "steps", "Remove or rephrase"),
    "more_placeholders_than_images": (record(question="<image><image>"), "question", "one per image"),
    "fewer_placeholders_than_images": (record(question="<image>", images=["a.png"] * 2), "question", "one per image"),
}


@pytest.mark.parametrize(("row", "field", "cure"), DEFECTS.values(), ids=DEFECTS.keys())
def test_a_defect_is_one_error_with_id_field_and_cure(folder, row, field, cure):
    with pytest.raises(ValueError, match="bad") as error:
        load_records(write(folder, [record(1), {**row, "id": "bad"}]))
    assert "'bad'" in str(error.value)
    assert f"`{field}`" in str(error.value)
    assert cure in str(error.value)


IN_TURN = [  # what is reported, and what mends it
    ("`id` is", {"id": "r"}),
    ("`question` is", {"question": "<|latent|>"}),
    ("`answer` is", {"answer": "<image>"}),
    ("`steps` is", {"steps": ["<image>"]}),
    ("`choices` is", {"choices": ["<image>"]}),
    ("`answers` is", {"answers": []}),
    ("`rationales` is", {"rationales": [["up"]]}),
    ("has both", {"rationales": None}),
    ("`extra` is", {"extra": {}}),
    ("`question` contains", {"question": "<image><image>"}),
    ("`answer` contains", {"answer": "red"}),
    ("`steps` contains", {"steps": []}),
    ("`choices` contains", {"choices": []}),
    ("`images` names", {"images": ["a.png"]}),
    ("`question` has 2", {"question": "Why?"}),
]


def test_a_record_with_every_defect_is_mended_one_message_after_the_other(folder):
    row = {"id": True, "question": " ", "answer": 3, "steps": "up", "choices": [1], "answers": "red", "extra": []}
    row |= {"rationales": ["up"], "images": ["none.png"]}
    for message, mended in IN_TURN:
        with pytest.raises(ValueError, match=message):
            load_records(write(folder, [row]), needs_steps=False)
        row |= mended
    assert load_records(write(folder, [row]), needs_steps=False)[0]["id"] == "r"


@pytest.mark.parametrize("row", [5, "text", None, ["a"]], ids=["number", "string", "null", "list"])
def test_a_record_that_is_no_object_is_named(folder, row):
    with pytest.raises(ValueError, match="Record 1: is a .*expected an object"):
        load_records(write(folder, [record(1), row]))


@pytest.mark.parametrize("value", [True, 1.5, ["x"]], ids=["bool", "float", "list"])
def test_an_id_of_wrong_type_is_named(folder, value):
    with pytest.raises(ValueError, match="Record 0: `id` is .*expected a string or an integer"):
        load_records(write(folder, [record(id=value)]))


def test_a_double_id_is_named(folder):
    with pytest.raises(ValueError, match="'r0': `id` stands twice"):
        load_records(write(folder, [record(0), record(0)]))


FILES = {
    "not_json_line": ("x.jsonl", b'{"id": 1}\n{"id": ', "line 2: not valid JSON.*one record a line"),
    "not_json": ("x.json", b"[{]", "not valid JSON"),
    "not_a_list": ("x.json", b'{"id": 1}', "holds a dict, expected a list of records"),
    "empty_lines": ("x.jsonl", b"\n\n", "no usable record"),
    "empty_list": ("x.json", b"[]", "no usable record"),
    "not_utf8": ("x.jsonl", b"\xff\xfe\x00", "not UTF-8"),
}


@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES.keys())
def test_a_broken_file_is_named(folder, name, content, message):
    if name == "x.jsonl":
        content = content.replace(b'{"id": 1}', json.dumps(record()).encode())
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_records(folder / name)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["none.jsonl", "no_folder"])
def test_a_missing_source_is_named(folder, name):
    with pytest.raises(ValueError, match=name):
        load_records(folder / name)


def test_records_without_steps_pass_where_none_are_needed(folder):
    assert load_records(write(folder, [record(steps=[])]), needs_steps=False)[0]["steps"] == []


def test_outside_images_pass_where_allowed(folder):
    path = write(folder, [record(images=["../outside.png"])])
    assert load_records(path, allow_outside=True)[0]["images"] == [str(folder.parent / "outside.png")]


def test_bad_records_are_listed_and_left_out(folder, caplog):
    caplog.set_level("WARNING")
    rows = [{**row, "id": name} for name, (row, _, _) in DEFECTS.items()]
    path = write(folder, [record(0), *rows, record(0), record(1)])
    path.write_text(path.read_text() + "\n{broken")
    records = load_records(path, skip_bad_records=True)
    assert [item["id"] for item in records] == ["r0", "r1"]
    assert f"{len(DEFECTS) + 2} records were left out" in caplog.text
    for text in (*map(repr, DEFECTS), "stands twice", "not valid JSON"):
        assert text in caplog.text


# --- other sources -----------------------------------------------------------------------------------------------


def test_pictures_and_bytes_are_taken_as_they_are(processor):
    records = load_records([record(0, images=[picture()]), record(1, images=png(width=90, height=30))])
    dataset = StageDataset(records, processor, CurriculumArguments())
    assert [dataset[index]["num_patches_list"] for index in range(2)] == [[1], [4]]
    batch = ReasoningCollator(processor)([dataset[0], dataset[1]])
    assert batch["pixel_values"].shape == (5, 3, 28, 28)


def hub_dataset(features=None, **columns):
    data = {"key": ["x", "y"], "ask": ["Where?", "Who?"], "why": [["up"], ["left", "down"]], "answer": ["red", "blue"]}
    features = {
        "key": Value("string"),
        "ask": Value("string"),
        "why": List(Value("string")),
        "answer": Value("string"),
        **(features or {}),
    }
    return Dataset.from_dict({**data, **columns}, features=Features(features))


MAPPING = {"id": "key", "question": "ask", "steps": "why"}


def test_data_sets_are_read_through_a_column_mapping_with_lazy_images(processor):
    broken = {"bytes": b"no image", "path": None}
    good = {"bytes": png(width=90, height=30), "path": None}
    source = hub_dataset({"shot": ImageFeature()}, shot=[good, broken])
    records = load_records(source, columns={**MAPPING, "images": "shot"})  # does not decode the broken one
    assert [item["id"] for item in records] == ["x", "y"]
    assert records[0]["images"][0].open().size == (90, 30)
    with pytest.raises(ValueError, match="'y': `images` number 0 cannot be read"):
        StageDataset(records, processor, CurriculumArguments())


def test_data_sets_with_lists_of_images_and_with_none(processor):
    small, wide = ({"bytes": png(**size), "path": None} for size in ({}, {"width": 90, "height": 30}))
    source = hub_dataset({"images": List(ImageFeature())}, images=[[small, wide], []])
    records = load_records(DatasetDict({"train": source}), columns=MAPPING)
    dataset = StageDataset(records, processor, CurriculumArguments())
    assert [dataset[index]["num_patches_list"] for index in range(2)] == [[1, 4], []]
    assert ReasoningCollator(processor)([dataset[0], dataset[1]])["num_patches_list"] == [1, 4]
    source = hub_dataset({"image": ImageFeature()}, image=[wide, None])
    assert [len(item["images"]) for item in load_records(source, columns=MAPPING)] == [1, 0]


def test_data_sets_with_paths_are_checked_as_files_are(folder):
    source = hub_dataset({"image": Value("string")}, image=[str(folder / "a.png"), str(folder / "none.png")])
    with pytest.raises(ValueError, match="'y': `images` names .*none.png, which does not exist"):
        load_records(source, columns=MAPPING)


def test_a_wrong_column_mapping_is_named():
    with pytest.raises(ValueError, match="rationale"):
        load_records(hub_dataset(), columns={"steps": "rationale"})
    with pytest.raises(ValueError, match="stepps"):
        load_records(hub_dataset(), columns={"stepps": "why"})


def test_a_split_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"\['test'\], not 'train'"):
        load_records(DatasetDict({"test": hub_dataset()}), columns=MAPPING)


def test_a_folder_with_broken_metadata_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (folder / "metadata.jsonl").write_text("{broken")
    with pytest.raises(ValueError, match="cannot be read as records"):
        load_records(folder)


def test_a_folder_of_images_with_metadata_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{**record(index), "file_name": name} for index, name in enumerate(["a.png", "b.png"])]
    for row in rows:
        del row["images"]
    write(folder, rows, "metadata.jsonl")
    records = load_records(folder)
    assert [item["images"][0].open().size for item in records] == [(28, 28), (90, 30)]
    assert [item["steps"] for item in records] == [["go up", "go left"]] * 2


# --- samples -----------------------------------------------------------------------------------------------------


RICH = [
    record(0),
    record(1, images=["b.png"], steps=["up", "left", "left", "down"], answer="dark blue"),
    record(2, images=["b.png", "a.png"], choices=["red", "blue"], question="Which fits?", steps=["one.", "Two 2"]),
    record(3, images=["a.png", "b.png"], question="Is <image> in <image>?", steps=["yes"]),
    record(4, images=[], question="1 + 1?", steps=["add 1", "get 2", "so 2"], answer="2"),
]


@pytest.fixture
def records(folder):
    return load_records(write(folder, RICH))


@pytest.fixture
def make_dataset(records, processor):
    def make(max_length=None, seed=42, **kwargs):
        return StageDataset(records, processor, CurriculumArguments(**kwargs), seed=seed, max_length=max_length)

    return make


@pytest.mark.parametrize("mode", MODES)
def test_samples_are_the_text_they_stand_for(make_dataset, processor, mode):
    dataset = make_dataset(mode=mode)
    ids = processor.tokenizer.convert_tokens_to_ids
    for stage in range(dataset.curriculum.last_stage + 1):
        dataset.set_stage(stage)
        for index, item in enumerate(dataset.records):
            sample = dataset[index]
            num_thoughts, num_gone = dataset.curriculum.counts(len(item["steps"]), stage)
            body = "".join(step + "\n" for step in item["steps"][num_gone:]) + f"### {item['answer']}<|im_end|>"
            body_ids = processor.tokenizer(body)["input_ids"]
            prompt_ids = dataset.prompt(index, dataset.num_thoughts(index, dataset.stage))["input_ids"]
            assert sample["input_ids"] == prompt_ids + body_ids
            assert sample["labels"] == [-100] * len(prompt_ids) + body_ids
            assert prompt_ids.count(ids("<|latent|>")) == num_thoughts
            assert prompt_ids.count(ids("<|start-latent|>")) == dataset.curriculum.has_block


def test_prompts_equal_the_output_of_the_processor(make_dataset, processor):
    dataset, collator = make_dataset(), ReasoningCollator(processor)
    for index, item in enumerate(dataset.records):
        messages = [{"role": "user", "content": question_text(item)}]
        texts = processor.apply_chat_template([messages], add_generation_prompt=True)
        for stage in (0, 2, 4):
            expected = processor(
                images=[item["images"]],
                text=texts,
                num_thoughts=dataset.curriculum.num_thoughts(stage),
                return_tensors="pt",
            )
            batch = collator.prompts([dataset.prompt(index, dataset.num_thoughts(index, stage))])
            assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
            assert batch.get("num_patches_list", []) == list(expected.get("num_patches_list", []))
            if item["images"]:
                torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=0, rtol=0)


def test_prompts_equal_the_chat_template_with_image_parts(make_dataset, processor):
    dataset = make_dataset()
    content = [{"type": "image", "path": path} for path in dataset.records[1]["images"]]
    content.append({"type": "text", "text": dataset.records[1]["question"]})
    expected = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        num_thoughts=4,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    batch = ReasoningCollator(processor).prompts([dataset.prompt(1, dataset.num_thoughts(1, stage=2))])
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=0, rtol=0)


def test_tiles_follow_the_processor_also_where_its_image_processor_does_not_tile(records):
    processor = MultiCoCoProcessor.from_pretrained(CHECKPOINT)
    processor.image_processor.crop_to_patches = False  # as in the checkpoints in transformers' format
    dataset = StageDataset(records, processor, CurriculumArguments())
    expected = processor(images=[records[1]["images"]], text=["<image>"], return_tensors="pt")
    batch = ReasoningCollator(processor)([dataset[1]])
    assert batch["num_patches_list"] == expected["num_patches_list"].tolist()
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], atol=0, rtol=0)


def test_turned_photographs_are_counted_as_they_are_opened(folder):
    """Like InternVL, nothing turns a photograph by its EXIF: whatever way it comes, its pixels are the file's."""
    processor = MultiCoCoProcessor.from_pretrained(CHECKPOINT)
    processor.image_processor.max_patches = 2
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture(84, 60).save(folder / "turned.jpg", exif=exif)
    picture(84, 60).save(folder / "plain.jpg")
    rows = [record(0, images=["turned.jpg"]), record(1, images=["plain.jpg"])]
    dataset = StageDataset(load_records(write(folder, rows)), processor, CurriculumArguments())
    batch = ReasoningCollator(processor)([dataset[0], dataset[1]])  # cuts them, and raises if the count differs
    assert batch["num_patches_list"] == [1, 1]
    again = processor(images=[(folder / "turned.jpg").read_bytes()], text="<image>", return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"][:1], again["pixel_values"], atol=0, rtol=0)


def test_choices_and_several_images_are_written_into_the_question(records):
    assert question_text(records[2]) == "<image>\n<image>\nWhich fits?\nChoices: red, blue"
    assert question_text(records[3]) == "Is <image> in <image>?"
    assert question_text(records[4]) == "1 + 1?"


def test_the_length_is_the_same_at_every_stage(make_dataset):
    dataset = make_dataset(mix="linear")
    lengths = set()
    for stage in range(5):
        dataset.set_stage(stage, epoch=stage)
        lengths.add((len(dataset), len([dataset[index] for index in range(len(dataset))])))
    assert lengths == {(5, 5)}


def test_stage_0_holds_no_thoughts_unless_mixed_uniformly(make_dataset, processor):
    latent = processor.tokenizer.convert_tokens_to_ids("<|latent|>")
    for mix, has_thoughts in (("none", False), ("linear", False), ("uniform", True)):
        dataset = make_dataset(mix=mix)
        found = False
        for epoch in range(4):
            dataset.set_stage(0, epoch)
            found |= any(latent in dataset[index]["input_ids"] for index in range(len(dataset)))
        assert found == has_thoughts


@pytest.mark.parametrize("mix", ["none", "linear", "uniform"])
def test_the_length_of_a_sample_is_known_whatever_is_drawn(make_dataset, mix):
    dataset, lengths = make_dataset(mix=mix, draw_surplus=True, step_loss_weight=1.0), set()
    for stage in (0, 2, 4):
        for epoch in range(6):
            dataset.set_stage(stage, epoch)
            found = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
            assert [dataset.length(index) for index in range(len(dataset))] == found
            lengths.add((stage, *found))
    assert len({row for row in lengths if row[0] == 4}) > 1
    assert [dataset.num_thoughts(index, 4) for index in range(len(dataset))] == [6] * 5  # it is asked with all


@pytest.mark.parametrize("options", [{}, {"c_thought": 20}], ids=["longest_at_stage_0", "longest_at_a_late_stage"])
def test_max_length_holds_at_every_stage(make_dataset, options):
    dataset = make_dataset(**options)
    longest = 0
    for stage in range(5):
        dataset.set_stage(stage)
        longest = max(longest, *(len(dataset[index]["input_ids"]) for index in range(len(dataset))))
    make_dataset(max_length=longest, **options)
    with pytest.raises(
        ValueError, match=rf"Record 'r\d'.*`steps`.* {longest} tokens.*`max_length` {longest - 1}.*Raise"
    ):
        make_dataset(max_length=longest - 1, **options)


@pytest.fixture
def merging_processor():
    """Its tokenizer has a token that eats the newline before it, so that pieces and whole differ."""
    processor = MultiCoCoProcessor.from_pretrained(CHECKPOINT)
    processor.tokenizer.add_tokens([AddedToken("<note>", lstrip=True, normalized=False)])
    return processor


@pytest.mark.parametrize("bad", [0, 2], ids=["first", "last"])
def test_every_record_is_checked_to_tokenize_in_pieces_as_in_one(merging_processor, bad):
    rows = [record(index, images=[]) for index in range(3)]
    StageDataset(load_records(rows), merging_processor, CurriculumArguments())
    rows[bad]["steps"] = ["go up", "<note> left"]
    with pytest.raises(ValueError, match=f"'r{bad}': `steps` and `answer` tokenize differently.*Strip"):
        StageDataset(load_records(rows), merging_processor, CurriculumArguments())


@pytest.mark.parametrize("content", [b"no image", b"", png()[:20]], ids=["text", "empty", "cut_header"])
def test_an_unreadable_image_stops_before_training(folder, processor, content):
    (folder / "bad.png").write_bytes(content)
    records = load_records(write(folder, [record(0), record(1, images=["bad.png"])]))
    with pytest.raises(ValueError, match="'r1': `images` .*bad.png cannot be read.*Mend the file"):
        StageDataset(records, processor, CurriculumArguments())


def test_skipping_lists_unreadable_long_and_differing_records(folder, merging_processor, caplog):
    caplog.set_level("WARNING")
    (folder / "bad.png").write_bytes(b"no image")
    rows = [
        record(0, images=["bad.png"]),
        record(1),
        record(2, steps=["go up", "<note> left"]),
        record(3, steps=["long " * 500]),
        record(4, images=["b.png"]),
    ]
    records = load_records(write(folder, rows))
    dataset = StageDataset(records, merging_processor, CurriculumArguments(), max_length=800, skip_bad_records=True)
    assert [item["id"] for item in dataset.records] == ["r1", "r4"]
    assert [dataset[index]["num_patches_list"] for index in range(len(dataset))] == [[1], [4]]
    assert all(name in caplog.text for name in ("3 records were left out", "'r0'", "'r2'", "'r3'"))
    with pytest.raises(ValueError, match="No usable record"):
        StageDataset(records[:1], merging_processor, CurriculumArguments(), skip_bad_records=True)


def as_list(features):
    return features


def test_workers_see_a_change_of_stage_and_draw_alike(make_dataset):
    dataset = make_dataset(mix="linear", seed=3, draw_surplus=True, step_loss_weight=1.0)
    loaders = {
        "none": DataLoader(dataset, batch_size=2, collate_fn=as_list),
        "workers": DataLoader(dataset, batch_size=2, collate_fn=as_list, num_workers=2),
        "persistent": DataLoader(dataset, batch_size=2, collate_fn=as_list, num_workers=2, persistent_workers=True),
    }
    epochs = []
    for stage, epoch in ((0, 0), (4, 1), (4, 2)):
        dataset.set_stage(stage, epoch)
        seen = {
            name: [(feature["input_ids"], feature["step_ids"]) for batch in loader for feature in batch]
            for name, loader in loaders.items()
        }
        assert seen["none"] == seen["workers"] == seen["persistent"]
        epochs.append(seen["none"])
    assert epochs[0] != epochs[1] != epochs[2]


# --- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["none", "linear"])
def test_a_batch_is_its_samples_in_one_pass_more_than_thoughts(shared_model, make_dataset, processor, mix):
    dataset, collator = make_dataset(mix=mix, max_latent_stage=2), ReasoningCollator(processor)
    dataset.set_stage(2, epoch=1)
    features = [dataset[index] for index in range(len(dataset))]
    batch = collator(features)
    latent = collator.latent_token_id
    firsts = {row.index(latent) for row in batch["input_ids"].tolist() if latent in row}
    most = max(feature["input_ids"].count(latent) for feature in features)
    assert len(firsts) == 1
    passes = []
    handle = shared_model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    try:
        with torch.no_grad(), widened():
            loss = shared_model(**{**batch, "pixel_values": batch["pixel_values"].double()}).loss
            assert len(passes) == most + 1 == 5
            total = count = 0
            for feature in features:
                single = collator([feature])
                if "pixel_values" in single:
                    single["pixel_values"] = single["pixel_values"].double()
                labels = int((single["labels"] != -100).sum())
                total, count = total + shared_model(**single).loss * labels, count + labels
    finally:
        handle.remove()
    torch.testing.assert_close(loss, total / count, atol=1e-11, rtol=0)


def test_a_batch_equals_the_plain_definition(shared_model, make_dataset, processor):
    dataset = make_dataset(c_thought=1)
    dataset.set_stage(2)
    features = [dataset[index] for index in (1, 4)]
    batch = ReasoningCollator(processor)(features)
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad(), widened():
        loss = shared_model(**batch).loss
        images = [feature["num_patches_list"] for feature in features]
        expected = reference_loss(shared_model, {**batch, "images": images})
    torch.testing.assert_close(loss, expected, atol=1e-11, rtol=0)


def test_prompts_are_padded_on_the_left_and_have_no_labels(make_dataset, processor):
    dataset, collator = make_dataset(), ReasoningCollator(processor)
    batch = collator.prompts([dataset.prompt(index, dataset.num_thoughts(index, 1)) for index in range(len(dataset))])
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "num_patches_list"}
    assert batch["attention_mask"][:, -1].all()
    for index, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        assert ids[mask].tolist() == dataset.prompt(index, dataset.num_thoughts(index, stage=1))["input_ids"]
        assert (ids[~mask] == collator.pad_token_id).all()


def test_a_file_that_has_changed_since_the_count_is_an_error(make_dataset, processor, folder):
    dataset = make_dataset()
    shutil.copy(folder / "b.png", folder / "a.png")
    with pytest.raises(ValueError, match=r"give \[4\] tiles, but gave \[1\].*changed"):
        ReasoningCollator(processor)([dataset[0]])


@pytest.mark.parametrize("dropped", [("images",), ("images", "num_patches_list")], ids=["images", "both"])
def test_samples_without_their_images_are_an_error(make_dataset, processor, dropped):
    sample = {name: value for name, value in make_dataset()[0].items() if name not in dropped}
    with pytest.raises(ValueError, match="`images`.*missing.*remove_unused_columns=False"):
        ReasoningCollator(processor)([sample])


def test_swapped_tile_counts_of_equal_total_are_an_error(make_dataset, processor):
    dataset = make_dataset()
    one, other = dataset[0], dataset[1]
    swapped = [
        {**one, "images": other["images"], "num_patches_list": other["num_patches_list"]},
        {**other, "images": one["images"], "num_patches_list": one["num_patches_list"]},
    ]
    with pytest.raises(ValueError, match="Sample 0: .*visual tokens, but `num_patches_list`"):
        ReasoningCollator(processor)(swapped)


def test_a_thought_before_an_image_is_an_error(make_dataset, processor):
    collator, sample = ReasoningCollator(processor), make_dataset()[0]
    sample["input_ids"] = [sample["input_ids"][0], collator.latent_token_id, *sample["input_ids"][1:]]
    sample["labels"] = [-100, *sample["labels"]]
    with pytest.raises(ValueError, match="Sample 0: a thought stands before an image"):
        collator([sample])
