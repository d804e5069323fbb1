"""Chain of Continuous Thought (Coconut, arXiv 2412.06769) on transformers' native InternVL.

The method: at a `<|latent|>` position the input embedding is not that of the token but the *thought*: the last hidden
state, after the final norm, of the position before it. It enters as it is (no projection, no scaling, no detach).

    Looking at <img> ... </img>, how many? <|start-latent|> <|latent|> <|latent|> <|end-latent|> ### 3
                                                         `--thought--^ `thought--^

One position needs the state of another, so a sequence is cut before each latent column and run chunk by chunk with a
key/value cache. With the thoughts of all rows aligned, `n` thoughts take `n + 1` passes and the sum of their tokens is
that of one plain forward. Gradients flow through every thought and through the cache.

InternVL fuses by overwriting the embeddings of `<IMG_CONTEXT>` with visual features; there is no other fusion path,
so passes over these embeddings, with a cache, see the image all the time.

Shapes: B batch, T tokens, D hidden size, V vocabulary, N tiles, P visual tokens per tile.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_multicoco import (
    END_LATENT_TOKEN,
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    LATENT_TOKEN,
    START_LATENT_TOKEN,
    MultiCoCoConfig,
)
from .processing_multicoco import (
    CHAT_TEMPLATE,
    IMAGE_PLACEHOLDER,
    expand_image_tokens,
    prepare_tokenizer,
    thought_block,
)


logger = logging.get_logger(__name__)

ANSWER_SEES = ("all", "no_image", "thoughts_only")


@dataclass
class MultiCoCoOutputWithPast(InternVLCausalLMOutputWithPast):
    r"""
    Output of [`MultiCoCoForConditionalGeneration`].

    loss (`torch.FloatTensor` of shape `(1,)`, *optional*): returned with `labels`.
    logits (`torch.FloatTensor` of shape `(batch_size, kept, vocab_size)`, *optional*):
        `None` in training with `labels`, unless `logits_to_keep` asks for them: over a long image prefix they would be
        the largest tensor of the step, and only the labelled positions are needed.
    thoughts (`torch.FloatTensor` of shape `(batch_size, num_thoughts, hidden_size)`, *optional*):
        What was fed at the latent positions, with `return_thoughts=True`; zeros after the last thought of a row.
    """

    thoughts: torch.FloatTensor | None = None


class PassLayer(DynamicLayer):
    """Keys and values of one layer in one pass: reads those of earlier passes, and only *sets* its own."""

    def __init__(self, past: tuple = ()):
        super().__init__()
        self.past = past  # ((keys, values), ...) of earlier passes, each (B, kv_heads, chunk, head_dim)
        self.own = None

    def update(self, key_states, value_states, *args, **kwargs):
        if self.own is None:  # the forward; a replay in the backward computes the same and only reads
            self.own = (key_states, value_states)
        if not self.past:
            return key_states, value_states
        keys, values = zip(*self.past, (key_states, value_states), strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self):
        return sum(keys.shape[-2] for keys, _ in self.past)


class PassCache(Cache):
    """
    The cache of one training pass, which activation checkpointing may replay.

    A growing cache would append a second time when the backward pass recomputes a layer. Here each pass gets a cache
    of its own that reads a frozen past, so the replay sees what the forward saw. The joined keys are not kept.
    """

    def __init__(self, num_layers: int, previous: "PassCache | None" = None):
        if previous is None:
            super().__init__(layers=[PassLayer() for _ in range(num_layers)])
        else:
            super().__init__(layers=[PassLayer((*layer.past, layer.own)) for layer in previous.layers])


def check_images(
    image_mask: torch.BoolTensor, num_tiles: int, num_image_token: int, num_patches_list: Sequence[int] | None
):
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
            "Leave out images that are not there, and do not nest it by sample."
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


def check_shapes(tokens, has_past: bool, attention_mask, labels, latent_mask):
    """
    Checks that what goes with the tokens `(B, T)` has their shape; a wrong one could broadcast in silence.

    Raises:
        ValueError: naming the argument, its shape and the expected one.
    """
    batch_size, length = tokens.shape
    for name, tensor, least, most in (
        ("attention_mask", attention_mask if _is_2d(attention_mask) else None, length, None if has_past else length),
        ("labels", labels, length, length),
        ("latent_mask", latent_mask, 0, length),
    ):
        if tensor is None:
            continue
        if tensor.dim() != 2 or len(tensor) != batch_size or not least <= tensor.shape[1] <= (most or tensor.shape[1]):
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, expected {(batch_size, length)} like `input_ids`. Use "
                "both as one call of the processor or collator made them."
            )


def check_thoughts(latent_mask: torch.BoolTensor, attention_mask: torch.Tensor | None, image_mask: torch.BoolTensor):
    """
    Checks that every thought has a state before it and comes after the images of its sample. All tensors on the host.

    Raises:
        ValueError: naming the sample and the position.
    """
    if not latent_mask.any():
        return
    real = torch.ones_like(latent_mask) if attention_mask is None else attention_mask.bool()
    has_previous = torch.zeros_like(latent_mask)
    has_previous[:, 1:] = real[:, :-1] & real[:, 1:]
    later_image = image_mask.flip(1).cumsum(1).flip(1) > 0
    for wrong, reason in (
        (latent_mask & ~real, "stands in the padding. Give `attention_mask` 1 there, or pad with another token."),
        (
            latent_mask & ~has_previous,
            "is the first token of its sample, so there is no state to feed. Put text first.",
        ),
        (latent_mask & later_image, "stands before or inside an image. Put all images before the thoughts."),
    ):
        if wrong.any():
            sample, position = wrong.nonzero()[0].tolist()
            raise ValueError(f"Sample {sample}: {LATENT_TOKEN} at position {position} of `input_ids` {reason}")


class InternVLChatModel(InternVLForConditionalGeneration):
    """
    The interface of the original `InternVLChatModel` on transformers' native modules.

    `pixel_values` is flat, `(sum of tiles, 3, height, width)`: every tile is encoded by itself, and the features fill
    the `<IMG_CONTEXT>` positions sample after sample.
    """

    config_class = MultiCoCoConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        Loads a checkpoint of our own, of transformers (`-hf`) or of the original program, from a folder or the Hub.
        Names and configuration are translated; no remote code is run. See [`~transformers.PreTrainedModel`].
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.lm_head.weight is not model.get_input_embeddings().weight:
            model.config.tie_word_embeddings = False  # the native default, True, is also that of `-hf` files
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves native parameter names and the code files, so that every auto class loads the folder."""
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def num_image_token(self) -> int:
        return self.config.num_image_token

    @property
    def img_context_token_id(self) -> int:
        return self.config.image_token_id

    def extract_feature(self, pixel_values: torch.FloatTensor) -> torch.FloatTensor:
        """Visual tokens `(N, P, D)` of tiles `(N, 3, height, width)`, in the language model's width."""
        return self.get_image_features(pixel_values, return_dict=True).pooler_output

    def fuse(self, input_ids, pixel_values=None, tiles=None, mm_encoder_outputs=None) -> torch.FloatTensor:
        """
        Token embeddings `(B, T, D)` with visual features at the `<IMG_CONTEXT>` positions: InternVL's whole fusion.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Ids.
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, 3, height, width)`, *optional*): Tiles.
            tiles (`Sequence[int]`, *optional*): Those that are placed; all by default. The others are encoded too, so
                that a rank without images calls the vision tower like the others, and count nothing.
            mm_encoder_outputs (`dict`, *optional*): Features computed before, under `"image"`, as in `generate`.
        """
        inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        if pixel_values is not None:
            features = self.extract_feature(pixel_values)  # (N, P, D)
        elif mm_encoder_outputs:
            features = mm_encoder_outputs["image"].pooler_output
        else:
            return inputs_embeds
        if tiles is not None:
            inputs_embeds = inputs_embeds + 0.0 * features.sum()
            features = features[torch.tensor(tiles, dtype=torch.long, device=features.device)]
        image_mask = (input_ids == self.config.image_token_id)[..., None]  # (B, T, 1)
        return inputs_embeds.masked_scatter(image_mask, features.to(inputs_embeds))

    def _check_images(self, input_ids, pixel_values, image_flags, num_patches_list):
        """[`check_images`], and the tiles to place (`None`: all). Gives a rank without images its blank tile."""
        tiles = None
        if pixel_values is None:
            if _world_size() > 1 and (self.training or _is_sharded(self)):
                vision = self.config.vision_config
                shape = (1, vision.num_channels, *vision.image_size)
                pixel_values, tiles = torch.zeros(shape, dtype=self.dtype, device=input_ids.device), []
            num_tiles = 0
        else:
            vision = self.config.vision_config
            tile = (vision.num_channels, *vision.image_size)
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
        check_images(image_mask, num_tiles, self.num_image_token, _as_list(num_patches_list))
        return pixel_values, tiles

    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> tuple | InternVLCausalLMOutputWithPast:
        r"""
        One plain forward: [`~transformers.InternVLForConditionalGeneration.forward`] with InternVL's own arguments.

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
        if input_ids is not None:
            tiles = None
            if (past_key_values is None or input_ids.shape[1] > 1) and mm_encoder_outputs is None:
                pixel_values, tiles = self._check_images(input_ids, pixel_values, image_flags, num_patches_list)
            inputs_embeds = self.fuse(input_ids, pixel_values, tiles, mm_encoder_outputs)
        return super().forward(
            attention_mask=attention_mask,
            position_ids=_positions(position_ids, attention_mask, inputs_embeds.shape[1]),
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        pixel_values: torch.FloatTensor | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        **kwargs,
    ):
        """
        [`~transformers.GenerationMixin.generate`], after the same checks of tiles and tokens as in `forward`. Returns
        the prompt and the new tokens, as transformers does.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None and kwargs.get("mm_encoder_outputs") is None:
            pixel_values, tiles = self._check_images(input_ids, pixel_values, image_flags, num_patches_list)
            if tiles is not None:
                if not tiles:
                    self.extract_feature(pixel_values)  # only so that all ranks call the vision tower equally often
                pixel_values = pixel_values[torch.tensor(tiles, dtype=torch.long)] if tiles else None
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        return super().generate(inputs, generation_config, **kwargs)

    def chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: torch.FloatTensor | None,
        question: str,
        generation_config: GenerationConfig | dict | None = None,
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        num_thoughts: int | None = None,
    ):
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
            num_thoughts (`int`, *optional*): Thoughts before the answer; by default what the checkpoint was
                trained with.

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
        prompts = self._chat_prompts(tokenizer, [messages], _as_list(num_patches_list), num_thoughts)
        response = self._answer(tokenizer, prompts, pixel_values, num_patches_list, generation_config)[0]
        history = [*(history or []), (question, response)]
        return (response, history) if return_history else response

    def batch_chat(
        self,
        tokenizer: PreTrainedTokenizerBase,
        pixel_values: torch.FloatTensor | None,
        questions: list[str],
        generation_config: GenerationConfig | dict | None = None,
        num_patches_list: Sequence[int] | None = None,
        num_thoughts: int | None = None,
    ) -> list[str]:
        """
        Answers of a batch of questions; see [`~InternVLChatModel.chat`]. With `pixel_values`, a question without
        `<image>` gets one before it, and `num_patches_list` (one tile for each image by default) goes by the order
        of all `<image>`.
        """
        if not questions:
            raise ValueError("`questions` is empty, expected at least one question. Do not call it without any.")
        if pixel_values is not None:
            questions = [item if IMAGE_PLACEHOLDER in item else f"{IMAGE_PLACEHOLDER}\n{item}" for item in questions]
            if num_patches_list is None:
                num_patches_list = [1] * len(pixel_values)
        conversations = [[{"role": "user", "content": question}] for question in questions]
        prompts = self._chat_prompts(tokenizer, conversations, _as_list(num_patches_list) or [], num_thoughts)
        return self._answer(tokenizer, prompts, pixel_values, num_patches_list, generation_config)

    def _chat_prompts(self, tokenizer, conversations, num_patches_list, num_thoughts) -> list[str]:
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN)
        if image_token_id != self.config.image_token_id:
            raise ValueError(
                f"`config.image_token_id` is {self.config.image_token_id}, but `tokenizer` gives "
                f"{IMAGE_CONTEXT_TOKEN} the id {image_token_id}. Use the tokenizer of the checkpoint."
            )
        block = self._thought_block(num_thoughts)
        prompts, first = [], 0
        for sample, messages in enumerate(conversations):
            prompt = tokenizer.apply_chat_template(
                messages,
                chat_template=CHAT_TEMPLATE,
                system_message=self.config.system_message,
                add_generation_prompt=True,
                tokenize=False,
            )
            last = first + prompt.count(IMAGE_PLACEHOLDER)
            if sample == len(conversations) - 1:
                last = max(last, len(num_patches_list))  # a surplus of images is an error of the last sample
            prompts.append(
                expand_image_tokens(prompt, num_patches_list[first:last], self.num_image_token, sample) + block
            )
            first = last
        return prompts

    def _thought_block(self, num_thoughts: int | None) -> str:
        if num_thoughts is not None:
            raise ValueError(
                "`num_thoughts` needs a `MultiCoCoForConditionalGeneration`; an InternVL has no thoughts."
            )
        return ""

    def _answer(self, tokenizer, prompts, pixel_values, num_patches_list, generation_config) -> list[str]:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(self.device)
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values.to(self.device, self.dtype)
            inputs["num_patches_list"] = num_patches_list
        settings = {
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
        }
        if isinstance(generation_config, dict):
            settings = {**generation_config, **settings}
            generation_config = None
        output = self.generate(**inputs, generation_config=generation_config, **settings)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]


