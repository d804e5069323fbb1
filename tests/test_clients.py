"""Programs that know InternVL and not us, on a trained checkpoint: they get its answers, and its thoughts are fed.

What each program calls was read in VLMEvalKit e8e78f0, lmms-eval 75571cf, the quick start of InternVL 2410d1d,
LlamaFactory v0.9.5 and ms-swift 3602360. None is installed here: the calls are, with tiles of our image processor.
"""

import contextlib
import copy
import functools
import inspect
import json
import subprocess
import sys
import textwrap
import threading
import types

import pytest
import torch
import torch.utils.checkpoint
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    GenerationMixin,
    TextIteratorStreamer,
    modeling_utils,
)

from multicoco import MultiCoCoProcessor
from multicoco.recipes.trails.prepare import COLOURS, cell_name, draw_board, iter_boards, make_question


NUM_BOARDS = 20
NUM_THOUGHTS = 5  # what the checkpoint was trained with
GREEDY = {"max_new_tokens": 8, "do_sample": False}

# The layers of a language model of 24 on two devices, as the model card deals them out: more of them than ours has.
SPLIT_MODEL = {
    **{f"language_model.model.layers.{layer}": "cpu" for layer in range(24)},
    "vision_model": "cpu",
    "mlp1": "cpu",
    "language_model.model.tok_embeddings": "cpu",
    "language_model.model.embed_tokens": "cpu",
    "language_model.output": "cpu",
    "language_model.model.norm": "cpu",
    "language_model.model.rotary_emb": "cpu",
    "language_model.lm_head": "cpu",
}
LOADED_BY = {
    "vlmevalkit": {"torch_dtype": torch.bfloat16, "low_cpu_mem_usage": True, "device_map": "auto"},
    "lmms_eval_internvl2": {"torch_dtype": torch.bfloat16, "low_cpu_mem_usage": True, "device_map": "cpu"},
    "lmms_eval_internvl3": {
        "torch_dtype": torch.bfloat16,
        "low_cpu_mem_usage": True,
        "use_flash_attn": True,
        "device_map": "cpu",
    },
    "lmms_eval_huggingface": {"torch_dtype": "bfloat16", "device_map": "cpu"},
    "quick_start": {"torch_dtype": torch.bfloat16, "low_cpu_mem_usage": True, "use_flash_attn": True},
    "quick_start_without_flash": {"torch_dtype": torch.bfloat16, "use_flash_attn": False},
    "quick_start_split": {"torch_dtype": torch.bfloat16, "use_flash_attn": True, "device_map": SPLIT_MODEL},
    "demo_worker": {"torch_dtype": torch.bfloat16, "load_in_8bit": False},
}


# --- boards, and our own answers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(trails):
    return str(trails)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return MultiCoCoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    """As most of these programs load it; our own processor never asks for the slow one."""
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)


@pytest.fixture(scope="module")
def boards(processor):
    """Boards that were not trained on: picture, tile `(1, 3, 56, 56)`, question and answer of each."""
    made = []
    for board in iter_boards("test", NUM_BOARDS, size=4, max_arrows=5, seed=0):
        picture = Image.fromarray(draw_board(board))
        made.append(
            types.SimpleNamespace(
                picture=picture,
                tile=torch.as_tensor(processor.image_processor(picture, return_tensors="pt")["pixel_values"]),
                question=make_question(cell_name(*board.trail[0]), board.num_arrows),
                answer=f"### {list(COLOURS)[board.colours[board.trail[board.num_arrows]]]}",
            )
        )
    return made


@pytest.fixture(scope="module")
def own_answers(model, processor, boards):
    return [own_answer(model, processor, [turn(board)]) for board in boards]


def turn(board, answer=None):
    """A board's question as messages, and its answer."""
    parts = [{"type": "image", "image": board.picture}, {"type": "text", "text": board.question}]
    return [{"role": "user", "content": parts}, *([{"role": "assistant", "content": answer}] if answer else [])]


