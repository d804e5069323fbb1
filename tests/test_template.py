"""The chat template writes the block of thoughts, so that every client that renders it has the checkpoint's number."""

import copy
import inspect
import json
import shutil

import pytest
from conftest import CHECKPOINT, GOLDEN
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from multicoco import MultiCoCoConfig, MultiCoCoProcessor
from multicoco.configuration_multicoco import (
    OWN,
    SYSTEM_MESSAGE,
    chat_template,
    check_saved_num_thoughts,
    plain_chat_template,
    thought_block,
)
from multicoco.curriculum import CurriculumArguments
from multicoco.data_multicoco import StageDataset
from multicoco.processing_multicoco import plain_processor, split_thought_block
from multicoco.records import load_records


PROMPTS = json.loads((GOLDEN / "internvl" / "prompts.json").read_text(encoding="utf-8"))
TURN = "<|im_start|>assistant\n"
PROMPT = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
PICTURE = Image.new("RGB", (60, 30), "teal")
ASK = [{"role": "user", "content": "Why?"}]
ASK_PICTURE = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Why?"}]},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "And how?"},
]
ANSWERED = [*ASK, {"role": "assistant", "content": "So."}]
# What multicoco 0.1.0 saved: the processor, not the template, wrote the block.
OLD_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "{{ system_message | default(SYSTEM, true) }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A template of others, which knows no thoughts, with and without our turns.
FOREIGN = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
FOREIGN += "{% endfor %}"
FOREIGN += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHER_TURNS = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}"
OTHER_TURNS += "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def processor():
    """With 3 thoughts; a test may change it."""
    processor = MultiCoCoProcessor.from_pretrained(CHECKPOINT)
    processor.num_thoughts = 3
    return processor


@pytest.fixture
def folder(processor, tmp_path):
    """A saved checkpoint of 3 thoughts, without weights."""
    config = MultiCoCoConfig.from_pretrained(CHECKPOINT)
    config.num_thoughts = 3
    config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def old_template(system_message=SYSTEM_MESSAGE):
    return OLD_TEMPLATE.replace("SYSTEM", json.dumps(system_message, ensure_ascii=False))


def messages_of(case):
    system = [] if case["system"] is None else [{"role": "system", "content": case["system"]}]
    return system + [message for message in case["messages"] if message["content"] is not None]


# --- where the block stands ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PROMPTS["template_prompts"], ids=lambda case: case["name"])
@pytest.mark.parametrize("num_thoughts", [None, 0, 4])
def test_prompts_are_those_of_the_original_and_a_block_at_the_start_of_the_last_turn(processor, case, num_thoughts):
    is_open = len(messages_of(case)) < len(case["messages"]) + (case["system"] is not None)
    text = processor.tokenizer.apply_chat_template(
        messages_of(case), add_generation_prompt=is_open, num_thoughts=num_thoughts, tokenize=False
    )
    ends_with_assistant = is_open or messages_of(case)[-1]["role"] == "assistant"
    before, turn, after = case["prompt"].rpartition(TURN)
    block = "" if num_thoughts is None or not ends_with_assistant else thought_block(num_thoughts)
    assert text == (before + turn + block + after if ends_with_assistant else case["prompt"])
    asked = num_thoughts if ends_with_assistant else OWN
    assert processor.apply_chat_template(messages_of(case), add_generation_prompt=is_open, num_thoughts=asked) == text


@pytest.mark.parametrize(
    ("messages", "is_open"),
    [(ASK, True), (ANSWERED, False), (ANSWERED + ASK, True), (ANSWERED + ANSWERED, False), (ANSWERED, True)],
    ids=["prompt", "whole", "history", "whole_history", "another_turn_of_the_assistant"],
)
def test_earlier_turns_have_no_block(processor, messages, is_open):
    text = processor.apply_chat_template(messages, add_generation_prompt=is_open)
    before, num_thoughts, after = split_thought_block(text)
    assert num_thoughts == 3
    assert before.endswith(TURN)
    assert "latent" not in before + after
    assert after == ("" if is_open else "So.<|im_end|>\n")


@pytest.mark.parametrize("messages", [ASK, ANSWERED + ASK], ids=["one", "many"])
def test_without_a_turn_of_the_assistant_there_is_no_block(processor, messages):
    text = processor.apply_chat_template(messages)
    assert text.endswith("Why?<|im_end|>\n")
    assert "latent" not in text
    assert processor.apply_chat_template(messages, tokenize=True) == processor(text=text)["input_ids"]


