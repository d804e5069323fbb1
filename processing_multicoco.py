"""From images and text to what the model reads: exact `<IMG_CONTEXT>` runs, a block of thoughts, InternVL's prompts.

A text holds one `<image>` for each of its images. An image of `n` tiles becomes

    <img> <IMG_CONTEXT> x (num_image_token * n) </img>

and a budget of `k` thoughts becomes, at the start of the assistant's turn,

    <|start-latent|> <|latent|> x k <|end-latent|>

Nothing is ever cut, repeated or guessed: whatever does not fit is a `ValueError`. This file knows no model.
"""

import json
import os
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ImageInput, load_image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .configuration_multicoco import (
    END_LATENT_TOKEN,
    HUB_KWARGS,
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    LATENT_TOKEN,
    START_LATENT_TOKEN,
    MultiCoCoConfig,
)


IMAGE_PLACEHOLDER = "<image>"
# Tokens that only the processor may write; in a user's text they would move features or thoughts.
RESERVED_TOKENS = (
    IMAGE_START_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_CONTEXT_TOKEN,
    START_LATENT_TOKEN,
    LATENT_TOKEN,
    END_LATENT_TOKEN,
)
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# The system message of InternVL's `internvl2_5` prompts, which InternVL2.5 and InternVL3 were trained on.
SYSTEM_MESSAGE = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "{{ system_message | default("
    + json.dumps(SYSTEM_MESSAGE, ensure_ascii=False)
    + ", true) }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + IMAGE_PLACEHOLDER + "\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(system_message: str | None = None) -> str:
    """`CHAT_TEMPLATE` with another system message for conversations that bring none; `None` leaves InternVL's."""
    if system_message is None:
        return CHAT_TEMPLATE
    quoted = [json.dumps(message, ensure_ascii=False) for message in (SYSTEM_MESSAGE, system_message)]
    return CHAT_TEMPLATE.replace(*quoted)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds those of the six special tokens that `tokenizer` lacks; returns how many. Safe to call again."""
    return tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in RESERVED_TOKENS], special_tokens=True
    )


def thought_block(num_thoughts: int) -> str:
    """
    The text of a block of `num_thoughts` continuous thoughts. With 0 the two markers remain, as in Coconut's stage 0.

    Raises:
        ValueError: `num_thoughts` is negative or not an integer.
    """
    if isinstance(num_thoughts, bool) or not isinstance(num_thoughts, int) or num_thoughts < 0:
        raise ValueError(
            f"`num_thoughts` must be an integer of at least 0, got {num_thoughts!r}. Pass 0 for a block without "
            "thoughts, or None for no block at all."
        )
    return START_LATENT_TOKEN + LATENT_TOKEN * num_thoughts + END_LATENT_TOKEN


def expand_image_tokens(text: str, num_patches_list: Sequence[int], num_image_token: int, sample: int = 0) -> str:
    """
    Replaces each `<image>` of one text by the run of visual tokens of its image.

    Args:
        text (`str`): Text with one `<image>` per image, in the order of the images.
        num_patches_list (`Sequence[int]`): Tiles of each image of this text.
        num_image_token (`int`): Visual tokens per tile.
        sample (`int`, defaults to 0): The number of the text in its batch, for error messages.

    Raises:
        ValueError: the text has more or fewer `<image>` than images, an image has no tile, or the text itself holds
            a token that only the processor may write.
    """
    for token in RESERVED_TOKENS:
        if token in text:
            raise ValueError(
                f"Sample {sample}: `text` contains {token}, which only the processor may write. Remove or rephrase "
                f"it; mark the place of an image by {IMAGE_PLACEHOLDER} and ask for thoughts by `num_thoughts`."
            )
    parts = text.split(IMAGE_PLACEHOLDER)
    if len(parts) - 1 != len(num_patches_list):
        raise ValueError(
            f"Sample {sample}: `text` has {len(parts) - 1} {IMAGE_PLACEHOLDER} but {len(num_patches_list)} images "
            f"were given. Write {IMAGE_PLACEHOLDER} exactly once per image, in the order of the images."
        )
    expanded = parts[0]
    for index, (num_patches, part) in enumerate(zip(num_patches_list, parts[1:], strict=True)):
        if num_patches < 1:
            raise ValueError(
                f"Sample {sample}: `num_patches_list` gives image {index} {num_patches} tiles, expected at least 1. "
                "Leave out an image that is not there, and its placeholder."
            )
        run = IMAGE_CONTEXT_TOKEN * (num_image_token * int(num_patches))
        expanded += IMAGE_START_TOKEN + run + IMAGE_END_TOKEN + part
    return expanded


class MultiCoCoProcessor(ProcessorMixin):
    r"""
    Joins a GotOcr2 image processor (InternVL's tiling, on Pillow: no torchvision needed) and a fast tokenizer.

    Args:
        image_processor ([`GotOcr2ImageProcessorPil`]):
            Cuts images into tiles; `max_patches` tiles at most, and a thumbnail if there is more than one.
        tokenizer ([`PreTrainedTokenizerBase`]):
            Tokenizer of the checkpoint. Special tokens that it lacks are added.
        num_image_token (`int`, defaults to 256):
            Visual tokens per tile, [`MultiCoCoConfig.num_image_token`].
        num_thoughts (`int`, *optional*):
            Budget that [`~MultiCoCoProcessor.apply_chat_template`] uses when none is given; saved with the processor,
            so that an evaluation uses what the training ended with. `None` writes no thought block.
        chat_template (`str`, *optional*):
            Jinja template; defaults to InternVL's `internvl2_5` prompts.

    Example:

    ```python
    >>> from multicoco import MultiCoCoProcessor

    >>> processor = MultiCoCoProcessor.from_pretrained("OpenGVLab/InternVL3-1B")  # doctest: +SKIP
    >>> inputs = processor(images=[["street.jpg"]], text=["<image>\nHow many cars?"], num_thoughts=6)  # doctest: +SKIP
    ```"""

    text_kwargs = {"padding_side": "left"}
    images_kwargs = {"crop_to_patches": True}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_token: int = 256,
        num_thoughts: int | None = None,
        chat_template: str | None = None,
    ):
        if num_thoughts is not None:
            thought_block(num_thoughts)  # checks the number
        if not isinstance(image_processor, GotOcr2ImageProcessorPil):  # torchvision's resize gives other pixels
            image_processor = GotOcr2ImageProcessorPil.from_dict(image_processor.to_dict())
        prepare_tokenizer(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.num_image_token = num_image_token
        self.num_thoughts = num_thoughts

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        Loads a processor of our own, or makes one for a transformers or an original InternVL checkpoint from its
        tokenizer and configuration; no remote code is run.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
        path = cached_file(
            pretrained_model_name_or_path,
            "processor_config.json",
            _raise_exceptions_for_missing_entries=False,
            **hub_kwargs,
        )
        if path is not None:
            with open(path, encoding="utf-8") as file:
                if json.load(file).get("processor_class") == cls.__name__:
                    return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = MultiCoCoConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        with open(cached_file(pretrained_model_name_or_path, "config.json", **hub_kwargs), encoding="utf-8") as file:
            raw_config = json.load(file)
        if raw_config["model_type"] == "internvl_chat":
            height, width = config.vision_config.image_size
            image_processor = GotOcr2ImageProcessorPil(
                size={"height": height, "width": width},
                crop_to_patches=True,
                min_patches=raw_config.get("min_dynamic_patch", 1),
                max_patches=raw_config.get("max_dynamic_patch", 12)
                if raw_config.get("dynamic_image_size", True)
                else 1,
                image_mean=IMAGENET_MEAN,
                image_std=IMAGENET_STD,
            )
        else:
            image_processor = GotOcr2ImageProcessorPil.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        tokenizer = AutoTokenizer.from_pretrained(
            pretrained_model_name_or_path, config=config.text_config, trust_remote_code=False, **hub_kwargs
        )
        return cls(
            image_processor,
            tokenizer,
            num_image_token=config.num_image_token,
            num_thoughts=kwargs.get("num_thoughts", config.num_thoughts),
            chat_template=kwargs.get("chat_template", chat_template(config.system_message)),
        )

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "num_patches_list"]

    def __call__(
        self,
        images: ImageInput | list[ImageInput] | None = None,
        text: str | list[str] | None = None,
        videos=None,
        audio=None,
        num_thoughts: int | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Prepares one prompt or a batch of prompts.

        Args:
            images (image, path, URL, or list of them, or one list per text, *optional*):
                The images of each text, in order. A flat list is dealt out by the placeholders of the texts. Images
                are converted to RGB first (transparency is dropped), as InternVL does.
            text (`str` or `list[str]`):
                Prompts with one `<image>` per image.
            num_thoughts (`int`, *optional*):
                Appends a block of this many thoughts to each prompt; with `None` no block.
            kwargs:
                Arguments of the tokenizer (`padding`, `return_tensors`, ...) and of the image processor
                (`max_patches`, `min_patches`, ...). `max_length` is a limit that raises, never a cut.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`, `pixel_values`
            of shape `(sum of tiles, 3, height, width)` if there are images, and `num_patches_list`, a list with the
            number of tiles of each image of the batch.

        Raises:
            ValueError: placeholders and images do not match, an image cannot be read or is empty, the text holds a
                reserved token, a prompt is longer than `max_length`, or the budget of thoughts or tiles is not valid.
        """
        if videos is not None or audio is not None:
            raise ValueError("`videos` and `audio` are not supported. Pass frames of a video as `images`.")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(item, str) for item in texts):
            raise ValueError(f"`text` must be a string or a non-empty list of strings, got {text!r:.100}.")
        block = "" if num_thoughts is None else thought_block(num_thoughts)
        nested_images = _nest_images(images, texts)
        kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs, images_kwargs = kwargs["text_kwargs"], kwargs["images_kwargs"]

        opened = [
            open_image(image, sample, index)
            for sample, sample_images in enumerate(nested_images)
            for index, image in enumerate(sample_images)
        ]
        data, num_patches_list = {}, []
        self._check_tile_budget(images_kwargs)
        if opened:
            tiles = self.image_processor(
                opened, **{**images_kwargs, "return_tensors": images_kwargs.get("return_tensors") or "np"}
            )
            data["pixel_values"] = tiles["pixel_values"]
            num_patches_list = [int(count) for count in tiles["num_patches"]]

        counts = iter(num_patches_list)
        nested_counts = [[next(counts) for _ in sample_images] for sample_images in nested_images]
        prompts = [prompt + block for prompt in self.expand_image_tokens(list(texts), nested_counts)]
        data.update(self._tokenize(prompts, text_kwargs))
        features = BatchFeature(data, tensor_type=text_kwargs.get("return_tensors"))
        features["num_patches_list"] = num_patches_list  # stays a list: it is read on the host, before any compute
        return features

    def expand_image_tokens(self, text: str | list[str], num_patches_list: list[int] | list[list[int]]):
        """
        Writes the exact run of visual tokens for each `<image>`: the step for users who cut tiles by themselves.

        Args:
            text (`str` or `list[str]`): One text or a batch of texts.
            num_patches_list (`list[int]` or `list[list[int]]`): Tiles of each image; one list per text for a batch.

        Returns:
            `str` or `list[str]`, as `text`.

        Raises:
            ValueError: see [`~processing_multicoco.expand_image_tokens`].
        """
        if isinstance(text, str):
            return expand_image_tokens(text, num_patches_list, self.num_image_token)
        if len(text) != len(num_patches_list):
            raise ValueError(
                f"`num_patches_list` has {len(num_patches_list)} lists for {len(text)} texts. Give one list per text, "
                "an empty one for a text without images."
            )
        return [
            expand_image_tokens(item, counts, self.num_image_token, sample)
            for sample, (item, counts) in enumerate(zip(text, num_patches_list, strict=True))
        ]

    def _check_tile_budget(self, images_kwargs: dict):
        fewest = images_kwargs.get("min_patches", self.image_processor.min_patches)
        most = images_kwargs.get("max_patches", self.image_processor.max_patches)
        for name, value in (("min_patches", fewest), ("max_patches", most)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"`{name}` must be an integer of at least 1, got {value!r}. Give the tiles per image."
                )
        if fewest > most:
            raise ValueError(
                f"`min_patches` must not exceed `max_patches`, got {fewest} and {most}. Lower the first or raise the "
                "second."
            )

    def _tokenize(self, prompts: list[str], text_kwargs: dict) -> dict:
        if text_kwargs.pop("truncation", None):
            raise ValueError(
                "`truncation` is not supported: it would cut visual tokens or thoughts. Shorten the text, or lower "
                "`max_patches`."
            )
        max_length = text_kwargs.get("max_length")
        if text_kwargs.get("padding") not in ("max_length",):
            text_kwargs.pop("max_length", None)
        if max_length is not None:
            lengths = [len(ids) for ids in self.tokenizer(prompts)["input_ids"]]
            for sample, length in enumerate(lengths):
                if length > max_length:
                    raise ValueError(
                        f"Sample {sample}: the prompt has {length} tokens, more than `max_length` {max_length}. "
                        "Nothing is truncated: raise `max_length`, shorten the text, or lower `max_patches`."
                    )
        return self.tokenizer(prompts, **{**text_kwargs, "return_attention_mask": True})

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        num_thoughts: int | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        r"""
        [`~transformers.ProcessorMixin.apply_chat_template`] with InternVL's prompts and a budget of thoughts.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages. Their content is a string with one `<image>` per image, or a list of parts
                `{"type": "image", "image" | "path" | "url": ...}` and `{"type": "text", "text": ...}`.
            num_thoughts (`int`, *optional*):
                Thoughts before the answer, at the start of the assistant's turn (needs `add_generation_prompt=True`
                and `tokenize=True`). Defaults to the processor's own `num_thoughts`.

        Raises:
            ValueError: as in [`~MultiCoCoProcessor.__call__`], or a part of another type, or thoughts without an
                assistant's turn to put them in.
        """
        conversations = [conversation] if conversation and isinstance(conversation[0], dict) else conversation
        if not conversations or not all(conversations):
            raise ValueError(f"`conversation` must hold at least one message, got {conversation!r}.")
        for sample, messages in enumerate(conversations):
            for message in messages:
                parts = message.get("content") or []
                for part in [] if isinstance(parts, str) else parts:
                    if part.get("type") not in ("text", "image", "image_url"):
                        raise ValueError(
                            f"Sample {sample}: content of type {part.get('type')!r} is not supported, expected 'text' "
                            "or 'image'. Pass frames of a video as images."
                        )
        if num_thoughts is not None and not (add_generation_prompt and tokenize):
            raise ValueError(
                "`num_thoughts` needs `add_generation_prompt=True` and `tokenize=True`: thoughts stand at the start "
                "of the assistant's turn. To tokenize later, pass it to the processor with the text."
            )
        if num_thoughts is None and add_generation_prompt and tokenize:
            num_thoughts = self.num_thoughts
        if num_thoughts is not None:
            processor_kwargs = {**(processor_kwargs or {}), "num_thoughts": num_thoughts}
        return super().apply_chat_template(
            conversation,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )


