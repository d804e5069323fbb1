"""The recipes for published data sets: fixtures of their true schemas become records, load, and train."""

import inspect
import io
import json
import math

import pytest
import torch
import yaml
from datasets import Dataset, Features, Sequence, Value
from datasets import Image as ImageFeature
from PIL import Image
from tokenizers import AddedToken

from multicoco import MultiCoCoProcessor, score, train
from multicoco.curriculum import CurriculumArguments
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.metrics import aokvqa as aokvqa_metric
from multicoco.recipes import common
from multicoco.recipes.aokvqa import prepare as aokvqa
from multicoco.recipes.llava_cot import prepare as llava_cot
from multicoco.recipes.m3cot import prepare as m3cot
from multicoco.recipes.scienceqa import prepare as scienceqa
from multicoco.recipes.text_json import prepare as text_json
from multicoco.records import load_records
from multicoco.training.arguments import parse


NUM_ROWS = 12
RECIPES = {"aokvqa": 3, "aokvqa_hub": 3, "m3cot": 8, "scienceqa": 6, "llava_cot": 6, "text_json": None}  # most steps


# --- sentences, clauses, steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("lower case. also lower.", ["lower case.", "also lower."]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("Mr. Smith is here. So is Dr. Lee.", ["Mr. Smith is here.", "So is Dr. Lee."]),
        ("The U.S. flag, e.g. this one.", ["The U.S. flag, e.g. this one."]),
        ("It is 3.5 m. It fits.", ["It is 3.5 m. It fits."]),
        ("1. Look. 2. Think.", ["1. Look.", "2. Think."]),
        ("Step 1. Look at it.\nStep 2. Think.", ["Step 1. Look at it.", "Step 2. Think."]),
        ("first line\n\n  second   line", ["first line", "second line"]),
        ("Wait... what?", ["Wait...", "what?"]),
        (" \n ", []),
    ],
    ids=["marks", "lower", "quotes", "titles", "letters", "unit", "numbers", "steps", "lines", "dots", "empty"],
)
def test_sentences(text, expected):
    assert common.split_sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is wet because it rained all day", ["It is wet", "because it rained all day"]),
        ("The sky is grey, so it may rain soon", ["The sky is grey,", "so it may rain soon"]),
        ("He has a board; he is at sea", ["He has a board;", "he is at sea"]),
        ("The flag is red, white, and blue", ["The flag is red, white, and blue"]),
        ("Look, the man is on a board", ["Look, the man is on a board"]),
    ],
    ids=["because", "comma", "semicolon", "a list", "short"],
)
def test_clauses(text, expected):
    assert common.split_clauses(text) == expected


@pytest.mark.parametrize("max_steps", [1, 2, 3, 9])
def test_steps_lose_nothing_and_are_few(max_steps):
    for text in (
        "A train would not be in the street, nobody waits there with bags for a parcel, and the boy on the board is "
        "busy and does not look up so it must be a cab.",
        "The man waves.  He has bags (two).\nHe waits; a cab comes because he waves!  So it is a cab. Yes. No. 1. Ok.",
        "word",
    ):
        steps = common.to_steps(text, max_steps)
        assert " ".join(steps) == " ".join(text.split())
        assert 1 <= len(steps) <= max_steps
        assert all(step.strip() == step and step for step in steps)
    assert len(common.to_steps("He is wet because it rained all day.", max_steps)) == min(2, max_steps)


def test_the_shortest_neighbours_are_merged():
    assert common.merge_steps(["aaaa", "b", "cc", "dddd"], 3) == ["aaaa", "b cc", "dddd"]
    assert common.merge_steps(["a", "b"], 3) == ["a", "b"]


def test_a_carved_split_takes_whole_groups_and_depends_on_the_seed_alone():
    groups = [f"image{index % 40}" for index in range(100)]
    chosen = common.carve(groups, 10, seed=0)
    held = sum(group in chosen for group in groups)
    assert 10 <= held <= 12
    assert common.carve(reversed(groups), 10, seed=0) == chosen != common.carve(groups, 10, seed=1)
    with pytest.raises(ValueError, match="100 of 100 rows"):
        common.carve(groups, 100, seed=0)