def own_inputs(processor, turns, num_thoughts=NUM_THOUGHTS):
    return processor.apply_chat_template(
        [message for messages in turns for message in messages],
        num_thoughts=num_thoughts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def own_answer(model, processor, turns, num_thoughts=NUM_THOUGHTS, **settings):
    """What the model says when it is asked as this package asks."""
    inputs = own_inputs(processor, turns, num_thoughts).to(model.device, model.dtype)
    output = model.generate(**inputs, **GREEDY, **settings)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@contextlib.contextmanager
def counted_calls(model):
    """The calls of the language model: `n + 1` passes for `n` thoughts, and one for each token after the first."""
    calls = []
    handle = model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def calls_of(tokenizer, answers, num_thoughts=NUM_THOUGHTS):
    """Calls of one batch. Its longest answer has these tokens and the end of the turn; the prefill gives the first."""
    return num_thoughts + 1 + max(len(tokenizer.encode(answer)) for answer in answers)


@contextlib.contextmanager
def seen_prompts(model, tokenizer):
    """The prompts whose embeddings were looked up, as text."""
    seen = []

    def look(module, args):
        if args[0].shape[1] > 1:
            seen.extend(tokenizer.batch_decode(args[0]))

    handle = model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def test_answers_are_right_and_need_the_thoughts(model, processor, boards, own_answers):
    """Else the tests of this file would not see whether thoughts were fed."""
    right = [board.answer for board in boards]
    assert sum(own == answer for own, answer in zip(own_answers, right, strict=True)) >= NUM_BOARDS - 1
    assert model.config.num_thoughts == NUM_THOUGHTS
    word = model.get_input_embeddings().weight[model.config.latent_token_id].detach()
    unfed = {"edit_thoughts": lambda thought, index: word.expand_as(thought)}  # latent tokens read as words
    for num_thoughts, settings in ((0, {}), (NUM_THOUGHTS, unfed)):
        answers = [own_answer(model, processor, [turn(board)], num_thoughts, **settings) for board in boards]
        assert sum(own == answer for own, answer in zip(answers, right, strict=True)) < NUM_BOARDS / 2


# --- loading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", LOADED_BY)
def test_loaded_as_a_client_loads_it_answers_are_our_own(client, folder, processor, tokenizer, boards):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, **LOADED_BY[client]).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for board in boards[:3]:
        with counted_calls(model) as calls:
            answer = model.chat(tokenizer, board.tile.to(torch.bfloat16), board.question, dict(GREEDY))
        assert answer == own_answer(model, processor, [turn(board)])
        assert len(calls) == calls_of(tokenizer, [answer])


def test_device_map_with_original_names_places_the_modules(folder, tokenizer, boards, own_answers, tmp_path):
    devices = {**SPLIT_MODEL, "mlp1": "disk", "language_model.model.layers.1": "disk"}
    model = AutoModel.from_pretrained(
        folder, trust_remote_code=True, device_map=devices, offload_folder=tmp_path, use_flash_attn=True
    ).eval()
    placed = {name: str(parameter.device) for name, parameter in model.named_parameters()}
    away = {name for name, device in placed.items() if device == "meta"}
    assert {name for name in placed if ".layers.1." in name and "language_model" in name} <= away
    assert {name for name in placed if "multi_modal_projector" in name} <= away
    assert len({name.split(".")[1] for name in away}) == 2
    with counted_calls(model) as calls:
        assert model.chat(tokenizer, boards[0].tile, boards[0].question, dict(GREEDY)) == own_answers[0]
    assert len(calls) == calls_of(tokenizer, own_answers[:1])


def test_quantization_of_the_quick_start_is_answered_with_its_successor(folder):
    with pytest.raises((ValueError, ImportError), match="bitsandbytes|BitsAndBytesConfig"):
        AutoModel.from_pretrained(folder, trust_remote_code=True, load_in_8bit=True)


@pytest.mark.parametrize(
    "settings", [{"use_fast": False}, {"device_map": "cpu"}, {}], ids=["use_fast", "device_map", "plain"]
)
def test_tokenizer_of_the_clients_is_that_of_the_processor(folder, processor, boards, settings):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **settings)
    text = f"<img><IMG_CONTEXT></img>\n{boards[0].question}<|start-latent|><|latent|><|end-latent|>"
    assert tokenizer.encode(text) == processor.tokenizer.encode(text)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


def test_original_names_in_the_configuration_mean_the_native_ones(folder, model, tmp_path):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.llm_config is config.text_config
    assert config.llm_config.num_hidden_layers == len(model.model.language_model.layers)
    assert model.config.llm_config.hidden_size == model.get_input_embeddings().weight.shape[1]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "text_config" in saved
    assert "llm_config" not in saved
    assert "InternVLChatModel" not in model.config.architectures  # LlamaFactory would refuse to load it


