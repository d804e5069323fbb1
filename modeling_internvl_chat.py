"""InternVL's own interface on transformers' native modules: tiles, `image_flags`, `chat`, and the original's names.

InternVL fuses by overwriting the embeddings of `<IMG_CONTEXT>` with visual features; there is no other fusion path.
This file knows no thoughts: `modeling_multicoco.py` adds them.

Shapes: B batch, T tokens, D hidden size, V vocabulary, N tiles, P visual tokens per tile.
"""

import functools
import os
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import GenerationConfig, InternVLForConditionalGeneration, InternVLModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast, InternVLModelOutputWithPast
from transformers.utils import is_flash_attn_2_available, logging
from transformers.utils.generic import can_return_tuple

from .compat import is_2d, is_sharded, saved_as_registered, world_size
from .configuration_multicoco import (
    CHAT_TEMPLATE,
    HUB_KWARGS,
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    OWN,
    SYSTEM_MESSAGE,
    TURN_END_TOKEN,
    MultiCoCoConfig,
    NumThoughts,
    check_saved_num_thoughts,
    is_int,
)
from .processing_multicoco import expand_image_tokens


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is

Forward = TypeVar("Forward", bound=Callable[..., Any])
# What `forward` of the original program takes by position.
ORIGINAL_ORDER = (
    "pixel_values",
    "input_ids",
    "attention_mask",
    "position_ids",
    "image_flags",
    "past_key_values",
    "labels",
)


def takes_original_order(forward: Forward) -> Forward:
    """
    Lets a `forward` whose first argument is `input_ids` be called by position as the original program's too: there
    `pixel_values` comes first. Ids are integers and pixels are not, so the two cannot be confused.
    """

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_pixels = [isinstance(value, torch.Tensor) and value.is_floating_point() for value in args[:2]]
        is_ids = [isinstance(value, torch.Tensor) and not value.is_floating_point() for value in args[:2]]
        if any(is_pixels[:1]) or any(is_ids[1:]):
            kwargs = {**dict(zip(ORIGINAL_ORDER, args, strict=False)), **kwargs}
            args = ()
        return forward(self, *args, **kwargs)

    return cast(Forward, wrapper)


def as_counts(num_patches_list: Any) -> list[int] | None:
    """
    Tiles of each image of a batch as one list, from a list, a tensor, or either nested by sample (as transformers'
    pipeline makes it, which fills the rows of a tensor up with zeros).
    """
    if isinstance(num_patches_list, torch.Tensor):
        rows = num_patches_list.tolist()
        nested = num_patches_list.dim() > 1
        return [count for row in rows for count in row if count] if nested else rows
    if num_patches_list is None or not any(isinstance(item, (list, tuple, torch.Tensor)) for item in num_patches_list):
        return None if num_patches_list is None else [*num_patches_list]
    rows = [as_counts(row) if isinstance(row, (list, tuple, torch.Tensor)) else [row] for row in num_patches_list]
    return [count for row in rows for count in row or ()]