def test_a_folder_appears_only_when_complete_and_no_other_is_replaced(tmp_path):
    with pytest.raises(RuntimeError), common.new_folder(tmp_path / "data", {"data_set": "x"}):
        raise RuntimeError
    assert not (tmp_path / "data").exists()
    with common.new_folder(tmp_path / "data", {"data_set": "x"}) as output:
        (output.folder / "old").touch()
    with common.new_folder(tmp_path / "data", {"data_set": "x"}):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["data", "left_out.jsonl", "settings.json"]
    for name in ("mine", "data"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / "mine" / "thesis.txt").touch()
        with pytest.raises(ValueError, match="did not make"), common.new_folder(tmp_path / name, {"data_set": "y"}):
            pass


# --- fixtures of the true schemas --------------------------------------------------------------------------------


def picture(index: int, form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (48 + index, 40), (index * 20 % 256, 90, 160)).save(file, form)
    return file.getvalue()


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_parquet(folder, split, rows, features):
    (folder / "data").mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, Features(features)).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def aokvqa_row(split: str, index: int) -> dict:
    row = {
        "split": split,
        "image_id": 100 * ("train", "val", "test").index(split) + index // 2,  # two questions an image
        "question_id": f"{split}{index}",
        "question": f"What does man {index} await?",
        "choices": ["cab", "bus ", "boat", f"no {index}"],
        "difficult_direct_answer": index % 4 == 1,
    }
    if split != "test":
        row |= {
            "correct_choice_idx": index % 4,
            "direct_answers": ["taxi"] * 3 + ["cab"] * (4 if index % 2 else 2) + ["it's"] * 3,
            "rationales": ["He waves.", "He waves because he has big bags.", "Bags. Curb. No bus. No boat."],
        }
    return row


