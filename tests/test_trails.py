"""The Trails recipe: its boards, read again from the pixels, and the model that it starts from."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModel, AutoProcessor

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor
from multicoco.recipes.trails import prepare, start_model


RECIPE = Path(prepare.__file__).parent
SIZES = pytest.mark.parametrize(("size", "max_arrows"), [(4, 5), (6, 10), (2, 3)], ids=["4x4", "6x6", "2x2"])
SMALL = {"num_train": 24, "num_val": 8, "size": 4, "max_arrows": 5}


def boards(count, size=4, max_arrows=5, split="train", seed=0):
    return list(prepare.iter_boards(split, count, size, max_arrows, seed))


def records(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_board(pixels):
    """What a viewer sees: each cell's colour, the side its white arrow points to, and the framed cells."""
    names = {colour: name for name, colour in prepare.COLOURS.items()}
    colours, sides, framed = {}, {}, []
    side = pixels.shape[0] // 14
    for row, column in np.ndindex(side, side):
        cell = pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].astype(int)
        place = "ABCDEF"[column] + str(row + 1)
        colours[place] = names[tuple(cell[1, 1])]
        down, right = np.argwhere((cell == 255).all(axis=-1)).mean(axis=0) - 6.5
        sides[place] = (int(np.sign(down)), 0) if abs(down) > abs(right) else (0, int(np.sign(right)))
        if not cell[0].any():
            framed.append(place)
    return colours, sides, framed


@SIZES
def test_trail_never_visits_a_cell_twice(size, max_arrows):
    for board in boards(200, size, max_arrows):
        assert len(board.trail) == len(set(board.trail)) == max_arrows + 1
        assert 1 <= board.num_arrows <= max_arrows


@SIZES
def test_steps_and_answer_follow_from_the_picture(tmp_path, size, max_arrows):
    prepare.write_split(tmp_path, "train", 100, size=size, max_arrows=max_arrows, seed=0)
    for record in records(tmp_path, "train"):
        with Image.open(tmp_path / record["images"][0]) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (14 * size, 14 * size))
            colours, sides, framed = read_board(np.asarray(image))
        start, num_arrows = re.fullmatch(
            r"Start at ([A-F][1-6]) and follow (\d+) arrows?\. Which colour do you reach\?", record["question"]
        ).groups()
        assert framed == [start]
        place, steps = start, []
        for _ in range(int(num_arrows)):
            down, right = sides[place]
            place = chr(ord(place[0]) + right) + str(int(place[1]) + down)
            steps.append(place)
        assert record["steps"] == steps
        assert record["answer"] == colours[place]


@SIZES
def test_every_arrow_stays_on_the_board(size, max_arrows):
    for board in boards(100, size, max_arrows):
        for cell in np.ndindex(size, size):
            assert all(0 <= at + by < size for at, by in zip(cell, prepare.MOVES[board.arrows[cell]], strict=True))


def test_records_have_the_documented_fields(tmp_path):
    prepare.write_split(tmp_path, "val", 12, size=4, max_arrows=5, seed=0)
    made = records(tmp_path, "val")
    assert [list(record) for record in made] == [["id", "images", "question", "steps", "answer"]] * 12
    assert len({record["id"] for record in made}) == 12
    assert all((tmp_path / path).is_file() for record in made for path in record["images"])


def test_same_seed_makes_the_same_bytes_and_another_seed_other_boards(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare.prepare(tmp_path / name, **SMALL, seed=seed)
    first, again, other = (files(tmp_path / name) for name in "abc")
    assert len(first) == 24 + 8 + 3
    assert first == again
    assert not {data for name, data in first.items() if name.endswith(".png")} & set(other.values())


def test_first_boards_do_not_depend_on_the_number_of_boards(tmp_path):
    prepare.prepare(tmp_path / "small", **SMALL)
    prepare.prepare(tmp_path / "large", **{**SMALL, "num_train": 40, "num_val": 12, "num_test": 4})
    small, large = files(tmp_path / "small"), files(tmp_path / "large")
    for split in ("train", "val"):
        assert large[f"{split}.jsonl"].startswith(small[f"{split}.jsonl"])
    pictures = [name for name in small if name.endswith(".png")]
    assert {name: small[name] for name in pictures} == {name: large[name] for name in pictures}


def test_splits_share_no_picture():
    seen = [{prepare.draw_board(board).tobytes() for board in boards(500, split=split)} for split in prepare.SPLITS]
    assert len(set.union(*seen)) == 1500


def test_a_board_in_two_splits_stops_the_run_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="`val` is also in `train`.*raise `size`"):
        prepare.prepare(tmp_path / "data", num_train=1500, num_val=1500, size=2, max_arrows=1)
    assert not (tmp_path / "data").exists()


