"""What a multicoco checkpoint knows about itself, and how the two other InternVL checkpoint formats are read.

Three kinds of `config.json` end up as one `MultiCoCoConfig`: our own, transformers' (`model_type: internvl`, as in
`OpenGVLab/InternVL3-1B-hf`) and the original program's (`model_type: internvl_chat`, as in `OpenGVLab/InternVL3-1B`,
whose remote code is never run). Then the chat template, which every file of a checkpoint must agree about with the
configuration. This file knows no tensors, no images and no tokenizer.
"""

import json
import math
import os
import re
from typing import TYPE_CHECKING, Any, Final, Literal, TypeGuard

from transformers import CONFIG_MAPPING, InternVLConfig, PreTrainedConfig
from transformers.utils import logging

from .compat import read_json, read_text


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is

IMAGE_PLACEHOLDER = "<image>"  # one per image, in the text of a user
IMAGE_CONTEXT_TOKEN = "<IMG_CONTEXT>"  # one per visual feature: the embedding there is overwritten
IMAGE_START_TOKEN, IMAGE_END_TOKEN = "<img>", "</img>"
START_LATENT_TOKEN, LATENT_TOKEN, END_LATENT_TOKEN = "<|start-latent|>", "<|latent|>", "<|end-latent|>"
TURN_START_TOKEN, TURN_END_TOKEN = "<|im_start|>", "<|im_end|>"  # of the chat template

# How a checkpoint was trained. `cot`, `no_cot` and `no_thoughts` differ from `coconut` in their data only.
MODES = {
    "coconut": "continuous thoughts: at a `<|latent|>` position the input is the last hidden state before it",
    "cot": "written reasoning, no thoughts",
    "no_cot": "the answer at once, without reasoning",
    "no_thoughts": "a control: written steps vanished stage by stage and nothing took their place",
    "pause": "a control: learned constants in the place of thoughts, in one pass",
    "pause_loop": "a control: learned constants in the place of thoughts, in the same passes",
}
# What is fed at a latent position: the state, or, in the two controls, the constant that `<|latent|>` embeds to.
STATE_FEEDBACKS = ("identity", "rms_match")
CONSTANT_FEEDBACKS = ("latent", "latent_one_pass")
FEEDBACKS = STATE_FEEDBACKS + CONSTANT_FEEDBACKS
CONTROL_FEEDBACK = {"pause": "latent_one_pass", "pause_loop": "latent"}
# The modes whose samples hold a block of thoughts; the others have written steps, or nothing, in its place.
BLOCK_MODES = ("coconut", *CONTROL_FEEDBACK)
# The fields that training sets: what a checkpoint was trained as, and how it is to be asked.
TRAINED = tuple(
    "mode stage num_thoughts thought_feedback thought_sweeps step_loss_weight c_thought max_latent_stage".split()
)

# Language models whose parameter names are the same in an original checkpoint and in transformers.
ORIGINAL_TEXT_MODELS = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "InternLM3ForCausalLM": "internlm3",
}

# The system message of InternVL's `internvl2_5` prompts, which InternVL2.5 and InternVL3 were trained on.
SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# Default of every `num_thoughts` that may be left out: the checkpoint's own number. `None` always means no block.
OWN: Final = "own"  # a string: remote code imports this file again, and an object would not be the same one
NumThoughts = int | Literal["own"] | None

HUB_KWARGS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision", "subfolder")


