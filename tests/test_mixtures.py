"""Sets with weights, conversations, records without steps: what a sample is made of, and what of it is trained."""

import json
import os
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import test_data
from conftest import CHECKPOINT
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import record, write

from multicoco import MultiCoCoProcessor
from multicoco.configuration_multicoco import BLOCK_MODES, MODES
from multicoco.curriculum import CurriculumArguments, draw_order
from multicoco.data_multicoco import ReasoningCollator, StageDataset, _Mixture
from multicoco.records import load_records
from multicoco.trainer_callbacks import AnswerCallback, CurriculumCallback
from multicoco.training.memory import worst_batches
from multicoco.training.results import make_judge


folder = test_data.folder  # a fixture


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# --- mixtures ----------------------------------------------------------------------------------------------------


def rows_of(name, count):
    return [record(f"{name}{number}", answer=f"{name} {number}") for number in range(count)]


@pytest.fixture
def sets(folder):
    """Files of 5, 4 and 1 records."""
    return [
        str(write(folder, rows_of(name, count), f"{name}.jsonl")) for name, count in (("x", 5), ("y", 4), ("z", 1))
    ]


def uses(dataset, epochs):
    """How often each record is used, and the ids of each epoch."""
    ids = []
    for epoch in epochs:
        dataset.set_stage(0, epoch)
        ids.append([dataset[index]["id"] for index in range(len(dataset))])
    return Counter(name for row in ids for name in row), ids


def mixed(sets, processor, weights, seed=42, **rules):
    return StageDataset(load_records(sets, weights=weights), processor, CurriculumArguments(**rules), seed=seed)


def test_several_sets_stand_one_behind_the_other_with_their_names(sets, processor):
    records = load_records(sets)
    pairs = zip(sets, "xyz", (5, 4, 1), strict=True)
    names = [f"{path}:r{name}{number}" for path, name, count in pairs for number in range(count)]
    assert [item["id"] for item in records] == names
    dataset = StageDataset(records, processor, CurriculumArguments())
    for epoch in range(3):
        dataset.set_stage(1, epoch)
        assert [dataset.record_of(index) for index in range(len(dataset))] == list(range(10))
    assert [dataset[index]["id"] for index in range(10)] == names
    (alone,) = {item["id"] for item in load_records(sets[2:])}
    assert alone == "rz0"  # one set needs no name


def test_whole_weights_repeat_each_record_in_every_epoch(sets, processor):
    dataset = mixed(sets, processor, [2, 1, 3])
    counts, ids = uses(dataset, range(2))
    assert len(dataset) == 17
    for name, count in counts.items():
        assert count == 2 * {"x": 2, "y": 1, "z": 3}[name.rsplit(":r")[1][0]]
    assert ids[0] == ids[1]


def test_half_a_weight_takes_all_records_in_two_epochs(sets, processor):
    dataset = mixed(sets[:2], processor, [1, 0.5])
    for pair in ((0, 1), (6, 7)):
        counts, (one, other) = uses(dataset, pair)
        of_y = [{name for name in row if ":ry" in name} for row in (one, other)]
        assert [len(names) for names in of_y] == [2, 2]
        assert not of_y[0] & of_y[1]
        assert {name: count for name, count in counts.items() if ":ry" in name} == dict.fromkeys(of_y[0] | of_y[1], 1)
    halves = {tuple(uses(dataset, [epoch])[1][0][5:]) for epoch in range(0, 40, 2)}
    assert len(halves) > 3  # not the same half again and again


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.floats(0.05, 4)), min_size=1, max_size=4).filter(
        lambda sets: any(count for count, _ in sets)
    ),
    st.integers(0, 5),
    st.integers(1, 12),
)
def test_no_record_is_used_more_than_once_more_than_another_of_its_set(sets, seed, epochs):
    places, members = 0, []
    for count, weight in sets:
        members.append((np.arange(places, places + count), weight))
        places += count
    mixture = _Mixture(members, seed)
    assert mixture.num_samples == sum(max(1, round(weight * count)) for count, weight in sets if count)
    counts = Counter()
    for epoch in range(epochs):
        drawn = [mixture.record(sample, epoch) for sample in range(mixture.num_samples)]
        counts.update(drawn)
        assert drawn == [_Mixture(members, seed).record(sample, epoch) for sample in range(mixture.num_samples)]
        for indices, weight in members:
            of_set = [counts[index] for index in indices.tolist()]
            if of_set:
                assert max(of_set) - min(of_set) <= 1
                assert sum(of_set) == (epoch + 1) * max(1, round(weight * len(of_set)))
            if weight == 1 and of_set:
                assert [index for index in drawn if index in set(indices.tolist())] == indices.tolist()


