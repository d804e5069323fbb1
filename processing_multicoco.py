"""From images and text to what the model reads: exact `<IMG_CONTEXT>` runs, a block of thoughts, InternVL's prompts.

A text holds one `<image>` for each of its images. An image of `n` tiles becomes

    <img> <IMG_CONTEXT> x (num_image_token * n) </img>

and `k` thoughts become, at the start of the assistant's turn,

    <|start-latent|> <|latent|> x k <|end-latent|>

The chat template writes that block, so whoever renders it has the thoughts: this processor, its tokenizer, a server.
Nothing is ever cut, repeated or guessed: whatever does not fit is a `ValueError`. This file knows no model.
"""

import copy
import functools
import os
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageInput, load_image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorKwargs,
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.tokenization_utils_base import AddedToken, PreTrainedTokenizerBase
from transformers.utils import logging

from .compat import DOWNLOAD_ERRORS, LOADER_KWARGS, TOKENIZER_KWARGS, TilesInPillow, pixel_table, read_json
from .configuration_multicoco import (
    CHAT_TEMPLATE,
    END_LATENT_TOKEN,
    HUB_KWARGS,
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    LATENT_TOKEN,
    OWN,
    START_LATENT_TOKEN,
    TURN_START_TOKEN,
    MultiCoCoConfig,
    NumThoughts,
    chat_template,
    check_saved_num_thoughts,
    is_int,
    plain_chat_template,
    read_number,
    thought_block,
    upgraded_template,
    write_number,
)


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is

# Tokens that only the processor may write; in a user's text they would move features or thoughts.
RESERVED_TOKENS = (
    IMAGE_START_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_CONTEXT_TOKEN,
    START_LATENT_TOKEN,
    LATENT_TOKEN,
    END_LATENT_TOKEN,
)
# What Pillow, numpy and a download raise of an image that cannot be read.
UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, SyntaxError, *DOWNLOAD_ERRORS)
UNREADABLE += (Image.DecompressionBombError,)

_ASSISTANT_TURN = f"{TURN_START_TOKEN}assistant\n"
_BLOCK_TEXT = re.compile(
    f"{re.escape(START_LATENT_TOKEN)}((?:{re.escape(LATENT_TOKEN)})*){re.escape(END_LATENT_TOKEN)}"
)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """Adds those of the six special tokens that `tokenizer` lacks; returns how many. Safe to call again."""
    return tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in RESERVED_TOKENS], special_tokens=True
    )


def split_thought_block(text: str) -> tuple[str, int | None, str]:
    """
    Cuts a text where its block of thoughts is, or would be: at the start of a last turn of the assistant, else at its
    end.

    Returns:
        What stands before the block, its number of thoughts (`None`: there is no block), and what stands after it.
        Markers elsewhere are left where they are.
    """
    start = text.rfind(TURN_START_TOKEN)
    if start < 0 or not text.startswith(_ASSISTANT_TURN, start):
        return text, None, ""
    place = start + len(_ASSISTANT_TURN)
    block = _BLOCK_TEXT.match(text, place)
    if block is None:
        return text[:place], None, text[place:]
    return text[:place], len(block[1]) // len(LATENT_TOKEN), text[block.end() :]


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
    _refuse_reserved(text, sample)
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


def _refuse_reserved(text: str, sample: int) -> None:
    for token in RESERVED_TOKENS:
        if token in text:
            raise ValueError(
                f"Sample {sample}: `text` contains {token}, which only the processor may write. Remove or rephrase "
                f"it; mark the place of an image by {IMAGE_PLACEHOLDER} and ask for thoughts by `num_thoughts`."
            )


class ImageProcessorKwargs(GotOcr2ImageProcessorKwargs, total=False):
    """The library's settings, and our own."""

    draft_jpeg: bool