@pytest.mark.parametrize("num_thoughts", [-1, 2.0, True, "2", "none"])
def test_template_refuses_what_is_no_count(processor, num_thoughts):
    with pytest.raises(TemplateError, match="`num_thoughts` must be an integer of at least 0"):
        processor.tokenizer.apply_chat_template(ASK, num_thoughts=num_thoughts, tokenize=False)
    for kwargs in ({}, {"tokenize": True}):
        with pytest.raises(ValueError, match="`num_thoughts` must be an integer of at least 0"):
            processor.apply_chat_template(ASK, num_thoughts=num_thoughts, add_generation_prompt=True, **kwargs)
    with pytest.raises(ValueError, match="`num_thoughts` must be an integer of at least 0"):
        chat_template(num_thoughts=num_thoughts)


PARTS = [{"type": "text", "text": "So"}, {"type": "text", "text": ", because "}]


@pytest.mark.parametrize("content", ["So, because ", PARTS], ids=["string", "parts"])
@pytest.mark.parametrize("num_thoughts", [OWN, None, 0, 2])
def test_a_message_that_is_continued_is_what_generation_has_written(processor, content, num_thoughts):
    begun = [*ASK, {"role": "assistant", "content": content}]
    prompt = processor.apply_chat_template(ASK, add_generation_prompt=True, num_thoughts=num_thoughts)
    number = 3 if num_thoughts == OWN else num_thoughts
    assert prompt.endswith(TURN + ("" if number is None else thought_block(number)))
    continued = processor.apply_chat_template(begun, continue_final_message=True, num_thoughts=num_thoughts)
    assert continued == prompt + "So, because "
    whole = processor.apply_chat_template(begun, num_thoughts=num_thoughts)
    assert whole == continued + "<|im_end|>\n"
    ids = processor.apply_chat_template(begun, continue_final_message=True, num_thoughts=num_thoughts, tokenize=True)
    assert ids == processor(text=continued)["input_ids"] == processor.tokenizer([continued])["input_ids"]


@pytest.mark.parametrize("through", ["processor", "tokenizer"])
def test_block_is_in_the_common_prefix_of_prompt_and_completion(processor, through):
    """trl takes what the two have in common for the prompt, and the rest for what is learned."""
    render = (processor if through == "processor" else processor.tokenizer).apply_chat_template
    prompt = render(ASK, add_generation_prompt=True, tokenize=False)
    whole = render(ANSWERED, tokenize=False)
    assert prompt.endswith(thought_block(3))
    assert whole == prompt + "So.<|im_end|>\n"