def test_a_sample_is_a_function_of_seed_epoch_and_index(sets, processor):
    weights = [1.3, 0.5, 2]
    dataset, again = (mixed(sets, processor, weights, mix="linear") for _ in range(2))
    dataset.set_stage(3, 4)
    samples = [dataset[index] for index in range(len(dataset))]
    again.set_stage(3, 2)
    [again[index] for index in range(0, len(again), 2)]  # whatever a process did before
    again.set_stage(3, 4)
    assert [again[index] for index in reversed(range(len(again)))] == samples[::-1]
    copy = pickle.loads(pickle.dumps(again))
    assert [copy[index] for index in range(len(copy))] == samples
    other = mixed(sets, processor, weights, seed=1, mix="linear")
    other.set_stage(3, 4)
    assert [other[index] for index in range(len(other))] != samples


def test_a_repeated_record_is_drawn_anew_each_time(sets, processor):
    dataset = mixed(sets[2:], processor, [40], mix="linear")
    dataset.set_stage(3)
    assert len({tuple(dataset[index]["input_ids"]) for index in range(40)}) > 1


def test_samples_name_the_record_that_they_are_made_of(folder, sets, processor):
    dataset = mixed(sets, processor, [0.5, 2.5, 7])
    for epoch in range(3):
        dataset.set_stage(1, epoch)
        for index in range(len(dataset)):
            item = dataset.records[dataset.record_of(index)]
            assert dataset[index]["id"] == dataset.tokenized(index).id == item["id"]
            answer = processor.tokenizer.decode(dataset.tokenized(index).answer)
            assert answer == f"### {item['answer']}<|im_end|>"
            assert dataset.length(index) == len(dataset[index]["input_ids"])
    asked = load_records([str(write(folder, [record(0), record(1, answer=None)]))], weights=[3], needs_answer=False)
    dataset = StageDataset(asked, processor, CurriculumArguments())
    assert [dataset[index]["id"] for index in (0, 2, 4)] == ["r0"] * 3
    with pytest.raises(ValueError, match="Record 'r1': `answer` is missing"):
        dataset[5]


def test_skipped_records_leave_the_mixture(folder, sets, processor):
    write(folder, [record(0), record(1, answer=""), record(2)], "bad.jsonl")
    records = load_records([str(folder / "bad.jsonl"), sets[2]], weights=[1.5, 1], skip_bad_records=True)
    dataset = StageDataset(records, processor, CurriculumArguments())
    assert len(dataset) == 3 + 1
    counts, _ = uses(dataset, range(4))
    assert sorted(name.rsplit(":")[1] for name in counts) == ["r0", "r2", "rz0"]
    assert sorted(counts.values()) == [4, 6, 6]


def test_a_defect_of_one_of_several_sets_names_the_set(folder, sets):
    write(folder, [record(0), record(1, answer="")], "bad.jsonl")
    with pytest.raises(ValueError, match="bad.jsonl: Record 'r1': `answer`"):
        load_records([sets[0], str(folder / "bad.jsonl")])
    with pytest.raises(ValueError, match="none.jsonl.*does not exist"):
        load_records([sets[0], str(folder / "none.jsonl")])


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_named(sets, weight):
    with pytest.raises(ValueError, match=rf"`weights`: that of .*y.jsonl is {weight}, expected a number above 0"):
        load_records(sets[:2], weights=[1, weight])