class MultiCoCoImageProcessor(TilesInPillow, GotOcr2ImageProcessorPil):  # type: ignore[misc]  # fewer names
    """
    The library's image processor in fewer passes: its pixels bit for bit, its files, its settings and one more.

    Args:
        draft_jpeg (`bool`, defaults to `False`): Let the decoder halve large JPEG files, up to three times and never
            below what is needed. Faster, but pixels differ, so it is saved. What comes decoded is taken as it is.
    """

    valid_kwargs = ImageProcessorKwargs
    draft_jpeg = False

    def to_dict(self) -> dict[str, Any]:
        """The library's, by whose name it is saved; `draft_jpeg` only where it is on."""
        values = {**super().to_dict(), "image_processor_type": "GotOcr2ImageProcessor"}
        return {name: value for name, value in values.items() if name != "draft_jpeg" or value}

    def grid(self, size: tuple[int, int], settings: dict[str, Any]) -> tuple[int, int] | None:
        """Columns and rows of the tiles of a picture of this width and height; `None`: the library cuts it."""
        tile = dict(settings["size"] or ())
        if tile.keys() != {"height", "width"} or not isinstance(settings["resample"], int):
            return None
        if not settings["crop_to_patches"] or settings["max_patches"] <= 1:
            return (1, 1) if settings["do_resize"] else None
        limits = settings["min_patches"], settings["max_patches"]
        grid: tuple[int, int] = get_optimal_tiled_canvas(size[::-1], (tile["height"], tile["width"]), *limits)
        return grid


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
            Thoughts that the chat template writes when no number is given; saved with the processor, so that an
            evaluation uses what the training ended with. `None` writes no thought block. The default is that of
            `chat_template`. May be set later: processor, tokenizer and template stay in step.
        chat_template (`str`, *optional*):
            Jinja template, which becomes the tokenizer's too; defaults to InternVL's `internvl2_5` prompts, see
            [`~configuration_multicoco.chat_template`].

    Example:

    ```python
    >>> from multicoco import MultiCoCoProcessor

    >>> processor = MultiCoCoProcessor.from_pretrained("OpenGVLab/InternVL3-1B")  # doctest: +SKIP
    >>> inputs = processor(images=[["street.jpg"]], text=["<image>\nHow many cars?"], num_thoughts=6)  # doctest: +SKIP
    ```"""

    # Set it to `False` for a program that hands every key on to a function with fixed names (trl's GRPO and RLOO); the
    # model then checks tiles and tokens by their totals only. Not saved.
    return_num_patches_list = True
    text_kwargs = {"padding_side": "left"}
    images_kwargs: Any = {"crop_to_patches": True}
    _chat_template: str | dict[str, str] | None

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_token: int = 256,
        num_thoughts: NumThoughts = OWN,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        for name, part in (("image_processor", image_processor), ("tokenizer", tokenizer)):
            if part is None:
                raise ValueError(
                    f"`{name}` is None, expected that of the checkpoint. Use `MultiCoCoProcessor.from_pretrained`."
                )
        if not isinstance(image_processor, GotOcr2ImageProcessorPil):
            logger.warning_once(
                f"`image_processor` is a {type(image_processor).__name__}, whose resize gives other pixels than "
                "InternVL's: a GotOcr2ImageProcessorPil with its settings takes its place."
            )
        chat_template = chat_template or CHAT_TEMPLATE
        if num_thoughts == OWN:
            written = read_number(chat_template)
            num_thoughts = None if written == OWN else written
        if num_thoughts is not None:
            thought_block(num_thoughts)  # checks the number
        self._num_thoughts = num_thoughts
        prepare_tokenizer(tokenizer)
        super().__init__(_on_pillow(image_processor), tokenizer)
        self.num_image_token = num_image_token
        self.chat_template = chat_template

    @property
    def num_thoughts(self) -> int | None:
        """Thoughts that prompts carry by default; setting it writes the number into the chat templates."""
        return self._num_thoughts

    @num_thoughts.setter
    def num_thoughts(self, num_thoughts: int | None) -> None:
        if num_thoughts is not None:
            thought_block(num_thoughts)  # checks the number
        self._num_thoughts = num_thoughts
        self._chat_template = write_number(self._chat_template, num_thoughts)
        self.tokenizer.chat_template = write_number(self.tokenizer.chat_template, num_thoughts)

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template, which is the tokenizer's too; the processor's number is written into it."""
        return self._chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None) -> None:
        self._chat_template = write_number(template, self._num_thoughts)
        if "tokenizer" in self.__dict__:  # the base class sets the template before it
            self.tokenizer.chat_template = self._chat_template

    @property
    def image_seq_length(self) -> int:
        """`num_image_token` under transformers' name."""
        return self.num_image_token

    # The names of transformers' `InternVLProcessor`, for those who read them; a text marks an image by `<image>`.
    image_token, start_image_token, end_image_token = IMAGE_CONTEXT_TOKEN, IMAGE_START_TOKEN, IMAGE_END_TOKEN

    @property
    def image_token_id(self) -> int:
        """Id of `image_token`."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def start_image_token_id(self) -> int:
        """Id of `start_image_token`."""
        return self.tokenizer.convert_tokens_to_ids(self.start_image_token)

    @property
    def end_image_token_id(self) -> int:
        """Id of `end_image_token`."""
        return self.tokenizer.convert_tokens_to_ids(self.end_image_token)

    @property  # type: ignore[misc]  # the base's can be set
    def image_token_ids(self) -> list[int | None]:
        """The three ids that an image is written with."""
        return [self.image_token_id, self.start_image_token_id, self.end_image_token_id]

    def to_dict(self) -> dict[str, Any]:
        """As [`~transformers.ProcessorMixin.to_dict`], which sees no properties."""
        return {**super().to_dict(), "num_thoughts": self.num_thoughts}

    @classmethod
    def from_pretrained(  # type: ignore[override]  # by keyword only
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, num_thoughts: NumThoughts = OWN, **kwargs: Any
    ) -> "MultiCoCoProcessor":
        """
        Loads a processor of our own, or makes one for a transformers or an original InternVL checkpoint from its
        tokenizer and configuration; no remote code is run. A given `num_thoughts` replaces the saved one.

        Args:
            kwargs: Arguments for the Hub, and settings of the image processor (`max_patches`), of the tokenizer
                (`padding_side`) or of the processor that replace the saved ones.

        Raises:
            ValueError: the files of the checkpoint hold different numbers of thoughts, and `num_thoughts` is not
                given, see [`~configuration_multicoco.check_saved_num_thoughts`]; or an argument is none of these.
        """
        settings = {*ImageProcessorKwargs.__annotations__, "num_image_token", "chat_template"}
        settings |= {"image_processor", "tokenizer", *TOKENIZER_KWARGS}
        given = {name for name, value in kwargs.items() if value is not None}
        unknown = given - settings - {*HUB_KWARGS, *LOADER_KWARGS}
        if unknown and "_from_pipeline" not in kwargs:  # a pipeline hands on what is the model's
            raise ValueError(
                f"`from_pretrained` of a processor does not know {sorted(unknown)}. Check the spelling, or set it on "
                "the part it belongs to, `image_processor` or `tokenizer`."
            )
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
        saved = read_json(pretrained_model_name_or_path, "processor_config.json", **hub_kwargs)
        if saved.get("processor_class") != cls.__name__:
            return cls._from_internvl(pretrained_model_name_or_path, num_thoughts, hub_kwargs, kwargs)
        if num_thoughts == OWN:
            check_saved_num_thoughts(pretrained_model_name_or_path, **hub_kwargs)
        processor: MultiCoCoProcessor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        processor.chat_template = upgraded_template(processor.chat_template)
        if num_thoughts != OWN:
            processor.num_thoughts = num_thoughts
        return processor

    @classmethod
    def _from_internvl(
        cls,
        name_or_path: str | os.PathLike[str],
        num_thoughts: NumThoughts,
        hub_kwargs: dict[str, Any],
        settings: dict[str, Any],
    ) -> "MultiCoCoProcessor":
        """A processor for a checkpoint of transformers or of the original program; `settings` replace what it says."""
        config = MultiCoCoConfig.from_pretrained(name_or_path, **hub_kwargs)
        original = read_json(name_or_path, "config.json", **hub_kwargs)
        if original["model_type"] == "internvl_chat":
            height, width = config.vision_config.image_size
            is_cut = original.get("dynamic_image_size", True)
            image_processor = MultiCoCoImageProcessor(
                size={"height": height, "width": width},
                crop_to_patches=True,
                min_patches=original.get("min_dynamic_patch", 1),
                max_patches=original.get("max_dynamic_patch", 12) if is_cut else 1,
                image_mean=IMAGENET_DEFAULT_MEAN,
                image_std=IMAGENET_DEFAULT_STD,
            )
        else:
            image_processor = MultiCoCoImageProcessor.from_pretrained(name_or_path, **hub_kwargs)
        of_images = {name: settings[name] for name in image_processor.valid_kwargs.__annotations__ if name in settings}
        if of_images:
            image_processor = MultiCoCoImageProcessor.from_dict({**image_processor.to_dict(), **of_images})
        of_text = {name: settings[name] for name in TOKENIZER_KWARGS if name in settings}
        return cls(
            settings.get("image_processor", image_processor),
            settings.get("tokenizer")
            or AutoTokenizer.from_pretrained(
                name_or_path, config=config.text_config, trust_remote_code=False, **hub_kwargs, **of_text
            ),
            num_image_token=settings.get("num_image_token", config.num_image_token),
            num_thoughts=config.num_thoughts if num_thoughts == OWN else num_thoughts,
            chat_template=settings.get("chat_template", chat_template(config.system_message)),
        )

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """[`~transformers.ProcessorMixin.from_args_and_dict`], whichever image processor an auto class has made."""
        return super().from_args_and_dict([_on_pillow(args[0]), *args[1:]], processor_dict, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """What [`~MultiCoCoProcessor.__call__`] can return."""
        return ["input_ids", "attention_mask", "pixel_values", "num_patches_list"]

    def __call__(
        self,
        images: ImageInput | list[ImageInput] | None = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        *,
        num_thoughts: NumThoughts = OWN,
        **kwargs: Any,
    ) -> BatchFeature:
        r"""
        Prepares one prompt or a batch of prompts.

        Args:
            images (image, path, URL, or list of them, or one list per text, *optional*):
                The images of each text, in order. A flat list is dealt out by the placeholders of the texts. Images
                are converted to RGB first (transparency is dropped), as InternVL does. `None` in the place of a
                list is a text without images.
            text (`str` or `list[str]`):
                Prompts with one `<image>` per image, and at most the one block of thoughts that the chat template
                writes at the start of a last turn of the assistant.
            num_thoughts (`int`, *optional*):
                Puts a block of this many thoughts at the start of a last turn of the assistant, else at the end of
                each prompt; it takes the place of one that is there, and `None` removes it. By default prompts keep
                what they have.
            kwargs:
                Arguments of the tokenizer (`padding`, `return_tensors`, ...) and of the image processor
                (`max_patches`, `min_patches`, ...). `max_length` is a limit that raises, never a cut, with or
                without `truncation`.

        Returns:
            [`BatchFeature`]: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`, `pixel_values`
            of shape `(sum of tiles, 3, height, width)` and `num_patches_list`, the number of tiles of each image of
            the batch (`(num_images,)` integers with `return_tensors="pt"`, else a list), if there are images.

        Raises:
            ValueError: placeholders and images do not match, an image cannot be read or is empty, the text holds a
                reserved token elsewhere or an image behind the thoughts, a prompt is longer than `max_length`, or the
                number of thoughts or tiles is not valid.
        """
        if not (_is_nothing(videos) and _is_nothing(audio)):
            raise ValueError("`videos` and `audio` are not supported. Pass frames of a video as `images`.")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(item, str) for item in texts):
            raise ValueError(f"`text` must be a string or a non-empty list of strings, got {text!r:.100}.")
        if num_thoughts is not None and num_thoughts != OWN:
            thought_block(num_thoughts)  # checks the number
        nested_images = _nest_images(images, texts)
        kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = kwargs["text_kwargs"]
        data, nested_counts = self._cut_images(nested_images, kwargs["images_kwargs"])
        samples = list(zip(texts, nested_counts, strict=True))
        prompts = [self._write(item, counts, num_thoughts, sample) for sample, (item, counts) in enumerate(samples)]
        wants_offsets = text_kwargs.pop("return_text_replacement_offsets", False)
        data.update(self._tokenize(prompts, text_kwargs))
        return_tensors = text_kwargs.get("return_tensors")
        features = BatchFeature(data, tensor_type=return_tensors)
        num_patches_list = [count for counts in nested_counts for count in counts]
        if num_patches_list and self.return_num_patches_list:  # set here: `to(device, dtype)` must leave counts alone
            as_tensor = return_tensors == "pt"
            features["num_patches_list"] = torch.tensor(num_patches_list) if as_tensor else num_patches_list
        if wants_offsets:  # for the mask of the assistant's tokens
            features["text_replacement_offsets"] = [
                self._offsets(item, counts, num_thoughts) for item, counts in samples
            ]
        return features

    def _cut_images(
        self, nested_images: list[list[Any]], images_kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], list[list[int]]]:
        """`pixel_values` of a batch, if it has images, and for each text the number of tiles of each of its images."""
        opened = [
            self.open_image(image, sample, index, images_kwargs)
            for sample, images in enumerate(nested_images)
            for index, image in enumerate(images)
        ]
        self.check_tile_limits(images_kwargs)
        if not opened:
            return {}, [[] for _ in nested_images]
        tiles = self.image_processor(
            opened, **{**images_kwargs, "return_tensors": images_kwargs.get("return_tensors") or "np"}
        )
        counts = iter(tiles["num_patches"])
        nested_counts = [[int(next(counts)) for _ in images] for images in nested_images]
        return {"pixel_values": tiles["pixel_values"]}, nested_counts

    def open_image(
        self, image: Any, sample: int, index: int, images_kwargs: dict[str, Any] | None = None
    ) -> Image.Image:
        """[`~processing_multicoco.open_image`] as this processor has files decoded, see `draft_jpeg`."""
        draft = getattr(self.image_processor, "draft", None)
        settings = self.images_kwargs if images_kwargs is None else images_kwargs
        return open_image(image, sample, index, draft and functools.partial(draft, **settings))

    def normalize_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        The tiles that the image processor gives, bit for bit, from the bytes that [`ReasoningCollator`] gives with
        `normalize_on_device`; on their device, which the host does not wait for.

        Args:
            pixel_values (`torch.ByteTensor` of shape `(num_tiles, 3, height, width)`): Tiles.

        Raises:
            ValueError: they are of another dtype.
        """
        if pixel_values.dtype != torch.uint8:
            raise ValueError(
                f"`pixel_values` is {pixel_values.dtype}, expected torch.uint8. Give the tiles as the collator gives "
                "them with `normalize_on_device`, and once."
            )
        table = torch.from_numpy(pixel_table(self.image_processor, self.images_kwargs))
        table = table.to(pixel_values.device, non_blocking=True)
        channels = zip(table, pixel_values.unbind(dim=1), strict=True)
        return torch.stack([numbers[plane.int()] for numbers, plane in channels], dim=1)

    def _write(self, text: str, num_patches_list: list[int], num_thoughts: NumThoughts, sample: int) -> str:
        """The text with its image runs and its block of thoughts, the given one or its own."""
        before, own, after = split_thought_block(text)
        num_thoughts = own if num_thoughts == OWN else num_thoughts
        if num_thoughts is None:
            return expand_image_tokens(before + after, num_patches_list, self.num_image_token, sample)
        if IMAGE_PLACEHOLDER in after:
            raise ValueError(
                f"Sample {sample}: `text` has {IMAGE_PLACEHOLDER} in the assistant's turn, after its thoughts, which "
                "could not see that image. Put the images into the question."
            )
        before = expand_image_tokens(before, num_patches_list, self.num_image_token, sample)
        _refuse_reserved(after, sample)
        return before + thought_block(num_thoughts) + after

    def _offsets(self, text: str, num_patches_list: list[int], num_thoughts: NumThoughts) -> list[dict[str, Any]]:
        """What [`_write`] replaced, in transformers' form: characters before and after, in order."""
        before, own, after = split_thought_block(text)
        run = len(IMAGE_START_TOKEN + IMAGE_END_TOKEN), len(IMAGE_CONTEXT_TOKEN) * self.num_image_token
        places = zip(re.finditer(re.escape(IMAGE_PLACEHOLDER), text), num_patches_list, strict=True)
        edits = [(*match.span(), run[0] + run[1] * tiles) for match, tiles in places]
        if num_thoughts != OWN:
            length = 0 if num_thoughts is None else len(thought_block(num_thoughts))
            edits.append((len(before), len(text) - len(after), length))
        offsets, shift = [], 0
        for start, end, length in sorted(edits):
            offsets.append({"span": (start, end), "new_span": (start + shift, start + shift + length)})
            shift += length - (end - start)
        return offsets

    def expand_image_tokens(self, text: str | list[str], num_patches_list: Sequence[Any]) -> str | list[str]:
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

    def check_tile_limits(self, images_kwargs: dict[str, Any]) -> None:
        """Raises a `ValueError` if least or most tiles of an image are no counts, or the least exceeds the most."""
        fewest = images_kwargs.get("min_patches", self.image_processor.min_patches)
        most = images_kwargs.get("max_patches", self.image_processor.max_patches)
        for name, value in (("min_patches", fewest), ("max_patches", most)):
            if not is_int(value) or value < 1:
                raise ValueError(
                    f"`{name}` must be an integer of at least 1, got {value!r}. Give the tiles per image."
                )
        if fewest > most:
            raise ValueError(
                f"`min_patches` must not exceed `max_patches`, got {fewest} and {most}. Lower the first or raise the "
                "second."
            )

    def _tokenize(self, prompts: list[str], text_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Ids and mask of the prompts, of which none may be longer than the limit."""
        truncation = text_kwargs.pop("truncation", None) not in (None, False, "do_not_truncate")
        limit, name = text_kwargs.get("max_length"), "`max_length`"
        if text_kwargs.get("padding") not in ("max_length",):
            text_kwargs.pop("max_length", None)
        if limit is None and truncation:
            limit, name = self.tokenizer.model_max_length, "the tokenizer's `model_max_length`"
        if limit is not None:
            lengths = [len(ids) for ids in self.tokenizer(prompts)["input_ids"]]
            for sample, length in enumerate(lengths):
                if length > limit:
                    raise ValueError(
                        f"Sample {sample}: the prompt has {length} tokens, more than {name} {limit}. Nothing is "
                        "truncated, it would cut visual tokens or thoughts: raise the limit, shorten the text, or "
                        "lower `max_patches`."
                    )
        return self.tokenizer(prompts, **{**text_kwargs, "return_attention_mask": True})

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: Any = "auto",
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        sanitize_control_tokens: bool = False,
        *,
        num_thoughts: NumThoughts = OWN,
        **kwargs: Any,
    ) -> Any:
        r"""
        [`~transformers.ProcessorMixin.apply_chat_template`] with InternVL's prompts and their thoughts.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages. Their content is a string with one `<image>` per image, or a list of parts
                `{"type": "image", "image" | "path" | "url": ...}` and `{"type": "text", "text": ...}`.
            num_thoughts (`int`, *optional*):
                Thoughts before the answer, at the start of the assistant's turn: the one that
                `add_generation_prompt=True` opens, or a last message of the assistant. Defaults to the processor's own
                `num_thoughts`; `None` is no block.

        Raises:
            ValueError: as in [`~MultiCoCoProcessor.__call__`], or a part of another type, or thoughts without an
                assistant's turn to put them in, or without `tokenize=True` by a template that does not write them.
        """
        conversations = [conversation] if conversation and isinstance(conversation[0], dict) else conversation
        if not conversations or not all(conversations):
            raise ValueError(f"`conversation` must hold at least one message, got {conversation!r}.")
        for sample, messages in enumerate(conversations):
            self._check_messages(messages, sample)
        processor_kwargs = dict(processor_kwargs or {})
        asked: NumThoughts = processor_kwargs.pop("num_thoughts", OWN) if num_thoughts == OWN else num_thoughts
        wanted = self.num_thoughts if asked == OWN else asked
        if wanted is not None:
            thought_block(wanted)  # checks the number
        has_place = [
            bool(add_generation_prompt) or messages[-1].get("role") == "assistant" for messages in conversations
        ]
        if asked is not None and asked != OWN and not all(has_place):
            raise ValueError(
                f"`num_thoughts` needs `add_generation_prompt=True` or a last message of the assistant, got {asked} "
                f"and neither in sample {has_place.index(False)}: thoughts stand at the start of the assistant's turn."
            )
        template = self._template_text(chat_template) or ""
        if "num_thoughts" in template:
            kwargs["num_thoughts"] = wanted
        kwargs |= {
            "chat_template": chat_template,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        is_asked = asked != OWN or (tokenize and wanted is not None)
        if is_asked and all(has_place) and read_number(template) == OWN:
            self._check_block_of_another(conversation, wanted, tokenize, **kwargs)
            processor_kwargs["num_thoughts"] = wanted
        return super().apply_chat_template(
            conversation,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            tokenize=tokenize,
            return_tensors=return_tensors,
            return_dict=return_dict,
            load_audio_from_video=load_audio_from_video,
            processor_kwargs=processor_kwargs,
            sanitize_control_tokens=sanitize_control_tokens,
            **kwargs,
        )

    def _check_block_of_another(
        self, conversation: Any, num_thoughts: int | None, tokenize: bool, **kwargs: Any
    ) -> None:
        """
        Checks a template of another, which may not write the block: with `tokenize` the processor can, if it finds the
        place.
        """
        texts = super().apply_chat_template(conversation, **kwargs)
        for sample, text in enumerate([texts] if isinstance(texts, str) else texts):
            before, written, _ = split_thought_block(text)
            is_open = kwargs["add_generation_prompt"] or before.endswith(_ASSISTANT_TURN)
            if written != num_thoughts and not (tokenize and is_open):
                raise ValueError(
                    f"Sample {sample}: `num_thoughts` is {num_thoughts}, but `chat_template` writes {written}. Use "
                    "one of `chat_template()`, or pass `num_thoughts` to the processor with the text."
                )

    def _check_messages(self, messages: list[dict[str, Any]], sample: int) -> None:
        for message in messages:
            parts = message.get("content") or []
            for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
                if part.get("type") not in ("text", "image", "image_url"):
                    raise ValueError(
                        f"Sample {sample}: content of type {part.get('type')!r} is not supported, expected 'text' "
                        "or 'image'. Pass frames of a video as images."
                    )
                if part["type"] == "text":
                    _refuse_reserved(part.get("text") or "", sample)

    def _template_text(self, name_or_template: str | None) -> str | None:
        """The template that `apply_chat_template` uses: the own, one of several by name, or the one that is given."""
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        return templates.get(name_or_template or "default", name_or_template)


def plain_processor(processor: MultiCoCoProcessor) -> MultiCoCoProcessor:
    """A copy whose chat template has no code for thoughts, for an exported model that has none."""
    processor = copy.deepcopy(processor)
    processor.num_thoughts = None
    processor.chat_template = plain_chat_template(processor.chat_template)
    return processor


def _on_pillow(image_processor: Any) -> GotOcr2ImageProcessorPil:
    """Our image processor with the settings of the library's, of either back end; a subclass of a user's stays."""
    is_own = isinstance(image_processor, GotOcr2ImageProcessorPil)
    if is_own and type(image_processor) is not GotOcr2ImageProcessorPil:
        return image_processor
    return MultiCoCoImageProcessor.from_dict(image_processor.to_dict())


def _is_nothing(value: object) -> bool:
    """None, or a list that holds nothing else."""
    return value is None or (isinstance(value, (list, tuple)) and all(map(_is_nothing, value)))


def _nest_images(images: Any, texts: Sequence[str]) -> list[list[Any]]:
    """One list of images per text, from whatever form the caller chose."""
    if _is_nothing(images):
        return [[] for _ in texts]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if any(item is None or isinstance(item, (list, tuple)) for item in images):
        if len(images) != len(texts):
            raise ValueError(
                f"`images` has {len(images)} lists for {len(texts)} texts. Give one list per text, an empty one for a "
                "text without images."
            )
        return [list(item) if isinstance(item, (list, tuple)) else [] if item is None else [item] for item in images]
    wanted = [text.count(IMAGE_PLACEHOLDER) for text in texts]
    if sum(wanted) != len(images):
        raise ValueError(
            f"`images` has {len(images)} images, but the texts hold {wanted} {IMAGE_PLACEHOLDER} (per sample). Write "
            f"{IMAGE_PLACEHOLDER} exactly once per image, in the order of the images."
        )
    flat = iter(images)
    return [[next(flat) for _ in range(count)] for count in wanted]


def open_image(
    image: Any, sample: int, index: int, draft: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """
    Any image that transformers understands, as RGB; transparency is dropped as in InternVL, not laid over white.
    A file is opened through `draft`, which may have it decoded smaller.

    Raises:
        ValueError: it cannot be read, or is empty; names it as image `index` of `sample`.
    """
    name = image if isinstance(image, (str, os.PathLike)) else type(image).__name__
    where = f"Sample {sample}, image {index} ({name!s:.200})"
    try:
        is_bytes = isinstance(image, (bytes, bytearray))
        if is_bytes or (isinstance(image, (str, os.PathLike)) and os.path.isfile(image)):
            # `load_image` would turn a photograph by its EXIF, which InternVL does not
            image = Image.open(BytesIO(image) if is_bytes else image)
            image = draft(image) if draft else image
        elif isinstance(image, (str, os.PathLike)):
            image = load_image(os.fspath(image))
        elif not isinstance(image, Image.Image):
            image = to_pil_image(np.asarray(image))
        image.load()
        if image.mode != "RGB" or "transparency" in image.info:
            image = image.convert("RGB")  # a copy
            image.info.pop("transparency", None)  # or the library lays that colour over white
    except UNREADABLE as error:
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