def _check_image_tokens(
    image_mask: torch.Tensor, num_tiles: int, num_image_token: int, num_patches_list: Sequence[int] | None
) -> None:
    """
    Checks that every sample has exactly the visual tokens that its tiles will fill, before anything is computed.

    Args:
        image_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            Where `<IMG_CONTEXT>` is; on the host.
        num_tiles (`int`): Tiles of the batch.
        num_image_token (`int`): Visual tokens per tile.
        num_patches_list (`Sequence[int]`, *optional*): Tiles of each image of the batch, in order. Without it only the
            totals can be checked, and a swap between samples of equal totals cannot be seen.

    Raises:
        ValueError: naming the sample, both counts, and the cure.
    """
    cure = (
        "Fewer tokens usually means truncation: raise `max_length` or lower `max_patches`. More usually means that "
        f"the text itself contains {IMAGE_CONTEXT_TOKEN}: let the processor place the images."
    )
    counts = image_mask.sum(dim=1).tolist()
    if num_patches_list is None:
        for sample, count in enumerate(counts):
            if count % num_image_token:
                raise ValueError(
                    f"Sample {sample}: `input_ids` holds {count} {IMAGE_CONTEXT_TOKEN} tokens, not a multiple of the "
                    f"{num_image_token} visual features of a tile. {cure}"
                )
        if sum(counts) != num_tiles * num_image_token:
            raise ValueError(
                f"`input_ids` holds {counts} {IMAGE_CONTEXT_TOKEN} tokens (per sample), but the {num_tiles} tiles in "
                f"`pixel_values` give {num_tiles * num_image_token} visual features ({num_image_token} per tile). "
                f"{cure}"
            )
        return
    if not all(isinstance(count, int) and count > 0 for count in num_patches_list):
        raise ValueError(
            f"`num_patches_list` is {num_patches_list}, expected one positive integer for each image of the batch. "
            "Leave out images that are not there."
        )
    if sum(num_patches_list) != num_tiles:
        raise ValueError(
            f"`num_patches_list` {list(num_patches_list)} counts {sum(num_patches_list)} tiles, but `pixel_values` "
            f"has {num_tiles}. Pass both as the processor returned them."
        )
    image = 0
    for sample, row in enumerate(image_mask):
        edges = torch.diff(row.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
        runs = (edges == -1).nonzero().flatten() - (edges == 1).nonzero().flatten()  # length of each run of tokens
        for run in runs.tolist():
            first, filled = image, 0
            while filled < run and image < len(num_patches_list):  # images without a token between them share a run
                filled += num_patches_list[image] * num_image_token
                image += 1
            if filled != run:
                raise ValueError(
                    f"Sample {sample}: `input_ids` holds a run of {run} {IMAGE_CONTEXT_TOKEN} tokens, but its tiles "
                    f"in `num_patches_list` ({list(num_patches_list[first:image])} from image {first} on) give "
                    f"{filled} visual features ({num_image_token} per tile). Order the tiles as the images stand in "
                    f"the batch. {cure}"
                )
    if image != len(num_patches_list):
        raise ValueError(
            f"`num_patches_list` has {len(num_patches_list)} images, but `input_ids` has {IMAGE_CONTEXT_TOKEN} tokens "
            f"for {image}. {cure}"
        )


def check_shapes(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    latent_mask: torch.Tensor | None = None,
    *,
    has_past: bool = False,
) -> None:
    """
    Checks that what goes with the tokens `(B, T)` has their shape; a wrong one could broadcast in silence.

    Raises:
        ValueError: naming the argument, its shape and the expected one.
    """
    batch_size, length = tokens.shape
    for name, tensor, least, most in (
        ("attention_mask", attention_mask if is_2d(attention_mask) else None, length, None if has_past else length),
        ("labels", labels, length, length),
        # of ids it may be that of the prompt alone; of embeddings nothing tells where it would begin
        ("latent_mask", latent_mask, length if tokens.is_floating_point() else 0, length),
    ):
        if tensor is None:
            continue
        if tensor.dim() != 2 or len(tensor) != batch_size or not least <= tensor.shape[1] <= (most or tensor.shape[1]):
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, expected {(batch_size, length)} like `input_ids`. Use "
                "both as one call of the processor or collator made them."
            )


def count_positions(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, length: int
) -> torch.Tensor | None:
    """Positions that count the real tokens of each row; the language model's own default ignores the mask."""
    if position_ids is None and is_2d(attention_mask):
        position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    return position_ids


