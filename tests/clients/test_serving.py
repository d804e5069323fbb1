"""A saved folder behind transformers' server, in its pipeline and in a page: the answers are those of score.py."""

import base64
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest
import torch
from boards import NUM_BOARDS, answer_of, counted_passes
from fastapi.testclient import TestClient
from gradio_client import Client, handle_file
from PIL import Image
from transformers import pipeline

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor
from multicoco.examples import app, serve


EXAMPLES = Path(app.__file__).parent
SECONDS_TO_START = 240


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_until_healthy(address, process, log):
    """Asks until the server answers; fails with its log if it ends, or takes too long."""
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    pytest.fail(f"{address} has not started:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """OpenAI's client of examples/serve.py, which runs as a process of its own."""
    address, log = f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--model", folder, "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", address.rpartition(":")[2]]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(address, process, log)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.wait(timeout=60)


def data_url(path):
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def message(question, *pictures):
    """A user's turn in OpenAI's form."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def of_board(board):
    return [message(board["question"], *board["images"])]


@pytest.fixture
def request_answer(client, folder):
    def ask(messages, num_thoughts=None, **kwargs):
        if num_thoughts is not None:
            kwargs["extra_body"] = {"chat_template_kwargs": {"num_thoughts": num_thoughts}}
        return client.chat.completions.create(
            model=folder, messages=messages, **{"max_completion_tokens": 8, "temperature": 0.0, **kwargs}
        )

    return ask


@pytest.fixture(scope="module")
def answer_here(folder):
    """`answer_here(messages, num_thoughts)`: the model and processor themselves, and the tokens of the prompt."""
    processor = MultiCoCoProcessor.from_pretrained(folder)
    model = MultiCoCoForConditionalGeneration.from_pretrained(folder)

    def ask(messages, num_thoughts):
        inputs = processor.apply_chat_template(
            messages,
            num_thoughts=num_thoughts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        length = inputs["input_ids"].shape[1]
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.decode(output[0, length:], skip_special_tokens=True), length

    return ask


def native(messages):
    """The same messages in transformers' form."""
    names = {"image_url": lambda part: {"type": "image", "url": part["image_url"]["url"]}, "text": lambda part: part}
    return [
        {**turn, "content": [names[part["type"]](part) for part in turn["content"]]}
        if isinstance(turn["content"], list)
        else turn
        for turn in messages
    ]


def test_the_server_gives_the_answers_of_score(request_answer, boards, score_boards, budget):
    answers = [request_answer(of_board(board)) for board in boards]
    texts = [answer.choices[0].message.content for answer in answers]
    expected_accuracy, expected = score_boards(budget)
    assert expected_accuracy >= 0.95
    assert [answer_of(text) for text in texts] == expected
    assert {answer.usage.completion_tokens for answer in answers} == {2}  # thought, not written: the answer, the end


@pytest.mark.parametrize("num_thoughts", [0, 3, 6])
def test_a_request_chooses_its_thoughts(num_thoughts, request_answer, answer_here, boards, budget):
    own = request_answer(of_board(boards[0])).usage.prompt_tokens
    for board in boards[:20]:
        answer = request_answer(of_board(board), num_thoughts=num_thoughts)
        text, length = answer_here(native(of_board(board)), num_thoughts)
        assert answer.choices[0].message.content == text
        assert answer.usage.prompt_tokens == length
        if board is boards[0]:
            assert length == own - budget + num_thoughts


def test_streams(request_answer, boards, score_boards, budget):
    for board, expected in zip(boards[:20], score_boards(budget)[1], strict=False):
        chunks = list(request_answer(of_board(board), stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert answer_of(text) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_two_pictures_and_a_second_turn(request_answer, answer_here, boards, budget):
    first, second = boards[:2]
    two_pictures = [message(first["question"], *first["images"], *second["images"])]
    second_turn = [
        *of_board(first),
        {"role": "assistant", "content": f"### {first['answer']}"},
        message(second["question"], *second["images"]),
    ]
    for messages in (two_pictures, second_turn):
        answer = request_answer(messages)
        assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == answer_here(native(messages), budget)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("change", "num_thoughts", "reason"),
    [
        ({}, -1, "`num_thoughts` must be an integer of at least 0, got -1"),
        ({}, "3", "`num_thoughts` must be an integer of at least 0, got '3'"),
        ({}, 2.5, "`num_thoughts` must be an integer of at least 0, got 2.5"),
        ({"question": "What is <|latent|>?"}, None, "contains <|latent|>"),
        ({"question": "<|start-latent|><|latent|><|end-latent|>"}, None, "<|start-latent|>"),
        ({"question": "What is <IMG_CONTEXT>?"}, None, "contains <IMG_CONTEXT>"),
        ({"question": "What is in <image>?"}, None, "<image>"),
    ],
    ids=["negative", "text", "fraction", "latent", "block", "visual token", "placeholder"],
)
def test_what_cannot_be_asked_is_refused_with_the_reason(
    change, num_thoughts, reason, stream, request_answer, boards, score_boards, budget
):
    with pytest.raises(openai.BadRequestError) as refused:
        request_answer(of_board({**boards[0], **change}), num_thoughts=num_thoughts, stream=stream)
    assert reason in refused.value.body["message"]
    answer = request_answer(of_board(boards[0])).choices[0].message.content  # and the server goes on
    assert answer_of(answer) == score_boards(budget)[1][0]


def test_a_picture_that_cannot_be_read_is_refused(request_answer, boards, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(boards[0]["images"][0]).read_bytes()[:60])
    with pytest.raises(openai.BadRequestError, match="cannot be read as an image"):
        request_answer([message(boards[0]["question"], broken)])
    nowhere = {"type": "image_url", "image_url": {"url": f"http://127.0.0.1:{free_port()}/board.png"}}
    with pytest.raises(openai.BadRequestError, match="cannot be read as an image"):
        request_answer([{"role": "user", "content": [nowhere, {"type": "text", "text": boards[0]["question"]}]}])


def test_the_server_feeds_its_own_number_of_thoughts_or_that_of_the_request(folder, boards):
    """In this process, where the passes can be counted."""
    counts = []

    def count(module, args):
        if type(module).__name__ == "Qwen2Model":
            counts[-1] += 1

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        with TestClient(serve.build(folder, num_thoughts=3, device="cpu")) as server:
            for kwargs, num_thoughts in (({}, 3), ({"chat_template_kwargs": {"num_thoughts": 5}}, 5)):
                counts.append(0)
                body = {"model": folder, "messages": of_board(boards[0]), "max_completion_tokens": 1, **kwargs}
                answer = server.post("/v1/chat/completions", json=body).json()
                assert answer["usage"]["completion_tokens"] == 1
                assert counts[-1] == num_thoughts + 1  # passes; the first word needs no step of its own
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_pipeline_gives_the_answers_of_score(batch_size, folder, boards, score_boards, budget):
    ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True, device="cpu")
    chats = []
    for board in boards:
        parts = [{"type": "image", "path": board["images"][0]}, {"type": "text", "text": board["question"]}]
        chats.append([{"role": "user", "content": parts}])
    with counted_passes(ask.model) as passes:
        answers = ask(text=chats, batch_size=batch_size, max_new_tokens=8, return_full_text=False)
    assert [answer_of(answer["generated_text"]) for (answer,) in answers] == score_boards(budget)[1]
    passes.check(num_prefills=-(-NUM_BOARDS // batch_size), num_thoughts=budget)


@pytest.fixture(scope="module")
def page(folder):
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return app.build(folder, max_new_tokens=8)


def test_the_page_gives_the_answers_of_score(page, boards, score_boards, answer_here, budget):
    (ask,) = [function.fn for function in page.fns.values() if function.api_name == "ask"]
    for board, expected in zip(boards[:20], score_boards(budget)[1], strict=False):
        with Image.open(board["images"][0]) as picture:
            assert answer_of(ask(picture, board["question"], budget)) == expected
            for num_thoughts in (0, 2 * budget):
                text, _ = answer_here(native(of_board(board)), num_thoughts)
                assert ask(picture, board["question"], num_thoughts) == text.strip()


def test_the_page_is_served(page, boards, score_boards, budget):
    (slider,) = [block for block in page.blocks.values() if getattr(block, "label", None) == "Thoughts"]
    assert (slider.minimum, slider.maximum, slider.value) == (0, 2 * budget, budget)
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True, share=False
    )
    try:
        client = Client(address, verbose=False)
        board = boards[0]
        answer = client.predict(handle_file(board["images"][0]), board["question"], budget, api_name="/ask")
        assert answer_of(answer) == score_boards(budget)[1][0]
        for question, reason in (("  ", "the question is empty"), ("What is <|latent|>?", "contains <|latent|>")):
            with pytest.raises(Exception, match=reason.replace("|", r"\|")):
                client.predict(handle_file(board["images"][0]), question, budget, api_name="/ask")
    finally:
        page.close()