@pytest.mark.parametrize("through", ["processor", "tokenizer"])
@pytest.mark.parametrize("with_picture", [False, True])
@pytest.mark.parametrize("template", [None, FOREIGN], ids=["own", "foreign"])
def test_mask_of_the_assistants_tokens_is_its_words(processor, through, with_picture, template):
    """What `assistant_only_loss` learns: answers with the end of their turns, neither image runs nor thoughts."""
    if template is not None:  # one that writes no block, so that the processor puts it in
        template = template.replace("{{ message['content'] }}<|im_end|>\n", "GENERATED")
        words = "{{ message['content'] }}<|im_end|>\n"
        template = template.replace(
            "GENERATED",
            "{% if message['role'] == 'assistant' %}{% generation %}" + words + "{% endgeneration %}"
            "{% else %}" + words + "{% endif %}",
        )
    messages = [{"role": "user", "content": "<image>\nWhy?" if with_picture else "Why?"}, *ANSWERED[1:], *ANSWERED]
    kwargs = {"chat_template": template, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    if through == "processor":
        if with_picture:
            kwargs["processor_kwargs"] = {"images": [PICTURE]}
        inputs = processor.apply_chat_template(messages, **kwargs)
        (ids,), (mask,) = inputs["input_ids"], inputs["assistant_masks"]
        assert ids.count(processor.image_token_id) == 4 * sum(inputs.get("num_patches_list", []))
    else:
        inputs = processor.tokenizer.apply_chat_template(messages, **kwargs)
        ids, mask = inputs["input_ids"], inputs["assistant_masks"]
    if through == "processor" or template is None:
        assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|latent|>")) == 3
    words = [token for token, is_learned in zip(ids, mask, strict=True) if is_learned]
    assert processor.tokenizer.decode(words) == "So.<|im_end|>\n" * 2


# --- one meaning of `num_thoughts` ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_thoughts", [OWN, None, 0, 2])
def test_all_ways_to_the_ids_are_one(processor, num_thoughts, folder):
    kwargs = {"num_thoughts": num_thoughts} if num_thoughts != OWN else {}
    inputs = processor.apply_chat_template(ASK_PICTURE, **PROMPT, **kwargs)
    text = processor.apply_chat_template(ASK_PICTURE, add_generation_prompt=True, **kwargs)
    expected = {OWN: 3}.get(num_thoughts, num_thoughts)
    assert split_thought_block(text)[1] == expected
    assert processor(images=[PICTURE], text=text)["input_ids"] == inputs["input_ids"]
    assert processor.apply_chat_template(ASK_PICTURE, add_generation_prompt=True, num_thoughts=expected) == text
    bare = processor.apply_chat_template(ASK_PICTURE, add_generation_prompt=True, num_thoughts=None)
    if num_thoughts is not None:
        assert processor(images=[PICTURE], text=bare, num_thoughts=expected)["input_ids"] == inputs["input_ids"]
    renderers = [processor.tokenizer, AutoTokenizer.from_pretrained(folder), AutoProcessor.from_pretrained(folder)]
    remote = get_class_from_dynamic_module("processing_multicoco.MultiCoCoProcessor", str(folder))
    assert remote.__module__.startswith("transformers_modules")
    renderers += [remote.from_pretrained(folder)]
    for renderer in renderers:
        for given in (kwargs, {"num_thoughts": num_thoughts}):  # the default by name too
            assert (
                renderer.apply_chat_template(ASK_PICTURE, add_generation_prompt=True, tokenize=False, **given) == text
            )


def test_batch_where_only_some_have_a_place(processor):
    texts = processor.apply_chat_template([ASK, ANSWERED])
    assert [split_thought_block(text)[1] for text in texts] == [None, 3]
    assert processor.apply_chat_template([ASK, ANSWERED], tokenize=True) == processor(text=texts)["input_ids"]
    for kwargs in ({}, {"tokenize": True}):
        with pytest.raises(ValueError, match="`num_thoughts` needs .* got 2 and neither in sample 0"):
            processor.apply_chat_template([ASK, ANSWERED], num_thoughts=2, **kwargs)


@pytest.mark.parametrize("num_thoughts", [None, 0, 5])
@pytest.mark.parametrize("after", ["", "So."], ids=["open", "begun"])
def test_given_number_takes_the_place_of_the_block_in_a_text(processor, num_thoughts, after):
    begin = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.tokenizer(begin + ("" if num_thoughts is None else thought_block(num_thoughts)) + after)[
        "input_ids"
    ]
    for text in (begin + after, begin + thought_block(0) + after, begin + thought_block(3) + after):
        assert processor(text=text, num_thoughts=num_thoughts)["input_ids"] == [ids]
        assert processor(text=[text, begin], num_thoughts=num_thoughts)["input_ids"][0] == ids
        assert processor(text=text)["input_ids"] == [processor.tokenizer(text)["input_ids"]]


@pytest.mark.parametrize("text", ["Why?", "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nWhy?", ""])
def test_block_ends_a_text_that_has_no_turn_of_the_assistant(processor, text):
    expected = processor.tokenizer(text + thought_block(2))["input_ids"]
    assert processor(text=text, num_thoughts=2)["input_ids"] == [expected]


BLOCK = thought_block(2)
MISPLACED = {
    "no_turn": f"Why?{BLOCK}",
    "turn_of_the_user": f"<|im_start|>user\n{BLOCK}Why?",
    "end_of_the_user": f"<|im_start|>user\nWhy?{BLOCK}",
    "earlier_turn": f"{TURN}{BLOCK}So.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n{TURN}",
    "both_turns": f"{TURN}{BLOCK}So.<|im_end|>\n{TURN}{BLOCK}",
    "later_in_the_turn": f"{TURN}So.{BLOCK}",
    "two_blocks": f"{TURN}{BLOCK}{BLOCK}",
    "not_closed": f"{TURN}<|start-latent|><|latent|>So.",
    "not_opened": f"{TURN}<|latent|><|end-latent|>So.",
    "broken": f"{TURN}<|start-latent|><|latent|> <|latent|><|end-latent|>",
    "only_a_latent": f"{TURN}<|latent|>",
    "image_run": f"<img><IMG_CONTEXT></img>{TURN}{BLOCK}",
    "image_run_behind": f"{TURN}{BLOCK}<IMG_CONTEXT>",
}


@pytest.mark.parametrize("text", MISPLACED.values(), ids=MISPLACED.keys())
@pytest.mark.parametrize("kwargs", [{}, {"num_thoughts": None}, {"num_thoughts": 1}], ids=["kept", "none", "given"])
def test_markers_elsewhere_are_refused(processor, text, kwargs):
    with pytest.raises(ValueError, match="Sample 1: `text` contains .*, which only the processor may write"):
        processor(text=[TURN + BLOCK, text], **kwargs)


@pytest.mark.parametrize("num_thoughts", [OWN, None, 2])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_markers_in_a_message_are_refused(processor, num_thoughts, role):
    """Also where they would stand as the template's own block does: at the start of a last message."""
    for messages in ([{"role": role, "content": f"{BLOCK}Hm."}], [*ASK, {"role": role, "content": f"{BLOCK}Hm."}]):
        for kwargs in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": role != "assistant", "tokenize": True},
        ):
            with pytest.raises(ValueError, match=r"Sample 0: `text` contains <\|"):
                processor.apply_chat_template(messages, num_thoughts=num_thoughts, **kwargs)