def test_the_number_of_weights_is_that_of_the_sets(sets):
    for weights in ([], [1], [1, 1, 1, 1]):
        with pytest.raises(ValueError, match=f"`weights` has {len(weights)} numbers for 3 sets"):
            load_records(sets, weights=weights)
    assert len(load_records(sets, weights=np.array([1, 2, 0.5]))) == 10


def test_a_set_that_comes_twice_is_refused(folder, sets, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "link.jsonl").symlink_to("x.jsonl")
    for pair in ([sets[0], sets[0]], [sets[0], "x.jsonl"], ["./x.jsonl", "x.jsonl"], ["x.jsonl", "link.jsonl"]):
        with pytest.raises(ValueError, match="names .*twice.*weight of 2"):
            load_records(pair)
    with pytest.raises(ValueError, match="reads .*x.jsonl for .* again"):
        load_records(["[xy].jsonl", "x.jsonl"])


def internvl_sets(folder, **more):
    meta = {
        "first": {"root": str(folder), "annotation": str(folder / "x.jsonl"), "repeat_time": 2},
        "second": {"annotation": str(folder / "y.jsonl"), "repeat_time": 0.5, "length": 4, "data_augment": False},
    }
    (folder / "meta.json").write_text(json.dumps(meta | more))
    return folder / "meta.json"


def test_the_sets_of_internvl_are_read_with_their_weights(folder, sets, processor):
    records = load_records(internvl_sets(folder))
    assert [item["id"] for item in records] == [f"first:rx{n}" for n in range(5)] + [f"second:ry{n}" for n in range(4)]
    assert all(os.path.isfile(item["images"][0]) for item in records)
    dataset = StageDataset(records, processor, CurriculumArguments())
    counts, _ = uses(dataset, range(2))
    assert {name[:5]: count for name, count in counts.items()} == {"first": 4, "secon": 1}
    assert (
        len(StageDataset(load_records(internvl_sets(folder), weights=[1, 1]), processor, CurriculumArguments())) == 9
    )