class MultiCoCoConfig(InternVLConfig):
    r"""
    Configuration of [`MultiCoCoForConditionalGeneration`]: InternVL's, plus what continuous thoughts need. Everything
    is checked when the object is made, so also when it is loaded.

    Args:
        latent_token_id, start_latent_id, end_latent_id (`int`, *optional*):
            Ids of `<|latent|>`, `<|start-latent|>` and `<|end-latent|>`. All `None` (a plain InternVL that has no such
            tokens yet) or all set; [`~modeling_multicoco.add_thought_tokens`] sets them.
        c_thought (`int`, defaults to 2):
            Continuous thoughts that replace one written step (2 on GSM8k, 1 on ProsQA in arXiv 2412.06769).
        max_latent_stage (`int`, defaults to 3):
            Number of stages after stage 0, as in the paper.
        stage (`int`, defaults to 0):
            Stage that was trained last.
        num_thoughts (`int`, *optional*):
            Thoughts to use at inference: what the last stage trained. `None`: the model was never trained with a
            thought block, and prompts carry none; 0: a block with its two markers and no thought (stage 0).
        thought_feedback (`str`, defaults to `"identity"`):
            What is fed at a latent position: the state before it as it is (`"identity"`, the paper's) or with the norm
            of the embedding of `<|latent|>` (`"rms_match"`); or, in the controls, that embedding itself, in the same
            passes (`"latent"`) or in one plain pass (`"latent_one_pass"`).
        thought_sweeps (`int`, *optional*):
            Parallel thoughts (PCCoT, arXiv 2506.18582): all thoughts of a batch are computed together, in so many
            sweeps, each from the thoughts of the sweep before; `T` sweeps make the first `T + 1` thoughts exact.
            `None`: one pass after another (the paper of Coconut).
        step_loss_weight (`float`, defaults to 0):
            What the step loss counts beside that of the words, in training; 0: there was none (the paper), and the
            thoughts cannot be read. See [`~objectives.StepDecoding`].
        mode (`str`, defaults to `"coconut"`):
            What the checkpoint was trained as: `coconut`, `cot`, `no_cot`, `no_thoughts`, `pause` or `pause_loop`. It
            changes nothing in the model; older files say by it what `thought_feedback` says now.
        system_message (`str`, *optional*):
            System message of [`~modeling_internvl_chat.InternVLChatModel.chat`]; `None` means that of InternVL's
            `internvl2_5` template (the shipped InternVL3 configurations hold `null` and mean this).

    Raises:
        ValueError: a field is out of range, naming the field, what came and what was expected.

    Example:

    ```python
    >>> from multicoco import MultiCoCoConfig

    >>> MultiCoCoConfig(c_thought=1, max_latent_stage=5).c_thought
    1
    ```"""

    model_type = "multicoco"
    keys_to_ignore_at_inference = ["past_key_values", "step_loss"]  # no predictions, in `Trainer.evaluate`

    latent_token_id: int | None = None
    start_latent_id: int | None = None
    end_latent_id: int | None = None
    c_thought: int = 2
    max_latent_stage: int = 3
    stage: int = 0
    num_thoughts: int | None = None
    thought_feedback: str = "identity"
    thought_sweeps: int | None = None
    step_loss_weight: float = 0.0
    mode: str = "coconut"
    system_message: str | None = None

    if TYPE_CHECKING:  # a dictionary or `None` only until the object is made
        text_config: PreTrainedConfig
        vision_config: PreTrainedConfig

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.thought_feedback in STATE_FEEDBACKS:  # files of version 0.1 name a control by its mode only
            self.thought_feedback = feedback_of(self.mode, self.thought_feedback)
        self._check_thoughts()
        self._check_vision()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """
        [`~transformers.PreTrainedConfig.save_pretrained`].

        Raises:
            ValueError: `mode` names a control, but `thought_feedback` feeds states: the file would be read as one of
                version 0.1, whose controls are named by their mode alone.
        """
        if self.mode in CONTROL_FEEDBACK and self.thought_feedback in STATE_FEEDBACKS:
            raise ValueError(
                f"`mode` is {self.mode!r}, a control that feeds {CONTROL_FEEDBACK[self.mode]!r}, but "
                f"`thought_feedback` is {self.thought_feedback!r}. Set `mode` to 'coconut', or the feedback back."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def trained(self) -> dict[str, Any]:
        """The fields that training sets, by name."""
        return {name: getattr(self, name) for name in TRAINED}

    def set_trained(self, **values: Any) -> None:
        """
        Sets fields that training sets, checked like those of a new object. A new `mode` brings its `thought_feedback`.

        Raises:
            ValueError: a name that is none of these fields, or a value out of range.
        """
        if unknown := values.keys() - set(TRAINED):
            raise ValueError(f"{sorted(unknown)} are not set by training, expected some of {', '.join(TRAINED)}.")
        if "mode" in values:
            values = {"thought_feedback": feedback_of(values["mode"], self.thought_feedback), **values}
        for name, value in values.items():
            setattr(self, name, value)
        self._check_thoughts()

    @property
    def llm_config(self) -> PreTrainedConfig:
        """The original's name of `text_config`."""
        return self.text_config

    @property
    def num_image_token(self) -> int:
        """Visual tokens that one tile becomes: `(image_size // patch_size)**2 * downsample_ratio**2`."""
        vision = self.vision_config
        return int((vision.image_size[0] // vision.patch_size[0]) ** 2 * self.downsample_ratio**2)

    def _check_thoughts(self) -> None:
        ids = {name: getattr(self, name) for name in ("start_latent_id", "latent_token_id", "end_latent_id")}
        given = [value for value in ids.values() if value is not None]
        if len(given) not in (0, 3) or len(set(given)) != len(given):
            raise ValueError(
                f"`latent_token_id`, `start_latent_id`, `end_latent_id` must be all None or three different ids, got "
                f"{ids}. Let `add_thought_tokens(model, tokenizer)` set them."
            )
        vocab_size = self.text_config.vocab_size
        for name, value in ids.items():
            if value is not None and not (is_int(value) and 0 <= value < vocab_size):
                raise ValueError(
                    f"`{name}` must be an id within the vocabulary of {vocab_size} tokens, got {value!r}. Let "
                    "`add_thought_tokens(model, tokenizer)` add the token and resize the embeddings."
                )
        least_values = {"c_thought": 1, "max_latent_stage": 0, "stage": 0, "num_thoughts": 0, "thought_sweeps": 1}
        for name, least in least_values.items():
            value = getattr(self, name)
            if value is None and name in ("num_thoughts", "thought_sweeps"):
                continue
            if not is_int(value) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        weight = self.step_loss_weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
            raise ValueError(f"`step_loss_weight` must be a number of at least 0, got {weight!r}.")
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.thought_feedback not in FEEDBACKS:
            raise ValueError(
                f"`thought_feedback` must be one of {', '.join(FEEDBACKS)}, got {self.thought_feedback!r}. The "
                "checkpoint may come from a newer multicoco: upgrade it."
            )

    def _check_vision(self) -> None:
        vision = self.vision_config
        (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
        side = width // patch_width
        if height != width or patch_height != patch_width or width % patch_width:
            raise ValueError(
                f"`vision_config.image_size` must be square and a multiple of a square `patch_size`, got "
                f"{vision.image_size} and {vision.patch_size}."
            )
        if (side * self.downsample_ratio) % 1 or not 0 < self.downsample_ratio <= 1:
            raise ValueError(
                f"`downsample_ratio` must divide the {side} x {side} patches of a tile evenly, got "
                f"{self.downsample_ratio}."
            )
        if self.image_seq_length != self.num_image_token:
            logger.warning_once(
                f"`image_seq_length` is {self.image_seq_length}, but a tile of this vision tower gives "
                f"{self.num_image_token} tokens; {self.num_image_token} is used."
            )
            self.image_seq_length = self.num_image_token

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        Reads any of the three formats; see [`~transformers.PreTrainedConfig.get_config_dict`].

        Raises:
            ValueError: the folder holds another kind of model, or none that [`translate_internvl_chat`] can read.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config.get("model_type")
        if model_type == "internvl_chat":
            image_token_id = _image_token_id(pretrained_model_name_or_path, hub_kwargs)
            config = translate_internvl_chat(config, image_token_id)
        elif model_type == "internvl":
            config = {name: value for name, value in config.items() if name not in ("architectures", "auto_map")}
            config["model_type"] = cls.model_type
        elif model_type != cls.model_type:
            raise ValueError(
                f"`model_type` of {pretrained_model_name_or_path} is {model_type!r}, expected 'multicoco', 'internvl' "
                "(transformers' InternVL, such as OpenGVLab/InternVL3-1B-hf) or 'internvl_chat' (the original's, such "
                "as OpenGVLab/InternVL3-1B). Start from an InternVL3 checkpoint."
            )
        return config, kwargs


def feedback_of(mode: str, thought_feedback: str) -> str:
    """What a model trained in `mode` feeds: a control its constant; others the state, in the model's own way."""
    if mode in CONTROL_FEEDBACK:
        return CONTROL_FEEDBACK[mode]
    return thought_feedback if thought_feedback in STATE_FEEDBACKS else "identity"


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer and no `bool`, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def translate_internvl_chat(original: dict[str, Any], image_token_id: int) -> dict[str, Any]:
    """
    Turns the `config.json` of an original InternVL checkpoint into the fields of [`MultiCoCoConfig`].

    The correspondence was checked value by value against the original program (commit 2410d1d of OpenGVLab/InternVL).
    Its drop path in the vision tower has no counterpart in transformers and is left out.

    Args:
        original (`dict`): Content of the original `config.json`.
        image_token_id (`int`): Id of `<IMG_CONTEXT>`, which the original keeps only in its tokenizer.

    Raises:
        ValueError: a language model, template or pixel shuffle that transformers' InternVL does not have.
    """
    for field in ("llm_config", "vision_config"):
        if not isinstance(original.get(field), dict):
            raise ValueError(f"`{field}` is {original.get(field)!r}, expected the settings of an InternVL checkpoint.")
    llm, vision = dict(original["llm_config"]), original["vision_config"]
    architecture = (llm.get("architectures") or [None])[0]
    text_model_type = ORIGINAL_TEXT_MODELS.get(architecture)
    if text_model_type is None or text_model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"`llm_config.architectures` is {architecture!r}, expected one of {', '.join(ORIGINAL_TEXT_MODELS)}: the "
            "parameter names of other language models are not known. Use the checkpoint's '-hf' version if it has one."
        )
    for field, expected in (("ps_version", "v2"), ("template", "internvl2_5")):
        if original.get(field, expected) != expected:
            raise ValueError(
                f"`{field}` is {original[field]!r}, expected {expected!r}: only the InternVL2.5 and InternVL3 "
                "families are supported."
            )
    if vision.get("norm_type", "rms_norm") not in ("layer_norm", "rms_norm"):
        raise ValueError(f"`vision_config.norm_type` must be layer_norm or rms_norm, got {vision['norm_type']!r}.")

    for name in ("auto_map", "architectures", "moe_config", "use_bfloat16", "torch_dtype", "attn_implementation"):
        llm.pop(name, None)
    llm.pop("use_cache", None)  # off in the original's files for its training, not a property of the model
    same = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "patch_size"]
    same += ["num_channels", "norm_type", "layer_norm_eps", "attention_dropout", "initializer_range"]
    image_size = original.get("force_image_size") or vision["image_size"]
    side = image_size // vision["patch_size"]
    downsample_ratio = original.get("downsample_ratio", 0.5)
    return {
        "model_type": MultiCoCoConfig.model_type,
        "text_config": {**llm, "model_type": text_model_type},
        "vision_config": {
            **{name: vision[name] for name in same if name in vision},
            "image_size": image_size,
            "attention_bias": vision.get("qkv_bias", True),
            "use_qk_norm": vision.get("qk_normalization", False),
            "hidden_dropout_prob": vision.get("dropout", 0.0),
            "projection_dropout": vision.get("dropout", 0.0),
            "layer_scale_init_value": vision.get("initializer_factor", 0.1),
            "use_mean_pooling": True,  # the original has no final norm; False would add an untrained one
        },
        "image_token_id": image_token_id,
        "image_seq_length": int(side**2 * downsample_ratio**2),
        "downsample_ratio": downsample_ratio,
        "vision_feature_layer": original.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": original.get("tie_word_embeddings", llm.get("tie_word_embeddings", False)),
        "system_message": original.get("system_message"),
        "dtype": original.get("torch_dtype"),
    }


def _image_token_id(name_or_path: str | os.PathLike[str], hub_kwargs: dict[str, Any]) -> int:
    """The id of `<IMG_CONTEXT>` from the JSON files of the tokenizer beside a `config.json` that does not hold it."""
    for filename in ("tokenizer_config.json", "added_tokens.json"):
        content = read_json(name_or_path, filename, **hub_kwargs)
        decoder = content.get("added_tokens_decoder", {})
        ids = {token["content"]: int(token_id) for token_id, token in decoder.items()} or content
        token_id = ids.get(IMAGE_CONTEXT_TOKEN)
        if isinstance(token_id, int):
            return token_id
    raise ValueError(
        f"`image_token_id`: no {IMAGE_CONTEXT_TOKEN} in tokenizer_config.json or added_tokens.json of {name_or_path}. "
        "An original InternVL checkpoint needs its tokenizer files beside config.json."
    )


MultiCoCoConfig.register_for_auto_class()


# The chat template, from its pieces. A block of thoughts is written where the assistant is about to speak, and at the
# start of a last message of the assistant, so that it is part of every prefix of a conversation that ends there.
_SYSTEM_START, _SYSTEM_END = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n{{ system_message | default(",
    ", true) }}<|im_end|>\n{% endif %}",
)
_ROLE = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_PLACEHOLDER + "\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
)
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
_NUMBER_START = f"{{%- set budget = num_thoughts if num_thoughts is defined and num_thoughts != '{OWN}' else "
_NUMBER_END = (
    " -%}\n{%- set block = '' -%}\n{%- if budget is not none -%}\n"
    "{%- if budget is not integer or budget < 0 -%}\n"
    "{{ raise_exception('`num_thoughts` must be an integer of at least 0, got ' ~ budget ~ '. Pass 0 for a block "
    "without thoughts, or none for no block at all.') }}\n{%- endif -%}\n"
    f"{{%- set block = '{START_LATENT_TOKEN}' ~ '{LATENT_TOKEN}' * budget ~ '{END_LATENT_TOKEN}' -%}}\n"
    "{%- endif -%}\n"
)
# Where a template, also one that was edited, has the number; `budget` is its name in all that are saved.
_TEMPLATE_NUMBER = re.compile(r"(set\s+budget\s*=\s*num_thoughts\s+if\s[^%]*?\selse\s+)(none|[0-9]+)")
_BLOCK = "{{ block }}"
_LAST_BLOCK = "{% if loop.last and not add_generation_prompt %}" + _BLOCK + "{% endif %}"


def thought_block(num_thoughts: int) -> str:
    """
    The text of a block of `num_thoughts` continuous thoughts. With 0 the two markers remain, as in Coconut's stage 0.

    Raises:
        ValueError: `num_thoughts` is negative or not an integer.
    """
    if not is_int(num_thoughts) or num_thoughts < 0:
        raise ValueError(
            f"`num_thoughts` must be an integer of at least 0, got {num_thoughts!r}. Pass 0 for a block without "
            "thoughts, or None for no block at all."
        )
    return START_LATENT_TOKEN + LATENT_TOKEN * num_thoughts + END_LATENT_TOKEN


def _jinja(num_thoughts: NumThoughts) -> str:
    return "none" if num_thoughts is None else str(num_thoughts)


def chat_template(system_message: str | None = None, num_thoughts: int | None = None) -> str:
    """
    InternVL's `internvl2_5` prompts with a block of thoughts at the start of the turn that the assistant has last.

    The template's variable `num_thoughts` is the number of thoughts, `none` for no block. Messages of the assistant
    stand in `generation` tags, the block in front of them.

    Args:
        system_message (`str`, *optional*): For conversations that bring none; `None` leaves InternVL's.
        num_thoughts (`int`, *optional*): What the variable is where it is not given.

    Raises:
        ValueError: `num_thoughts` is negative or not an integer.
    """
    if num_thoughts is not None:
        thought_block(num_thoughts)  # checks the number
    message = SYSTEM_MESSAGE if system_message is None else system_message
    return (
        f"{_NUMBER_START}{_jinja(num_thoughts)}{_NUMBER_END}"
        + f"{_SYSTEM_START}{json.dumps(message, ensure_ascii=False)}{_SYSTEM_END}{_ROLE}"
        + "{% if message['role'] == 'assistant' %}"
        + f"{_LAST_BLOCK}{{% generation %}}{_CONTENT}{{% endgeneration %}}{{% else %}}{_CONTENT}{{% endif %}}"
        + f"{{% endfor %}}{_PROMPT}{_BLOCK}{{% endif %}}"
    )


CHAT_TEMPLATE = chat_template()


def plain_chat_template(template: Any) -> Any:
    """
    A template (`str`), or several by name (`dict[str, str]`), without the code that writes thoughts: for a model that
    has none.

    Raises:
        ValueError: the template writes thoughts by code of its own.
    """
    if not isinstance(template, str):
        return template and {name: plain_chat_template(text) for name, text in template.items()}
    for code in (f"{_NUMBER_START}{_jinja(read_number(template))}{_NUMBER_END}", _LAST_BLOCK, _BLOCK):
        template = template.replace(code, "")
    if START_LATENT_TOKEN in template or LATENT_TOKEN in template:
        raise ValueError(
            f"`chat_template` writes {LATENT_TOKEN} by code of its own, which cannot be taken out of it. Give the "
            "processor a template without thoughts, such as `chat_template()`, and export again."
        )
    return template


def read_number(template: str | dict[str, str] | None) -> NumThoughts:
    """The number that a template writes where none is given; [`OWN`] if it has no such default."""
    if isinstance(template, dict):
        template = template.get("default")
    found = _TEMPLATE_NUMBER.search(template or "")
    return OWN if found is None else None if found[2] == "none" else int(found[2])


def write_number(template: Any, num_thoughts: int | None) -> Any:
    """The template, or several by name, with another default; one that has none stays as it is."""
    if isinstance(template, dict):
        return {name: write_number(text, num_thoughts) for name, text in template.items()}
    return template and _TEMPLATE_NUMBER.sub(rf"\g<1>{_jinja(num_thoughts)}", template, count=1)


def upgraded_template(template: Any) -> Any:
    """A template of multicoco 0.1.0, which left the block to the processor, as today's with its system message."""
    end = f"{_SYSTEM_END}{_ROLE}{_CONTENT}{{% endfor %}}{_PROMPT}{{% endif %}}"
    if isinstance(template, str) and template.startswith(_SYSTEM_START) and template.endswith(end):
        return chat_template(json.loads(template[len(_SYSTEM_START) : -len(end)]))
    return template


def check_saved_num_thoughts(
    name_or_path: str | os.PathLike[str], num_thoughts: NumThoughts = OWN, **hub_kwargs: Any
) -> None:
    """
    Compares the numbers of thoughts that the files of a checkpoint hold: `config.json`, `processor_config.json` and
    the chat template. A file that is not there says nothing.

    Args:
        name_or_path (`str` or `os.PathLike`): Folder or Hub name.
        num_thoughts (`int`, *optional*): The configuration's number, if it was read already.
        hub_kwargs: Arguments for [`~transformers.utils.cached_file`], such as `revision`.

    Raises:
        ValueError: they differ, so that prompts would carry other thoughts than the model was trained with.
    """
    found: dict[str, int | None] = {}
    if num_thoughts == OWN:
        config = read_json(name_or_path, "config.json", **hub_kwargs)
        if config.get("model_type") == MultiCoCoConfig.model_type:
            num_thoughts = config.get("num_thoughts")  # the file leaves out what is None
    if num_thoughts != OWN:
        found["config.json"] = num_thoughts
    processor = read_json(name_or_path, "processor_config.json", **hub_kwargs)
    if "num_thoughts" in processor:
        found["processor_config.json"] = processor["num_thoughts"]
    template = read_text(name_or_path, "chat_template.jinja", **hub_kwargs)
    template = template or read_json(name_or_path, "tokenizer_config.json", **hub_kwargs).get("chat_template")
    baked = read_number(template if isinstance(template, str) else None)
    if baked != OWN:
        found["the chat template"] = baked
    if len(set(found.values())) > 1:
        numbers = ", ".join(f"{number} in {place}" for place, number in found.items())
        raise ValueError(
            f"`num_thoughts` of {name_or_path} is {numbers}, expected one number: prompts would carry other thoughts "
            "than the model was trained with. If the configuration is right, run "
            f'`MultiCoCoProcessor.from_pretrained("{name_or_path}", num_thoughts={found.get("config.json", "N")})'
            f'.save_pretrained("{name_or_path}")`. If the processor is (as after adapters that were merged by hand), '
            "load the model with its number, `from_pretrained(..., num_thoughts=...)`, and save it."
        )