def test_folder_alone_answers_in_a_program_that_has_never_imported_us(folder, boards, own_answers, tmp_path):
    tiles = tmp_path / "tiles.pt"
    torch.save([board.tile for board in boards], tiles)
    program = f"""
        import json, sys, torch
        from transformers import AutoModel, AutoTokenizer

        questions, greedy = json.loads(sys.argv[1]), {GREEDY}
        tokenizer = AutoTokenizer.from_pretrained({folder!r}, trust_remote_code=True, use_fast=False)
        model = AutoModel.from_pretrained(
            {folder!r}, torch_dtype=torch.float32, low_cpu_mem_usage=True, use_flash_attn=True, trust_remote_code=True
        ).eval()
        tiles = torch.load({str(tiles)!r})
        calls = []
        model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
        one = model.chat(tokenizer, tiles[0], questions[0], greedy)
        num_calls = len(calls)
        counts = [len(tile) for tile in tiles]
        batch = model.batch_chat(
            tokenizer, torch.cat(tiles), num_patches_list=counts, questions=questions, generation_config=greedy
        )
        assert "multicoco" not in sys.modules and type(model).__module__.startswith("transformers_modules")
        print(json.dumps([one, num_calls, batch]))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), json.dumps([board.question for board in boards])],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    one, num_calls, batch = json.loads(result.stdout.splitlines()[-1])
    assert [one, *batch] == [own_answers[0], *own_answers]
    assert num_calls == NUM_THOUGHTS + 2  # every answer is one token and the end of the turn


# --- evaluations -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_vlmevalkit_version_2_gets_our_answers(model, tokenizer, boards, own_answers):
    """One dictionary of settings for all questions, as it keeps it; `temperature` and `top_p` stand in it unused."""
    settings = {"do_sample": False, "max_new_tokens": 4096, "top_p": 0.95, "temperature": 0.6}
    answers = []
    for board in boards:
        with counted_calls(model) as calls:
            answers.append(
                model.chat(
                    tokenizer,
                    pixel_values=board.tile.to(model.device),
                    num_patches_list=[board.tile.size(0)],
                    question=f"<image>\n{board.question}",
                    generation_config=settings,
                    verbose=True,
                )
            )
        assert len(calls) == calls_of(tokenizer, answers[-1:])
    assert answers == own_answers


@torch.no_grad()
def test_vlmevalkit_version_1_5_gets_our_answers(model, tokenizer, boards, own_answers):
    settings = {"do_sample": False, "max_new_tokens": 4096, "top_p": None}
    ask = functools.partial(model.chat, tokenizer, generation_config=settings, verbose=True)
    with counted_calls(model) as calls:
        assert [ask(pixel_values=board.tile, question=board.question) for board in boards] == own_answers
    assert len(calls) == sum(calls_of(tokenizer, [answer]) for answer in own_answers)


def test_vlmevalkit_asks_without_a_picture(model, tokenizer):
    """Its code has this call; at this commit a division by the number of pictures stands before it."""
    settings = {"do_sample": False, "max_new_tokens": 4, "top_p": 0.95, "temperature": 0.6}
    with counted_calls(model) as calls, seen_prompts(model, tokenizer) as prompts:
        answer = model.chat(
            tokenizer,
            pixel_values=None,
            num_patches_list=[],
            question="Which colour?",
            generation_config=settings,
            verbose=True,
        )
    assert isinstance(answer, str)
    assert "<IMG_CONTEXT>" not in prompts[0]
    assert prompts[0].count("<|latent|>") == NUM_THOUGHTS
    assert len(calls) >= NUM_THOUGHTS + 1


def test_vlmevalkit_in_many_turns_gets_our_answers(model, processor, tokenizer, boards):
    """All pictures of the conversation at once; the history is of pairs, with their `<image>`."""
    settings = {"do_sample": False, "max_new_tokens": 512, "top_p": None, "num_beams": 1}
    for first, second in zip(boards[:5], boards[5:10], strict=True):
        with counted_calls(model) as calls:
            answer, history = model.chat(
                tokenizer,
                pixel_values=torch.cat([first.tile, second.tile]),
                num_patches_list=[1, 1],
                question=f"<image>\n{second.question}",
                generation_config=settings,
                history=[(f"<image>\n{first.question}", first.answer)],
                return_history=True,
            )
        assert answer == own_answer(model, processor, [turn(first, first.answer), turn(second)])
        assert len(calls) == calls_of(tokenizer, [answer])
        assert [tuple(pair) for pair in history] == [
            (f"<image>\n{first.question}", first.answer),
            (f"<image>\n{second.question}", answer),
        ]


def test_vlmevalkit_assigns_a_system_message(model, tokenizer, boards, own_answers):
    model = copy.copy(model)
    usual = model.system_message
    ask = functools.partial(model.chat, tokenizer, boards[0].tile, boards[0].question, dict(GREEDY))
    model.system_message = "Think first, then answer."
    with seen_prompts(model, tokenizer) as prompts:
        ask()
    assert prompts[0].startswith("<|im_start|>system\nThink first, then answer.<|im_end|>\n")
    model.system_message = usual
    with seen_prompts(model, tokenizer) as prompts:
        assert ask() == own_answers[0]
    assert prompts[0].startswith(f"<|im_start|>system\n{usual}<|im_end|>\n")
    assert usual == model.config.system_message


@pytest.mark.parametrize("settings", [{}, {"until": ["\n\n"], "temperature": 0}], ids=["plain", "task"])
def test_lmms_eval_internvl2_and_internvl3_get_our_answers(model, tokenizer, boards, own_answers, settings):
    """Arguments by position; the task's settings are cut to those of the default, and completed from it."""
    default = {"num_beams": 1, "max_new_tokens": 1024, "do_sample": False}
    settings = {name: settings.get(name, value) for name, value in default.items()}
    answers = []
    for board in boards:
        with counted_calls(model) as calls:
            answer, history = model.chat(
                tokenizer,
                board.tile,
                f"<image>\n{board.question}",
                settings,
                num_patches_list=[board.tile.size(0)],
                history=None,
                return_history=True,
            )
        assert len(calls) == calls_of(tokenizer, [answer])
        assert [tuple(pair) for pair in history] == [(f"<image>\n{board.question}", answer)]
        answers.append(answer)
    assert answers == own_answers
    settings = {**settings, "max_new_tokens": 4}
    text, _ = model.chat(
        tokenizer, None, "Which colour?", settings, num_patches_list=None, history=None, return_history=True
    )
    assert isinstance(text, str)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_lmms_eval_huggingface_gets_our_answers(folder, model, tokenizer, boards, own_answers, batch_size):
    """Text first, without tokens; then the processor, which is given empty lists of videos and of audios too."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    answers = []
    for start in range(0, NUM_BOARDS, batch_size):
        chunk = boards[start : start + batch_size]
        texts = [
            processor.apply_chat_template(turn(board), tokenize=False, add_generation_prompt=True) for board in chunk
        ]
        inputs = processor(
            text=texts,
            padding=True,
            return_tensors="pt",
            images=[board.picture for board in chunk],
            videos=[],
            audios=[],
        ).to(model.device)
        with counted_calls(model) as calls:
            output = model.generate(
                **inputs,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                do_sample=False,
                temperature=None,
                top_p=None,
                num_beams=1,
                max_new_tokens=4096,
                use_cache=True,
            )
        new = [row[len(prompt) :] for prompt, row in zip(inputs.input_ids, output, strict=True)]
        answers += processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert len(calls) == calls_of(tokenizer, answers[-len(chunk) :])
    assert answers == own_answers


def test_lmms_eval_huggingface_asks_without_a_picture(folder, model):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Which colour?"}]}]
    texts = [processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)]
    inputs = processor(text=texts, padding=True, return_tensors="pt", images=[], videos=[], audios=[])
    assert (inputs["input_ids"] == model.config.latent_token_id).sum() == NUM_THOUGHTS
    with counted_calls(model) as calls:
        assert len(model.generate(**inputs, max_new_tokens=1, do_sample=False)) == 1
    assert len(calls) == NUM_THOUGHTS + 1


@pytest.mark.parametrize("num_thoughts", [3, 0, None], ids=["three", "zero", "none"])
def test_folder_saved_with_another_number_is_asked_with_it(folder, model, tokenizer, boards, num_thoughts, tmp_path):
    """How a budget reaches programs that have no argument for it."""
    other = copy.deepcopy(model)
    other.config.num_thoughts = num_thoughts
    other.save_pretrained(tmp_path)
    MultiCoCoProcessor.from_pretrained(folder, num_thoughts=num_thoughts).save_pretrained(tmp_path)
    expected = own_answer_of(model, MultiCoCoProcessor.from_pretrained(folder), boards[0], num_thoughts)

    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with counted_calls(loaded) as calls:
        assert loaded.chat(tokenizer, boards[0].tile, boards[0].question, dict(GREEDY)) == expected
    assert len(calls) == calls_of(tokenizer, [expected], num_thoughts or 0)

    processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    text = processor.apply_chat_template(turn(boards[0]), tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[boards[0].picture], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.latent_token_id).sum() == (num_thoughts or 0)
    output = loaded.generate(**inputs, **GREEDY)
    assert processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == expected


# --- quick start of the model card -------------------------------------------------------------------------------


def test_quick_start_talks_without_a_picture(model, tokenizer):
    settings = {"max_new_tokens": 4, "do_sample": False}
    first, history = model.chat(tokenizer, None, "Hello?", settings, history=None, return_history=True)
    with seen_prompts(model, tokenizer) as prompts:
        second, history = model.chat(tokenizer, None, "Go on.", settings, history=history, return_history=True)
    assert [tuple(pair) for pair in history] == [("Hello?", first), ("Go on.", second)]
    assert "user\nHello?<|im_end|>" in prompts[0]
    assert "<IMG_CONTEXT>" not in prompts[0]


def test_quick_start_asks_about_one_picture_twice(model, tokenizer, processor, boards, own_answers):
    first, second = boards[0], "Start at A1 and follow 1 arrow. Which colour do you reach?"
    assert model.chat(tokenizer, first.tile, f"<image>\n{first.question}", dict(GREEDY)) == own_answers[0]
    answer, history = model.chat(
        tokenizer, first.tile, f"<image>\n{first.question}", dict(GREEDY), history=None, return_history=True
    )
    with counted_calls(model) as calls, seen_prompts(model, tokenizer) as prompts:
        again, history = model.chat(tokenizer, first.tile, second, dict(GREEDY), history=history, return_history=True)
    turns = [turn(first, answer), [{"role": "user", "content": second}]]
    assert again == own_answer(model, processor, turns)
    assert prompts == [processor.tokenizer.decode(own_inputs(processor, turns)["input_ids"][0])]
    assert len(calls) == calls_of(tokenizer, [again])
    assert [question for question, _ in history] == [f"<image>\n{first.question}", second]


@pytest.mark.parametrize("separate", [False, True], ids=["combined", "separate"])
def test_quick_start_asks_about_two_pictures(model, tokenizer, boards, separate):
    """Combined, the tiles of both stand in one run; separate, each picture has a run of its own. Two turns each."""
    pixel_values = torch.cat([boards[0].tile, boards[1].tile])
    counts = {"num_patches_list": [len(boards[0].tile), len(boards[1].tile)]} if separate else {}
    question = "Image-1: <image>\nImage-2: <image>\nCompare." if separate else "<image>\nCompare."
    settings = {"max_new_tokens": 4, "do_sample": False}
    with counted_calls(model) as calls, seen_prompts(model, tokenizer) as prompts:
        _, history = model.chat(
            tokenizer, pixel_values, question, settings, **counts, history=None, return_history=True
        )
        _, history = model.chat(
            tokenizer, pixel_values, "Why?", settings, **counts, history=history, return_history=True
        )
    per_tile = "<IMG_CONTEXT>" * model.num_image_token
    runs = [f"<img>{per_tile}</img>"] * 2 if separate else [f"<img>{2 * per_tile}</img>"]
    for prompt in prompts:
        assert [prompt.count(run) for run in dict.fromkeys(runs)] == [len(runs)]
        assert prompt.count("<IMG_CONTEXT>") == 2 * model.num_image_token
    assert len(history) == 2
    assert len(calls) >= 2 * (NUM_THOUGHTS + 1)


def test_quick_start_asks_about_frames(model, tokenizer, boards):
    frames = torch.cat([board.tile for board in boards[:8]])
    question = "".join(f"Frame{index + 1}: <image>\n" for index in range(8)) + boards[0].question
    with seen_prompts(model, tokenizer) as prompts:
        answer, history = model.chat(
            tokenizer, frames, question, dict(GREEDY), num_patches_list=[1] * 8, history=None, return_history=True
        )
    assert prompts[0].count("<img>") == 8
    assert prompts[0].count("<|latent|>") == NUM_THOUGHTS
    assert [tuple(pair) for pair in history] == [(question, answer)]


@pytest.mark.parametrize("tiles", ["num_patches_list", "image_counts"])
def test_quick_start_asks_in_a_batch(model, tokenizer, boards, own_answers, tiles):
    with counted_calls(model) as calls:
        answers = model.batch_chat(
            tokenizer,
            torch.cat([board.tile for board in boards]),
            questions=[f"<image>\n{board.question}" for board in boards],
            generation_config=dict(GREEDY),
            **{tiles: [len(board.tile) for board in boards]},
        )
    assert answers == own_answers
    assert len(calls) == calls_of(tokenizer, answers)


def test_arguments_by_position_mean_what_they_mean_in_the_original(model, tokenizer, boards, own_answers):
    names = ("<img>", "</img>", "<IMG_CONTEXT>")
    board = boards[0]
    answer, history = model.chat(
        tokenizer, board.tile, board.question, dict(GREEDY), None, True, [len(board.tile)], *names, False
    )
    assert (answer, len(history)) == (own_answers[0], 1)
    pixel_values = torch.cat([board.tile for board in boards[:3]])
    questions = [board.question for board in boards[:3]]
    assert (
        model.batch_chat(tokenizer, pixel_values, questions, dict(GREEDY), [1, 1, 1], None, False, *names, True, None)
        == own_answers[:3]
    )
    assert (
        model.batch_chat(tokenizer, pixel_values, questions, dict(GREEDY), None, None, False, *names, False, [1, 1, 1])
        == own_answers[:3]
    )


@pytest.mark.parametrize("argument", [{"history": [("a", "b")]}, {"return_history": True}], ids=["given", "asked"])
def test_a_batch_has_no_history(model, tokenizer, boards, argument):
    with pytest.raises(ValueError, match="`history` and `return_history` are not supported by `batch_chat`"):
        model.batch_chat(tokenizer, boards[0].tile, [boards[0].question], dict(GREEDY), [1], **argument)


def test_quick_start_streams_the_answer(model, tokenizer, boards, own_answers):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    settings = {"max_new_tokens": 1024, "do_sample": False, "streamer": streamer}
    keywords = {
        "tokenizer": tokenizer,
        "pixel_values": boards[0].tile,
        "question": boards[0].question,
        "history": None,
        "return_history": False,
        "generation_config": settings,
    }
    with counted_calls(model) as calls:
        thread = threading.Thread(target=model.chat, kwargs=keywords)
        thread.start()
        written = ""
        for text in streamer:
            if text == model.conv_template.sep:
                break
            written += text
        thread.join(timeout=120)
    assert written == own_answers[0]
    assert model.conv_template.sep.strip() == "<|im_end|>"
    assert len(calls) == calls_of(tokenizer, [written])


@pytest.mark.parametrize(
    ("asked", "fed"), [("own", NUM_THOUGHTS), (None, None), (0, 0), (3, 3)], ids=["own", "none", "zero", "three"]
)
def test_number_of_thoughts_can_be_asked_for(model, tokenizer, processor, boards, asked, fed):
    with counted_calls(model) as calls, seen_prompts(model, tokenizer) as prompts:
        answer = model.chat(tokenizer, boards[0].tile, boards[0].question, dict(GREEDY), num_thoughts=asked)
    assert answer == own_answer_of(model, processor, boards[0], fed)
    assert prompts[0].count("<|latent|>") == (fed or 0)
    assert prompts[0].endswith("assistant\n") == (fed is None)
    assert len(calls) == calls_of(tokenizer, [answer], fed or 0)
    (batch_answer,) = model.batch_chat(
        tokenizer, boards[0].tile, [boards[0].question], dict(GREEDY), [1], num_thoughts=asked
    )
    assert batch_answer == answer


def own_answer_of(model, processor, board, num_thoughts):
    """[`own_answer`] from the parts: text, then the processor with or without a block."""
    text = processor.apply_chat_template(turn(board), add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[board.picture], text=[text], num_thoughts=num_thoughts, return_tensors="pt")
    output = model.generate(**inputs, **GREEDY)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# --- calls of the model itself -----------------------------------------------------------------------------------


def test_inputs_can_be_moved_one_by_one(folder, model, tokenizer, boards, own_answers):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = own_inputs(processor, [turn(boards[0])])
    moved = {k: v.to(model.device) for k, v in inputs.items()}
    with counted_calls(model) as calls:
        output = model.generate(**moved, **GREEDY)
    new = output[0, moved["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == own_answers[0]
    assert len(calls) == calls_of(tokenizer, own_answers[:1])


def test_generate_is_called_with_an_id_that_the_client_assigned(model, processor, tokenizer, boards, own_answers):
    inputs = own_inputs(processor, [turn(boards[0])])
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    with counted_calls(model) as calls:
        output = model.generate(
            pixel_values=inputs["pixel_values"],
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            **GREEDY,
        )
    assert tokenizer.decode(output[0], skip_special_tokens=True).strip().endswith(own_answers[0])
    assert len(calls) == calls_of(tokenizer, own_answers[:1])
    assert model.img_context_token_id == model.config.image_token_id


@pytest.fixture(scope="module")
def example(processor, boards):
    """Two boards with their answers: the second has a label less, so that its cut is longer than it needs."""
    inputs = own_inputs(processor, [turn(boards[0])]), own_inputs(processor, [turn(boards[1])])
    answers = [processor.tokenizer.encode(f"{board.answer}<|im_end|>") for board in boards[:2]]
    ids = torch.cat([torch.cat([x["input_ids"], torch.tensor([a])], 1) for x, a in zip(inputs, answers, strict=True)])
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = ids[0, -2:]
    labels[1, -1:] = ids[1, -1:]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([x["pixel_values"] for x in inputs]).double(),
        "labels": labels,
    }


@pytest.fixture
def learner(model):
    """The trained model in float64, to be changed; without some noise it has next to no loss."""
    learner = copy.deepcopy(model).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return learner


def loss_and_grads(model, outputs):
    model.zero_grad()
    outputs.loss.backward()
    return outputs.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_training(model, outputs, expected):
    loss, grads = loss_and_grads(model, outputs)
    torch.testing.assert_close(loss, expected[0])
    assert grads.keys() == expected[1].keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_forward_takes_ids_and_mask_by_position(learner, example):
    ids, mask = example["input_ids"], example["attention_mask"]
    learner.eval()
    text = torch.where(ids == learner.config.image_token_id, ids[:, :1], ids)
    with torch.no_grad(), counted_calls(learner) as calls:
        logits = learner(text, attention_mask=mask).logits
        torch.testing.assert_close(logits, learner(input_ids=text, attention_mask=mask).logits, rtol=0, atol=0)
        assert len(calls) == 2 * (NUM_THOUGHTS + 1)
        logits = learner(ids, example["pixel_values"], mask).logits
        keywords = {name: example[name] for name in ("input_ids", "pixel_values", "attention_mask")}
        torch.testing.assert_close(logits, learner(**keywords).logits, rtol=0, atol=0)
    assert len(calls) == 4 * (NUM_THOUGHTS + 1)


def test_forward_takes_the_order_of_the_original(learner, example):
    """Tiles first, and flags of shape `(tiles, 1)`; the last tile is a dummy, as the original pads a batch."""
    ids, mask = example["input_ids"], example["attention_mask"]
    pixel_values = torch.cat([example["pixel_values"], torch.zeros_like(example["pixel_values"][:1])])
    flags = torch.tensor([[1], [1], [0]])
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    expected = loss_and_grads(learner, learner(**example))
    with counted_calls(learner) as calls:
        outputs = learner(pixel_values, ids, mask, positions, flags, None, example["labels"])
    assert len(calls) == NUM_THOUGHTS + 1
    assert_same_training(learner, outputs, expected)
    learner.eval()
    with torch.no_grad():
        keywords = {name: example[name] for name in ("input_ids", "pixel_values", "attention_mask")}
        logits = learner(pixel_values, ids, mask, positions, flags).logits
        torch.testing.assert_close(logits, learner(**keywords).logits, rtol=0, atol=0)


# --- training ----------------------------------------------------------------------------------------------------


def llamafactory_checkpointing(**checkpoint_kwargs):
    """LlamaFactory's checkpointing function: transformers', behind a plain function that remembers it."""
    inner = functools.partial(torch.utils.checkpoint.checkpoint, **checkpoint_kwargs)

    @functools.wraps(inner, assigned=(*functools.WRAPPER_ASSIGNMENTS, "__self__"))
    def wrapper(function, *args, **kwargs):
        for arg in args:
            if torch.is_tensor(arg) and torch.is_floating_point(arg):
                arg.requires_grad_(True)
                break
        return inner(function, *args, **kwargs)

    return wrapper


def test_llamafactory_wraps_the_checkpointing_and_gets_the_same_gradients(learner, example):
    expected = loss_and_grads(learner, learner(**example))
    assert "value" not in inspect.signature(learner._set_gradient_checkpointing).parameters
    function = llamafactory_checkpointing(use_reentrant=False)
    learner._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    learner.config.use_cache = False
    with counted_calls(learner) as calls:
        outputs = learner(**example)
    assert len(calls) == NUM_THOUGHTS + 1
    assert_same_training(learner, outputs, expected)


def test_llamafactory_default_of_reentrant_checkpointing_is_refused(learner, example):
    function = llamafactory_checkpointing(use_reentrant=True)
    learner._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    with pytest.raises(ValueError, match="reentrant"):
        learner(**example)


def test_llamafactory_replaces_generate_and_gets_our_answers(model, processor, tokenizer, boards, own_answers):
    """It puts transformers' own `generate` in the place of one that is not; ours is then never called."""
    model = copy.copy(model)
    model.generate = types.MethodType(GenerationMixin.generate, model)
    for board, own in zip(boards[:3], own_answers[:3], strict=True):
        inputs = own_inputs(processor, [turn(board)])
        with counted_calls(model) as calls:
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                pixel_values=inputs["pixel_values"],
                **GREEDY,
            )
        new = output[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == own
        assert len(calls) == calls_of(tokenizer, [own])


def ms_swift_cut(labels):
    """Labels as long as the logits that are kept: those before the first label go, or all that predict no label."""
    if len(labels) > 1:
        kept = labels.shape[1] - int((labels != -100).int().argmax(dim=1).min()) + 1
        return {"labels": labels[:, -kept:], "logits_to_keep": kept}
    labelled = labels[0] != -100
    kept = torch.nn.functional.pad(labelled[1:], (0, 1), value=True)
    return {"labels": torch.nn.functional.pad(labels[:, labelled], (1, 0), value=-100), "logits_to_keep": kept}


@pytest.mark.parametrize("batch_size", [1, 2], ids=["mask", "count"])
def test_ms_swift_cuts_the_labels_and_gets_the_same_gradients(learner, example, batch_size):
    assert "logits_to_keep" in inspect.signature(learner.forward).parameters  # else it would not cut
    example = {name: value[:batch_size] for name, value in example.items()}
    expected = loss_and_grads(learner, learner(**example))
    learner.eval()
    with torch.no_grad():
        whole = learner(**{name: value for name, value in example.items() if name != "labels"}).logits
    learner.train()
    cut = ms_swift_cut(example["labels"])
    assert cut["labels"].shape[1] < example["labels"].shape[1]
    with counted_calls(learner) as calls:
        outputs = learner(**{**example, **cut})
    assert len(calls) == NUM_THOUGHTS + 1
    kept = cut["logits_to_keep"]
    torch.testing.assert_close(outputs.logits, whole[:, -kept:] if isinstance(kept, int) else whole[:, kept])
    assert outputs.logits.shape[:2] == cut["labels"].shape  # its accuracy lays one over the other
    assert_same_training(learner, outputs, expected)


def test_ms_swift_pops_the_labels_and_gets_the_kept_logits(learner, example):
    """As with weights of the loss: it then computes the loss by itself, from the logits alone."""
    expected = learner(**example).loss
    inputs = {**example, **ms_swift_cut(example["labels"])}
    labels = inputs.pop("labels")
    logits = learner(**inputs).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss.to(expected), expected)


