"""Read thoughts in score.py and diagnose.py: against one record at a time, from scratch, and on planted models."""

import json
import re
import shutil

import pytest
import torch
from reference import reference_embeds, widened
from test_diagnose import COLOUR_OF, flags, plant, save

from multicoco import diagnose, score
from multicoco.evaluation import edits as editing
from multicoco.evaluation.diagnosis import Diagnosis
from multicoco.evaluation.readings import (
    draw_edits,
    edit_table,
    judge,
    load_follow,
    load_function,
    load_same_step,
    share,
    stands_for,
    steps_among,
)
from multicoco.evaluation.subject import AskArguments, Subject
from multicoco.recipes.trails.prepare import prepare
from multicoco.recipes.trails.start_model import make_model, make_processor
from multicoco.records import load_records
from multicoco.training.card import make_card


NUM_RECORDS, NUM_THOUGHTS = 10, 4
# A rule of the planted models: a step is the colour of the start cell's name, and so is the answer.
RULES = """
def same_step(text, step):
    return text.rsplit("### ")[-1] == step.rsplit("### ")[-1]

def follow(record, index, step):
    colour = step.rsplit("### ")[-1]
    return [colour] * (len(record["steps"]) - index - 1), colour
"""


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def processor():
    return make_processor(size=4, max_arrows=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor):
    """
    `trails/train.jsonl`: boards of 1 to 5 steps. `trails/cells.jsonl`: the same boards with 1 to 3 steps, the colour
    of the start cell's name each, as is the answer. Random models in float64 whose thoughts are read in pairs:
    `feeds`, and `pause` and `pause_loop` with constants; and a planted one that reads its second thought, `reads-1`.
    """
    folder = tmp_path_factory.mktemp("readings")
    prepare(folder / "trails", num_train=NUM_RECORDS, num_val=0)
    records = [json.loads(line) for line in (folder / "trails" / "train.jsonl").read_text().splitlines()]
    told = []
    for number, record in enumerate(3 * records):
        colour = COLOUR_OF[re.search(r"Start at (\w\d)", record["question"])[1]]
        told.append(record | {"id": number, "answer": colour, "steps": [colour] * (1 + number % 3)})
    write_records(folder / "trails" / "cells.jsonl", told)
    (folder / "rules.py").write_text(RULES)
    for name, feedback, mode in (
        ("feeds", "identity", "coconut"),
        ("pause", "latent_one_pass", "pause"),
        ("pause_loop", "latent", "pause_loop"),
    ):
        model = make_model(processor, seed=3).to(torch.float64).eval()
        model.config.set_trained(
            mode=mode, stage=2, num_thoughts=NUM_THOUGHTS, thought_feedback=feedback, c_thought=2, step_loss_weight=1.0
        )
        save(model, processor, folder / name)
    model = plant(processor, 1)
    model.config.c_thought, model.config.step_loss_weight = 1, 1.0
    save(model, processor, folder / "reads-1")
    return folder


def subject_of(folder, name, data="train"):
    arguments = AskArguments(data=str(folder / "trails" / f"{data}.jsonl"))
    return Subject(str(folder / name), load_records(arguments.data), arguments, torch.device("cpu"))


def plain_states(subject, row, edit=None):
    """What thoughts of one record are, or would have been in a control: whole prefixes again for every thought."""
    model, sample = subject.model, subject.dataset.prompt(row, NUM_THOUGHTS)
    ids, pixels = torch.tensor(sample["input_ids"]), subject.collator.prompts([sample])["pixel_values"].double()
    latent = model.get_input_embeddings().weight[model.config.latent_token_id]
    constant = None if subject.feeds_states else lambda thought, index: latent.expand_as(thought)
    embeds, thoughts = reference_embeds(model, ids, pixels, edit or constant)
    if not subject.feeds_states:
        hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
        thoughts = hidden[(ids == model.config.latent_token_id).nonzero().flatten() - 1]
    return embeds, torch.stack(list(thoughts))


def plain_text(subject, embeds, count):
    """Greedy text behind embeddings (T, D), the whole sequence again for every token."""
    model, tokens = subject.model, []
    while len(tokens) < count and model.generation_config.eos_token_id not in tokens:
        hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, -1]
        scores = model.lm_head(hidden)
        scores[model.generation_config.suppress_tokens] = -torch.inf
        tokens.append(int(scores.argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings().weight[tokens[-1:]]])
    return subject.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["feeds", "pause", "pause_loop"])