def test_guesses_without_reasoning_stay_near_chance():
    """In 4,000 boards a share of 1/8 has a standard deviation of 0.0052."""
    made = boards(4000)
    answers = np.array([board.colours[board.trail[board.num_arrows]] for board in made])
    most_frequent = np.array([np.bincount(board.colours.ravel(), minlength=8).argmax() for board in made])
    start = np.array([board.colours[board.trail[0]] for board in made])
    assert (abs(np.bincount(answers, minlength=8) / len(made) - 1 / 8) < 0.025).all()
    assert (answers == most_frequent).mean() < 0.29
    assert (answers == start).mean() < 1 / 8 + 0.025
    num_arrows = np.bincount([board.num_arrows for board in made], minlength=6)[1:]
    assert (abs(num_arrows / len(made) - 1 / 5) < 0.03).all()


def test_same_settings_are_kept_and_others_made_anew(tmp_path):
    folder = tmp_path / "data"
    assert prepare.prepare(folder, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not prepare.prepare(folder, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert prepare.prepare(folder, **{**SMALL, "num_train": 5})
    assert len(list((folder / "train").iterdir())) == len(records(folder, "train")) == 5


def test_an_interrupted_run_is_made_anew(tmp_path, monkeypatch):
    prepare.prepare(tmp_path / "whole", **SMALL)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare.json, "dumps", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(tmp_path / "data", **SMALL)
    assert not (tmp_path / "data").exists()
    assert prepare.prepare(tmp_path / "data", **SMALL)
    assert files(tmp_path / "data") == files(tmp_path / "whole")


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="`output_dir` .* Choose another folder"):
        prepare.prepare(tmp_path, **SMALL)
    assert files(tmp_path) == {"mine.txt": b"keep"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_train", -1), ("size", 1), ("size", 27), ("max_arrows", 0), ("max_arrows", 16), ("seed", -1)],
    ids=str,
)
def test_an_argument_out_of_range_is_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*{value}"):
        prepare.prepare(tmp_path / "data", **{**SMALL, field: value})


def test_the_command_makes_what_the_function_makes(tmp_path):
    flags = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, str(RECIPE / "prepare.py"), "--output_dir", str(tmp_path / "command"), *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=tmp_path)
    prepare.prepare(tmp_path / "function", **SMALL)
    assert files(tmp_path / "command") == files(tmp_path / "function")


# --- sentences, and what reads steps and boards ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def styles(tmp_path_factory):
    """The same boards with steps in either style."""
    folder = tmp_path_factory.mktemp("styles")
    for style in prepare.STYLES:
        assert prepare.prepare(folder / style, **{**SMALL, "num_train": 300}, style=style)
    return folder


def test_sentences_tell_the_steps_of_the_same_boards_in_drawn_phrasings(styles):
    cells, sentences = (records(styles / style, "train") for style in ("cells", "sentences"))
    assert "style" not in json.loads((styles / "cells" / "settings.json").read_text())  # as folders of old
    pictures = [{n: d for n, d in files(styles / s).items() if n.endswith(".png")} for s in ("cells", "sentences")]
    assert pictures[0] == pictures[1]
    used = []
    for plain, told in zip(cells, sentences, strict=True):
        assert {**plain, "steps": None} == {**told, "steps": None}
        places = [plain["question"].split()[2], *plain["steps"]]
        for sentence, here, there in zip(told["steps"], places[:-1], places[1:], strict=True):
            assert re.findall(r"\b[A-D][1-4]\b", sentence) == [here, there]
            down, right = int(there[1]) - int(here[1]), ord(there[0]) - ord(here[0])
            word = {(-1, 0): "up", (1, 0): "down", (0, 1): "right", (0, -1): "left"}[down, right]
            assert re.findall(r"\b(?:up|down|right|left)\b", sentence) == [word]
            used.append(sentence.replace(here, "X").replace(there, "Y").replace(word, "Z"))
    shares = [used.count(phrasing) / len(used) for phrasing in set(used)]
    assert len(shares) >= 3
    assert min(shares) > 0.8 / len(shares)