def test_image_behind_the_thoughts_is_refused(processor):
    text = f"<image>{TURN}{BLOCK}<image>"
    for kwargs in ({}, {"num_thoughts": 1}):
        with pytest.raises(ValueError, match="Sample 0: `text` has <image> in the assistant's turn"):
            processor(images=[PICTURE, PICTURE], text=text, **kwargs)
    assert len(processor(images=[PICTURE, PICTURE], text=text, num_thoughts=None)["num_patches_list"]) == 2


TEXTS = ["", "Why?", TURN, f"{TURN}So.", f"a{TURN}{BLOCK}", f"{TURN}{thought_block(0)}So.", *MISPLACED.values()]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_split_text_is_the_text(text):
    before, num_thoughts, after = split_thought_block(text)
    assert before + ("" if num_thoughts is None else thought_block(num_thoughts)) + after == text


@pytest.mark.parametrize("template", [FOREIGN, OTHER_TURNS], ids=["our_turns", "other_turns"])
def test_number_for_a_template_that_writes_no_block(processor, template):
    """Ids have the block, a text cannot: silence would be a prompt without thoughts."""
    plain = processor.apply_chat_template(ASK, chat_template=template, add_generation_prompt=True, num_thoughts=None)
    ids = processor.tokenizer([plain + thought_block(2), plain + thought_block(3)])["input_ids"]
    kwargs = {"chat_template": template, "add_generation_prompt": True}
    assert processor.apply_chat_template(ASK, **kwargs, tokenize=True, num_thoughts=2) == ids[:1]
    assert processor.apply_chat_template(ASK, **kwargs, tokenize=True) == ids[1:]
    with pytest.raises(ValueError, match="`num_thoughts` is 2, but `chat_template` writes None"):
        processor.apply_chat_template(ASK, **kwargs, num_thoughts=2)
    processor.chat_template = template
    assert processor.apply_chat_template(ASK, add_generation_prompt=True, tokenize=True) == ids[1:]


def test_number_for_a_begun_message_by_a_template_that_writes_no_block(processor):
    kwargs = {"continue_final_message": True, "chat_template": FOREIGN}
    before, turn, begun = processor.apply_chat_template(ANSWERED, **kwargs, num_thoughts=None).rpartition(TURN)
    expected = processor.tokenizer([before + turn + thought_block(2) + begun])["input_ids"]
    assert processor.apply_chat_template(ANSWERED, **kwargs, num_thoughts=2, tokenize=True) == expected
    kwargs = {"continue_final_message": True, "num_thoughts": 2, "tokenize": True}
    with pytest.raises(ValueError, match="`chat_template` writes None"):  # its turns are not ours: where would it go?
        processor.apply_chat_template(ANSWERED, chat_template=OTHER_TURNS, **kwargs)