def make_aokvqa(folder):
    for split in aokvqa.SPLITS:
        rows = [aokvqa_row(split, index) for index in range(NUM_ROWS)]
        for index in range(NUM_ROWS // 2):
            path = folder / "coco" / f"{split}2017" / f"{rows[2 * index]['image_id']:012}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(rows[2 * index]["image_id"] % 100))
        write_json(folder / "release" / f"aokvqa_v1p0_{split}.json", rows)
    return {"aokvqa_dir": folder / "release", "coco_dir": folder / "coco", "num_dev": 3}


def make_aokvqa_hub(folder):
    texts = Sequence(Value("string"))
    features = {"image": ImageFeature(), "question_id": Value("string"), "question": Value("string"), "choices": texts}
    features |= {"correct_choice_idx": Value("int8"), "direct_answers": Value("string")}
    features |= {"difficult_direct_answer": Value("bool"), "rationales": texts}
    for split in aokvqa.SPLITS:
        rows = []
        for index in range(NUM_ROWS):
            row = aokvqa_row(split, index)
            answers = str(row["direct_answers"]) if "direct_answers" in row else None
            image = {"bytes": picture(row["image_id"] % 100), "path": None}
            row |= {"image": image, "direct_answers": answers}
            rows.append({name: row.get(name) for name in features} | {"rationales": row.get("rationales", [])})
        write_parquet(folder / "hub", {"val": "validation"}.get(split, split), rows, features)
    return {"hub": str(folder / "hub"), "num_dev": 3}


def make_m3cot(folder):
    names = ("id", "category", "image_id", "question", "context", "answer", "rationale", "split", "domain", "topic")
    features = {name: Value("string") for name in names}
    features |= {"choices": Sequence(Value("string")), "image": ImageFeature()}
    for split in ("train", "validation", "test"):
        rows = [
            dict.fromkeys(names, "x")
            | {
                "id": f"{split}-{index}",
                "question": "Which is it?",
                "context": "Look closely." if index % 2 else "",
                "choices": ["rough", "soft", "hard"],
                "answer": "ABC"[index % 3],
                "rationale": "First, it shines.\nSecond, it is wet. Third, it is cold. So it is ice.",
                "image": {"bytes": picture(index, "PNG"), "path": None},
            }
            for index in range(NUM_ROWS)
        ]
        write_parquet(folder / "hub", split, rows, features)
    return {"hub": str(folder / "hub")}


def make_scienceqa(folder):
    texts = ("question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    features = {"image": ImageFeature(), "choices": Sequence(Value("string")), "answer": Value("int8")}
    features |= {name: Value("string") for name in texts}
    for split in ("train", "validation", "test"):
        rows = [
            dict.fromkeys(texts, "x")
            | {
                "question": "Which state is north?",
                "hint": "A map." if index % 2 else "",
                "choices": ["Ohio", "Iowa"],
                "answer": index % 2,
                "lecture": "Maps have norths." if index % 3 else "",
                "solution": "Look at the map. It is on top." if index % 4 else "",
                "image": {"bytes": picture(index, "PNG"), "path": None} if index % 2 else None,
            }
            for index in range(NUM_ROWS + 1)  # of 0 and 12, neither lecture nor solution
        ]
        write_parquet(folder / "hub", split, rows, features)
    return {"hub": str(folder / "hub")}


def llava_cot_answer(caption="A chart.", conclusion="B"):
    texts = ("I count.", caption, "One is red. Two are blue. Three are old. So it is B.", conclusion)
    return "\n\n".join(f"<{tag}> {text} </{tag}>" for tag, text in zip(llava_cot.TAGS, texts, strict=True))


def make_llava_cot(folder):
    rows = []
    for index in range(16):
        image = f"chartqa/train/{index // 2}.png"
        path = folder / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index // 2, "PNG"))
        turns = [
            {"from": "human", "value": f"<image>\nHow many {index}?" if index % 2 else f"How many {index}?"},
            {"from": "gpt", "value": llava_cot_answer(conclusion="B" if index else "B\nor so")},
        ]
        rows.append({"id": "same", "image": image, "conversations": turns * (2 if index == 3 else 1)})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train_file": folder / "train.jsonl", "image_dir": folder / "images", "num_dev": 2, "num_val": 2}


def make_text_json(folder):
    files = {}
    for split in ("train", "val", "test"):
        rows = [
            {
                "question": f"Every a is b{index}. Tom is an a. Is Tom a b{index} or c?",
                "answer": f"Tom is b{index}.",
                "steps": ["Tom is an a.", f"Every a is b{index}.", "So."][: 1 + index % 3],
                "edges": [[0, 1]],
                "root": 0,
            }
            for index in range(NUM_ROWS)
        ]
        files[split] = folder / f"prosqa_{split}.json"
        write_json(files[split], rows)
    return files


MODULES = {"aokvqa": aokvqa, "aokvqa_hub": aokvqa, "m3cot": m3cot, "scienceqa": scienceqa, "llava_cot": llava_cot}
MODULES["text_json"] = text_json


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Of each recipe the fixture goes through `prepare.py`, once: `prepared(name)` gives folder and summary."""
    done = {}

    def prepare(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            arguments = globals()[f"make_{name}"](folder / "raw")
            done[name] = folder / "data", MODULES[name].prepare(folder / "data", **arguments)
        return done[name]

    return prepare


@pytest.fixture(scope="module")
def bytes_processor(trails_start):
    return MultiCoCoProcessor.from_pretrained(trails_start)


def read(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line]


# --- every recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_split_loads_and_composes_at_every_stage(prepared, bytes_processor, name):
    folder, _ = prepared(name)
    curriculum = CurriculumArguments(c_thought=1, max_latent_stage=2)
    collator = ReasoningCollator(bytes_processor)
    counts = json.loads((folder / "settings.json").read_text())["records"]
    assert set(counts) == {path.stem for path in folder.glob("*.jsonl")} - {"left_out"}
    for split, count in counts.items():
        is_train = split.startswith("train")
        records = load_records(folder / f"{split}.jsonl", needs_steps=is_train, needs_answer="test" not in split)
        assert len(records) == count
        for record in records:
            for steps in record.get("rationales", [record["steps"]]):
                assert not is_train or 1 <= len(steps) <= (RECIPES[name] or 99)
            assert (
                not record["choices"]
                or record["answer"] is None
                or record["answer"] in map(str.strip, record["choices"])
            )
        if "direct" in split:
            continue
        dataset = StageDataset(records[:2], bytes_processor, curriculum)
        for stage in range(curriculum.last_stage + 1):
            dataset.set_stage(stage)
            indices = range(len(dataset))
            batch = collator.prompts([dataset.prompt(index, dataset.num_thoughts(index, stage)) for index in indices])
            if records[0]["answer"] is not None:
                batch = collator([dataset[index] for index in range(len(dataset))])
            assert len(batch["input_ids"]) == len(dataset)


@pytest.mark.parametrize("name", ["aokvqa", "m3cot", "scienceqa", "llava_cot", "text_json"])
def test_the_recipes_settings_train_through_two_stages_and_score(prepared, trails_start, tmp_path, name):
    """The recipe's own YAML, with the tiny model, its files and few steps in place of what it names."""
    folder, _ = prepared(name)
    settings = yaml.safe_load((common.Path(common.__file__).parent / name / "coconut.yaml").read_text())
    assert settings["eval_file"].endswith(("dev.jsonl", "val.jsonl"))
    assert name != "aokvqa" or settings["eval_file"].endswith("dev.jsonl")
    del settings["eval_file"]
    rows = [row | {"images": [str(folder / image) for image in row["images"]]} for row in read(folder, "train")[:4]]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings |= {
        "model_name_or_path": str(trails_start),
        "train_file": str(tmp_path / "few.jsonl"),
        "allow_outside": True,
        "output_dir": str(tmp_path / "out"),
        "max_latent_stage": 1,
        "final_stage": False,
        "epochs_per_stage": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    trainer = train.main([str(tmp_path / "settings.yaml")])
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["curriculum/stage"] for entry in log] == sorted(entry["curriculum/stage"] for entry in log)
    assert {entry["curriculum/stage"] for entry in log} == {0, 1}
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in log)
    metrics = common.Path(common.__file__).parent.parent / "metrics"
    metric = {"aokvqa": f"{metrics / 'aokvqa.py'}:multiple_choice"}.get(name, "exact")
    flags = ["--model", tmp_path / "out", "--data", tmp_path / "few.jsonl", "--output_dir", tmp_path / "scores"]
    flags += ["--allow_outside", "--num_thoughts", "0", "2", "--max_new_tokens", "8", "--metric", metric]
    rows = score.main([str(flag) for flag in flags])
    assert [(row["num_thoughts"], row["scored"], row["stage"]) for row in rows] == [(0, 4, 1), (2, 4, 1)]
    assert (tmp_path / "scores" / "scores.png").is_file()


def test_both_settings_of_aokvqa_differ_in_the_checkpoint_only():
    folder = common.Path(aokvqa.__file__).parent
    first, second = (yaml.safe_load((folder / name).read_text()) for name in ("coconut.yaml", "coconut_hf.yaml"))
    assert {key for key in first if first[key] != second[key]} == {"model_name_or_path", "output_dir"}
    assert first.keys() == second.keys()
    assert first["max_latent_stage"] == inspect.signature(aokvqa.prepare).parameters["max_steps"].default


@pytest.mark.parametrize(
    ("name", "module"), [("aokvqa", aokvqa), ("m3cot", m3cot), ("scienceqa", scienceqa), ("llava_cot", llava_cot)]
)
def test_settings_with_step_decoding_give_every_record_a_surplus_group(name, module):
    folder = common.Path(module.__file__).parent
    model_args, _, rules, args, _ = parse(None, [str(folder / "steps.yaml")])
    most_steps = inspect.signature(module.prepare).parameters["max_steps"].default
    assert rules.decodes_steps
    assert rules.draw_surplus
    assert rules.last_stage == most_steps + 1
    assert not rules.final_stage
    assert rules.stage(int(args.num_train_epochs) - 1) == rules.last_stage
    assert "NOT RUN on real weights" in (folder / "steps.yaml").read_text()


# --- A-OKVQA -----------------------------------------------------------------------------------------------------


def test_dev_is_carved_from_train_by_whole_images(prepared):
    folder, _ = prepared("aokvqa")
    train_rows, dev_rows = read(folder, "train"), read(folder, "dev")
    assert len(train_rows) + len(dev_rows) == NUM_ROWS
    assert 3 <= len(dev_rows) <= 4
    assert not {row["images"][0] for row in train_rows} & {row["images"][0] for row in dev_rows}
    assert {row["id"] for row in read(folder, "val")} == {f"val{index}" for index in range(NUM_ROWS)}


def test_official_release_and_hub_give_the_same_records(prepared):
    official, hub = prepared("aokvqa")[0], prepared("aokvqa_hub")[0]
    by_id = []
    for folder in (official, hub):
        rows = [row for split in ("train", "dev", "val", "test") for row in read(folder, split)]
        by_id.append({row["id"]: row for row in rows})
    assert by_id[0].keys() == by_id[1].keys()
    for name, row in by_id[0].items():
        other = by_id[1][name]
        assert {**row, "images": None} == {**other, "images": None}
        pixels = [(folder / item["images"][0]).read_bytes() for folder, item in ((official, row), (hub, other))]
        assert pixels[0] == pixels[1]


def test_an_aokvqa_record(prepared):
    folder, _ = prepared("aokvqa")
    row = next(row for row in read(folder, "val") if row["id"] == "val1")
    assert row == {
        "id": "val1",
        "images": ["val2017/000000000100.jpg"],
        "question": "What does man 1 await?",
        "choices": ["cab", "bus ", "boat", "no 1"],
        "rationales": [
            ["He waves."],
            ["He waves because he has big bags."],
            ["Bags. Curb.", "No bus.", "No boat."],
        ],
        "answer": "bus ",
        "answers": ["taxi"] * 3 + ["cab"] * 4 + ["it's"] * 3,
        "extra": {"correct_choice_idx": 1, "difficult_direct_answer": True},
    }
    direct = next(row for row in read(folder, "val_direct") if row["id"] == "val1")
    assert direct["answer"] == "cab"
    assert "choices" not in direct
    assert direct["extra"] == row["extra"] | {"choices": row["choices"]}


def test_the_metric_scores_records_of_the_recipe(prepared):
    records = load_records(prepared("aokvqa")[0] / "val.jsonl", needs_steps=False)
    questions = [
        {"question_id": row["id"], "choices": row["choices"], "direct_answers": row["answers"], **row["extra"]}
        for row in records
    ]
    right = {row["id"]: row["choices"][row["extra"]["correct_choice_idx"]] for row in records}
    assert set(aokvqa_metric.question_scores(questions, right, "multiple_choice", strict=True).values()) == {1}
    counted = aokvqa_metric.question_scores(questions, dict.fromkeys(right, "cab"), "direct_answer")
    assert counted.keys() == {row["id"] for row in records if not row["extra"]["difficult_direct_answer"]}


def test_the_test_split_can_be_asked_but_not_trained_on(prepared, bytes_processor):
    path = prepared("aokvqa")[0] / "test.jsonl"
    with pytest.raises(ValueError, match="'test0': `answer` is None"):
        load_records(path, needs_steps=False)
    records = load_records(path, needs_steps=False, needs_answer=False)
    assert (records[0]["answer"], records[0]["answers"], records[0]["steps"]) == (None, [], [])
    dataset = StageDataset(records, bytes_processor, CurriculumArguments(c_thought=1, max_latent_stage=2))
    text = bytes_processor.tokenizer.decode(dataset.prompt(0, dataset.num_thoughts(0, stage=2))["input_ids"])
    assert "Choices: cab, bus , boat, no 0" in text
    assert text.endswith("<|start-latent|><|latent|><|latent|><|end-latent|>")
    with pytest.raises(ValueError, match="'test0': `answer` is missing"):
        dataset[0]


def test_every_row_that_is_left_out_is_listed_with_its_reason(tmp_path):
    arguments = make_aokvqa(tmp_path)
    path = tmp_path / "release" / "aokvqa_v1p0_val.json"
    rows = json.loads(path.read_text())
    rows[0]["image_id"] = 999
    rows[1]["correct_choice_idx"] = 7
    rows[2]["direct_answers"] = "['taxi'"
    rows[3]["question"] = "What is <|latent|>?"
    rows[4]["question_id"] = "val5"
    (tmp_path / "coco" / "val2017" / f"{rows[6]['image_id']:012}.jpg").write_bytes(picture(0)[:-40])
    path.write_text(json.dumps(rows))
    summary = aokvqa.prepare(tmp_path / "data", **arguments, splits=("val",))
    left_out = {
        row["row"]: row["reason"]
        for row in map(json.loads, (tmp_path / "data" / "left_out.jsonl").read_text().splitlines())
        if row["split"] == "val"
    }
    assert left_out.keys() == {"val0", "val1", "val2", "val3", "val5", "val6", "val7"}
    for row, reason in {
        "val0": "image not found",
        "val1": "none of the choices",
        "val2": "neither a list",
        "val3": "`question` contains <|latent|>",
        "val5": "stands twice",
        "val6": "cannot be read",
    }.items():
        assert reason in left_out[row]
    assert "val                5 records" in summary
    assert "2 left out: image cannot be read (val6, val7)" in summary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coco_dir": None}, "Give either"),
        ({"hub": "x"}, "Give either"),
        ({"num_dev": 12}, "12 of 12 rows cannot be carved off. Lower `num_dev`"),
        ({"num_dev": 0}, "`num_dev` must be at least 1"),
        ({"max_steps": 0}, "`max_steps` must be at least 1"),
        ({"aokvqa_dir": "/nowhere"}, "no aokvqa_v1p0_train.json"),
    ],
    ids=["no images", "two sources", "all dev", "no dev", "no step", "no file"],
)
def test_bad_arguments_are_refused_and_leave_nothing(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        aokvqa.prepare(tmp_path / "data", **make_aokvqa(tmp_path) | change)
    assert not (tmp_path / "data").exists()


# --- the other recipes -------------------------------------------------------------------------------------------


def test_an_m3cot_record(prepared):
    folder, summary = prepared("m3cot")
    row = read(folder, "train")[1]
    assert row["question"] == "Look closely.\nWhich is it?"
    assert (row["id"], row["answer"], row["choices"]) == ("train-1", "soft", ["rough", "soft", "hard"])
    assert row["steps"] == ["First, it shines.", "Second, it is wet.", "Third, it is cold.", "So it is ice."]
    assert row["extra"].keys() == {"domain", "topic", "category", "image_id"}
    assert "left out" not in summary


@pytest.mark.parametrize("answer", ["D", "AB", "", None], ids=["too far", "two", "empty", "none"])
def test_an_m3cot_answer_that_is_no_choice_is_left_out(answer):
    row = {"answer": answer, "choices": ["a", "b"], "context": None, "rationale": "x", "question": "y", "id": "z"}
    with pytest.raises(common.LeftOut):
        m3cot.make_record(row, "a.png", 3)


def test_scienceqa_keeps_text_only_questions_and_leaves_out_those_without_a_reason(prepared):
    folder, summary = prepared("scienceqa")
    rows = {row["id"]: row for row in read(folder, "train")}
    assert "train-000000" not in rows
    assert rows["train-000002"]["images"] == []
    assert rows["train-000001"]["question"] == "A map.\nWhich state is north?"
    assert rows["train-000001"]["steps"] == ["Look at the map.", "It is on top."]
    assert rows["train-000004"]["steps"] == ["Maps have norths."]  # no solution: the lecture
    assert rows["train-000001"]["answer"] == "Iowa"
    assert "2 left out: no valid record: `steps` is empty" in summary
    assert len(read(folder, "val")) == NUM_ROWS + 1  # asked without steps


def test_a_llava_cot_record(prepared):
    folder, summary = prepared("llava_cot")
    rows = [row for split in ("train", "dev", "val") for row in read(folder, split)]
    assert len(rows) == 16
    by_id = {row["id"]: row for row in rows}
    assert by_id["000001-same"]["question"] == "How many 1?"
    assert by_id["000001-same"]["steps"] == [
        "I count.",
        "A chart.",
        "One is red.",
        "Two are blue.",
        "Three are old.",
        "So it is B.",
    ]
    assert by_id["000000-same"]["answer"] == "B or so"
    assert by_id["000000-same"]["extra"] == {"source": "chartqa"}
    assert "1 later turns of conversations are not used" in summary
    images = [{row["images"][0] for row in read(folder, split)} for split in ("train", "dev", "val")]
    assert sum(map(len, images)) == len(set.union(*images)) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"image": "../outside.png"},
        {"image": None},
        {"image": "missing.png"},
        {"conversations": []},
        {"conversations": [{"from": "human", "value": "Q"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "Just B."}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": llava_cot_answer() * 2}]},
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "gpt", "value": llava_cot_answer(conclusion=" ")},
            ]
        },
    ],
    ids=["outside", "no image", "missing", "no turn", "odd", "no tags", "twice", "no conclusion"],
)
def test_a_broken_llava_cot_row_is_left_out(tmp_path, change):
    arguments = make_llava_cot(tmp_path)
    lines = arguments["train_file"].read_text().splitlines()
    broken = json.loads(lines[0]) | {"id": "broken"} | change
    arguments["train_file"].write_text("\n".join([*lines, json.dumps(broken)]))
    llava_cot.prepare(tmp_path / "data", **arguments)
    left_out = (tmp_path / "data" / "left_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in left_out] == ["broken"]


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4])
def test_few_llava_cot_steps_still_hold_the_whole_text(max_steps):
    steps = llava_cot.make_steps("I count.", "A  chart.", "One. Two. Three.", max_steps)
    assert len(steps) == max_steps
    assert " ".join(steps) == "I count. A chart. One. Two. Three."
    assert max_steps < 3 or steps[:2] == ["I count.", "A chart."]