def test_a_batch_reads_as_each_record_from_scratch(folder, name):
    """Of a control the states that thoughts would have been, not the constants, which all read alike."""
    subject = subject_of(folder, name)
    subject.load()
    subject.__dict__["longest_text"] = 6
    assert subject.can_read(NUM_THOUGHTS)
    assert not subject.can_read(1)  # no whole group
    with widened(), torch.no_grad():
        expected = [
            [plain_text(subject, group, 6) for group in plain_states(subject, row)[1].split(2)] for row in range(4)
        ]
        answers, thoughts = subject.ask(range(4), NUM_THOUGHTS)
        assert (thoughts is None) == (name != "feeds")
        assert subject.read(range(4), NUM_THOUGHTS, thoughts) == expected
        assert subject.read(range(4), NUM_THOUGHTS) == expected
        assert subject.read(range(2), 3) == [texts[:1] for texts in expected[:2]]  # the third thought is no group
        assert answers == subject.answer(range(4), NUM_THOUGHTS)
    assert len({text for texts in expected for text in texts}) > 2


def test_score_stores_what_is_read_and_counts_what_is_right(folder, tmp_path):
    """Several batches; rows with and without thoughts in one table; another rule, from the same files."""
    names = [str(folder / name) for name in ("feeds", "pause")]
    data, out = folder / "trails" / "train.jsonl", tmp_path / "out"
    words = ["--model", *names, "--data", str(data), "--output_dir", str(out)]
    words += ["--batch_size", "4", "--max_new_tokens", "2", "--num_thoughts", "0", str(NUM_THOUGHTS)]
    (tmp_path / "rules.py").write_text("def same_step(text, step):\n    return len(text) % 2 == 0\n")
    rows = score.main([*words, "--same_step", f"{tmp_path / 'rules.py'}:same_step"])
    assert ["reads" in row for row in rows] == [False, True, False, True]
    records = load_records(data)
    for row, name in zip(rows[1::2], ("feeds", "pause"), strict=True):
        (path,) = (out / "predictions").glob(f"{name}-{NUM_THOUGHTS}-*.jsonl")
        lines = sorted(map(json.loads, path.read_text().splitlines()[1:]), key=lambda line: line["index"])
        subject = subject_of(folder, name)
        subject.load()
        assert [line["thoughts"] for line in lines] == [subject.read([n], NUM_THOUGHTS)[0] for n in range(NUM_RECORDS)]
        rights = [
            len(text) % 2 == 0
            if group < len(record["steps"])
            else text.rsplit("### ", 1)[-1].strip() == record["answer"]
            for record, line in zip(records, lines, strict=True)
            for group, text in enumerate(line["thoughts"])
        ]
        assert 0 < sum(rights) < len(rights)
        assert row["reads"] == pytest.approx(sum(rights) / len(rights))
        assert row["reads_low"] < row["reads"] < row["reads_high"]
        assert row["reads_samples"] == NUM_RECORDS
    assert rows == score.main([*words, "--same_step", f"{tmp_path / 'rules.py'}:same_step"])
    exact = score.main(words)
    assert exact[1]["reads"] < rows[1]["reads"]
    assert "reads" in (out / "scores.csv").read_text().splitlines()[0]


def test_lines_without_readings_are_left_out_of_the_share():
    records = [{"steps": ["a"], "answer": "x"}] * 2
    assert share(records, [["a", "### x"], None], load_same_step(None))["samples"] == 1
    assert share(records, [None, None], load_same_step(None))["rate"] is None


def test_groups_are_judged_by_place_and_by_any_rationale():
    same = load_same_step(None)
    record = {"steps": ["a", "b"], "answer": "x"}
    assert judge(record, ["a", "b", "### x", "x"], same) == [True, True, True, True]
    assert judge(record, ["b", "a", "b", ""], same) == [False] * 4
    assert judge(record, ["### x", "b"], same) == [False, True]  # the answer is not a step
    several = {**record, "rationales": [["a", "b"], ["c"], ["d", "e", "f"]]}
    assert judge(several, ["c", "e", "f", "### x"], same) == [True] * 4
    assert judge(several, ["b", "### x", "### x", "f"], same) == [False, True, True, False]
    assert judge({"steps": [], "rationales": [[]], "answer": "x"}, ["### x"], same) == [None]
    assert judge({"steps": ["a"], "answer": None}, ["a", "### x"], same) == [True, None]
    assert stands_for(several, 1) == ["b", "### x", "e"]
    found = share([record, record], [["a", "b", "### x", ""], ["a", "", "", ""]], same)
    assert (found["rate"], found["samples"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--same_step", "nowhere.py:same"), "`--same_step` is 'nowhere.py:same', expected FILE:FUNCTION"),
        (("--same_step", "{rules}:other"), "has no function 'other'"),
        (("--follow", "{rules}:follow"), "`--edits_from` is None and `--follow`.*needs both"),
        (("--follow", "{rules}:follow", "--edits_from", "{train}"), "step_loss_weight` 0"),
        (("--follow", "{rules}:same_step", "--edits_from", "{train}"), "same_step\\(\\) takes 2 positional"),
        (("--follow", "{wrong}:follow", "--edits_from", "{train}"), "its own, it gives .*'no'.*expected"),
    ],
    ids=["no file", "no function", "half", "unreadable", "not the rule", "another rule"],
)
def test_bad_settings_are_refused_before_anything_is_computed(folder, tmp_path, processor, more, message):
    if not (folder / "mute").is_dir():
        save(plant(processor, None), processor, folder / "mute")
    (tmp_path / "wrong.py").write_text("def follow(record, index, step):\n    return [], 'no'\n")
    places = {"rules": folder / "rules.py", "wrong": tmp_path / "wrong.py", "train": folder / "trails/train.jsonl"}
    more = [word.format(**places) for word in more]
    with pytest.raises((ValueError, TypeError), match=message):
        diagnose.main(flags(folder, "mute", tmp_path / "out", *more))
    assert not list(tmp_path.rglob("*.jsonl"))


