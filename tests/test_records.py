"""Records wherever they come from: the same records, samples, errors; tables that are made once, never by halves."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import test_data
import torch
import torch.distributed as dist
from conftest import CHECKPOINT
from datasets import Dataset, Features, IterableDatasetDict, List, load_from_disk
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import DEFECTS, RICH, picture, record, write
from torch.utils.data import DataLoader
from transformers import AddedToken

from multicoco import MultiCoCoProcessor, data_multicoco, sources
from multicoco import records as records_module
from multicoco.configuration_multicoco import MODES
from multicoco.curriculum import CurriculumArguments
from multicoco.data_multicoco import ReasoningCollator, StageDataset, _parts_of
from multicoco.records import Records, load_records
from multicoco.trainer_callbacks import check_ranks_agree


folder = test_data.folder  # a fixture


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "multicoco"


@pytest.fixture
def small_batches(monkeypatch):
    """Two rows a batch, also in worker processes, which are forked."""
    monkeypatch.setattr(sources, "BATCH", 2)


# --- one record, whatever it comes from --------------------------------------------------------------------------


ROWS = [
    *RICH,
    record(5, images=[], rationales=[["by car"], ["on foot", "then by bus"]], steps=None, answers=["red", "crimson"]),
    record(6, history=[["What is it? \u2028 <image>", "a map"]], question="Größe? 数", extra={"n": 1}),
]
SOURCES = ("jsonl", "json", "list", "generator", "Dataset", "shuffled", "parquet", "embedded")


def absolute(row, data):
    return {**row, "images": [str(data / name) for name in row["images"]]}


def embedded(row, data):
    return {**row, "images": [{"bytes": (data / name).read_bytes(), "path": None} for name in row["images"]]}


def source_of(kind, data, rows=ROWS):
    """These records as a file, a list, ..."""
    plain = [absolute(row, data) for row in rows]
    if kind in ("jsonl", "json"):
        return write(data, rows, f"train.{kind}")
    if kind == "list":
        return plain
    if kind == "generator":
        return (dict(row) for row in plain)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = {name: [row.get(name) for row in plain] for name in names}
    if kind == "Dataset":
        return Dataset.from_dict(table)
    if kind == "shuffled":  # there and back: rows that a data set takes from elsewhere
        rest = [{name: values[0] for name, values in table.items()} | {"id": f"other{n}"} for n in range(3)]
        longer = {name: values + [row[name] for row in rest] for name, values in table.items()}
        mixed = Dataset.from_dict(longer).shuffle(seed=1)
        return mixed.select([mixed["id"].index(name) for name in table["id"]])
    path = data / f"{kind}.parquet"
    if kind == "parquet":
        Dataset.from_dict(table | {"images": [row["images"] for row in rows]}).to_parquet(path)
        return path
    features = Dataset.from_dict(table).features | {"images": List(ImageFeature())}
    pictures = [embedded(row, data)["images"] for row in rows]
    Dataset.from_dict(table | {"images": pictures}, features=Features(features)).to_parquet(path)
    return path


def without_images(item):
    return {name: value for name, value in item.items() if name != "images"}


def everything(dataset, collator):
    """All that a training or an evaluation reads of a data set; its lengths are checked on the way."""
    found = [dataset.max_new_tokens(), len(dataset)]
    for stage, epoch in itertools.product(range(dataset.curriculum.last_stage + 1), range(2)):
        dataset.set_stage(stage, epoch)
        for index in range(len(dataset)):
            sample = dataset[index]
            assert dataset.length(index) == len(sample["input_ids"]) == len(sample["labels"])
            shape = dataset.shape(index)
            assert shape.prompt(dataset.num_image_token) == len(dataset.prompt(index, None)["input_ids"])
            num_thoughts = dataset.num_thoughts(index, stage)
            prompt, answered = dataset.prompt(index, num_thoughts), dataset.answered(index, num_thoughts)
            found += [without_images(item) for item in (sample, prompt, answered)] + [num_thoughts]
    batch = collator([dataset[index] for index in range(len(dataset))])
    return found, batch


@pytest.mark.parametrize("kind", SOURCES)
def test_records_and_samples_are_the_same_from_everywhere(folder, processor, kind):
    reference = load_records(source_of("list", folder))
    records = load_records(source_of(kind, folder))
    if kind == "embedded":
        assert list(map(without_images, records)) == list(map(without_images, reference))
        sizes = [[Image.open(path).size for path in item["images"]] for item in reference]
        assert [[image.open().size for image in item["images"]] for item in records] == sizes
        assert [[image.size() for image in item["images"]] for item in records] == sizes
    else:
        assert list(records) == list(reference)
        assert records == reference
    collator, rules = ReasoningCollator(processor), CurriculumArguments(mix="linear")
    expected, batch = everything(StageDataset(reference, processor, rules), collator)
    for source in (records, source_of(kind, folder)):  # loaded before, and plain
        found, ours = everything(StageDataset(source, processor, rules), collator)
        assert found == expected
        assert ours.keys() == batch.keys()
        for name, value in batch.items():
            assert torch.equal(ours[name], value) if torch.is_tensor(value) else ours[name] == value


@pytest.mark.parametrize("mix", ["none", "uniform"])
@pytest.mark.parametrize("mode", MODES)
def test_lengths_and_samples_in_every_mode(folder, processor, mode, mix):
    rules = CurriculumArguments(mode=mode, mix=mix, max_latent_stage=2, pad_latent_to_max=mix == "none")
    one, other = (StageDataset(source_of(kind, folder), processor, rules) for kind in ("list", "jsonl"))
    found, _ = everything(one, ReasoningCollator(processor))
    assert found == everything(other, ReasoningCollator(processor))[0]


def test_the_number_of_processes_changes_nothing(folder, processor, small_batches, cache):
    tables = []
    for num_proc in (1, 2):
        shutil.rmtree(cache, ignore_errors=True)
        records = load_records(source_of("jsonl", folder), num_proc=num_proc)
        dataset = StageDataset(records, processor, CurriculumArguments(), num_proc=num_proc)
        assert len(list(cache.glob("*/*.arrow"))) == 2 * num_proc
        tables.append((list(records), everything(dataset, ReasoningCollator(processor))[0]))
    assert tables[0] == tables[1]


def test_embedded_pictures_and_processes(folder, processor, small_batches):
    path = source_of("embedded", folder)
    one = StageDataset(load_records(path, num_proc=2), processor, CurriculumArguments(), num_proc=2)
    two = StageDataset(source_of("list", folder), processor, CurriculumArguments())
    assert everything(one, ReasoningCollator(processor))[0] == everything(two, ReasoningCollator(processor))[0]


@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_records_are_a_sequence(folder, kind):
    records = load_records(source_of(kind, folder))
    plain = list(records)
    assert len(records) == len(plain) == len(ROWS)
    assert [records[index] for index in range(-len(plain), len(plain))] == plain + plain
    for part in (slice(1, 4), slice(None, None, -2), slice(5, 1), slice(-3, None), slice(0, 100, 3)):
        assert isinstance(records[part], Records)
        assert records[part] == plain[part]
        assert plain[part] == list(records[part])
    assert records[1:][::2][-1] == plain[1:][::2][-1]
    assert records.select(np.array([3, 0, 3])) == [plain[3], plain[0], plain[3]]
    assert records != plain[:-1]
    assert records != [*plain[:-1], {**plain[-1], "answer": "other"}]
    assert plain[2] in records
    assert list(reversed(records)) == plain[::-1]
    with pytest.raises(IndexError):
        records[len(plain)]
    again = pickle.loads(pickle.dumps(records))
    assert again == plain
    assert [again.images_of(index) for index in range(len(again))] == [item["images"] for item in plain]


def test_a_selection_trains_on_its_own_records(folder, processor):
    records = load_records(source_of("jsonl", folder))
    dataset = StageDataset(records[::-2], processor, CurriculumArguments())
    assert [dataset[index]["id"] for index in range(len(dataset))] == [row["id"] for row in ROWS[::-2]]
    assert [item["id"] for item in dataset.records] == [row["id"] for row in ROWS[::-2]]


# --- from Python -------------------------------------------------------------------------------------------------


BARE = {"question": "1 + 1?", "steps": ["add"], "answer": "2"}


@pytest.mark.parametrize("make", [list, iter, tuple, Dataset.from_list], ids=["list", "iterator", "tuple", "Dataset"])
def test_a_data_set_takes_plain_dictionaries(processor, make):
    """It had a KeyError for `images`, then for `choices`, where a file may leave them out."""
    dataset = StageDataset(make([dict(BARE), dict(BARE)]), processor, CurriculumArguments())
    assert [dataset[index]["id"] for index in range(2)] == [0, 1]
    assert dataset.records[0] == {**BARE, "id": 0, "images": [], "choices": [], "answers": []}


@pytest.mark.parametrize("name", [name for name in DEFECTS if name not in ("path_leaving_the_folder",)])
def test_a_data_set_checks_plain_dictionaries_as_a_file(folder, processor, name, monkeypatch):
    monkeypatch.chdir(folder)
    row, field, cure = DEFECTS[name]
    with pytest.raises(ValueError, match="'bad'") as error:
        StageDataset([record(1), {**row, "id": "bad"}], processor, CurriculumArguments())
    assert f"`{field}`" in str(error.value)
    assert cure in str(error.value)


@pytest.mark.parametrize("kind", SOURCES)
def test_checked_records_pass_again(folder, kind):
    records = load_records(source_of(kind, folder))
    again = load_records(list(records))
    assert list(map(without_images, again)) == list(map(without_images, records))
    assert load_records(again) == again


def test_of_rationales_other_steps_are_refused():
    with pytest.raises(ValueError, match="has both `steps` and `rationales`"):
        load_records([record(0, images=[], rationales=[["a"], ["b"]], steps=["b"])])


WRONG_SOURCES = {
    "a_mapping": ({"id": 1}, "is a dict, expected files"),
    "a_stream": (Dataset.from_list([BARE]).to_iterable_dataset(), "is a IterableDataset, .*without `streaming`"),
    "streams_by_split": (
        IterableDatasetDict({"train": Dataset.from_list([BARE]).to_iterable_dataset()}),
        "is a IterableDatasetDict, .*without `streaming`",
    ),
    "a_number": (3, "is a int, expected"),
    "nothing": ([], "no usable record"),
    "a_transform": (Dataset.from_list([BARE]).with_transform(lambda rows: rows), "transform of its own.*`map`"),
    "text_among_records": ([dict(BARE), "train.jsonl"], "Record 1: is a str"),
    "half_a_character": ([{**BARE, "answer": "\ud83d"}], "Record 0: `answer` .*half a character"),
    "no_path": ([{**BARE, "images": ["a\0b"]}], "Record 0: `images` names .*no path"),
}


@pytest.mark.parametrize(("source", "message"), WRONG_SOURCES.values(), ids=WRONG_SOURCES.keys())
def test_what_cannot_be_read_is_named(processor, source, message):
    with pytest.raises(ValueError, match=message):
        StageDataset(source, processor, CurriculumArguments())


def test_half_a_character_in_a_file_is_one_bad_record(folder, caplog):
    path = write(folder, [record(0), record(1, question="\ud83d"), record(2, images=["\udcff.png"])])
    assert [item["id"] for item in load_records(path, skip_bad_records=True)] == ["r0"]
    assert "'r1': `question`" in caplog.text
    assert "'r2': `images`" in caplog.text


# --- files -------------------------------------------------------------------------------------------------------


def test_lists_with_marks_line_ends_and_depth_give_the_records_of_lines(folder):
    rows = [record(n, question="ä\u2028\u85b0 [1, {2}] \\", extra={"a": [[{"b": "]}"}], []]}) for n in range(3)]
    lines = load_records(write(folder, rows))
    for indent, end, mark in itertools.product((None, 2), ("\n", "\r\n"), (b"", b"\xef\xbb\xbf")):
        text = json.dumps(rows, indent=indent, ensure_ascii=False).replace("\n", end)
        (folder / "train.json").write_bytes(mark + b" \r\n" + text.encode() + b"\n")
        assert load_records(folder / "train.json") == lines
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_records(folder / "marked.jsonl") == lines


def test_a_broken_line_is_named_by_file_and_number(folder):
    write(folder, [record(0), record(1)], "one.jsonl")
    (folder / "two.jsonl").write_text("\n\n\n" + json.dumps(record(2)) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"two.jsonl`, line 5: not valid JSON"):
        load_records(str(folder / "*.jsonl"))


def test_a_glob_is_one_set_in_the_order_of_its_names(folder):
    for name in ("b", "a", "c"):
        write(folder, [record(name), {**record(), "id": None}], f"{name}.jsonl")
    records = load_records(str(folder / "[a-c].jsonl"))
    assert [item["id"] for item in records] == ["ra", 1, "rb", 3, "rc", 5]
    with pytest.raises(ValueError, match="matches no file"):
        load_records(str(folder / "*.none"))
    (folder / "more").mkdir()
    write(folder / "more", [record("d")], "d.jsonl")
    with pytest.raises(ValueError, match="several folders. Give `--image_folder`"):
        load_records(str(folder / "**/*.jsonl"))
    with pytest.raises(ValueError, match="expected .jsonl and .json, or .parquet"):
        load_records(str(folder / "*.*"))
    shutil.copy(folder / "a.png", folder / "more")
    assert len(load_records(str(folder / "**/[b-d].jsonl"), image_folder=folder)) == 5


def test_paths_in_parquet_are_relative_to_it_and_stay_inside(folder):
    for image, message in (("none.png", "does not exist"), ("../outside.png", "leaves the folder")):
        Dataset.from_list([record(0, images=[image])]).to_parquet(folder / "train.parquet")
        with pytest.raises(ValueError, match=f"'r0': `images` .*{message}"):
            load_records(folder / "train.parquet")
    Dataset.from_list([record(0, images=["data/a.png"])]).to_parquet(folder / "train.parquet")
    records = load_records(folder / "train.parquet", image_folder=folder.parent)
    assert records[0]["images"] == [str(folder / "a.png")]


JSON_ITEMS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
BLANKS = st.text(" \t\r\n", max_size=3)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(JSON_ITEMS, max_size=6), st.sampled_from([None, 0, 3]), st.booleans(), st.booleans(), st.data())
def test_each_item_of_a_list_is_found_where_it_stands(items, indent, as_ascii, has_mark, data):
    texts = [json.dumps(item, indent=indent, ensure_ascii=as_ascii) for item in items]
    gaps = [data.draw(BLANKS) for _ in range(2 * len(items) + 3)]
    text, lines = gaps[0] + "[" + gaps[1], []
    for number, item in enumerate(texts):
        text += ("," if number else "") + gaps[2 * number + 2]
        lines.append(text.count("\n") + 1)
        text += item + gaps[2 * number + 3]
    content = (b"\xef\xbb\xbf" if has_mark else b"") + (text + "]" + gaps[-1]).encode("utf-8", "surrogatepass")
    spans = list(sources._spans_of_list(Path("x.json"), content))
    assert [json.loads(content[start:stop]) for _, start, stop in spans] == items
    assert [line for line, _, _ in spans] == lines


# --- tables that are made once -----------------------------------------------------------------------------------


def files_of(cache):
    """The files of all tables, and when each was made."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.glob("*/*.arrow")}


CACHED = [record(0), record(1, images=["b.png", "a.png"]), record(2, images=[])]


def start(path, processor, *, max_length=None, needs_steps=True, how=None, **rules):
    """What a training does first."""
    rules = CurriculumArguments(**rules)
    found = load_records(path, needs_steps=needs_steps, **(how or {}))
    return StageDataset(found, processor, rules, max_length=max_length)


@pytest.fixture
def own_processor():
    """One that a test may change."""
    return MultiCoCoProcessor.from_pretrained(CHECKPOINT)


def test_a_second_start_makes_nothing(folder, own_processor, cache):
    path = write(folder, CACHED)
    first = start(path, own_processor)
    made = files_of(cache)
    assert len(made) == 2
    os.utime(path, (1, 1))
    parts = _parts_of(own_processor)
    own_processor.tokenizer(["a", "a long text"], padding=True, truncation=True, max_length=3)
    assert _parts_of(own_processor) == parts
    for again in (
        start(path, own_processor, mode="cot", mix="uniform", c_thought=5),  # no limit: the rules do not matter
        start(path, MultiCoCoProcessor.from_pretrained(CHECKPOINT)),
    ):
        assert again.records == first.records
        assert [again.tokenized(index) for index in range(3)] == [first.tokenized(index) for index in range(3)]
    weighed = load_records([str(path)], weights=[3])
    assert len(StageDataset(weighed, own_processor, CurriculumArguments(), seed=7)) == 9
    assert files_of(cache) == made


def change_content(path, folder, processor):
    write(folder, [*CACHED[:2], record(2, images=[], answer="blue")])


def move_folder(path, folder, processor):
    shutil.copytree(folder, folder.parent / "moved")
    return {"path": folder.parent / "moved" / path.name}


def add_token(path, folder, processor):
    processor.tokenizer.add_tokens([AddedToken("red", normalized=False)])


def change_template(path, folder, processor):
    processor.chat_template = "Read." + processor.chat_template


def fewer_tiles(path, folder, processor):
    processor.image_processor.max_patches = 2


CHANGES = {  # what it changes, and how many of the two tables are made anew
    "content": (change_content, 2),
    "folder": (move_folder, 2),
    "columns": (lambda *_: {"how": {"columns": {"answers": "steps"}}}, 2),
    "needs_steps": (lambda *_: {"needs_steps": False}, 2),
    "steps_from": (lambda *_: {"how": {"steps_from": "think"}}, 2),
    "allow_outside": (lambda *_: {"how": {"allow_outside": True}}, 2),
    "overwritten": (lambda *_: {"how": {"overwrite_cache": True}}, 1),
    "max_length": (lambda *_: {"max_length": 900}, 1),
    "tokenizer": (add_token, 1),
    "template": (change_template, 1),
    "tiles": (fewer_tiles, 1),
}


@pytest.mark.parametrize(("change", "number"), CHANGES.values(), ids=CHANGES.keys())
def test_what_a_table_is_made_of_makes_it_anew(folder, own_processor, cache, change, number):
    path = write(folder, CACHED)
    start(path, own_processor)
    before = files_of(cache)
    how = change(path, folder, own_processor) or {}
    dataset = start(how.pop("path", path), own_processor, **how)
    after = files_of(cache)
    assert len({file for file, state in after.items() if before.get(file) != state}) == number
    shutil.rmtree(cache)
    fresh = start(how.get("path", dataset.records.sets[0].name), own_processor, **how)
    assert fresh.records == dataset.records
    assert [fresh[index] for index in range(3)] == [dataset[index] for index in range(3)]


def test_with_a_limit_the_rules_matter(folder, processor, cache):
    path = write(folder, CACHED)
    start(path, processor, max_length=200, c_thought=1)
    assert len(files_of(cache)) == 2
    with pytest.raises(ValueError, match="more than `max_length` 200"):
        start(path, processor, max_length=200, c_thought=100)
    before = files_of(cache)
    start(path, processor, max_length=200, c_thought=1)
    assert files_of(cache) == before


@pytest.mark.parametrize("name", sources.CODE)
def test_a_change_of_the_code_makes_other_names(tmp_path, monkeypatch, name):
    known = sources.fingerprint_of("same")
    package = Path(sources.__file__).parent
    for file in package.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sources.py"))
    sources._code_version.cache_clear()
    assert sources.fingerprint_of("same") == known
    with open(tmp_path / f"{name}.py", "a") as file:
        file.write("# changed")
    sources._code_version.cache_clear()
    changed = sources.fingerprint_of("same")
    monkeypatch.undo()
    sources._code_version.cache_clear()
    assert changed != known == sources.fingerprint_of("same")


def replace_picture(folder):
    picture(90, 30).save(folder / "a.png")


def reshape_picture(folder):  # as many bytes: without compression they depend on the number of pixels only
    before = (folder / "a.bmp").stat().st_size
    picture(48, 49).save(folder / "a.bmp")
    assert (folder / "a.bmp").stat().st_size == before


def lead_elsewhere(folder):
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to("b.png")


@pytest.mark.parametrize(
    ("name", "change", "tiles"),
    [("a.png", replace_picture, (1, 4)), ("a.bmp", reshape_picture, (4, 5)), ("link.png", lead_elsewhere, (1, 4))],
    ids=["size", "same_bytes", "link"],
)
@pytest.mark.parametrize("kind", ["file", "Dataset"])
def test_a_picture_that_changed_is_counted_anew(folder, processor, name, change, tiles, kind):
    picture(84, 28).save(folder / "a.bmp")
    (folder / "link.png").symlink_to("a.png")
    source = write(folder, [record(0, images=[name]), record(1, images=["b.png"])])
    if kind == "Dataset":  # which has their paths only
        rows = [{**BARE, "image": str(folder / name)}, {**BARE, "image": str(folder / "b.png")}]
        source = Dataset.from_list(rows).cast_column("image", ImageFeature())
    collator = ReasoningCollator(processor)
    for number in tiles:
        for _ in range(2):
            dataset = start(source, processor)
            assert collator([dataset[0]])["num_patches_list"] == dataset[0]["num_patches_list"] == [number]
        if number == tiles[0]:
            change(folder)


def test_a_picture_that_is_gone_is_named_and_comes_back(folder, processor, caplog):
    path = write(folder, [record(0), record(1, images=["b.png"])])
    start(path, processor)
    (folder / "b.png").rename(folder / "c.png")
    with pytest.raises(ValueError, match="'r1': `images` .*b.png"):
        start(path, processor)
    skip = {"skip_bad_records": True}
    for _ in range(2):
        caplog.clear()
        dataset = StageDataset(load_records(path, **skip), processor, CurriculumArguments(), **skip)
        assert [item["id"] for item in dataset.records] == ["r0"]
        assert "1 records were left out" in caplog.text
        assert "'r1': `images`" in caplog.text
    (folder / "c.png").rename(folder / "b.png")
    dataset = StageDataset(load_records(path, **skip), processor, CurriculumArguments(), **skip)
    assert [item["id"] for item in dataset.records] == ["r0", "r1"]


@pytest.mark.parametrize("content", [None, b"no image"], ids=["missing", "broken"])
def test_a_mended_picture_of_a_skipped_record_is_used(folder, processor, content, cache):
    if content is not None:
        (folder / "c.png").write_bytes(content)
    path, skip = write(folder, [record(0), record(1, images=["c.png"]), record(2)]), {"skip_bad_records": True}
    seen = []
    for mended in (False, False, True, True):
        if mended and len(seen) == 2:
            shutil.copy(folder / "b.png", folder / "c.png")
        dataset = StageDataset(load_records(path, **skip), processor, CurriculumArguments(), **skip)
        seen.append(([item["id"] for item in dataset.records], files_of(cache)))
    assert [ids for ids, _ in seen] == [["r0", "r2"]] * 2 + [["r0", "r1", "r2"]] * 2
    assert seen[0][1] == seen[1][1]
    assert seen[2][1] == seen[3][1]


def test_a_table_with_skipped_records_is_no_excuse_for_the_next_start(folder, processor):
    """A start with `skip_bad_records` left a table that one without it took, and only listed what was left out."""
    (folder / "c.png").write_bytes(b"no image")
    rows = [(record(1, answer=" "), "`answer`"), (record(1, images=["c.png"]), "c.png"), (record(0), "twice")]
    for row, where in rows:
        path, skip = write(folder, [record(0), row]), {"skip_bad_records": True}
        assert len(StageDataset(load_records(path, **skip), processor, CurriculumArguments(), **skip)) == 1
        with pytest.raises(ValueError, match=f"Record 'r.*{where}"):
            StageDataset(load_records(path), processor, CurriculumArguments())


@pytest.mark.parametrize("cut", ["rows", "batch", "mark", "file"])
def test_a_table_that_was_cut_is_made_anew(folder, cache, small_batches, cut):
    path = write(folder, ROWS)
    expected = list(load_records(path))
    (file,) = cache.glob("*/*.arrow")
    if cut == "file":
        file.unlink()
    elif cut == "batch":  # behind the first rows, where a reader sees nothing wrong
        with pa.OSFile(str(file)) as stream:
            for _ in range(2):  # the schema, and rows
                pa.ipc.read_message(stream)
            length = stream.tell()
        os.truncate(file, length)
        assert 0 < len(Dataset.from_file(str(file))) < len(ROWS)
    else:
        target = file if cut == "rows" else file.parent / sources.COMPLETE
        os.truncate(target, target.stat().st_size * 2 // 3)
    assert list(load_records(path)) == expected
    assert list(load_records(path)) == expected


# --- starts that are killed, or at once --------------------------------------------------------------------------


SCHEMA = pa.schema({"row": pa.int64(), "square": pa.int64(), "defect": pa.string()})
COUNT = 12


def in_child(function, *arguments):
    """Runs this in a process in a group of its own; its id. It ends after a minute at the latest."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    signal.alarm(60)
    code = 1
    try:
        function(*arguments)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_own_group():
    os.killpg(0, signal.SIGKILL)


def squares(numbers, kill_at=None, kill=kill_own_group):
    for number in numbers:
        if number == kill_at:
            kill()
        yield {"row": number, "square": number**2}


def make_squares(num_proc, check=squares, **kwargs):
    table, good, _ = sources.make_table(check, COUNT, SCHEMA, fingerprint="squares", num_proc=num_proc, **kwargs)
    return table.with_format(None)["square"][:], good.tolist()


WHOLE = [number**2 for number in range(COUNT)], list(range(COUNT))


@pytest.mark.parametrize("kill_at", [0, 5, 6, 9, 11, "before_the_mark", "before_its_name"])
@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_killed_start_leaves_nothing_that_is_read(small_batches, cache, monkeypatch, num_proc, kill_at):
    def begin():
        if kill_at == "before_the_mark":
            monkeypatch.setattr(sources, "_complete", lambda folder: kill_own_group())
        if kill_at == "before_its_name":
            monkeypatch.setattr(os, "replace", lambda *names: kill_own_group())
        make_squares(num_proc, lambda numbers: squares(numbers, kill_at))

    child = in_child(begin)
    assert exit_code(child) == -signal.SIGKILL
    assert (cache / "squares").is_dir()  # it had begun
    assert not (cache / "squares" / sources.COMPLETE).exists()
    assert make_squares(num_proc) == WHOLE
    assert make_squares(num_proc, check=None) == WHOLE  # read, not made


def test_a_killed_start_whose_processes_live_on_holds_nobody_up(small_batches, cache):
    def begin():
        parent = os.getpid()
        make_squares(2, lambda numbers: squares(numbers, 3, lambda: os.kill(parent, signal.SIGKILL)))

    child = in_child(begin)
    code = exit_code(child)
    other = exit_code(in_child(make_squares, 2))
    os.killpg(child, signal.SIGKILL)  # what lives on of the first
    assert (code, other) == (-signal.SIGKILL, 0)
    assert make_squares(2, check=None) == WHOLE


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("part", ["_CheckRows", "_CheckRecords"])
def test_training_starts_whole_after_a_killed_start(folder, processor, small_batches, monkeypatch, part, num_proc):
    path = write(folder, ROWS)
    module = records_module if part == "_CheckRows" else data_multicoco
    call = getattr(module, part).__call__

    def kill_late(self, numbers):
        for count, row in enumerate(call(self, numbers)):
            if numbers[count] == 5:
                kill_own_group()
            yield row

    def begin():
        monkeypatch.setattr(getattr(module, part), "__call__", kill_late)
        StageDataset(load_records(path, num_proc=num_proc), processor, CurriculumArguments(), num_proc=num_proc)

    child = in_child(begin)
    assert exit_code(child) == -signal.SIGKILL
    dataset = start(path, processor)
    expected = StageDataset(source_of("list", folder), processor, CurriculumArguments())
    assert (
        everything(dataset, ReasoningCollator(processor))[0] == everything(expected, ReasoningCollator(processor))[0]
    )


@pytest.mark.parametrize("overwrite", [False, True], ids=["cold", "overwritten"])
def test_starts_at_once_make_a_table_once(folder, processor, tmp_path, monkeypatch, overwrite):
    path = write(folder, ROWS)
    if overwrite:
        start(path, processor)
    write_table, log = sources._write_table, tmp_path / "makings"

    def logged(folder, *arguments):
        with open(log, "a") as file:
            file.write(folder.name + "\n")
        return write_table(folder, *arguments)

    together = multiprocessing.Barrier(3)

    def begin(number):
        monkeypatch.setattr(sources, "_write_table", logged)
        monkeypatch.setattr(sources, "_opened", set())  # as in a process that has just started
        monkeypatch.setattr(sources, "_STARTED", sources.time.time())
        monkeypatch.setattr(sources, "world_size", lambda: 3)
        together.wait()
        how = {"overwrite_cache": overwrite}
        dataset = StageDataset(load_records(path, **how), processor, CurriculumArguments(), **how)
        (tmp_path / f"read{number}").write_text(json.dumps([dataset[index] for index in range(len(dataset))]))

    children = [in_child(begin, number) for number in range(3)]
    assert [exit_code(child) for child in children] == [0] * 3
    made = log.read_text().split()
    assert len(made) == len(set(made)) == 2
    dataset = start(path, processor)
    samples = [dataset[index] for index in range(len(dataset))]
    assert [json.loads((tmp_path / f"read{number}").read_text()) for number in range(3)] == [samples] * 3


@pytest.fixture
def public_cache(monkeypatch):
    """A cache that other users may read."""
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    (parent / "cache").mkdir()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", parent / "cache")
    yield parent / "cache"
    shutil.rmtree(parent)


@pytest.mark.parametrize("name", [".", "multicoco"])
def test_a_cache_that_cannot_be_written_is_an_error_but_can_be_read(public_cache, name):
    closed = public_cache / name
    closed.mkdir(exist_ok=True)

    def begin(reads):
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write anywhere
        if reads:
            assert make_squares(1, check=None) == WHOLE
            return
        with pytest.raises(ValueError, match="`HF_DATASETS_CACHE`: no folder can be made in .*can be written"):
            make_squares(1)

    closed.chmod(0o555)
    assert exit_code(in_child(begin, False)) == 0
    closed.chmod(0o755)
    make_squares(1)
    closed.chmod(0o555)
    assert exit_code(in_child(begin, True)) == 0
    closed.chmod(0o000)
    assert exit_code(in_child(begin, False)) == 0
    closed.chmod(0o755)


# --- errors, whichever process finds them ------------------------------------------------------------------------


def test_every_defect_is_found_by_whichever_process(folder, small_batches, caplog):
    """Of several defects the first in the file is the error; skipped, all are listed in their order."""
    rows = []
    for name, (row, _, _) in DEFECTS.items():
        rows += [record(f"before_{name}"), {**row, "id": name}, record(f"after_{name}")]
    path, good = write(folder, rows), [row["id"] for row in rows if row["id"] not in DEFECTS]
    for _ in range(2):  # cold and warm
        caplog.clear()
        records = load_records(path, num_proc=2, skip_bad_records=True)
        assert [item["id"] for item in records] == good
        listed = caplog.text.split("records were left out:")[1].splitlines()[1:]
        assert [line.split("'")[1] for line in listed] == list(DEFECTS)
        for line, (_, field, cure) in zip(listed, DEFECTS.values(), strict=True):
            assert f"`{field}`" in line
            assert cure in line
    texts = [line.strip() for line in listed]
    names = list(DEFECTS)
    for first in (0, len(names) // 3, len(names) - 1):  # in the first process's half, or only in the second's
        with pytest.raises(ValueError, match=f"'{names[first]}'") as error:
            load_records(write(folder, rows[3 * first :]), num_proc=2)
        assert str(error.value) == texts[first]


@pytest.mark.parametrize("kind", ["jsonl", "list", "Dataset"])
@pytest.mark.parametrize("num_proc", [1, 2])
def test_an_id_that_stands_twice_is_reported_in_its_turn(folder, small_batches, caplog, kind, num_proc):
    def source(rows):
        return source_of(kind, folder, rows)

    rows = [record(0), record(1), record(1), record(2, answer=" "), record(3), record(0), record(4)]
    with pytest.raises(ValueError, match="'r1': `id` stands twice"):
        load_records(source(rows), num_proc=num_proc)
    with pytest.raises(ValueError, match="'r2': `answer`"):
        load_records(source(rows[2:]), num_proc=num_proc)
    with pytest.raises(ValueError, match="'r0': `id` stands twice"):  # across the halves
        load_records(source([row for row in rows if row["id"] != "r2"][:1] + rows[4:]), num_proc=num_proc)
    records = load_records(source(rows), num_proc=num_proc, skip_bad_records=True)
    assert [item["id"] for item in records] == ["r0", "r1", "r3", "r4"]
    listed = caplog.text.split("records were left out:")[1].splitlines()[1:]
    assert [line.split(":")[0].strip() for line in listed] == ["Record 'r1'", "Record 'r2'", "Record 'r0'"]


def test_numbers_and_texts_are_different_ids(folder):
    rows = [record(id=1), record(id="1")]
    assert [item["id"] for item in load_records(write(folder, rows))] == [1, "1"]
    assert [item["id"] for item in load_records(source_of("list", folder, rows))] == [1, "1"]


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_defects_of_tokens_are_reported_in_turn(folder, small_batches, caplog, own_processor, kind, num_proc):
    own_processor.tokenizer.add_tokens([AddedToken("<note>", lstrip=True, normalized=False)])
    (folder / "bad.png").write_bytes(b"no image")
    bad = {
        "pieces": ({"steps": ["go up", "<note> left"]}, "tokenize differently"),
        "picture": ({"images": ["bad.png"]}, "bad.png cannot be read"),
        "length": ({"steps": ["long " * 500]}, "more than `max_length` 800"),
    }
    rows = [row for name, (fields, _) in bad.items() for row in (record(f"before_{name}"), record(id=name, **fields))]
    found = load_records(source_of(kind, folder, rows))
    how = {"max_length": 800, "num_proc": num_proc}
    dataset = StageDataset(found, own_processor, CurriculumArguments(), skip_bad_records=True, **how)
    assert [dataset[index]["id"] for index in range(len(dataset))] == [f"rbefore_{name}" for name in bad]
    listed = caplog.text.split("records were left out:")[1].splitlines()[1:]
    for line, (name, (_, message)) in zip(listed, bad.items(), strict=True):
        assert f"Record {name!r}" in line
        assert message in line
    for first, (name, (_, message)) in enumerate(bad.items()):
        with pytest.raises(ValueError, match=f"Record {name!r}: .*{message}"):
            StageDataset(found[2 * first :], own_processor, CurriculumArguments(), **how)


# --- pictures of data sets ---------------------------------------------------------------------------------------


def as_bytes(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def of_pictures(pictures, rows=None, feature=None):
    """A data set with these bytes as its pictures."""
    cells = [[{"bytes": one, "path": None} for one in some] if isinstance(some, list) else some for some in pictures]
    rows = rows or [{**BARE, "id": f"p{number}"} for number in range(len(cells))]
    table = {name: [row[name] for row in rows] for name in rows[0]}
    features = Dataset.from_dict(table).features | {"images": feature or List(ImageFeature())}
    return Dataset.from_dict(table | {"images": cells}, features=Features(features))


@pytest.mark.parametrize("as_file", [False, True], ids=["Dataset", "parquet"])
def test_no_picture_is_decoded_before_it_is_needed(folder, processor, as_file):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 84, 3), dtype=np.uint8))
    source = of_pictures([[as_bytes(noise)[:200]], [as_bytes(picture())]])  # a good header, and no pixels
    if as_file:
        source.to_parquet(folder / "train.parquet")
        source = folder / "train.parquet"
    dataset = StageDataset(source, processor, CurriculumArguments())
    assert [dataset[index]["num_patches_list"] for index in range(2)] == [[4], [1]]
    collator = ReasoningCollator(processor)
    assert collator([dataset[1]])["num_patches_list"] == [1]
    with pytest.raises((ValueError, OSError)):
        collator([dataset[0]])


def test_turned_photographs_of_a_data_set_are_counted_as_they_are_opened(own_processor):
    own_processor.image_processor.max_patches = 2
    pictures = []
    for kind, orientation in itertools.product(("JPEG", "PNG"), range(1, 9)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        pictures.append([as_bytes(picture(90, 30), kind, exif=exif)])
    dataset = StageDataset(of_pictures(pictures), own_processor, CurriculumArguments())
    images = [dataset[index]["images"][0] for index in range(16)]
    assert [image.size() for image in images] == [image.open().size for image in images]
    assert {image.size() for image in images} == {(90, 30), (30, 90)}
    expected = [count for index in range(16) for count in dataset[index]["num_patches_list"]]
    batch = ReasoningCollator(own_processor)([dataset[index] for index in range(16)])
    assert batch["num_patches_list"] == expected


def test_what_is_no_picture_is_named(processor):
    good = as_bytes(picture())
    cells = [[{"bytes": good, "path": None}], [{"bytes": good, "path": None}, None], []]
    source = of_pictures([[]] * 3).remove_columns("images").add_column("images", cells)
    source = source.cast_column("images", List(ImageFeature()))
    with pytest.raises(ValueError, match="'p1': `images` number 1 cannot be read: there is none"):
        StageDataset(source, processor, CurriculumArguments())
    dataset = StageDataset(source, processor, CurriculumArguments(), skip_bad_records=True)
    assert [dataset[index]["id"] for index in range(len(dataset))] == ["p0", "p2"]


def test_pictures_that_are_not_decoded_are_read_too(processor):
    source = of_pictures([[as_bytes(picture(90, 30))]] * 2).cast_column("images", List(ImageFeature(decode=False)))
    dataset = StageDataset(source, processor, CurriculumArguments())
    assert ReasoningCollator(processor)([dataset[1]])["num_patches_list"] == [4]


def test_a_selection_of_a_data_set_has_its_own_pictures(processor):
    sizes = [(28 * width, 28) for width in range(1, 7)]
    source = of_pictures([[as_bytes(picture(*size))] for size in sizes])
    for changed in (
        source.select([4, 1, 0]),
        source.shuffle(seed=3),
        source.filter(lambda row: row["id"] > "p2"),
    ):
        dataset = StageDataset(changed, processor, CurriculumArguments())
        found = {dataset[index]["id"]: dataset[index]["images"][0].size() for index in range(len(dataset))}
        assert found == {name: sizes[int(name[1:])] for name in changed["id"]}


# --- workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "embedded", "list"])
def test_workers_however_they_start_see_what_this_process_sees(folder, processor, kind):
    dataset = StageDataset(source_of(kind, folder), processor, CurriculumArguments(mix="linear"))
    again = pickle.loads(pickle.dumps(dataset))
    loaders = [DataLoader(dataset, batch_size=4, collate_fn=list, num_workers=2, persistent_workers=True)]
    if kind == "embedded":
        spawned = {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}
        loaders.append(DataLoader(dataset, batch_size=4, collate_fn=list, **spawned))
    for stage, epoch in ((0, 0), (3, 1)):
        for each in (dataset, again):
            each.set_stage(stage, epoch)
        expected = [without_images(dataset[index]) for index in range(len(dataset))]
        assert [without_images(again[index]) for index in range(len(dataset))] == expected
        for loader in loaders:
            assert [without_images(sample) for batch in loader for sample in batch] == expected


def test_workers_make_the_batches_of_this_process(folder, processor):
    dataset = StageDataset(source_of("embedded", folder), processor, CurriculumArguments())
    collator = ReasoningCollator(processor)
    dataset.set_stage(2, 1)
    for workers in (0, 2):
        batches = list(DataLoader(dataset, batch_size=3, collate_fn=collator, num_workers=workers))
        if not workers:
            expected = batches
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            assert torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]


# --- found by an attempt to break it -----------------------------------------------------------------------------


def test_a_table_that_another_process_made_since_this_one_started_is_checked_too(folder, processor, tmp_path):
    path, picture_path = write(folder, CACHED), folder / CACHED[0]["images"][0]
    assert exit_code(in_child(start, path, processor)) == 0
    Image.new("RGB", (400, 30)).save(picture_path)
    counted = start(path, processor).tokenized(0).num_patches_list
    assert (
        counted
        == StageDataset(source_of("list", folder, CACHED), processor, CurriculumArguments())
        .tokenized(0)
        .num_patches_list
    )


def test_a_file_that_changes_while_it_is_read_leaves_no_table(folder, monkeypatch):
    path = write(folder, [record(number, images=[], answer="red") for number in range(3)])
    before, scan = path.read_bytes(), sources._scan

    def overtaken(files):
        found = scan(files)
        path.write_bytes(before.replace(b'"red"', b'"RED"'))  # rows of the same length
        return found

    monkeypatch.setattr(sources, "_scan", overtaken)
    with pytest.raises(ValueError, match="has changed while it was read"):
        load_records(path)
    monkeypatch.setattr(sources, "_scan", scan)
    path.write_bytes(before)
    assert [record["answer"] for record in load_records(path)] == ["red"] * 3


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, "1" * 5000], ids=["deep", "long"])
def test_json_that_python_does_not_read_names_its_file(folder, content):
    (folder / "odd.jsonl").write_text(json.dumps(record(1, images=[])) + "\n" + f'{{"extra": {content}}}\n')
    with pytest.raises(ValueError, match="odd.jsonl`, line 2: not valid JSON"):
        load_records(folder / "odd.jsonl")
    assert len(load_records(folder / "odd.jsonl", skip_bad_records=True)) == 1
    (folder / "odd.json").write_text(content)
    with pytest.raises(ValueError, match="odd.json` (is not valid JSON|holds)"):
        load_records(folder / "odd.json")


@pytest.mark.parametrize("other", [None, [], ["b.png"]], ids=["null", "empty", "another"])
@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_no_picture_is_lost_between_its_two_names(folder, kind, other):
    row = absolute(record(1, images=["a.png"]), folder)
    row |= {"image": row["images"][0], "images": other}
    source = [row] if kind == "list" else write(folder, [row])
    if other is None:
        assert load_records(source)[0]["images"] == [row["image"]]
    else:
        with pytest.raises(ValueError, match="Record 'r1': has `image` and `images`"):
            load_records(source)


def test_of_several_pictures_in_a_row_one_is_decoded(monkeypatch):
    pictures = [Image.new("L" if number == 1 else "RGB", (9, 9), number) for number in range(3)]
    found = load_records(of_pictures([[as_bytes(one) for one in pictures]]))
    opened, decode = [], ImageFeature.decode_example
    monkeypatch.setattr(ImageFeature, "decode_example", lambda *args, **kw: opened.append(1) or decode(*args, **kw))
    images = [image.open() for image in found[0]["images"]]
    assert len(opened) == 3
    assert [(image.mode, image.tobytes()) for image in images] == [(one.mode, one.tobytes()) for one in pictures]


@pytest.mark.parametrize("as_file", [False, True], ids=["Dataset", "parquet"])
def test_pictures_in_a_column_of_bytes_are_named(folder, as_file):
    row = {"id": 1, "question": "q", "answer": "a", "steps": ["s"], "image": as_bytes(picture(9, 9))}
    data = Dataset.from_list([row])
    if as_file:
        data.to_parquet(folder / "bytes.parquet")
    with pytest.raises(ValueError, match="Record 1: `images` holds a bytes.*cast_column"):
        load_records(folder / "bytes.parquet" if as_file else data)
    assert load_records(data.cast_column("image", ImageFeature()))[0]["images"][0].size() == (9, 9)


def test_a_data_set_made_anew_the_same_way_is_read_anew(tmp_path):
    rows, answer = Dataset.from_list([{"id": 1, "question": "q", "steps": ["s"]}]), tmp_path / "answer"

    def read(row):  # no fingerprint sees what a function reads
        return {"answer": answer.read_text()}

    for text in ("red", "green"):
        answer.write_text(text)
        made = rows.map(read, new_fingerprint="same", load_from_cache_file=False)
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        made.save_to_disk(tmp_path / "saved")
        assert load_records(load_from_disk(tmp_path / "saved"))[0]["answer"] == text


@pytest.mark.parametrize("lacks", [None, "b.png"], ids=["the same", "one lacks a picture"])
def test_ranks_with_other_records_are_told_before_they_train(folder, processor, tmp_path, monkeypatch, lacks):
    rows = [record(number, images=[name]) for number, name in enumerate(["a.png", "b.png", "a.png"])]

    def begin(rank):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / f"cache{rank}")  # machines of their own
        machine = tmp_path / f"machine{rank}"
        shutil.copytree(folder, machine)
        if rank and lacks:
            (machine / lacks).unlink()
        records = load_records(write(machine, rows), skip_bad_records=True)
        dataset = StageDataset(records, processor, CurriculumArguments())
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=rank, world_size=2)
        try:
            check_ranks_agree(dataset, torch.device("cpu"))
            told = ""
        except ValueError as error:
            told = str(error)
        (tmp_path / f"told{rank}").write_text(told)

    assert [exit_code(child) for child in [in_child(begin, rank) for rank in range(2)]] == [0, 0]
    told = [(tmp_path / f"told{rank}").read_text() for rank in range(2)]
    assert told == ["", ""] if lacks is None else all("not the same on all ranks" in text for text in told)


@pytest.mark.parametrize("kind", ["jsonl", "list"])
def test_a_mapped_column_that_no_row_has_is_named(folder, kind):
    """Pictures under a name that is spelled otherwise were left out without a word."""
    rows = [{**record(0), "shot": None}, {**record(1), "shot": "a.png"}]
    for row in rows:
        del row["images"]
    source = write(folder, rows) if kind == "jsonl" else rows
    where = {"image_folder": folder}
    assert [len(item["images"]) for item in load_records(source, columns={"images": "shot"}, **where)] == [0, 1]
    with pytest.raises(ValueError, match=r"`columns` names \['shots'\], but no row has them"):
        load_records(source, columns={"images": "shots"}, **where)