@pytest.mark.parametrize("content", [None, "[", "{}"], ids=["no file", "no JSON", "no list"])
def test_a_file_that_is_no_list_of_problems_is_refused(tmp_path, content):
    files = make_text_json(tmp_path)
    files["val"].unlink() if content is None else files["val"].write_text(content)
    with pytest.raises(ValueError, match="`val` .*prosqa_val.json"):
        text_json.prepare(tmp_path / "data", **files)
    if content != "{}":
        with pytest.raises(ValueError, match="`train_file` .*prosqa_val.json"):
            llava_cot.prepare(tmp_path / "data", files["val"], tmp_path)
    assert not (tmp_path / "data").exists()


def test_text_json_keeps_steps_as_they_are(prepared):
    folder, _ = prepared("text_json")
    assert read(folder, "val")[2] == {
        "id": "val-000002",
        "images": [],
        "question": "Every a is b2. Tom is an a. Is Tom a b2 or c?",
        "steps": ["Tom is an a.", "Every a is b2.", "So."],
        "answer": "Tom is b2.",
    }


# --- alternative rationales --------------------------------------------------------------------------------------

CURRICULUM = CurriculumArguments(c_thought=1, max_latent_stage=2, pad_latent_to_max=False)
ALTERNATIVES = [["go up"], ["go left", "then up", "stop"], ["look", "jump"]]