def _nest_images(images, texts: Sequence[str]) -> list[list]:
    """One list of images per text, from whatever form the caller chose."""
    if images is None:
        return [[] for _ in texts]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(item, (list, tuple)) for item in images):
        if len(images) != len(texts):
            raise ValueError(
                f"`images` has {len(images)} lists for {len(texts)} texts. Give one list per text, an empty one for a "
                "text without images."
            )
        return [list(item) if isinstance(item, (list, tuple)) else [item] for item in images]
    wanted = [text.count(IMAGE_PLACEHOLDER) for text in texts]
    if sum(wanted) != len(images):
        raise ValueError(
            f"`images` has {len(images)} images, but the texts hold {wanted} {IMAGE_PLACEHOLDER} (per sample). Write "
            f"{IMAGE_PLACEHOLDER} exactly once per image, in the order of the images."
        )
    flat = iter(images)
    return [[next(flat) for _ in range(count)] for count in wanted]


def open_image(image, sample: int, index: int) -> Image.Image:
    """Any image that transformers understands, as RGB; transparency is dropped as in InternVL, not laid over white."""
    name = image if isinstance(image, (str, os.PathLike)) else type(image).__name__
    where = f"Sample {sample}, image {index} ({name!s:.200})"
    try:
        if isinstance(image, (bytes, bytearray)):
            image = Image.open(BytesIO(image))
        elif isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
            image = Image.open(image)  # `load_image` would turn a photograph by its EXIF, which InternVL does not
        elif isinstance(image, (str, os.PathLike)):
            image = load_image(os.fspath(image))
        elif not isinstance(image, Image.Image):
            image = to_pil_image(np.asarray(image))
        image = image.convert("RGB")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{where}: cannot be read as an image: {error}. Expected a PIL image, a path, a "
            "URL, bytes or an array: check that the file is whole, or leave out the image and its placeholder."
        ) from error
    if 0 in image.size:
        raise ValueError(
            f"{where}: the image is empty, {image.size[0]} x {image.size[1]} pixels, expected at least "
            "1 x 1. Leave it out, and its placeholder."
        )
    return image


MultiCoCoProcessor.register_for_auto_class()