def _check_pixels(pixel_values: torch.Tensor) -> None:
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` is {pixel_values.dtype}, expected normalised floats. Give them through "
            "`processor.normalize_pixels`, which `StageTrainer` calls, or leave out `normalize_on_device`."
        )


class InternVLChatBackbone(InternVLModel):
    """The native backbone, which also takes dummy tiles and the tiles of each image, and checks them."""

    config: MultiCoCoConfig

    def place_images(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
    ) -> tuple[torch.Tensor | None, list[int] | None]:
        """
        Tiles and the indices of those that are placed (`None`: all), after [`_check_image_tokens`]. A rank without
        images gets a blank tile that is encoded and not placed, so that it calls the tower like the others.

        Raises:
            ValueError: the shape of a tile, the number of flags, or tiles and `<IMG_CONTEXT>` tokens do not match.
        """
        vision = self.config.vision_config
        tile = (vision.num_channels, *vision.image_size)
        tiles, num_tiles = None, 0
        if pixel_values is None:
            if world_size() > 1 and (self.training or is_sharded(self)):
                pixel_values, tiles = torch.zeros((1, *tile), dtype=self.dtype, device=input_ids.device), []
        else:
            _check_pixels(pixel_values)
            if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != tile:
                raise ValueError(
                    f"`pixel_values` has shape {tuple(pixel_values.shape)}, expected (sum of tiles, {tile[0]}, "
                    f"{tile[1]}, {tile[2]}). Concatenate the tiles of all samples along the first axis; they "
                    "are never mixed."
                )
            num_tiles = len(pixel_values)
            if image_flags is not None:
                flags = torch.as_tensor(image_flags).flatten().tolist()
                if len(flags) != num_tiles:
                    raise ValueError(
                        f"`image_flags` has {len(flags)} entries, expected one for each of {num_tiles} tiles in "
                        "`pixel_values`. Give 1 for a tile to place, 0 for a dummy."
                    )
                tiles = [index for index, flag in enumerate(flags) if flag]
                num_tiles = len(tiles)
        image_mask = (input_ids == self.config.image_token_id).cpu()
        _check_image_tokens(image_mask, num_tiles, self.config.num_image_token, as_counts(num_patches_list))
        return pixel_values, tiles

    def get_image_features(self, pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """[`~transformers.InternVLModel.get_image_features`], which would take bytes for normalised values."""
        _check_pixels(pixel_values)
        return super().get_image_features(pixel_values, *args, **kwargs)

    def fuse(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        tiles: Sequence[int] | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **vision_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Token embeddings with visual features at the `<IMG_CONTEXT>` positions: InternVL's whole fusion.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Ids.
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, 3, height, width)`, *optional*): Tiles.
            tiles (`Sequence[int]`, *optional*): Those that are placed; all by default. The others are encoded too, so
                that a rank without images calls the vision tower like the others, and count nothing.
            mm_encoder_outputs (`dict`, *optional*): Features computed before, under `"image"`, as in `generate`.
            vision_kwargs: `vision_feature_layer` and `vision_feature_select_strategy`, as in the native model.

        Returns:
            The embeddings `(batch_size, sequence_length, hidden_size)`, and the features `(num_tiles, P, hidden_size)`
            that were placed, or `None`.
        """
        inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, return_dict=True, **vision_kwargs).pooler_output
        elif mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            features = mm_encoder_outputs["image"].pooler_output
        else:
            return inputs_embeds, None
        features = features.to(inputs_embeds)  # (N, P, D)
        if tiles is not None:
            inputs_embeds = inputs_embeds + 0.0 * features.sum()
            features = features[torch.tensor(tiles, dtype=torch.long, device=features.device)]
        image_mask = (input_ids == self.config.image_token_id)[..., None]  # (B, T, 1)
        if mm_encoder_outputs and int(image_mask.sum()) != features.shape[:-1].numel():  # tiles were counted before
            raise ValueError(
                f"`mm_encoder_outputs` holds {features.shape[:-1].numel()} visual features, but `input_ids` has "
                f"{int(image_mask.sum())} {IMAGE_CONTEXT_TOKEN} tokens. Give the features of exactly these images."
            )
        return inputs_embeds.masked_scatter(image_mask, features), features

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | InternVLModelOutputWithPast:
        """[`~transformers.InternVLModel.forward`]; arguments and errors as in [`InternVLChatModel.forward`]."""
        embeds: Any = inputs_embeds
        features = None
        if input_ids is not None:
            tiles = None
            if (past_key_values is None or input_ids.shape[1] > 1) and mm_encoder_outputs is None:
                pixel_values, tiles = self.place_images(input_ids, pixel_values, image_flags, num_patches_list)
            embeds, features = self.fuse(
                input_ids,
                pixel_values,
                tiles,
                mm_encoder_outputs,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
            )
        outputs = super().forward(
            attention_mask=attention_mask,
            position_ids=count_positions(position_ids, attention_mask, embeds.shape[1]),
            past_key_values=past_key_values,
            inputs_embeds=embeds,
            return_dict=True,
            **kwargs,
        )
        outputs["image_hidden_states"] = features
        return outputs


class InternVLChatModel(InternVLForConditionalGeneration):
    """
    The interface of the original `InternVLChatModel` on transformers' native modules.

    `pixel_values` is flat, `(sum of tiles, 3, height, width)`: every tile is encoded by itself, and the features fill
    the `<IMG_CONTEXT>` positions sample after sample.
    """

    config: MultiCoCoConfig
    backbone_class: type[InternVLChatBackbone] = InternVLChatBackbone
    model: InternVLChatBackbone

    def __init__(self, config: MultiCoCoConfig) -> None:
        super(InternVLForConditionalGeneration, self).__init__(config)  # the native one would make its own backbone
        self.model = self.backbone_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        use_flash_attn: bool = False,
        load_in_8bit: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Loads a checkpoint of our own, of transformers (`-hf`) or of the original program, from a folder or the Hub.
        Names and configuration are translated; no remote code is run. See [`~transformers.PreTrainedModel`].

        Args:
            use_flash_attn (`bool`, defaults to `False`): The original's switch: flash attention where it is installed
                and `attn_implementation` says nothing else.
            load_in_8bit (`bool`, defaults to `False`): Refused; `quantization_config` is its successor.
            device_map: As in transformers; the original's names of modules are understood too.

        Raises:
            ValueError: `load_in_8bit`, or model and processor of the folder disagree about the number of thoughts.
        """
        if load_in_8bit:
            raise ValueError(
                "`load_in_8bit` is True, which transformers no longer takes. Pass `quantization_config="
                "BitsAndBytesConfig(load_in_8bit=True)`."
            )
        if use_flash_attn and kwargs.get("attn_implementation") is None:
            if is_flash_attn_2_available():
                kwargs["attn_implementation"] = "flash_attention_2"
            else:
                logger.warning_once("`use_flash_attn` is True, but flash-attn is not installed: sdpa is used.")
        if isinstance(kwargs.get("device_map"), dict):
            kwargs["device_map"] = translate_device_map(kwargs["device_map"])
        if pretrained_model_name_or_path is not None and not {"config", "num_thoughts"} & kwargs.keys():
            hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
            check_saved_num_thoughts(pretrained_model_name_or_path, **hub_kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.lm_head.weight is not model.get_input_embeddings().weight:
            model.config.tie_word_embeddings = False  # the native default, True, is also that of `-hf` files
        if model.config.num_thoughts and cls.backbone_class is InternVLChatBackbone:
            logger.warning_once(
                f"{pretrained_model_name_or_path} was trained with {model.config.num_thoughts} thoughts, which "
                f"{cls.__name__} does not feed. Load it by `MultiCoCoForConditionalGeneration`."
            )
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Saves native parameter names and the code files, so that every auto class loads the folder."""
        kwargs.setdefault("save_original_format", False)
        with saved_as_registered(self, save_directory) as known:
            reference = f"{known.__module__.rsplit('.', 1)[-1]}.{known.__name__}"
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                "AutoConfig": "configuration_multicoco.MultiCoCoConfig",
                "AutoProcessor": "processing_multicoco.MultiCoCoProcessor",
                **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"), reference),
            }
            super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def num_image_token(self) -> int:
        """Visual tokens that one tile becomes."""
        return self.config.num_image_token

    @property
    def img_context_token_id(self) -> int:
        """Id of `<IMG_CONTEXT>`; the original's clients set it from their tokenizer."""
        return self.config.image_token_id

    @img_context_token_id.setter
    def img_context_token_id(self, token_id: int) -> None:
        if not is_int(token_id):
            raise ValueError(
                f"`img_context_token_id` is {token_id!r}, expected an id. Give "
                f"`tokenizer.convert_tokens_to_ids({IMAGE_CONTEXT_TOKEN!r})`."
            )
        self.config.image_token_id = token_id

    @property
    def system_message(self) -> str:
        """System message of `chat` and `batch_chat`; can be assigned, and what is assigned is not saved."""
        assigned = getattr(self, "_system_message", None)
        return assigned if assigned is not None else self.config.system_message or SYSTEM_MESSAGE

    @system_message.setter
    def system_message(self, message: str) -> None:
        self._system_message = message

    @property
    def template(self) -> str:
        """The original's name of the prompts, of which the InternVL2.5 and InternVL3 families have one kind."""
        return "internvl2_5"

    @property
    def conv_template(self) -> SimpleNamespace:
        """Of the original's conversation template what its clients read: the end of a turn, the system message."""
        return SimpleNamespace(sep=f"{TURN_END_TOKEN}\n", system_message=self.system_message)

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Visual tokens `(N, P, D)` of tiles `(N, 3, height, width)`, in the language model's width."""
        return self.get_image_features(pixel_values, return_dict=True).pooler_output

    def fuse(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Token embeddings `(B, T, D)` with visual features in their places; see [`InternVLChatBackbone.fuse`]."""
        return self.model.fuse(input_ids, pixel_values, **kwargs)[0]

    @takes_original_order
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | InternVLCausalLMOutputWithPast:
        r"""
        [`~transformers.InternVLForConditionalGeneration.forward`] with InternVL's own arguments. By position it takes
        transformers' order, or that of the original program, which begins with `pixel_values`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, 3, height, width)`, *optional*):
                Tiles of all images of the batch, in order.
            image_flags (`torch.Tensor` of shape `(num_tiles,)` or `(num_tiles, 1)`, *optional*):
                0 marks a dummy tile, which is encoded and then left out.
            num_patches_list (`Sequence[int]`, *optional*):
                Tiles of each image (without dummies); makes the check of tiles and tokens exact per sample.

        Raises:
            ValueError: tiles and `<IMG_CONTEXT>` tokens do not match.
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            image_flags=image_flags,
            num_patches_list=num_patches_list,
            **kwargs,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the base's own arguments by keyword only
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        [`~transformers.GenerationMixin.generate`], after the same checks of tiles and tokens as in `forward`. Returns
        the prompt and the new tokens, as transformers does.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None and kwargs.get("mm_encoder_outputs") is None:
            pixel_values, tiles = self.model.place_images(input_ids, pixel_values, image_flags, num_patches_list)
            if pixel_values is not None and tiles is not None:
                if not tiles:
                    self.extract_feature(pixel_values)  # only so that all ranks call the vision tower equally often
                pixel_values = pixel_values[torch.tensor(tiles, dtype=torch.long)] if tiles else None
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        return super().generate(inputs, generation_config, **kwargs)  # type: ignore[misc]  # its own kind of `self`

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = IMAGE_START_TOKEN,
        IMG_END_TOKEN: str = IMAGE_END_TOKEN,
        IMG_CONTEXT_TOKEN: str = IMAGE_CONTEXT_TOKEN,
        verbose: bool = False,
        *,
        num_thoughts: NumThoughts = OWN,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        r"""
        One turn of a conversation, as in the original program.

        Args:
            tokenizer ([`PreTrainedTokenizerBase`]): Tokenizer of the checkpoint.
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, 3, height, width)`, *optional*):
                Tiles of all images of the conversation.
            question (`str`): The question; without `<image>` and history, the images stand before it.
            generation_config ([`GenerationConfig`] or `dict`, *optional*):
                Any generation settings. The turn always ends at `<|im_end|>`.
            history (`list[tuple[str, str]]`, *optional*): Earlier questions (with their `<image>`) and answers.
            return_history (`bool`, defaults to `False`): Also return the history with this turn.
            num_patches_list (`Sequence[int]`, *optional*): Tiles of each image; one image by default.
            IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN (`str`): What an image is written with.
            verbose (`bool`, defaults to `False`): Write question and answer to the log.
            num_thoughts (`int`, *optional*): Thoughts before the answer; by default what the checkpoint was
                trained with. `None`: no block.

        Returns:
            `str`, or `tuple[str, list[tuple[str, str]]]` with `return_history`.

        Raises:
            ValueError: images, tiles and `<image>` do not match, or the question holds a reserved token.
        """
        if history is None and pixel_values is not None and IMAGE_PLACEHOLDER not in question:
            question = f"{IMAGE_PLACEHOLDER}\n{question}"
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        messages = []
        for past_question, past_answer in history or []:
            messages.append({"role": "user", "content": past_question})
            messages.append({"role": "assistant", "content": past_answer})
        messages.append({"role": "user", "content": question})
        image_tokens = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)
        counts = as_counts(num_patches_list) or []
        prompts = self._chat_prompts(tokenizer, [messages], counts, image_tokens, num_thoughts)
        response = self._answer(tokenizer, prompts, pixel_values, num_patches_list, generation_config)[0]
        if verbose:
            logger.warning(f"{question}\n{response}")  # a level that is seen: the caller asked for it
        history = [*(history or []), (question, response)]
        return (response, history) if return_history else response

    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: torch.Tensor | None,
        questions: list[str],
        generation_config: GenerationConfig | dict[str, Any] | None = None,
        num_patches_list: Sequence[int] | None = None,
        history: None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = IMAGE_START_TOKEN,
        IMG_END_TOKEN: str = IMAGE_END_TOKEN,
        IMG_CONTEXT_TOKEN: str = IMAGE_CONTEXT_TOKEN,
        verbose: bool = False,
        image_counts: Sequence[int] | None = None,
        *,
        num_thoughts: NumThoughts = OWN,
    ) -> list[str]:
        """
        Answers of a batch of questions; see [`~InternVLChatModel.chat`]. With `pixel_values`, a question without
        `<image>` gets one before it, and `num_patches_list` (one tile for each image by default) goes by the order
        of all `<image>`. `image_counts` is its old name. As in the original, there is no history.
        """
        if not questions:
            raise ValueError("`questions` is empty, expected at least one question. Do not call it without any.")
        if history is not None or return_history:
            raise ValueError("`history` and `return_history` are not supported by `batch_chat`. Use `chat`.")
        if image_counts is not None:
            if num_patches_list is not None:
                raise ValueError("`image_counts` is the old name of `num_patches_list`. Give only the latter.")
            num_patches_list = image_counts
        if pixel_values is not None:
            questions = [item if IMAGE_PLACEHOLDER in item else f"{IMAGE_PLACEHOLDER}\n{item}" for item in questions]
            if num_patches_list is None:
                num_patches_list = [1] * len(pixel_values)
        conversations = [[{"role": "user", "content": question}] for question in questions]
        image_tokens = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)
        counts = as_counts(num_patches_list) or []
        prompts = self._chat_prompts(tokenizer, conversations, counts, image_tokens, num_thoughts)
        answers = self._answer(tokenizer, prompts, pixel_values, num_patches_list, generation_config)
        if verbose:
            logger.warning(
                "\n".join(f"{question}\n{answer}" for question, answer in zip(questions, answers, strict=True))
            )
        return answers

    def _chat_prompts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: list[list[dict[str, str]]],
        num_patches_list: list[int],
        image_tokens: tuple[str, str, str],
        num_thoughts: NumThoughts,
    ) -> list[str]:
        """
        The texts of conversations with their image runs, each written as the three `image_tokens`, and their block.

        By the constant template: the tokenizer may be the original's, whose template is another, and the system
        message is the model's own, which can be assigned.
        """
        image_token_id = tokenizer.convert_tokens_to_ids(image_tokens[1])
        if image_token_id != self.config.image_token_id:
            raise ValueError(
                f"`config.image_token_id` is {self.config.image_token_id}, but `tokenizer` gives "
                f"{image_tokens[1]} the id {image_token_id}. Use the tokenizer of the checkpoint."
            )
        block = self._thought_block(num_thoughts)
        prompts, first = [], 0
        for sample, messages in enumerate(conversations):
            prompt: Any = tokenizer.apply_chat_template(
                [{"role": "system", "content": self.system_message}, *messages],
                chat_template=CHAT_TEMPLATE,
                num_thoughts=None,
                add_generation_prompt=True,
                tokenize=False,
            )
            last = first + prompt.count(IMAGE_PLACEHOLDER)
            if sample == len(conversations) - 1:
                last = max(last, len(num_patches_list))  # a surplus of images is an error of the last sample
            prompt = expand_image_tokens(prompt, num_patches_list[first:last], self.num_image_token, sample)
            for written, wanted in zip(
                (IMAGE_START_TOKEN, IMAGE_CONTEXT_TOKEN, IMAGE_END_TOKEN), image_tokens, strict=True
            ):
                prompt = prompt.replace(written, wanted)  # users cannot have written it: that was refused
            prompts.append(prompt + block)
            first = last
        return prompts

    def _thought_block(self, num_thoughts: NumThoughts) -> str:
        if num_thoughts not in (None, OWN):
            raise ValueError(
                "`num_thoughts` needs a `MultiCoCoForConditionalGeneration`; an InternVL has no thoughts."
            )
        return ""

    def _answer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[str],
        pixel_values: torch.Tensor | None,
        num_patches_list: Sequence[int] | None,
        generation_config: GenerationConfig | dict[str, Any] | None,
    ) -> list[str]:
        """What a batch of prompts is answered, without the special tokens."""
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(self.device)
        if pixel_values is not None:
            _check_pixels(pixel_values)
            inputs["pixel_values"] = pixel_values.to(self.device, self.dtype)
            inputs["num_patches_list"] = num_patches_list
        settings = {
            "eos_token_id": tokenizer.convert_tokens_to_ids(TURN_END_TOKEN),
            "pad_token_id": tokenizer.pad_token_id,
        }
        if isinstance(generation_config, dict):
            settings = {**generation_config, **settings}
            generation_config = None
        output = self.generate(**inputs, generation_config=generation_config, **settings)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