# --- the read-edit experiment ------------------------------------------------------------------------------------


def test_an_edit_feeds_the_mean_at_the_places_of_its_group_and_nowhere_else(folder, tmp_path, monkeypatch):
    """Means, answers and later readings equal a recompute from scratch; two thoughts a group, several batches."""
    monkeypatch.setattr(editing, "FEWEST_MEMBERS", 1)
    subject, donors = subject_of(folder, "feeds"), subject_of(folder, "feeds")
    for each in (subject, donors):
        each.__dict__["longest_text"] = 5
    subject.max_new_tokens = 3
    with widened(), torch.no_grad():
        diagnosis = Diagnosis(subject, output_dir=tmp_path, batch_size=4)
        subject.load()
        states = [plain_states(subject, row)[1] for row in range(NUM_RECORDS)]
        texts = [[plain_text(subject, group, 5) for group in each.split(2)] for each in states]
        kind = lambda text: sum(text.encode()) % 3  # noqa: E731
        diagnosis.folder.mkdir(parents=True)  # as `run` leaves it
        found = diagnosis.edit_readings(donors, texts, lambda text, step: kind(text) == kind(step))
        assert set(found) == {0, 1}
        for group, lines in found.items():
            has_step = [row for row in range(NUM_RECORDS) if group < len(subject.records[row]["steps"])]
            assert 0 < len(lines) <= len(has_step)
            for line in lines:
                row = line["index"]
                assert row in has_step
                members = [one for one in has_step if texts[one][group] == line["step"]]
                mean = torch.stack([states[one][2 * group : 2 * group + 2] for one in members]).mean(dim=0)
                own = texts[row][group], subject.records[row]["steps"][group]
                assert kind(line["step"]) not in map(kind, own)

                def edit(thought, index, mean=mean, group=group):
                    return mean[index - 2 * group][None] if index // 2 == group else thought

                embeds, thoughts = plain_states(subject, row, edit)
                assert line["text"].strip() == plain_text(subject, embeds, 3)
                assert line["thoughts"] == [plain_text(subject, each, 5) for each in thoughts.split(2)]