@pytest.mark.parametrize("name", ["apply_chat_template", "__call__"])
def test_positions_of_arguments_are_those_of_the_base(name):
    def positional(function):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [
            parameter.name for parameter in inspect.signature(function).parameters.values() if parameter.kind in kinds
        ]

    assert positional(getattr(MultiCoCoProcessor, name)) == positional(getattr(ProcessorMixin, name))
    parameter = inspect.signature(getattr(MultiCoCoProcessor, name)).parameters["num_thoughts"]
    assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert parameter.default == OWN


def test_training_data_writes_its_own_blocks(processor):
    """The data set puts the thoughts of each stage in, whatever the processor's number is."""
    row = {"images": [PICTURE], "question": "Why?", "steps": ["a", "b"], "answer": "c"}
    prompts = {}
    for num_thoughts in (None, 0, 3):
        processor.num_thoughts = num_thoughts
        dataset = StageDataset(load_records([row]), processor, CurriculumArguments(c_thought=1, max_latent_stage=2))
        prompts[num_thoughts] = [dataset.prompt(0, dataset.num_thoughts(0, stage))["input_ids"] for stage in range(3)]
    latent = processor.tokenizer.convert_tokens_to_ids("<|latent|>")
    assert [ids.count(latent) for ids in prompts[3]] == [0, 1, 2]
    assert prompts[None] == prompts[0] == prompts[3]


# --- the number of a processor -------------------------------------------------------------------------------------


def test_number_is_written_into_both_templates(processor, tmp_path):
    for num_thoughts in (0, 7, None, 12):
        processor.num_thoughts = num_thoughts
        assert processor.num_thoughts == num_thoughts
        assert processor.chat_template == processor.tokenizer.chat_template == chat_template(None, num_thoughts)
    for wrong in (-1, True, 2.0, "2"):
        with pytest.raises(ValueError, match="`num_thoughts` must be an integer of at least 0"):
            processor.num_thoughts = wrong
    assert processor.num_thoughts == 12
    processor.chat_template = chat_template("Be brief.", 5)  # the number stays that of the processor
    assert processor.chat_template == processor.tokenizer.chat_template == chat_template("Be brief.", 12)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == chat_template("Be brief.", 12)
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_thoughts"] == 12
    assert "num_thoughts" not in (tmp_path / "tokenizer_config.json").read_text()


def test_processor_takes_the_number_of_its_template(processor):
    parts = processor.image_processor, copy.deepcopy(processor.tokenizer), 4
    assert MultiCoCoProcessor(*parts, chat_template=chat_template(num_thoughts=5)).num_thoughts == 5
    assert MultiCoCoProcessor(*parts, chat_template=chat_template(num_thoughts=5), num_thoughts=2).num_thoughts == 2
    assert (
        MultiCoCoProcessor(*parts, chat_template=chat_template(num_thoughts=5), num_thoughts=None).num_thoughts is None
    )
    assert MultiCoCoProcessor(*parts).num_thoughts is None
    assert MultiCoCoProcessor(*parts, chat_template=FOREIGN).num_thoughts is None


def test_template_of_another_is_left_alone(processor, tmp_path):
    processor.chat_template = FOREIGN
    assert processor.tokenizer.chat_template == FOREIGN
    processor.tokenizer.chat_template = OTHER_TURNS
    processor.num_thoughts = 5
    assert (processor.chat_template, processor.tokenizer.chat_template) == (FOREIGN, OTHER_TURNS)
    processor.save_pretrained(tmp_path)
    again = MultiCoCoProcessor.from_pretrained(tmp_path)
    assert (again.chat_template, again.num_thoughts) == (FOREIGN, 5)


def test_several_templates_by_name_have_the_number(processor, tmp_path):
    processor.chat_template = {"default": chat_template(), "brief": chat_template("Be brief."), "foreign": FOREIGN}
    processor.num_thoughts = 2
    processor.save_pretrained(tmp_path)
    for each in (processor, MultiCoCoProcessor.from_pretrained(tmp_path)):
        assert each.chat_template == each.tokenizer.chat_template
        for name in (None, "default", "brief"):
            text = each.apply_chat_template(ASK, chat_template=name, add_generation_prompt=True)
            assert split_thought_block(text)[1] == 2
            assert ("Be brief." in text) == (name == "brief")


