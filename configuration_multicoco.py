"""What a multicoco checkpoint knows about itself, and how the two other InternVL checkpoint formats are read.

Three kinds of `config.json` end up as one `MultiCoCoConfig`: our own, transformers' (`model_type: internvl`, as in
`OpenGVLab/InternVL3-1B-hf`) and the original program's (`model_type: internvl_chat`, as in `OpenGVLab/InternVL3-1B`,
whose remote code is never run). This file knows no tensors.
"""

import json
from typing import Any

from transformers import CONFIG_MAPPING, InternVLConfig
from transformers.utils import logging

from .compat import optional_file


logger = logging.get_logger(__name__)

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
# The fields that training sets: what a checkpoint was trained as, and how it is to be asked.
TRAINED = ("mode", "stage", "num_thoughts", "thought_feedback", "c_thought", "max_latent_stage")

# Language models whose parameter names are the same in an original checkpoint and in transformers.
ORIGINAL_TEXT_MODELS = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "InternLM3ForCausalLM": "internlm3",
}

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

    latent_token_id: int | None = None
    start_latent_id: int | None = None
    end_latent_id: int | None = None
    c_thought: int = 2
    max_latent_stage: int = 3
    stage: int = 0
    num_thoughts: int | None = None
    thought_feedback: str = "identity"
    mode: str = "coconut"
    system_message: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.thought_feedback in STATE_FEEDBACKS:  # files of version 0.1 name a control by its mode only
            self.thought_feedback = feedback_of(self.mode, self.thought_feedback)
        self._check_thoughts()
        self._check_vision()

    def save_pretrained(self, save_directory, *args, **kwargs):
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
    def llm_config(self):
        """The original's name of `text_config`."""
        return self.text_config

    @property
    def num_image_token(self) -> int:
        """Visual tokens that one tile becomes: `(image_size // patch_size)**2 * downsample_ratio**2`."""
        vision = self.vision_config
        return int((vision.image_size[0] // vision.patch_size[0]) ** 2 * self.downsample_ratio**2)

    def _check_thoughts(self):
        ids = {name: getattr(self, name) for name in ("start_latent_id", "latent_token_id", "end_latent_id")}
        given = [value for value in ids.values() if value is not None]
        if len(given) not in (0, 3) or len(set(given)) != len(given):
            raise ValueError(
                f"`latent_token_id`, `start_latent_id`, `end_latent_id` must be all None or three different ids, got "
                f"{ids}. Let `add_thought_tokens(model, tokenizer)` set them."
            )
        vocab_size = self.text_config.vocab_size
        for name, value in ids.items():
            if value is not None and not (_is_int(value) and 0 <= value < vocab_size):
                raise ValueError(
                    f"`{name}` must be an id within the vocabulary of {vocab_size} tokens, got {value!r}. Let "
                    "`add_thought_tokens(model, tokenizer)` add the token and resize the embeddings."
                )
        for name, least in (("c_thought", 1), ("max_latent_stage", 0), ("stage", 0), ("num_thoughts", 0)):
            value = getattr(self, name)
            if value is None and name == "num_thoughts":
                continue
            if not _is_int(value) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        if self.thought_feedback not in FEEDBACKS:
            raise ValueError(
                f"`thought_feedback` must be one of {', '.join(FEEDBACKS)}, got {self.thought_feedback!r}. The "
                "checkpoint may come from a newer multicoco: upgrade it."
            )

    def _check_vision(self):
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
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads any of the three formats; see [`~transformers.PreTrainedConfig.get_config_dict`]."""
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


def _is_int(value) -> bool:
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
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "patch_size")
    same += ("num_channels", "norm_type", "layer_norm_eps", "attention_dropout", "initializer_range")
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


def _image_token_id(name_or_path: str, hub_kwargs: dict[str, Any]) -> int:
    """The id of `<IMG_CONTEXT>` from the JSON files of the tokenizer beside a `config.json` that does not hold it."""
    for filename in ("tokenizer_config.json", "added_tokens.json"):
        path = optional_file(name_or_path, filename, **hub_kwargs)
        if path is None:
            continue
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        decoder = content.get("added_tokens_decoder", {})
        ids = {token["content"]: int(token_id) for token_id, token in decoder.items()} or content
        if isinstance(ids.get(IMAGE_CONTEXT_TOKEN), int):
            return ids[IMAGE_CONTEXT_TOKEN]
    raise ValueError(
        f"`image_token_id`: no {IMAGE_CONTEXT_TOKEN} in tokenizer_config.json or added_tokens.json of {name_or_path}. "
        "An original InternVL checkpoint needs its tokenizer files beside config.json."
    )


MultiCoCoConfig.register_for_auto_class()