def asked(index=0, **fields):
    return {"id": f"r{index}", "question": f"Where {index}?", "answer": "red", **fields}


def stage_dataset(processor, rows, curriculum=CURRICULUM, **kwargs):
    return StageDataset(load_records(rows), processor, curriculum, **kwargs)


def test_one_of_the_rationales_is_composed_as_if_it_were_the_only_one(bytes_processor):
    mixed = stage_dataset(bytes_processor, [asked(rationales=ALTERNATIVES)])
    single = [stage_dataset(bytes_processor, [asked(steps=steps)]) for steps in ALTERNATIVES]
    for stage in range(CURRICULUM.last_stage + 1):
        used = set()
        for epoch in range(20):
            mixed.set_stage(stage, epoch)
            for number, dataset in enumerate(single):
                dataset.set_stage(stage, epoch)
                if dataset[0] == mixed[0]:
                    used.add(number)
        assert used == {0, 1, 2}


def test_the_draw_depends_on_seed_epoch_and_index_alone(bytes_processor):
    rows = [asked(index, rationales=ALTERNATIVES) for index in range(12)]

    def drawn(dataset, epoch):
        dataset.set_stage(0, epoch)
        return [len(dataset[index]["labels"]) for index in range(len(dataset))]

    first, again = (stage_dataset(bytes_processor, rows, seed=3) for _ in range(2))
    other = stage_dataset(bytes_processor, rows, seed=4)
    epochs = [drawn(first, epoch) for epoch in range(6)]
    assert epochs == [drawn(again, epoch) for epoch in reversed(range(6))][::-1]
    assert all(len(set(epoch)) > 1 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert epochs != [drawn(other, epoch) for epoch in range(6)]


def test_persistent_workers_draw_the_rationales_of_the_epoch(bytes_processor):
    dataset = stage_dataset(bytes_processor, [asked(index, rationales=ALTERNATIVES) for index in range(8)])
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True, multiprocessing_context="fork"
    )
    for epoch in range(3):
        dataset.set_stage(0, epoch)
        assert [item["input_ids"] for item in loader] == [dataset[index]["input_ids"] for index in range(8)]