# --- plain templates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system_message", [None, "Say \"yes\" or 'no'.\nC:\\"], ids=["internvl", "other"])
def test_plain_template_has_no_code_for_thoughts(system_message):
    plain = plain_chat_template(chat_template(system_message, 4))
    assert plain == plain_chat_template(chat_template(system_message)) == plain_chat_template(plain)
    assert not any(word in plain for word in ("latent", "num_thoughts", "budget", "block"))
    assert plain_chat_template({"a": chat_template(), "b": FOREIGN}) == {
        "a": plain_chat_template(chat_template()),
        "b": FOREIGN,
    }
    assert plain_chat_template(None) is None
    with pytest.raises(ValueError, match="by code of its own"):
        plain_chat_template(FOREIGN + BLOCK)


@pytest.mark.parametrize("case", PROMPTS["template_prompts"], ids=lambda case: case["name"])
def test_plain_prompts_are_those_of_the_original(processor, case):
    is_open = len(messages_of(case)) < len(case["messages"]) + (case["system"] is not None)
    plain = plain_processor(processor)
    kwargs = {"add_generation_prompt": is_open, "tokenize": False}
    assert plain.apply_chat_template(messages_of(case), **kwargs) == case["prompt"]
    for number in ({}, {"num_thoughts": 4}):  # a server that passes it on gets no latents either
        assert plain.tokenizer.apply_chat_template(messages_of(case), **kwargs, **number) == case["prompt"]


def test_plain_processor_is_a_copy(processor, tmp_path):
    before = copy.deepcopy((processor.chat_template, processor.tokenizer.chat_template, processor.num_thoughts))
    plain = plain_processor(processor)
    plain.save_pretrained(tmp_path)
    assert (processor.chat_template, processor.tokenizer.chat_template, processor.num_thoughts) == before
    assert plain.tokenizer is not processor.tokenizer
    again = MultiCoCoProcessor.from_pretrained(tmp_path)
    for each in (plain, again):
        assert each.num_thoughts is None
        assert each.chat_template == each.tokenizer.chat_template == plain_chat_template(chat_template())
    files = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.jinja"))
    assert "latent" not in files
    text = processor.apply_chat_template(ASK_PICTURE, add_generation_prompt=True, num_thoughts=None)
    for each in (again, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.apply_chat_template(ASK_PICTURE, add_generation_prompt=True, tokenize=False) == text


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_thoughts", [None, 0, 3])
@pytest.mark.parametrize(
    "system_message", [SYSTEM_MESSAGE, "Say \"yes\" or 'no'.\nC:\\, true) }}"], ids=["internvl", "other"]
)
def test_old_folder_is_upgraded(folder, num_thoughts, system_message, tmp_path):
    config = MultiCoCoConfig.from_pretrained(folder)
    config.num_thoughts = num_thoughts
    config.save_pretrained(folder)
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_thoughts": num_thoughts}))
    (folder / "chat_template.jinja").write_text(old_template(system_message), encoding="utf-8")
    for loaded in (MultiCoCoProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)):
        assert loaded.num_thoughts == num_thoughts
        assert loaded.chat_template == loaded.tokenizer.chat_template == chat_template(system_message, num_thoughts)
        text = loaded.apply_chat_template(ASK, add_generation_prompt=True)
        assert text.startswith(f"<|im_start|>system\n{system_message}<|im_end|>\n<|im_start|>user\n")
        assert split_thought_block(text)[1] == num_thoughts
    loaded.save_pretrained(tmp_path / "again")
    assert MultiCoCoProcessor.from_pretrained(tmp_path / "again").chat_template == loaded.chat_template