def test_a_folder_of_one_style_is_not_taken_for_the_other(tmp_path):
    prepare.prepare(tmp_path, **{**SMALL, "num_train": 2})
    assert prepare.prepare(tmp_path, **{**SMALL, "num_train": 2}, style="sentences")
    assert not prepare.prepare(tmp_path, **{**SMALL, "num_train": 2}, style="sentences")
    assert " " in records(tmp_path, "train")[0]["steps"][0]
    with pytest.raises(ValueError, match="`style` must be one of cells, sentences, got 'poems'"):
        prepare.prepare(tmp_path, style="poems")


def test_a_sentence_is_few_tokens_and_pieces_are_the_whole(styles, tmp_path):
    """Nothing is bytes, the line break is a token of its own, and the sequences of the longest board fit."""
    tokenizer = start_model.make_processor(4, 5, "sentences").tokenizer
    words = set(start_model.recipe_words(4, 5, "sentences"))
    for record in records(styles / "sentences", "train"):
        pieces = [*(f"{step}\n" for step in record["steps"]), f"### {record['answer']}", "<|im_end|>"]
        tokens = [tokenizer.encode(piece) for piece in pieces]
        assert sum(tokens, []) == tokenizer.encode("".join(pieces))
        for ids in tokens[:-2]:
            assert 9 <= len(ids) <= 15
            assert {tokenizer.decode(token) for token in ids[:-1]} <= words
            assert tokenizer.decode(ids[-1]) == "\n"


SENTENCE = "The arrow in D3 points down, so the next cell is D4."


@pytest.mark.parametrize(
    ("text", "step", "same"),
    [
        ("D4", "D4", True),
        ("D4\n", "D4", True),
        ("D3", "D4", False),
        ("d4", "D4", False),
        ("D4 D4", "D4", False),
        ("### red", "D4", False),
        ("", "D4", False),
        ("D27", "D27", False),
        (SENTENCE, SENTENCE, True),
        ("From D3 the way goes down to D4.", SENTENCE, True),
        ("D5 has an arrow that points up: go on to D4.", SENTENCE, True),
        ("From D4 the way goes down to D5.", SENTENCE, False),
        ("From D3 the way goes up to D4.", SENTENCE, False),  # contradicts itself
        ("From A1 the way goes down to D4.", SENTENCE, False),
        ("From D3 the way goes down to D4", SENTENCE, False),
        (SENTENCE + " " + SENTENCE, SENTENCE, False),
        ("The arrow the way goes down to D4.", SENTENCE, False),
        ("D4", SENTENCE, True),  # as `follow` names it
        (SENTENCE, "D4", True),
        ("nothing", "nothing", False),
    ],
)
def test_same_step_is_the_same_cell_whatever_the_phrasing(text, step, same):
    assert prepare.same_step(text, step) is same


def test_follow_trail_knows_trails_that_no_board_has(tmp_path):
    """An edit that names the step itself is the board's own trail; one that names the start goes back there."""
    prepare.write_split(tmp_path, "val", 40, size=4, max_arrows=5, seed=0)
    seen = set()
    for line in (tmp_path / "val.jsonl").read_text().splitlines():
        record = json.loads(line)
        record["images"] = [str(tmp_path / record["images"][0])]
        start = record["question"].split()[2]
        assert prepare.follow_trail(record, 0, record["steps"][0]) == (record["steps"][1:], record["answer"])
        assert prepare.follow_trail(record, 0, start) is None
        for name in ("A1", "B2", "C3", "D4"):
            names, colour = prepare.follow(record, 0, name)
            is_new = len({start, name, *names}) == len(names) + 2
            assert prepare.follow_trail(record, 0, name) == ((names, colour) if is_new else None)
            seen.add(is_new)
    assert seen == {True, False}


def test_every_step_of_a_record_is_read(styles):
    for style in prepare.STYLES:
        for record in records(styles / style, "val"):
            for index, step in enumerate(record["steps"]):
                assert [prepare.same_step(step, other) for other in record["steps"]].index(True) == index


@SIZES
def test_a_board_is_read_from_its_picture(size, max_arrows):
    for board in boards(20, size, max_arrows):
        pixels = prepare.draw_board(board)
        for picture in (pixels, Image.fromarray(pixels), Image.fromarray(pixels).convert("RGBA")):
            colours, arrows = prepare.read_board(picture)
            assert (colours == board.colours).all()
            assert (arrows == board.arrows).all()