class MultiCoCoForConditionalGeneration(InternVLChatModel):
    r"""
    InternVL that thinks in continuous thoughts.

    Example:

    ```python
    >>> from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor, add_thought_tokens

    >>> name = "OpenGVLab/InternVL3-1B"  # or "-hf", or a checkpoint of our own
    >>> processor = MultiCoCoProcessor.from_pretrained(name)  # doctest: +SKIP
    >>> model = MultiCoCoForConditionalGeneration.from_pretrained(name, dtype="auto")  # doctest: +SKIP
    >>> add_thought_tokens(model, processor.tokenizer)  # doctest: +SKIP
    ```"""

    def __init__(self, config: MultiCoCoConfig):
        super().__init__(config)
        for layer in self.model.language_model.layers:
            layer._can_checkpoint_with_cache = True  # `forward` gives checkpointed layers a `PassCache` or no cache

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        latent_mask: torch.BoolTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        return_thoughts: bool = False,
        edit_thoughts: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        answer_sees: str = "all",
        **kwargs,
    ) -> tuple | MultiCoCoOutputWithPast:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, 3, height, width)`, *optional*):
                Tiles of all images of the batch, in order.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for real tokens. Padding may stand on either side.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Defaults to counting the real tokens of each row.
            image_flags (`torch.Tensor` of shape `(num_tiles,)` or `(num_tiles, 1)`, *optional*):
                0 marks a dummy tile, which is encoded and then left out.
            num_patches_list (`Sequence[int]`, *optional*):
                Tiles of each image (without dummies); makes the check of tiles and tokens exact per sample.
            latent_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Where thoughts are fed. Defaults to the positions of `<|latent|>` in `input_ids`. If it is shorter than
                `input_ids`, it is that of the prompt, and what follows holds no thought.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, -100 where none is; shifted inside. The loss is the mean over all labels of the batch,
                or their sum over `num_items_in_batch`.
            return_thoughts (`bool`, defaults to `False`): Return what was fed at the latent positions.
            edit_thoughts (`Callable`, *optional*):
                `(thought (batch_size, hidden_size), index) -> thought`, called for every thought inside the loop, so
                that later thoughts and the answer follow from the edited one. It gets all rows; those that do not
                have this thought at this position are ignored, so swap rows only where thoughts are aligned.
            answer_sees (`str`, defaults to `"all"`):
                What positions after the last thought may attend to: `"all"`, `"no_image"`, or `"thoughts_only"`
                (the thoughts, and what comes after them). The thoughts themselves see everything before them.

        Raises:
            ValueError: tiles and `<IMG_CONTEXT>` tokens do not match; a thought that has no state before it, or that
                stands in the padding or before an image; checkpointing that would give wrong gradients.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is not None and (pixel_values is not None or mm_encoder_outputs):
            raise ValueError("With `inputs_embeds`, place the images yourself: `inputs_embeds=model.fuse(...)`.")
        use_cache = self._resolve_cache(use_cache, past_key_values)
        tokens = input_ids if input_ids is not None else inputs_embeds[..., 0]  # (B, T)
        check_shapes(tokens, past_key_values is not None, attention_mask, labels, latent_mask)

        # All that the host must know about the batch is read and checked here, before any compute, and not again.
        columns, numbers, tiles = [], None, None
        if past_key_values is None or tokens.shape[1] > 1 or latent_mask is not None:  # not a step of decoding
            if latent_mask is None:
                latent_mask = self._latent_mask(input_ids)
            if input_ids is not None and mm_encoder_outputs is None:
                pixel_values, tiles = self._check_images(input_ids, pixel_values, image_flags, num_patches_list)
            if latent_mask is not None:
                padded = _pad(latent_mask, tokens.shape[1])
                numbers = self._check_thoughts(input_ids, padded, attention_mask)  # (B, T), on the host
                if self.config.mode != "pause" or edit_thoughts is not None or return_thoughts:
                    columns = numbers.any(dim=0).nonzero().flatten().tolist()
                if columns and attention_mask is not None and not _is_2d(attention_mask):
                    raise ValueError("`attention_mask` must be (batch_size, sequence_length) when there are thoughts.")
        if labels is not None:
            labelled = [index.to(tokens.device) for index in (labels[:, 1:].cpu() != -100).nonzero(as_tuple=True)]
            if len(labelled[0]) == 0 and kwargs.get("num_items_in_batch") is None:
                raise ValueError("`labels` are all -100, so there is no loss. Give at least one position a label.")
        if answer_sees != "all" and past_key_values is not None and int(past_key_values.get_seq_length()) > 0:
            raise ValueError(
                f"`answer_sees={answer_sees!r}` cannot continue `past_key_values`: which of its positions are to be "
                "hidden is not known. Pass the whole sequence and no cache."
            )
        visible = self._visibility(answer_sees, input_ids, latent_mask) if answer_sees != "all" else None
        position_ids = _positions(position_ids, attention_mask, tokens.shape[1])
        if columns and _is_2d(attention_mask) and attention_mask.all():
            attention_mask = None  # without padding the passes use kernels that take no mask

        if inputs_embeds is None:
            inputs_embeds = self.fuse(input_ids, pixel_values, tiles, mm_encoder_outputs)  # (B, T, D)
        with _settled_rotary(self.model.language_model, position_ids if columns else None):
            hidden_states, outputs, thoughts = self._think(
                inputs_embeds,
                columns=columns,
                numbers=numbers,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                edit_thoughts=edit_thoughts,
                visible=visible,
                **kwargs,
            )

        loss = logits = None
        if labels is not None:  # logits only where there is a label: (labels, V)
            rows, positions = labelled
            loss = self.loss_function(
                logits=self.lm_head(hidden_states[rows, positions]),
                labels=None,
                shift_labels=labels[rows, positions + 1],
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        if labels is None or not self.training or not isinstance(logits_to_keep, int) or logits_to_keep:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return MultiCoCoOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs[-1].past_key_values,
            hidden_states=_join_hidden_states(outputs),
            attentions=_join_attentions(outputs),
            thoughts=thoughts if return_thoughts else None,
        )

    def _think(
        self,
        inputs_embeds,
        columns,
        numbers,
        attention_mask,
        position_ids,
        past_key_values,
        use_cache,
        edit_thoughts,
        visible,
        **kwargs,
    ):
        """
        The passes. `columns` are the positions that hold a thought in any row; `numbers` (B, T), on the host, holds 1
        at the first thought of a row, 2 at its second and so on, 0 elsewhere.

        Returns the last hidden states (B, T, D), the output of each pass, and the thoughts (B, num_thoughts, D).
        """
        language_model = self.model.language_model
        batch_size, length, hidden_size = inputs_embeds.shape
        num_thoughts = int(numbers.max()) if columns else 0
        thoughts = [inputs_embeds.new_zeros(batch_size, hidden_size)] * num_thoughts
        if columns:
            device_numbers = numbers.to(inputs_embeds.device, non_blocking=True)
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=language_model.config)
        past_length = attention_mask.shape[1] - length if _is_2d(attention_mask) else 0
        num_surplus = 0
        if _is_sharded(self) and numbers is not None:  # asked before the passes, which gather parameters themselves
            num_passes = len(columns) + 1
            num_surplus = _most_of_all_ranks(num_passes, inputs_embeds.device) - num_passes

        # transformers asks the device whether a 2D mask has padding, once per pass; a mask made here does not wait.
        makes_mask = visible is not None or (columns and attention_mask is not None)
        makes_mask = makes_mask and "flash" not in language_model.config._attn_implementation

        cache, outputs, states = past_key_values, [], []
        for start, stop in zip([0, *columns], [*columns, length], strict=True):
            chunk = inputs_embeds[:, start:stop]  # (B, stop - start, D)
            if start > 0:
                first = chunk[:, 0]  # (B, D)
                state = self._feed_back(states[-1][:, -1], first)
                for number in sorted(set(numbers[:, start].tolist()) - {0}):
                    thought = state if edit_thoughts is None else edit_thoughts(state, number - 1)
                    rows = device_numbers[:, start, None] == number  # (B, 1)
                    first = torch.where(rows, thought, first)
                    thoughts[number - 1] = torch.where(rows, thought, thoughts[number - 1])
                chunk = torch.cat([first[:, None], chunk[:, 1:]], dim=1)
            if columns and past_key_values is None:
                cache = PassCache(len(language_model.layers), previous=cache)
            mask = attention_mask[:, : past_length + stop] if _is_2d(attention_mask) else attention_mask
            positions = position_ids[:, start:stop] if position_ids is not None else None
            if makes_mask:
                mask = create_causal_mask(
                    config=language_model.config,
                    inputs_embeds=chunk,
                    attention_mask=mask,
                    past_key_values=cache,
                    position_ids=positions,
                    and_mask_function=visible,
                    allow_is_causal_skip=False,
                )
            outputs.append(
                language_model(
                    inputs_embeds=chunk,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=use_cache,
                    **kwargs,
                )
            )
            states.append(outputs[-1].last_hidden_state)
        hidden_states = torch.cat(states, dim=1) if columns else states[0]  # (B, T, D)
        for _ in range(num_surplus):
            surplus = language_model(inputs_embeds=inputs_embeds[:1, :1], use_cache=False).last_hidden_state
            hidden_states = hidden_states + 0.0 * surplus.sum()
        return hidden_states, outputs, torch.stack(thoughts, dim=1) if thoughts else None

    def _feed_back(self, state, latent):
        """The thought (B, D) that `state` (B, D) becomes where the embedding `latent` (B, D) stands."""
        if self.config.mode in ("pause", "pause_loop"):
            return latent
        if self.config.thought_feedback == "identity":
            return state
        # Not the mean norm of all embeddings: under ZeRO-3 no rank has them, and this one can be learned.
        norm = state.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(state.dtype).tiny)
        return state * (latent.norm(dim=-1, keepdim=True) / norm)

    def _resolve_cache(self, use_cache: bool | None, past_key_values: Cache | None) -> bool:
        """Whether a cache is returned; refuses what activation checkpointing would silently compute wrongly."""
        if use_cache is None:
            use_cache = self.model.language_model.config.use_cache and not self.training
        checkpointed = [layer for layer in self.model.language_model.layers if layer.gradient_checkpointing]
        if not (checkpointed and self.training and torch.is_grad_enabled()):
            return use_cache
        if getattr(checkpointed[0]._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False:
            raise ValueError(
                "Activation checkpointing is reentrant, expected non-reentrant: with thoughts its gradients are "
                "wrong. Set `activation_checkpointing_kwargs={'use_reentrant': False}` (transformers' default)."
            )
        if past_key_values is not None:
            raise ValueError(
                "`past_key_values` cannot be used in training with activation checkpointing: a replayed layer would "
                "write to it twice. Pass the whole sequence, or disable checkpointing."
            )
        return False

    def _latent_mask(self, input_ids: torch.LongTensor | None) -> torch.BoolTensor | None:
        if input_ids is None or self.config.latent_token_id is None:
            return None
        return input_ids == self.config.latent_token_id

    def _check_thoughts(self, input_ids, latent_mask, attention_mask) -> torch.LongTensor:
        """[`check_thoughts`] on the host, and the number (from 1) of the thought at each position, (B, T)."""
        latent_mask = latent_mask.cpu()
        length = latent_mask.shape[1]
        attention_mask = attention_mask[:, -length:].cpu() if _is_2d(attention_mask) else None
        image_mask = torch.zeros_like(latent_mask)
        if input_ids is not None:
            image_mask = (input_ids == self.config.image_token_id).cpu()
        check_thoughts(latent_mask, attention_mask, image_mask)
        return latent_mask.cumsum(dim=1) * latent_mask

    def _hidden_from_answer(self, answer_sees, input_ids, latent_mask):
        """Which positions follow the thoughts, and which ones those may not see; both (B, T)."""
        if answer_sees not in ANSWER_SEES:
            raise ValueError(f"`answer_sees` must be one of {', '.join(ANSWER_SEES)}, got {answer_sees!r}.")
        if input_ids is None or latent_mask is None:
            raise ValueError(f"`answer_sees={answer_sees!r}` needs `input_ids` of a model with thought tokens.")
        block = latent_mask | (input_ids == self.config.start_latent_id)
        if not block.any(dim=1).all():
            raise ValueError(
                f"`answer_sees={answer_sees!r}` needs a thought block in every sample, also if it holds no thought: "
                f"write {START_LATENT_TOKEN}{END_LATENT_TOKEN} (`num_thoughts=0`)."
            )
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        after = positions > (positions * block).amax(dim=1, keepdim=True)
        hidden = input_ids == self.config.image_token_id if answer_sees == "no_image" else ~after & ~latent_mask
        return after, hidden

    def _visibility(self, answer_sees, input_ids, latent_mask):
        """The rule of `answer_sees` as a mask function of transformers: `(batch, head, query, key) -> allowed`."""
        length = None if latent_mask is None else latent_mask.shape[1]
        after, hidden = self._hidden_from_answer(
            answer_sees, None if input_ids is None else input_ids[:, :length], latent_mask
        )
        after, hidden = ~_pad(~after, input_ids.shape[1]), _pad(hidden, input_ids.shape[1])
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"`answer_sees={answer_sees!r}` needs attention masks, which {self.config._attn_implementation} does "
                "not take. Load the model with `attn_implementation='sdpa'`."
            )
        last = input_ids.shape[1] - 1  # a static cache has keys beyond the prompt
        return lambda batch, head, query, key: ~(after[batch, query] & hidden[batch, key.clamp(max=last)])

    def _thought_block(self, num_thoughts: int | None) -> str:
        num_thoughts = self.config.num_thoughts if num_thoughts is None else num_thoughts
        return "" if num_thoughts is None else thought_block(num_thoughts)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        latent_mask: torch.BoolTensor | None = None,
        return_thoughts: bool = False,
        **kwargs,
    ):
        r"""
        [`~transformers.GenerationMixin.generate`] with everything it can do; the prompt's thoughts are computed in its
        prefill by the passes of `forward`, and decoding is plain and cached. A latent token that the model itself
        emits is an ordinary token, as in the original program.

        Args:
            latent_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Where thoughts are fed. Defaults to the positions of `<|latent|>` in the prompt.
            return_thoughts (`bool`, defaults to `False`):
                Return a dictionary whose `thoughts` are `(batch_size, num_thoughts, hidden_size)`.
            kwargs:
                `pixel_values`, `num_patches_list`, `image_flags`, `edit_thoughts`, `answer_sees` as in `forward`, and
                any argument of [`~transformers.GenerationMixin.generate`].

        Raises:
            ValueError: as in `forward`, before anything is computed.
        """
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if kwargs.get("inputs_embeds") is not None and kwargs.get("pixel_values") is not None:
            raise ValueError("With `inputs_embeds`, place the images yourself: `inputs_embeds=model.fuse(...)`.")
        if input_ids is not None:
            has_past = kwargs.get("past_key_values") is not None
            check_shapes(input_ids, has_past, kwargs.get("attention_mask"), None, latent_mask)
        latent_mask = self._latent_mask(input_ids) if latent_mask is None else latent_mask
        answer_sees = kwargs.get("answer_sees", "all")
        if answer_sees != "all":
            self._visibility(answer_sees, input_ids, latent_mask)  # its checks: the tower runs before the prefill
        if latent_mask is not None:
            if input_ids is not None:  # an assistant gets the mask of the prompt, and ids that have grown
                latent_mask = _pad(latent_mask, input_ids.shape[1])
            numbers = self._check_thoughts(input_ids, latent_mask, kwargs.get("attention_mask"))
            num_thoughts, trained = int(numbers.max()), self.config.num_thoughts
            if trained is not None and num_thoughts > trained:
                logger.warning_once(
                    f"`num_thoughts` is {num_thoughts}, but this checkpoint was trained with {trained} thoughts."
                )
            configs = (generation_config, self.generation_config)
            chunk_sizes = [getattr(config, "prefill_chunk_size", None) for config in configs]
            if any([kwargs.get("prefill_chunk_size"), *chunk_sizes]) and num_thoughts:
                raise ValueError(
                    "`prefill_chunk_size` cannot be used with thoughts: their passes are the chunks. Leave it out."
                )
            kwargs["latent_mask"] = latent_mask
        if return_thoughts:
            kwargs.update(thought_sink=[], return_dict_in_generate=True)
        output = super().generate(inputs, generation_config, **kwargs)
        if return_thoughts:
            thoughts = kwargs["thought_sink"][0] if kwargs["thought_sink"] else None
            if thoughts is not None:  # beams and returned sequences share the thoughts of their prompt
                thoughts = thoughts[:: len(thoughts) // len(latent_mask)]
            output["thoughts"] = thoughts
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool = False,
        latent_mask: torch.BoolTensor | None = None,
        edit_thoughts: Callable | None = None,
        answer_sees: str = "all",
        thought_sink: list | None = None,
        **kwargs,
    ):
        """Thoughts belong to the prompt: its prefill gets all that concerns them, cached steps get none of it."""
        cached = past_key_values is not None and not is_first_iteration
        cached = cached and (next_sequence_length == 1 or int(past_key_values.get_seq_length()) > 0)
        prompt_mask = attention_mask
        if cached and answer_sees != "all":  # every new token follows the thoughts: a 2D mask says what it may see
            length = latent_mask.shape[1]
            _, hidden = self._hidden_from_answer(answer_sees, input_ids[:, :length], latent_mask)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = attention_mask.masked_fill(_pad(hidden, attention_mask.shape[1]), 0)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        ids = model_inputs["input_ids"] if model_inputs.get("input_ids") is not None else model_inputs["inputs_embeds"]
        if cached:
            if ids.shape[1] > 1:  # candidates copied from the prompt, to be checked as the ordinary tokens they are
                model_inputs["mm_encoder_outputs"] = {}
                model_inputs["latent_mask"] = torch.zeros(ids.shape[:2], dtype=torch.bool, device=ids.device)
            return model_inputs
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if features is not None and ids.shape[1] < input_ids.shape[1]:  # the caller's cache holds the images before
            image_mask = input_ids == self.config.image_token_id
            fed = image_mask.clone()
            fed[:, : -ids.shape[1]] = False
            features = type(features)(pooler_output=features.pooler_output.flatten(0, -2)[fed[image_mask]])
        if features is not None:  # transformers leaves them out of the prefill of an assistant
            model_inputs["mm_encoder_outputs"] = {"image": features}
        model_inputs["attention_mask"] = prompt_mask  # 2D also for a static cache: each pass makes its mask from it
        if latent_mask is not None:
            model_inputs["latent_mask"] = latent_mask[:, -ids.shape[1] :]
        model_inputs.update(
            edit_thoughts=edit_thoughts, answer_sees=answer_sees, return_thoughts=thought_sink is not None
        )
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        if model_kwargs.get("thought_sink") is not None and outputs.get("thoughts") is not None:
            model_kwargs["thought_sink"].append(outputs.thoughts)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


def add_thought_tokens(
    model: InternVLChatModel, tokenizer: PreTrainedTokenizerBase, init_from: str | None = None
) -> None:
    """
    Gives a model its thought tokens: adds them to the tokenizer if they are missing, resizes the embeddings if they
    are too few (a padded vocabulary is never shrunk), starts the new rows, and writes the ids into the configuration.
    Calling it again changes nothing. Under ZeRO-3 call it on all ranks, before the optimizer is made.

    Args:
        model ([`InternVLChatModel`]): Loaded from any of the three kinds of checkpoint.
        tokenizer ([`PreTrainedTokenizerBase`]): Its tokenizer.
        init_from (`str`, *optional*): A token whose rows the new ones copy (the paper's program uses `"<<"`). Defaults
            to the mean of all rows.

    Raises:
        ValueError: the tokenizer is not the model's, or `init_from` is not one token.
    """
    prepare_tokenizer(tokenizer)
    config = model.config
    names = {"start_latent_id": START_LATENT_TOKEN, "latent_token_id": LATENT_TOKEN, "end_latent_id": END_LATENT_TOKEN}
    wanted = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    expected = {"image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT_TOKEN), **wanted}
    for name, token_id in expected.items():
        if getattr(config, name) not in (None, token_id):
            raise ValueError(
                f"`config.{name}` is {getattr(config, name)}, but the tokenizer gives this token the id {token_id}. "
                "Use the tokenizer that was saved with the checkpoint."
            )
    if config.latent_token_id is not None:
        return
    num_known = min(wanted.values())
    source = slice(0, num_known)
    if init_from is not None:
        ids = tokenizer.encode(init_from, add_special_tokens=False)
        if len(ids) != 1 or ids[0] >= num_known:
            raise ValueError(f"`init_from` must be one token of the checkpoint, but {init_from!r} has the ids {ids}.")
        source = slice(ids[0], ids[0] + 1)

    if len(tokenizer) > config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weights = [model.get_input_embeddings().weight]
    if model.lm_head.weight is not weights[0]:
        weights.append(model.lm_head.weight)
    for weight in weights:
        with _gathered(weight), torch.no_grad():
            precise = torch.promote_types(weight.dtype, torch.float32)
            weight[list(wanted.values())] = weight[source].to(precise).mean(dim=0).to(weight.dtype)
    for name, token_id in wanted.items():
        setattr(config, name, token_id)
    hidden = [IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_CONTEXT_TOKEN, *names.values()]
    suppressed = set(model.generation_config.suppress_tokens or []) | set(tokenizer.convert_tokens_to_ids(hidden))
    model.generation_config.suppress_tokens = sorted(suppressed)


def export_internvl(model: InternVLChatModel, save_directory: str) -> None:
    """
    Saves a plain `InternVLForConditionalGeneration` with the same weights, which transformers and servers such as vLLM
    load without this code. It has the written reasoning of a model, not its thoughts: a latent token is a word to it.

    Raises:
        ValueError: the parameters are sharded over ranks or carry unmerged adapters.
    """
    if _is_sharded(model):
        raise ValueError("`model` is sharded over ranks. Save it by `Trainer.save_model`, load that, and export.")
    values = model.config.to_dict()
    ours = set(MultiCoCoConfig.__dataclass_fields__) - set(InternVLConfig.__dataclass_fields__)
    config = InternVLConfig(
        **{
            name: value
            for name, value in values.items()
            if name not in ours | {"auto_map", "architectures", "model_type"}
        }
    )
    with torch.device("meta"):
        native = InternVLForConditionalGeneration(config)
    missing, unexpected = native.load_state_dict(model.state_dict(), strict=False, assign=True)
    if missing or unexpected:
        raise ValueError(
            f"`model` is not a plain InternVL: missing {missing[:3]}, unexpected {unexpected[:3]}. Merge adapters "
            "first (`model = peft_model.merge_and_unload()`)."
        )
    native.tie_weights()
    native.generation_config = copy.deepcopy(model.generation_config)
    native.save_pretrained(save_directory, save_original_format=False)


def _as_list(counts) -> list[int] | None:
    return counts.tolist() if isinstance(counts, torch.Tensor) else counts


def _is_2d(attention_mask) -> bool:
    return isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2


def _positions(position_ids, attention_mask, length: int):
    """Positions that count the real tokens of each row; the language model's own default ignores the mask."""
    if position_ids is None and _is_2d(attention_mask):
        position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    return position_ids


@contextlib.contextmanager
def _settled_rotary(language_model: nn.Module, position_ids: torch.LongTensor | None):
    """
    InternVL3's rotary embedding is of the dynamic kind: each call asks the device for the largest position, to change
    its frequencies beyond `max_position_embeddings`. Within, it is the plain one, so this asks once for all passes.
    """
    rotary = language_model.rotary_emb
    limit = getattr(rotary, "original_max_seq_len", None)
    is_dynamic = position_ids is not None and getattr(rotary, "rope_type", None) == "dynamic"
    settled = is_dynamic and rotary.max_seq_len_cached == limit and int(position_ids.max()) < limit
    if settled:
        rotary.rope_type = "default"
    try:
        yield
    finally:
        if settled:
            rotary.rope_type = "dynamic"


def _pad(mask: torch.BoolTensor, length: int) -> torch.BoolTensor:
    return nn.functional.pad(mask, (0, max(0, length - mask.shape[1])))


def _join_hidden_states(outputs):
    if len(outputs) == 1 or outputs[0].hidden_states is None:
        return outputs[0].hidden_states
    return tuple(torch.cat(layer, dim=1) for layer in zip(*(output.hidden_states for output in outputs), strict=True))


def _join_attentions(outputs):
    """Attentions of all passes as (B, heads, T, T): a pass cannot see later keys, so their weight is 0."""
    if len(outputs) == 1 or not outputs[0].attentions:
        return outputs[0].attentions
    num_keys = outputs[-1].attentions[0].shape[-1]
    return tuple(
        torch.cat([nn.functional.pad(weights, (0, num_keys - weights.shape[-1])) for weights in layer], dim=2)
        for layer in zip(*(output.attentions for output in outputs), strict=True)
    )


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_sharded(model: nn.Module) -> bool:
    """Whether ranks gather parameters from each other, so that all must call all modules equally often."""
    return _world_size() > 1 and (hasattr(next(model.parameters()), "ds_id") or is_fsdp_managed_module(model))


def _most_of_all_ranks(count: int, device: torch.device) -> int:
    most = torch.tensor(count, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def _gathered(weight: nn.Parameter):
    """The whole of a parameter that ZeRO-3 has partitioned; what is written to it on rank 0 reaches all."""
    if not hasattr(weight, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([weight], modifier_rank=0)


AUTO_MAP = {
    "AutoConfig": "configuration_multicoco.MultiCoCoConfig",
    "AutoProcessor": "processing_multicoco.MultiCoCoProcessor",
    **dict.fromkeys(
        ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
        "modeling_multicoco.MultiCoCoForConditionalGeneration",
    ),
}

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
for _class in (InternVLChatModel, MultiCoCoForConditionalGeneration):
    _names = [WeightRenaming(source, target) for source, target in CHECKPOINT_NAMES.items()]
    _names += [
        WeightConverter(  # rows of q, k and v, in this order
            f".attn.qkv.{kind}", [f".attention.{part}_proj.{kind}" for part in "qkv"], operations=[Chunk(dim=0)]
        )
        for kind in ("weight", "bias")
    ]
    register_checkpoint_conversion_mapping(_class.__name__, _names, overwrite=True)
MultiCoCoForConditionalGeneration.register_for_auto_class("AutoModel")