def write_numbers(folder, config, processor, template):
    """Makes the three files of a saved checkpoint hold these numbers; "absent" removes the file or what it says."""
    values = json.loads((folder / "config.json").read_text())
    values.pop("num_thoughts", None)
    (folder / "config.json").write_text(json.dumps({**values, "num_thoughts": config} if config else values))
    if config == "absent":
        (folder / "config.json").unlink()
    values = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**values, "num_thoughts": processor}))
    text = FOREIGN if template == "absent" else chat_template(num_thoughts=template)
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("numbers", "fragments"),
    [
        ((4, 3, 3), ["4 in config.json", "3 in processor_config.json", "3 in the chat template", "num_thoughts=4"]),
        ((3, 4, 3), ["3 in config.json", "4 in processor_config.json", "3 in the chat template", "num_thoughts=3"]),
        ((3, 3, 4), ["3 in config.json", "3 in processor_config.json", "4 in the chat template", "num_thoughts=3"]),
        ((3, None, None), ["3 in config.json", "None in processor_config.json", "None in the chat template"]),
        ((None, 3, 3), ["None in config.json", "3 in processor_config.json", "num_thoughts=None"]),
        ((3, 5, "absent"), ["3 in config.json", "5 in processor_config.json"]),
        (("absent", 5, 4), ["5 in processor_config.json", "4 in the chat template", "num_thoughts=N"]),
    ],
    ids=["config", "processor", "template", "only_config", "only_processor", "foreign_template", "no_config"],
)
def test_folder_whose_numbers_differ_is_refused(folder, numbers, fragments):
    write_numbers(folder, *numbers)
    for load in (MultiCoCoProcessor.from_pretrained, AutoProcessor.from_pretrained, check_saved_num_thoughts):
        with pytest.raises(ValueError, match="`num_thoughts` of ") as caught:
            load(folder)
        for fragment in [*fragments, str(folder), "MultiCoCoProcessor.from_pretrained(", ".save_pretrained("]:
            assert fragment in str(caught.value)
    right = numbers[0] if numbers[0] != "absent" else 5
    MultiCoCoProcessor.from_pretrained(folder, num_thoughts=right).save_pretrained(folder)  # the cure
    assert MultiCoCoProcessor.from_pretrained(folder).num_thoughts == right
    check_saved_num_thoughts(folder)


@pytest.mark.parametrize("numbers", [(3, 3, 3), (None, None, None), (3, 3, "absent"), ("absent", 3, 3)], ids=str)
def test_folder_whose_numbers_agree_is_loaded(folder, numbers):
    write_numbers(folder, *numbers)
    check_saved_num_thoughts(folder)
    assert MultiCoCoProcessor.from_pretrained(folder).num_thoughts == numbers[1]


def test_given_number_replaces_the_saved_ones(folder, tmp_path):
    write_numbers(folder, 3, 4, 5)
    for num_thoughts in (None, 0, 7):
        processor = MultiCoCoProcessor.from_pretrained(folder, num_thoughts=num_thoughts)
        assert processor.num_thoughts == num_thoughts
        assert processor.chat_template == processor.tokenizer.chat_template == chat_template(None, num_thoughts)
        assert "num_thoughts" not in processor.tokenizer.init_kwargs
    with pytest.raises(ValueError, match="`num_thoughts` of "):
        MultiCoCoProcessor.from_pretrained(folder, num_thoughts=OWN)


def test_check_reads_the_number_of_a_configuration_that_is_loaded(folder, tmp_path):
    """As a model's `from_pretrained` calls it, also for folders that hold a model only, or no checkpoint of ours."""
    check_saved_num_thoughts(folder, 3)
    with pytest.raises(ValueError, match="4 in config.json, 3 in processor_config.json, 3 in the chat template"):
        check_saved_num_thoughts(folder, 4)
    with pytest.raises(ValueError, match="None in config.json, 3 in processor_config.json"):
        check_saved_num_thoughts(folder, None)
    model_only = tmp_path / "model_only"
    model_only.mkdir()
    shutil.copy(folder / "config.json", model_only)
    for kwargs in ({}, {"num_thoughts": 3}, {"num_thoughts": None}):
        check_saved_num_thoughts(model_only, **kwargs)
        check_saved_num_thoughts(CHECKPOINT, **kwargs)


def test_check_reads_the_cache_of_the_hub(folder, tmp_path):
    write_numbers(folder, 3, 4, 3)
    commit = "0123456789" * 4
    repository = tmp_path / "cache" / "models--me--x"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    names = ["config.json", "processor_config.json", "chat_template.jinja"]
    hub_kwargs = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for name in names:
        check_saved_num_thoughts("me/x", **hub_kwargs)  # what is not there says nothing
        if name != "processor_config.json":
            shutil.copy(folder / name, snapshot)
    shutil.copy(folder / "processor_config.json", snapshot)
    with pytest.raises(ValueError, match="`num_thoughts` of me/x is 3 in config.json, 4 in processor_config.json"):
        check_saved_num_thoughts("me/x", revision="main", **hub_kwargs)
