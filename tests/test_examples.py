"""Each example does what it says, on the golden model."""

import io
import json
import shutil

import pytest
from conftest import GOLDEN
from safetensors.torch import load_file

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor
from multicoco.examples import chat, custom_data, generate_batch, pipeline
from multicoco.processing_multicoco import OWN


PICTURES = [str(GOLDEN / "internvl" / "images" / f"{name}.png") for name in ("square", "wide")]


@pytest.fixture(scope="module")
def saved(shared_model, processor, tmp_path_factory):
    """A folder as training leaves it: it knows its own budget of thoughts."""
    folder = tmp_path_factory.mktemp("examples") / "model"
    shared_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_thoughts": 2}))
    MultiCoCoProcessor.from_pretrained(folder, num_thoughts=2).save_pretrained(folder)
    return str(folder)


def pixels_of(processor, pictures):
    inputs = processor(images=[pictures], text="<image>\n" * len(pictures), return_tensors="pt")
    return inputs["pixel_values"], inputs["num_patches_list"]


def asked(saved, pictures, *questions, num_thoughts=OWN, max_new_tokens=5):
    """The answers of InternVL's own interface, to one question after the other."""
    processor = MultiCoCoProcessor.from_pretrained(saved)
    model = MultiCoCoForConditionalGeneration.from_pretrained(saved, dtype="auto")
    pixel_values, counts = pixels_of(processor, pictures)
    history, answers = None, []
    for number, question in enumerate(questions):
        question = "<image>\n" * len(pictures) + question if number == 0 else question
        answer, history = model.chat(
            processor.tokenizer,
            pixel_values,
            question,
            {"max_new_tokens": max_new_tokens},
            num_patches_list=counts,
            history=history,
            return_history=True,
            num_thoughts=num_thoughts,
        )
        answers.append(answer)
    return answers


def test_chat_keeps_the_conversation_and_streams(saved, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\nAnd on the left?\n"))
    messages = chat.main(["--model", saved, "--image", *PICTURES, "--num_thoughts", "3", "--max_new_tokens", "5"])
    expected = asked(saved, PICTURES, "How many?", "And on the left?", num_thoughts=3)
    assert [message["content"] for message in messages if message["role"] == "assistant"] == expected
    assert expected != asked(saved, PICTURES, "How many?", "And on the left?")  # the budget reached the model
    printed = capsys.readouterr().out
    assert all(answer.strip("\ufffd") in printed for answer in expected)


def test_chat_shows_what_thoughts_read_as(saved, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "readable"
    shutil.copytree(saved, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "step_loss_weight": 1.0, "c_thought": 2}))
    words = ["--image", PICTURES[0], "--num_thoughts", "5", "--max_new_tokens", "5", "--show_thoughts"]
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    messages = chat.main(["--model", str(folder), *words])
    assert messages[1]["content"] == asked(saved, PICTURES[:1], "How many?", num_thoughts=5)[0]
    printed = capsys.readouterr().out
    processor = MultiCoCoProcessor.from_pretrained(folder)
    model = MultiCoCoForConditionalGeneration.from_pretrained(folder, dtype="auto")
    parts = [{"type": "image", "path": PICTURES[0]}, {"type": "text", "text": "How many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        num_thoughts=5,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    thoughts = model.generate(**inputs, max_new_tokens=1, return_thoughts=True).thoughts
    for group in range(2):
        (tokens,) = model.read_thoughts(thoughts[:, 2 * group : 2 * group + 2])[0]
        assert f"[thought {group + 1}] {processor.decode(tokens, skip_special_tokens=True).strip()}\n" in printed
    assert "[thought 3]" not in printed  # the fifth thought is no whole group
    with pytest.raises(SystemExit):
        chat.main(["--model", saved, *words])
    assert "cannot be read: its mode is coconut and its `step_loss_weight` 0" in capsys.readouterr().err


def test_a_batch_is_answered_as_its_records_alone(saved, tmp_path):
    for picture in PICTURES:
        shutil.copy(picture, tmp_path)
    records = [
        {"id": "a", "images": ["square.png"], "question": "How many?"},
        {"id": "b", "question": "Is there anything to see at all?"},
        {"id": "c", "images": ["wide.png", "square.png"], "question": "Which?"},
    ]
    data, output = tmp_path / "mine.jsonl", tmp_path / "answers.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    flags = ["--model", saved, "--data", data, "--output", output, "--batch_size", 2, "--max_new_tokens", 5]
    generate_batch.main(list(map(str, flags)))
    answers = {line["id"]: line["answer"] for line in map(json.loads, output.read_text().splitlines())}
    assert answers == {
        "a": asked(saved, PICTURES[:1], "How many?")[0],
        "b": MultiCoCoForConditionalGeneration.from_pretrained(saved, dtype="auto").chat(
            MultiCoCoProcessor.from_pretrained(saved).tokenizer, None, records[1]["question"], {"max_new_tokens": 5}
        ),
        "c": asked(saved, PICTURES[::-1], "Which?")[0],
    }


def test_own_records_train_through_the_curriculum(saved, tmp_path):
    out = tmp_path / "out"
    trainer = custom_data.main(["--model", saved, "--output_dir", str(out), "--count", "2"])
    config = MultiCoCoConfig.from_pretrained(out)
    assert (config.stage, config.num_thoughts) == (4, 3)  # three steps, then the last stage: no written step
    assert trainer.state.global_step == 5
    before, after = load_file(f"{saved}/model.safetensors"), load_file(out / "model.safetensors")
    assert any((before[name] != after[name].to(before[name])).any() for name in before)


def test_records_of_the_example_add_up():
    for record in custom_data.make_records(20):
        red, blue = (int(step.split()[0]) for step in record["steps"][:2])
        assert record["answer"] == str(red + blue)
        colours = record["images"][0].getcolors()
        assert {colour for _, colour in colours} <= {(255, 255, 255), (255, 0, 0), (0, 0, 255)}
        assert sum(number for number, colour in colours if colour != (255, 255, 255)) == (red + blue) * 101**2


@pytest.mark.parametrize("num_thoughts", [OWN, 4], ids=["own budget", "asked for"])
def test_the_pipeline_answers_as_the_model(saved, num_thoughts, capsys):
    flags = ["--model", saved, "--image", PICTURES[0], "--question", "How many?", "--max_new_tokens", "5"]
    if num_thoughts != OWN:
        flags += ["--num_thoughts", str(num_thoughts)]
    answer = pipeline.main(flags)
    assert answer.strip() == asked(saved, PICTURES[:1], "How many?", num_thoughts=num_thoughts)[0]
    assert capsys.readouterr().out.strip() == answer.strip()