def test_what_is_no_board_is_refused():
    board = boards(1)[0]
    pixels = prepare.draw_board(board)
    dotted, outside = pixels.copy(), board.arrows.copy()
    dotted[30, 20] = 7
    outside[0, 0] = 0  # upwards
    bad = {"no cell of a board at B3": dotted, "expected \\(n, n, 3\\)": pixels[:50], "no cell": pixels.astype(float)}
    bad["0 cells are marked"] = np.tile(prepare._cell_pictures()[0, 1, 0], (3, 3, 1))
    bad |= {"or an arrow leaves it": prepare.draw_board(board._replace(arrows=outside))}
    for message, picture in bad.items():
        with pytest.raises(ValueError, match=message):
            prepare.read_board(picture)


@pytest.mark.parametrize("style", prepare.STYLES)
def test_follow_goes_on_from_the_other_cell(styles, style):
    """On the right cell it gives what the record has; on another what a viewer of the picture finds."""
    for record in records(styles / style, "val"):
        path = styles / style / record["images"][0]
        cells = [re.findall(r"[A-D][1-4]", step)[-1] for step in record["steps"]]
        with Image.open(path) as image:
            colours, sides, _ = read_board(np.asarray(image))
            for index, step in enumerate(record["steps"]):
                taken = prepare.follow({**record, "images": [str(path)]}, index, step)
                assert taken == (cells[index + 1 :], record["answer"])
                place, names = "B2", []
                for _ in cells[index + 1 :]:
                    down, right = sides[place]
                    place = chr(ord(place[0]) + right) + str(int(place[1]) + down)
                    names.append(place)
                other = "B2" if style == "cells" else "From B3 the way goes up to B2."
                assert prepare.follow({**record, "images": [image]}, index, other) == (names, colours[place])


def test_follow_refuses_what_is_no_step(styles):
    record = records(styles / "cells", "val")[0]
    record["images"] = [str(styles / "cells" / record["images"][0])]
    for index in (-1, len(record["steps"])):
        with pytest.raises(ValueError, match=f"`index` must be between 0 and .*, got {index}"):
            prepare.follow(record, index, "A1")
    for step in ("E1", "A5", "red", "From A4 the way goes down to A5."):
        with pytest.raises(ValueError, match="`step` .* names no cell of a board of 4 x 4 cells"):
            prepare.follow(record, 0, step)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["start_model.py", "--output_dir", str(folder), "--seed", "3"])
        start_model.main()
    return folder


@pytest.fixture(scope="module")
def trails_processor(checkpoint):
    return MultiCoCoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trails")
    prepare.write_split(folder, "val", 200, size=4, max_arrows=5, seed=0)
    return folder


def messages(record, folder):
    parts = [
        {"type": "image", "path": str(folder / record["images"][0])},
        {"type": "text", "text": record["question"]},
    ]
    return [{"role": "user", "content": parts}]