# The original's modules -> native ones, for a `device_map` as its model cards make it.
MODULE_NAMES = {
    r"^vision_model": "model.vision_tower",
    r"^mlp1": "model.multi_modal_projector",
    r"^language_model\.(lm_head|output)": "lm_head",
    r"^language_model\.model\.tok_embeddings": "model.language_model.embed_tokens",
    r"^language_model\.model": "model.language_model",
}


def translate_device_map(device_map: dict[str, Any]) -> dict[str, Any]:
    """A `device_map` with native names of modules; names that are native already stay as they are."""
    translated: dict[str, Any] = {}
    for name, device in device_map.items():
        if name == "language_model":
            translated |= {"model.language_model": device, "lm_head": device}
            continue
        for pattern, native in MODULE_NAMES.items():
            name = re.sub(pattern, native, name)
        translated[name] = device
    return translated


# Names of original and `-hf` checkpoints -> native names. Checked tensor by tensor in `tests/`.
CHECKPOINT_NAMES = {
    r"^vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.cls_token",
    r"^vision_model.embeddings.position_embedding": "model.vision_tower.embeddings.position_embeddings",
    r"^vision_model.embeddings.patch_embedding": "model.vision_tower.embeddings.patch_embeddings.projection",
    r"^vision_model.encoder.layers": "model.vision_tower.encoder.layer",
    r"\.attn\.proj": ".attention.projection_layer",
    r"\.attn\.q_norm": ".attention.q_norm",
    r"\.attn\.k_norm": ".attention.k_norm",
    r"\.norm1": ".layernorm_before",
    r"\.norm2": ".layernorm_after",
    r"\.ls1": ".lambda_1",
    r"\.ls2": ".lambda_2",
    r"^mlp1\.0": "model.multi_modal_projector.layer_norm",
    r"^mlp1\.1": "model.multi_modal_projector.linear_1",
    r"^mlp1\.3": "model.multi_modal_projector.linear_2",
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model.language_model",
    r"^vision_tower": "model.vision_tower",
    r"^multi_modal_projector": "model.multi_modal_projector",
}


def register_checkpoint_names(model_class: type[InternVLChatModel]) -> None:
    """Lets `from_pretrained` of a class read files with original and `-hf` names."""
    names: list[WeightRenaming | WeightConverter] = [
        WeightRenaming(source, target) for source, target in CHECKPOINT_NAMES.items()
    ]
    names += [
        WeightConverter(  # rows of q, k and v, in this order
            f".attn.qkv.{kind}", [f".attention.{part}_proj.{kind}" for part in "qkv"], operations=[Chunk(dim=0)]
        )
        for kind in ("weight", "bias")
    ]
    register_checkpoint_conversion_mapping(model_class.__name__, names, overwrite=True)


register_checkpoint_names(InternVLChatModel)
InternVLChatModel.register_for_auto_class("AutoModel")