def test_edits_are_followed_where_the_edited_thought_is_read_and_only_there(folder, tmp_path, monkeypatch):
    """The planted model answers the colour that its second thought says, whatever the others say."""
    monkeypatch.setattr(editing, "FEWEST_MEMBERS", 1)
    rules = [f"--{name}={folder / 'rules.py'}:{name}" for name in ("same_step", "follow")]
    data = folder / "trails" / "cells.jsonl"
    words = flags(folder, "reads-1", tmp_path / "out", *rules, "--edits_from", data, "--num_read", 3)
    words += ["--batch_size", "7", "--control", str(folder / "pause")]
    report = diagnose.main(words)
    readings, edits = report["readings"], report["edits"]
    assert readings["all"]["rate"] == 1
    assert readings["control"]["all"]["rate"] < 0.5
    assert [row["step"]["samples"] for row in readings["groups"]] == [30, 20, 10]
    assert [row["answer"]["samples"] for row in readings["groups"]] == [0, 10, 20]
    assert [row["group"] for row in edits["groups"]] == [0, 1, 2]
    for row, size in zip(edits["groups"], (30, 20, 10), strict=True):
        is_read = row["group"] == 1
        assert row["followed"]["samples"] == row["followed_where_they_differ"]["samples"] <= size
        assert row["followed"]["samples"] > 5
        assert row["followed"]["rate"] == row["followed_where_they_differ"]["rate"] == is_read
        assert row["stayed"]["rate"] == row["stayed_where_they_differ"]["rate"] == (not is_read)
        assert row["reads_as_edit"]["rate"] == 1
        assert row["next_reads"]["rate"] == (None if row["group"] == 2 else 0)  # each looks at the question itself
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "What the thoughts say" in page
    assert "A thought made to say another step" in page
    assert page.count("<th>the control's reads</th>") == len(readings["samples"]) == 3
    assert report["thoughts"]["verdict"] == "used"

    few = json.loads(next((tmp_path / "out").rglob("edit-means-*.json")).read_text())["result"]["counts"]
    assert [sum(counts) for counts in few] == [30, 20, 10]
    monkeypatch.setattr(editing, "FEWEST_MEMBERS", 4)
    subject = subject_of(folder, "reads-1", "cells")
    subject.load()
    found = editing.mean_thoughts(subject, 3, 7)
    assert found.counts == [[count for count in counts if count >= 4] for counts in few]
    assert [len(texts) for texts in found.texts] == [len(means) for means in found.means] != [0, 0, 0]

    (kept,) = (tmp_path / "out" / "experiments").glob("reads-1-*")
    lines = (kept / "edit-1.jsonl").read_bytes().splitlines(keepends=True)
    (kept / "edit-1.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])  # killed in the middle of a line
    asked, ask = [], Subject.write

    def counted(self, batch, **kwargs):
        asked.append(len(batch["input_ids"]))
        return ask(self, batch, **kwargs)

    monkeypatch.setattr(Subject, "write", counted)
    assert diagnose.main(words) == report
    assert sum(asked) == len(lines) - 4
    assert (kept / "edit-1.jsonl").read_bytes() == b"".join(lines)


def test_edits_draw_another_step_and_count_where_the_answers_differ():
    records = [{"steps": ["a", "b"], "answer": "x"}, {"steps": ["c"], "answer": "y"}, {"steps": ["a"], "answer": "z"}]
    same = load_same_step(None)
    assert draw_edits(records, [["c", "c"]] * 3, ["a", "b"], 1, same, 0) == {0: 0}  # the only one with two steps
    drawn = draw_edits(records, [["a"], ["b"], ["a"]], ["a", "b", "c"], 0, same, 0)
    assert drawn[1] == 0  # neither its step nor what it reads as
    assert drawn[0] != 0
    assert draw_edits(records, [["a"]] * 3, ["a"], 0, same, 0) == {}
    assert steps_among(["a", "b", "c", "x"], records, 0, same) == [0, 2]
    lines = [
        {"index": 0, "step": "q", "prediction": "u", "thoughts": ["q", "v", "### u"]},
        {"index": 1, "step": "q", "prediction": "y", "thoughts": ["q", "### u", "w"]},
        {"index": 2, "step": "q", "prediction": "z", "thoughts": ["p", "### z", "w"]},
    ]
    rule = {0: (["v"], "u"), 1: ([], "u"), 2: ([], "z")}
    follow = lambda record, index, step: rule[records.index(record)]  # noqa: E731
    found = edit_table(records, {0: lines}, ["x", "y", "z"], follow, same)["all"]
    rates = {name: (row["rate"], row["samples"]) for name, row in found.items()}
    assert rates == {
        "followed": (pytest.approx(2 / 3), 3),
        "stayed": (pytest.approx(2 / 3), 3),
        "followed_where_they_differ": (0.5, 2),
        "stayed_where_they_differ": (0.5, 2),
        "reads_as_edit": (pytest.approx(2 / 3), 3),
        "next_reads": (1.0, 3),
    }
    none = edit_table(records, {0: lines}, ["x", "y", "z"], lambda *_: None, same)["all"]
    assert none["followed"]["samples"] == 0


def test_the_card_says_how_often_thoughts_read_right(folder, tmp_path):
    shutil.copy(folder / "feeds" / "config.json", tmp_path)
    row = {"model": str(tmp_path), "mode": "coconut", "num_thoughts": 4, "samples": 9, "new_tokens": 1.0}
    row |= {"accuracy": 0.5, "low": 0.3, "high": 0.7}
    for reads in ({}, {"reads": 0.875, "reads_low": 0.5, "reads_high": 0.9375, "reads_samples": 9}):
        (tmp_path / "scores.json").write_text(json.dumps({"scores": [row | reads], "settings": {}}))
        card = make_card(tmp_path).content
        assert ("87.5% of the groups of thoughts read as their step" in card) == bool(reads)
        assert "Thoughts were trained to be readable" in card


def test_functions_come_from_files(folder):
    assert load_function(f"{folder / 'rules.py'}:same_step", "same_step")("### red### red", "red")
    record = {"id": 1, "steps": ["red"], "answer": "red"}
    follow = load_follow(f"{folder / 'rules.py'}:follow", try_on=[{"steps": []}, record])
    assert follow(record, 0, "blue") == ([], "blue")