def test_one_rationale_is_the_same_as_steps(bytes_processor):
    record = load_records([asked(rationales=[["go up", "stop "]])])[0]
    assert record["steps"] == ["go up", "stop"]
    datasets = [
        stage_dataset(bytes_processor, [asked(**{name: value})])
        for name, value in (("rationales", [["go up", "stop "]]), ("steps", ["go up", "stop"]))
    ]
    for stage in range(CURRICULUM.last_stage + 1):
        for dataset in datasets:
            dataset.set_stage(stage)
        assert datasets[0][0] == datasets[1][0]
        assert datasets[0].num_thoughts(0, stage) == datasets[1].num_thoughts(0, stage)
        assert datasets[0].prompt(0, stage) == datasets[1].prompt(0, stage)


def test_limits_count_the_longest_rationale(bytes_processor):
    row = asked(rationales=[["a"], ["a much longer rationale", "of two steps"]])
    short, long = (stage_dataset(bytes_processor, [asked(steps=steps)]) for steps in row["rationales"])
    both = stage_dataset(bytes_processor, [row])
    assert both.max_new_tokens() == long.max_new_tokens() > short.max_new_tokens()
    assert both.num_thoughts(0, CURRICULUM.last_stage) == long.num_thoughts(0, CURRICULUM.last_stage)
    longest = len(long[0]["input_ids"])
    stage_dataset(bytes_processor, [row], max_length=longest)
    with pytest.raises(ValueError, match=f"are {longest} tokens, more than `max_length` {longest - 1}"):
        stage_dataset(bytes_processor, [row], max_length=longest - 1)


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "last"])
def test_every_rationale_must_tokenize_in_pieces_as_in_one(trails_start, bad):
    processor = MultiCoCoProcessor.from_pretrained(trails_start)
    processor.tokenizer.add_tokens([AddedToken("<note>", lstrip=True, normalized=False)])  # eats the line break before
    rationales = [["go up", "then left"], ["go on", "and stop"]]
    stage_dataset(processor, [asked(rationales=rationales)])
    rationales[bad][1] = "<note> left"
    with pytest.raises(ValueError, match="'r0': `steps` and `answer` tokenize differently"):
        stage_dataset(processor, [asked(rationales=rationales)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": ["a"], "rationales": [["b"]]}, "has both `steps` and `rationales`"),
        ({"rationales": ["a", "b"]}, "`rationales` is .*expected a list of alternative lists"),
        ({"rationales": [["a"], []]}, "`rationales` is "),
        ({"rationales": [["a"], [" "]]}, "`rationales` is "),
        ({"rationales": [["a"], ["b <|latent|>"]]}, "`steps` contains <|latent|>".replace("|", r"\|")),
        ({"rationales": []}, "`steps` is empty"),
        ({"steps": ["a"], "extra": ["b"]}, "`extra` is .*expected an object"),
    ],
    ids=["both", "flat", "empty one", "empty step", "reserved", "none", "extra"],
)
def test_bad_rationales_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"Record 'r0': .*{message}"):
        load_records([asked(**fields)])


def test_extra_is_passed_on_as_it_is():
    assert load_records([asked(steps=["a"], extra={"difficult": True})])[0]["extra"] == {"difficult": True}
    assert "extra" not in load_records([asked(steps=["a"])])[0]