def test_start_model_loads_whole_by_class_and_by_auto_class(checkpoint, trails_processor, pictures):
    model, info = MultiCoCoForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    remote = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    remote_processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    conversation = messages(records(pictures, "val")[0], pictures)
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    settings["num_thoughts"] = 2
    inputs = trails_processor.apply_chat_template(conversation, **settings)
    remote_inputs = remote_processor.apply_chat_template(conversation, **settings)
    assert inputs["input_ids"].tolist() == remote_inputs["input_ids"].tolist()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, remote(**remote_inputs).logits, rtol=0, atol=0)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_start_model_is_the_same_for_the_same_seed_only(checkpoint, tmp_path):
    state = torch.random.get_rng_state()
    start_model.make_start_model(tmp_path / "again", seed=3)
    start_model.make_start_model(tmp_path / "other", seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = files(checkpoint), files(tmp_path / "again"), files(tmp_path / "other")
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_start_model_is_one_that_can_learn(checkpoint):
    """With position embeddings or thought tokens of zero, as by default, it learns nothing for a long time."""
    model = MultiCoCoForConditionalGeneration.from_pretrained(checkpoint)
    config, embeddings = model.config, model.get_input_embeddings().weight.detach()
    thoughts = embeddings[[config.start_latent_id, config.latent_token_id, config.end_latent_id]]
    line_break = MultiCoCoProcessor.from_pretrained(checkpoint).tokenizer.encode("\n")
    assert (thoughts == embeddings[line_break]).all()
    assert thoughts.std() > 0.05
    assert 0.07 < model.model.vision_tower.embeddings.position_embeddings.std() < 0.09
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert embeddings.shape[0] % 8 == 0


def test_generation_ends_with_the_turn_and_never_writes_markers(checkpoint, trails_processor):
    tokenizer = trails_processor.tokenizer
    settings = MultiCoCoForConditionalGeneration.from_pretrained(checkpoint).generation_config
    assert tokenizer.convert_ids_to_tokens([settings.eos_token_id, settings.pad_token_id]) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    markers = ["<img>", "</img>", "<IMG_CONTEXT>", "<|start-latent|>", "<|latent|>", "<|end-latent|>"]
    assert set(tokenizer.convert_ids_to_tokens(settings.suppress_tokens)) == set(markers)


@SIZES
def test_every_phrase_of_the_recipe_is_one_token(size, max_arrows):
    tokenizer = start_model.make_processor(size, max_arrows).tokenizer
    names = [f"{column}{row}" for column in "ABCDEF"[:size] for row in range(1, size + 1)]
    words = {f"### {colour}" for colour in prepare.COLOURS} | {f" {number}" for number in range(1, max_arrows + 1)}
    words |= {f" {name}" for name in names} | {*names, "\n", "system\nFollow the arrows.", "user\n", "assistant\n"}
    words |= {"Start at", " and follow", *(f" arrow{s}. Which colour do you reach?" for s in ("", "s"))}
    words |= {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"}
    words |= {"<|start-latent|>", "<|latent|>", "<|end-latent|>"}
    ids = {word: tokenizer.encode(word) for word in words}
    assert {word: len(tokens) for word, tokens in ids.items() if len(tokens) != 1} == {}
    assert len({tokens[0] for tokens in ids.values()}) == len(words)
    assert {word: tokenizer.decode(tokens) for word, tokens in ids.items()} == {word: word for word in words}


def test_pieces_tokenized_alone_equal_the_whole(trails_processor, pictures):
    tokenizer = trails_processor.tokenizer
    for record in records(pictures, "val"):
        prompt = trails_processor.apply_chat_template(messages(record, pictures), add_generation_prompt=True)
        pieces = [prompt, *(f"{step}\n" for step in record["steps"]), f"### {record['answer']}", "<|im_end|>"]
        whole = tokenizer.encode("".join(pieces))
        assert [token for piece in pieces for token in tokenizer.encode(piece)] == whole
        assert len(whole) - len(tokenizer.encode(prompt)) == 2 * len(record["steps"]) + 2


@pytest.mark.parametrize(
    "text",
    ["Where is the zebra?", "B2B3  C4\r\n\tarrows arrowsred", "naïve 漢字 🙂 ### ##", "\n\n \n", "_snake_case's"],
    ids=["words", "spaces", "unicode", "breaks", "signs"],
)
def test_any_other_text_survives_the_tokenizer(trails_processor, text):
    tokenizer = trails_processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_is_short_and_the_picture_arrives_pixel_by_pixel(trails_processor, pictures):
    record = records(pictures, "val")[0]
    inputs = trails_processor.apply_chat_template(
        messages(record, pictures), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = trails_processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert tokens.count("<IMG_CONTEXT>") == 16
    assert len(tokens) == 34
    assert inputs["num_patches_list"].tolist() == [1]
    with Image.open(pictures / record["images"][0]) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(inputs["pixel_values"][0], expected.float(), rtol=0, atol=1e-6)


def test_modes_are_trained_alike():
    """A control that had another budget would prove nothing."""
    settings = {}
    for name in ("coconut", "plain", "cot", "no_cot", "no_thoughts", "pause", "pause_loop"):
        settings[name] = yaml.safe_load((RECIPE / f"{name}.yaml").read_text(encoding="utf-8"))
        assert settings[name].pop("mode") == name.replace("plain", "coconut")
        assert settings[name].pop("output_dir") == f"out/trails-{name}"
        assert settings[name].pop("step_loss_weight") == (2 if name == "coconut" else 0)
    assert settings["coconut"]["draw_surplus"]
    assert settings["coconut"]["max_latent_stage"] > 5  # a surplus thought for the longest trail, too
    assert all(values == settings["coconut"] for values in settings.values())