def test_data_that_is_asked_has_each_record_once(folder, sets, processor):
    """In its order, whatever a file of sets says."""
    records = load_records(internvl_sets(folder)).each_once()
    dataset = StageDataset(records, processor, CurriculumArguments())
    assert [dataset.record_of(index) for index in range(len(dataset))] == list(range(9))
    with pytest.raises(ValueError, match="that of .*x.jsonl is 0, expected a number above 0"):
        load_records(sets, weights=[0, 1, 1])


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ({"annotation": "y.tsv"}, "'third': `annotation` is 'y.tsv'"),
        ({"annotation": "y.jsonl", "repeat_time": "2"}, "'third': `repeat_time` is '2'"),
        ({"annotation": "y.jsonl", "repeat_time": 0}, "that of third is 0.0, expected a number above 0"),
        ({"annotation": "none.jsonl"}, "none.jsonl.*does not exist"),
        ({"annotation": "y.jsonl", "root": "none"}, "none is no folder"),
        ({"root": "."}, "holds a dict, expected a list"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_a_wrong_file_of_sets_is_named(folder, sets, monkeypatch, one, message):
    monkeypatch.chdir(folder)
    (folder / "w.jsonl").write_text((folder / "y.jsonl").read_text())
    one = {name: "w.jsonl" if value == "y.jsonl" else value for name, value in one.items()}
    with pytest.raises(ValueError, match=message):
        load_records(internvl_sets(folder, third=one))


def test_answers_are_judged_by_the_record_of_the_sample(sets, processor, monkeypatch):
    """Whatever the weights, each prompt is answered once and compared with the answer of its own record."""
    dataset = mixed(sets, processor, [0.5, 2, 1.5])
    judge = make_judge(dataset, processor)
    right = [
        processor.tokenizer(f"### {dataset.records[dataset.record_of(n)]['answer']}")["input_ids"]
        for n in range(len(dataset))
    ]
    for index in range(len(dataset)):
        assert [judge(tokens, index) for tokens in right] == [tokens == right[index] for tokens in right]
    rules = CurriculumArguments()
    callback = AnswerCallback(rules, dataset, ReasoningCollator(processor), judge, batch_size=3)
    monkeypatch.setattr(callback, "_answers", lambda model, indices, stage: [right[index] for index in indices])
    model = SimpleNamespace(training=False, eval=lambda: None, train=lambda mode: None)
    found = callback.measure(model, 1, disable_tqdm=True)
    assert (found["eval/accuracy"], found["eval/samples"]) == (1, len(dataset))


# --- conversations -----------------------------------------------------------------------------------------------


def turn(value, speaker="human"):
    return {"from": speaker, "value": value}


def talk(*values, **fields):
    """A line of InternVL: questions and answers in turn."""
    speakers = ["human", "gpt"] * len(values)
    return {
        "conversations": [turn(value, speaker) for value, speaker in zip(values, speakers, strict=False)],
        **fields,
    }


def read_talks(folder, *rows, kind="jsonl", **how):
    if kind == "list":
        return load_records([dict(row) for row in rows], needs_steps=False, image_folder=folder, **how)
    return load_records(write(folder, list(rows)), needs_steps=False, **how)


IMAGES = {  # `image`, questions, and of each record how many images it has
    "one": ("a.png", ["<image>\nWhat?"], [1]),
    "one_without_a_place": ("a.png", ["What?"], [1]),
    "none": (None, ["What?", "And?"], [0, 0]),
    "list": (["a.png", "b.png"], ["<image> and <image>?"], [2]),
    "later": ("a.png", ["Hello.", "What is <image>?", "Sure?"], [0, 1, 1]),
    "one_each": (["a.png", "b.png"], ["<image>?", "<image>?", "Same?"], [1, 2, 2]),
    "first": (["a.png", "b.png"], ["Both?", "Sure?"], [2, 2]),
}


@pytest.mark.parametrize("kind", ["jsonl", "list"])
@pytest.mark.parametrize(("image", "questions", "numbers"), IMAGES.values(), ids=IMAGES.keys())
def test_a_conversation_is_a_record_for_each_answer(folder, processor, image, questions, numbers, kind):
    values = [text for number, question in enumerate(questions) for text in (f" {question}\n", f"No. {number} ")]
    fields = {} if image is None else {"image": image}
    records = read_talks(folder, talk(*values, id="c", width=28, **fields), kind=kind)
    suffixes = [""] if len(questions) == 1 else [f":{number + 1}" for number in range(len(questions))]
    images = [] if image is None else [str(folder / name) for name in ([image] if isinstance(image, str) else image)]
    for number, (item, suffix) in enumerate(zip(records, suffixes, strict=True)):
        history = [[question, f"No. {past}"] for past, question in enumerate(questions[:number])]
        assert item == {
            "id": f"c{suffix}",
            "images": images[: numbers[number]],
            "question": questions[number],
            "choices": [],
            "steps": [],
            "answer": f"No. {number}",
            "answers": [],
            **({"history": history} if history else {}),
        }
    dataset = StageDataset(records, processor, CurriculumArguments(mode="no_cot"))
    collator = ReasoningCollator(processor)
    for index, item in enumerate(records):
        messages = []
        for asked, answer in item.get("history", []):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": f"### {answer}"}]
        messages.append({"role": "user", "content": item["question"]})
        if "<image>" not in str(messages):
            messages[0]["content"] = "<image>\n" * len(item["images"]) + messages[0]["content"]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        expected = processor(images=[item["images"]], text=[text], return_tensors="pt")["input_ids"]
        asked = collator.prompts([dataset.prompt(index, None)])
        assert asked["input_ids"].tolist() == expected.tolist()
        assert dataset[index]["input_ids"] == expected[0].tolist() + dataset.tokenized(index).answer


STEPS = {
    "none": ("none", "First.\nThen. <think>\n4", [], "First.\nThen. <think>\n4"),
    "think": ("think", "<think>\nFirst.\n\n Then. \n</think>\n\n4\nor so", ["First.", "Then."], "4\nor so"),
    "think_without": ("think", "First.\n4", [], "First.\n4"),
    "think_nothing": ("think", "<think></think>4", [], "4"),
    "lines": ("lines", "First.\n\n  Then.\r\n4 ", ["First.", "Then."], "4"),
    "lines_one": ("lines", "4", [], "4"),
}


@pytest.mark.parametrize(("steps_from", "text", "steps", "answer"), STEPS.values(), ids=STEPS.keys())
def test_steps_of_an_answer_are_where_they_are_said_to_be(folder, steps_from, text, steps, answer):
    records = read_talks(folder, talk("Why?", text, "So?", "Yes."), steps_from=steps_from)
    assert [(item["steps"], item["answer"]) for item in records] == [(steps, answer), ([], "Yes.")]
    assert records[1]["history"] == [["Why?", answer]]
    assert [item["id"] for item in records] == ["0:1", "0:2"]


def test_steps_of_a_conversation_are_trained(folder, processor):
    path = write(folder, [talk("<image>\nWhy?", "<think>go up\ngo left</think>red", id="c", image="a.png")])
    plain = write(folder, [record(id="c", question="Why?")], "plain.jsonl")
    datasets = [
        StageDataset(load_records(source, steps_from="think"), processor, CurriculumArguments())
        for source in (path, plain)
    ]
    for stage in range(5):
        for dataset in datasets:
            dataset.set_stage(stage)
        assert datasets[0][0] == datasets[1][0]


BAD_TALKS = {
    "system": (
        {"conversations": [turn("Be good.", "system"), turn("Q"), turn("A", "gpt")]},
        "conversations",
        "system_m",
    ),
    "two_questions": ({"conversations": [turn("Q"), turn("R"), turn("A", "gpt")]}, "conversations", "in turn"),
    "answer_first": ({"conversations": [turn("A", "gpt")]}, "conversations", "in turn"),
    "nothing": ({"conversations": []}, "conversations", "in turn"),
    "open_end": (talk("Q", "A", "R"), "conversations", "ends with a question"),
    "no_list": ({"conversations": "Q"}, "conversations", "expected a list of turns"),
    "no_turns": ({"conversations": ["Q", "A"]}, "conversations", "expected a list of turns"),
    "no_text": (talk("Q", None), "value", "non-empty string"),
    "open_think": (talk("Q", "<think>first"), "conversations", "Close the marks"),
    "shut_think": (talk("Q", "first</think>A"), "conversations", "Close the marks"),
    "think_inside": (talk("Q", "Well <think>first</think>A"), "conversations", "Close the marks"),
    "think_twice": (
        talk("Q", "<think>a</think>A", "R", "<think>a</think>b</think>A"),
        "conversations",
        "Close the marks",
    ),
    "think_only": (talk("Q", "<think>first</think> "), "answer", "Fill it in"),
    "more_places": (talk("<image> <image>", "A", image="a.png"), "conversations", "one per image"),
    "fewer_places": (talk("<image>", "A", "R", "B", image=["a.png"] * 2), "conversations", "one per image"),
    "place_without_image": (talk("Q", "A", "<image>", "B"), "conversations", "one per image"),
    "place_in_answer": (talk("Q", "<image>", "R", "A", image="a.png"), "answer", "Remove or rephrase"),
    "reserved_question": (talk("Q", "A", "<|latent|>", "B"), "question", "Remove or rephrase"),
    "reserved_answer": (talk("Q", "A<|im_end|>", "R", "B"), "answer", "Remove or rephrase"),
    "reserved_step": (talk("Q", "<think><IMG_CONTEXT></think>A"), "steps", "Remove or rephrase"),
    "steps_beside": (talk("Q", "A", steps=["up"]), "steps", "Leave one out"),
    "rationales_beside": (talk("Q", "A", rationales=[["up"]]), "rationales", "Leave one out"),
    "question_beside": (talk("Q", "A", question="Q"), "question", "Leave one out"),
    "missing_image": (talk("Q", "A", "R", "B", image="none.png"), "images", "does not exist"),
}


@pytest.mark.parametrize("kind", ["jsonl", "list"])
@pytest.mark.parametrize(("row", "field", "cure"), BAD_TALKS.values(), ids=BAD_TALKS.keys())
def test_a_wrong_conversation_is_one_error_and_taken_not_at_all(folder, row, field, cure, kind, caplog):
    rows = [talk("Q", "A", id="c"), {**row, "id": "bad"}, talk("Q", "A", "R", "B", id="d")]
    with pytest.raises(ValueError, match="Record 'bad") as error:
        read_talks(folder, *rows, steps_from="think", kind=kind)
    assert f"`{field}`" in str(error.value)
    assert cure in str(error.value)
    records = read_talks(folder, *rows, steps_from="think", kind=kind, skip_bad_records=True)
    assert [item["id"] for item in records] == ["c", "d:1", "d:2"]
    assert "1 records were left out" in caplog.text
    assert str(error.value) in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_a_conversation_with_an_id_that_stands_twice_is_left_out_as_a_whole(folder, kind):
    rows = [record(id="c:2"), talk("Q", "A", "R", "B", id="c"), record(id="c:1"), talk("Q", "A", "R", "B", id="d")]
    records = read_talks(folder, *rows, kind=kind, skip_bad_records=True)
    assert [item["id"] for item in records] == ["c:2", "c:1", "d:1", "d:2"]
    with pytest.raises(ValueError, match="Record 'c:2': `id` stands twice"):
        read_talks(folder, *rows, kind=kind)


def test_an_open_question_can_be_asked(folder, processor):
    records = read_talks(folder, talk("<image> Q", "A", "R", image="a.png"), needs_answer=False)
    assert [item["answer"] for item in records] == ["A", None]
    dataset = StageDataset(records, processor, CurriculumArguments())
    assert dataset.prompt(1, None)["num_patches_list"] == [1]
    with pytest.raises(ValueError, match="'0:2': `answer` is missing"):
        dataset[1]


def test_conversations_of_a_data_set(folder, processor):
    rows = [talk("<image> Q", "A", "R", "B"), talk("S", "C")]
    pictures = [{"bytes": (folder / "b.png").read_bytes(), "path": None}, None]
    source = Dataset.from_dict({"chat": [row["conversations"] for row in rows], "image": pictures})
    source = source.cast_column("image", ImageFeature())
    how = {"columns": {"conversations": "chat"}, "needs_steps": False}
    records = load_records(source, **how)
    assert [(item["id"], item["question"], len(item["images"])) for item in records] == [
        ("0:1", "<image> Q", 1),
        ("0:2", "R", 1),
        (1, "S", 0),
    ]
    dataset = StageDataset(records, processor, CurriculumArguments(mode="no_cot"))
    batch = ReasoningCollator(processor)([dataset[index] for index in range(3)])
    assert batch["num_patches_list"] == [4, 4]


# --- records without steps ---------------------------------------------------------------------------------------


WITHOUT = [record(0), record(1, steps=[]), record(2, steps=["up", "down", "left", "right"])]


def with_rules(folder, processor, rows=WITHOUT, **rules):
    rules = CurriculumArguments(**rules)
    return StageDataset(load_records(write(folder, rows), needs_steps=rules.needs_steps), processor, rules)


@pytest.mark.parametrize("mode", MODES)
def test_by_default_a_record_without_steps_is_refused(folder, processor, mode):
    if mode == "no_cot":
        assert len(with_rules(folder, processor, mode=mode)) == 3
        return
    with pytest.raises(ValueError, match="'r1': `steps` is empty.*`--without_steps`"):
        with_rules(folder, processor, mode=mode)
    for without in ("no_thoughts", "thoughts"):
        assert len(with_rules(folder, processor, mode=mode, without_steps=without)) == 3
    rules = CurriculumArguments(mode=mode)
    with pytest.raises(ValueError, match="'r1': `steps` is empty"):
        StageDataset([{**row, "images": []} for row in WITHOUT], processor, rules)


def counted(dataset, index, latent):
    return dataset[index]["input_ids"].count(latent)


@pytest.mark.parametrize("mix", ["none", "linear", "uniform"])
@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_a_record_without_steps_has_no_thoughts(folder, processor, mode, mix):
    dataset = with_rules(folder, processor, mode=mode, mix=mix, without_steps="no_thoughts")
    start, latent, end = dataset.block_ids
    most = 0
    for stage in range(5):
        for epoch in range(4):
            dataset.set_stage(stage, epoch)
            ids = dataset[1]["input_ids"]
            assert [ids.count(token) for token in dataset.block_ids] == [1, 0, 1]
            assert ids.index(end) == ids.index(start) + 1
            assert dataset.num_thoughts(1, stage) == 0
            most = max(most, counted(dataset, 0, latent))
            if mix == "none":
                assert counted(dataset, 0, latent) == dataset.curriculum.num_thoughts(stage)
    assert most > 0


@pytest.mark.parametrize("mode", BLOCK_MODES)
def test_a_record_without_steps_has_the_thoughts_of_the_stage(folder, processor, mode):
    dataset = with_rules(folder, processor, mode=mode, without_steps="thoughts")
    for stage in range(5):
        dataset.set_stage(stage)
        wanted = dataset.curriculum.num_thoughts(stage)
        assert counted(dataset, 1, dataset.block_ids[1]) == dataset.num_thoughts(1, stage) == wanted


def test_a_file_of_both_trains_a_step(folder, processor, model):
    for without in ("no_thoughts", "thoughts"):
        dataset = with_rules(folder, processor, without_steps=without)
        dataset.set_stage(2)
        batch = ReasoningCollator(processor)([dataset[index] for index in range(3)])
        batch["pixel_values"] = batch["pixel_values"].double()
        model.zero_grad()
        model(**batch).loss.backward()
        gradient = model.get_input_embeddings().weight.grad
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("rules", "is_refused"),
    [
        ({"without_steps": "no_thoughts"}, True),
        ({"without_steps": "thoughts"}, False),
        ({"without_steps": "thoughts", "mix": "uniform"}, True),
        ({"without_steps": "thoughts", "mix": "uniform", "mix_prob": 0.5}, False),
        ({"without_steps": "no_thoughts", "mode": "cot"}, False),
        ({"without_steps": "no_thoughts", "mode": "no_cot"}, False),
        ({"without_steps": "no_thoughts", "mode": "no_thoughts"}, False),
    ],
    ids=str,
)
def test_where_no_record_has_steps_no_run_is_begun_without_a_thought(folder, processor, rules, is_refused):
    rows = [record(0, steps=[]), record(1, steps=[])]
    dataset = with_rules(folder, processor, rows, **rules)
    if is_refused:
        with pytest.raises(ValueError, match="`steps` is empty in all records.*no thought at any stage"):
            CurriculumCallback(dataset.curriculum, dataset)._enter(0, None, None)
        return
    dataset.set_stage(0)
    most = max(dataset.curriculum.counts(0, stage)[0] for stage in range(5))
    assert (most > 0) == (dataset.curriculum.mode == "coconut")