def test_labels_of_no_known_length_are_still_refused(learner, example):
    cut = {**example, "labels": example["labels"][:, -4:]}
    with pytest.raises(ValueError, match="`labels` has shape"):
        learner(**cut)
    with pytest.raises(ValueError, match="`labels` has shape"):
        learner(**cut, logits_to_keep=3)


def test_ms_swift_makes_every_checkpointing_reentrant_and_is_refused(learner, example, monkeypatch):
    """
    Its patch of torch overrides what was asked for, so the keyword that the layers hold is not what happens. The
    gradients through the thoughts would be lost without a word.
    """
    inner = torch.utils.checkpoint.checkpoint

    @functools.wraps(inner)
    def always_reentrant(*args, use_reentrant=None, **kwargs):
        return inner(*args, use_reentrant=True, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", always_reentrant)
    monkeypatch.setattr(modeling_utils, "checkpoint", always_reentrant)
    learner.activation_checkpointing_enable()
    learner.enable_input_require_grads()
    with pytest.raises(ValueError, match="reentrant"):
        learner(**example)


def test_ms_swift_packs_samples_into_one_row_and_they_do_not_see_each_other(learner, example):
    """One row, positions that begin again and no mask; passes share a cache, so this does not follow by itself."""
    expected = loss_and_grads(learner, learner(**example))
    batch_size, length = example["input_ids"].shape
    packed = {
        "input_ids": example["input_ids"].flatten()[None],
        "position_ids": torch.arange(length).repeat(batch_size)[None],
        "pixel_values": example["pixel_values"],
        "labels": example["labels"].flatten()[None],
    }
    assert_same_training(learner, learner(**packed), expected)
    cut = ms_swift_cut(packed["labels"])
    assert_same_training(learner, learner(**{**packed, **cut}), expected)


def test_llamafactory_and_ms_swift_write_the_tokens_of_a_picture_as_the_processor_does(folder, boards):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    tiles = processor.image_processor(
        images=[boards[0].picture], return_tensors="pt", crop_to_patches=True, max_patches=12, min_patches=1
    )
    count = int(tiles["num_patches"][0])
    text = processor.apply_chat_template(turn(boards[0]), add_generation_prompt=True, tokenize=False)
    image = f"<img>{'<IMG_CONTEXT>' * processor.image_seq_length * count}</img>"
    inputs = own_inputs(processor, [turn(boards[0])])
    assert tiles["pixel_values"].shape == inputs["pixel_values"].shape
    assert processor.tokenizer.encode(text.replace("<image>", image)) == inputs["input_ids"][0].tolist()


def test_ms_swift_places_the_pictures_as_the_model_does(folder, learner, example):
    """Its template gives the model embeddings alone, in which no thought can be found: thoughts need the mask too."""
    learner.eval()
    ids, pixel_values = example["input_ids"], example["pixel_values"]
    keywords = {name: example[name] for name in ("input_ids", "pixel_values", "attention_mask")}
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        embeds = learner.get_input_embeddings()(ids)
        features = learner.model.get_image_features(
            pixel_values,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        ).pooler_output
        torch.testing.assert_close(features, learner.extract_feature(pixel_values), rtol=0, atol=0)
        embeds = embeds.masked_scatter((ids == config.image_token_id)[..., None], features)
        with counted_calls(learner) as calls:
            logits = learner(
                inputs_embeds=embeds,
                attention_mask=example["attention_mask"],
                latent_mask=ids == config.latent_token_id,
            ).logits
        torch.testing.assert_close(logits, learner(**keywords).logits, rtol=0, atol=0)
    assert len(calls) == NUM_THOUGHTS + 1