def test_data_that_is_only_asked_is_asked_with_the_thoughts_of_the_stage(folder, processor):
    """It needs no steps; that it has none says nothing of how the model was trained."""
    rows = [record(0, steps=[]), record(1, steps=[])]
    dataset = with_rules(folder, processor, rows, without_steps="no_thoughts")
    rules = dataset.curriculum
    assert [dataset.num_thoughts(0, stage) for stage in range(5)] == [rules.num_thoughts(stage) for stage in range(5)]


# --- found by an attempt to break it -----------------------------------------------------------------------------


def test_samples_from_the_end_are_those_of_a_list(tmp_path, processor):
    files = [
        write(tmp_path, [record(number, images=[]) for number in range(3)], name) for name in ("a.jsonl", "b.jsonl")
    ]
    dataset = StageDataset(load_records(files, weights=[1, 1.5]), processor, CurriculumArguments(mix="linear"))
    dataset.set_stage(2, 1)
    count = len(dataset)
    assert [dataset[place - count] for place in range(count)] == [dataset[place] for place in range(count)]
    assert [dataset.length(place - count) for place in range(count)] == list(map(dataset.length, range(count)))
    for place in (count, -count - 1):
        with pytest.raises(IndexError):
            dataset[place]


def test_no_file_is_read_twice_without_a_word(tmp_path):
    rows = [record(number, images=[], id=None) for number in range(2)]
    for name in ("x", "y"):
        Dataset.from_list([{**row, "images": None} for row in rows]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match="x.parquet for .* and again for"):
        load_records([str(tmp_path / "*.parquet"), str(tmp_path / "x.parquet")])
    write(tmp_path, rows, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="matches a file twice, by a link"):
        load_records(str(tmp_path / "*.jsonl"))


def test_no_set_of_a_file_of_sets_hides_another(tmp_path):
    file = json.dumps({"annotation": str(write(tmp_path, [record(0, images=[])], "a.jsonl"))})
    (tmp_path / "sets.json").write_text(f'{{"one": {file}, "one": {file}}}')
    with pytest.raises(ValueError, match="has two sets with the name one"):
        load_records(tmp_path / "sets.json")


def test_a_video_is_not_left_out_without_a_word():
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "That"}]
    with pytest.raises(ValueError, match="Record 7: has a `video`"):
        load_records([{"id": 7, "video": "a.mp4", "conversations": turns}], needs_steps=False)


def test_the_estimate_of_memory_sees_records_that_this_epoch_leaves_out(folder, sets, processor):
    """An epoch of a quarter of a set may not have its longest record; a later one has."""
    rows = [record(f"r{number}", images=[], steps=["go up " * (40 if number == 3 else 1)]) for number in range(4)]
    path = write(folder, rows, "long.jsonl")
    for seed in range(4):  # another record of the four in the first epoch
        part, whole = (
            StageDataset(load_records([str(path)], weights=[weight]), processor, CurriculumArguments(), seed=seed)
            for weight in (0.25, 1)
        )
        assert len(part) == 1
        assert worst_batches(part, 1) == worst_batches(whole, 1)
        assert part.max_new_tokens() == whole.max_new_tokens()


def test_many_sets_with_parts_draw_each_order_once(monkeypatch):
    drawn = Counter()

    def draw(count, key):
        drawn[key] += 1
        return draw_order(count, key)

    monkeypatch.setattr("multicoco.data_multicoco.draw_order", draw)
    mixture = _Mixture([(np.arange(5), 0.6)] * 40, 0)
    shuffled = np.random.default_rng(0).permutation(mixture.num_samples).tolist()
    for epoch in range(4):
        for _ in range(3):
            for sample in shuffled:
                mixture.record(sample, epoch)
    assert set(drawn.values()) == {1}
    again = pickle.loads(pickle.dumps(mixture))
    assert [again.record(sample, 3) for sample in shuffled] == [mixture.record(sample, 3) for sample in shuffled]


@pytest.mark.parametrize(("name", "value"), [("max_patches", 0), ("min_patches", 20), ("max_patches", 2.5)])
def test_limits_of_tiles_that_cannot_be_are_not_taken(name, value):
    processor = MultiCoCoProcessor.from_pretrained(CHECKPOINT)
    setattr(processor.image_processor, name, value)
    with pytest.raises(ValueError, match="max_patches` must|min_patches` must"):
        StageDataset([record(0, images=[])], processor, CurriculumArguments())
