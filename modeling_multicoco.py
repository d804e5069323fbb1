"""Chain of Continuous Thought (Coconut, arXiv 2412.06769) on transformers' native InternVL.

The method: at a `<|latent|>` position the input embedding is not that of the token but the *thought*: the last hidden
state, after the final norm, of the position before it. It enters as it is (no projection, no scaling, no detach).

    Looking at <img> ... </img>, how many? <|start-latent|> <|latent|> <|latent|> <|end-latent|> ### 3
                                                         `--thought--^ `thought--^

One position needs the state of another, so a sequence is cut before each latent column and run chunk by chunk with a
key/value cache. With the thoughts of all rows aligned, `n` thoughts take `n + 1` passes and the sum of their tokens is
that of one plain forward. Gradients flow through every thought and through the cache.

The backbone thinks: [`MultiCoCoModel`] fuses the images, runs the passes and returns the last hidden states, so who
calls `model.base_model` and a head of its own (trl does) has the thoughts. [`MultiCoCoForConditionalGeneration`] adds
head, loss and generation. `modeling_internvl_chat.py` is InternVL's own interface, `passes.py` the passes themselves.

Shapes: B batch, T tokens, D hidden size, V vocabulary, N tiles, P visual tokens per tile.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast, InternVLModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .compat import (
    checkpointed_with_cache,
    gathered,
    is_2d,
    is_reentrant,
    is_sharded,
    most_of_all_ranks,
    only_loss_is_read,
    settled_rotary,
    shifts_smoothed_labels,
)
from .configuration_multicoco import (
    END_LATENT_TOKEN,
    IMAGE_CONTEXT_TOKEN,
    LATENT_TOKEN,
    OWN,
    START_LATENT_TOKEN,
    STATE_FEEDBACKS,
    MultiCoCoConfig,
    NumThoughts,
    thought_block,
)
from .modeling_internvl_chat import (
    InternVLChatBackbone,
    InternVLChatModel,
    check_shapes,
    count_positions,
    register_checkpoint_names,
    takes_original_order,
)
from .objectives import StepDecoding, Targets, states_before, tokens_of
from .passes import (
    REENTRANT,
    EditThoughts,
    Plan,
    answer_visibility,
    check_thoughts,
    count_sweeps,
    hidden_from_answer,
    holds_tokens,
    join_attentions,
    join_hidden_states,
    packed_samples,
    packed_visibility,
    pad_mask,
    run_passes,
)
from .processing_multicoco import RESERVED_TOKENS, MultiCoCoProcessor, plain_processor, prepare_tokenizer


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is


@dataclass
class MultiCoCoModelOutputWithPast(InternVLModelOutputWithPast):
    r"""
    Output of [`MultiCoCoModel`].

    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
        What the head reads. At the position before a thought it is that thought (by `thought_sweeps` one sweep later).
    thoughts (`torch.FloatTensor` of shape `(batch_size, num_thoughts, hidden_size)`, *optional*):
        What was fed at the latent positions, with `return_thoughts=True`; zeros after the last thought of a row.
    states (`torch.FloatTensor` of shape `(batch_size, num_thoughts, hidden_size)`, *optional*):
        The same with `return_states=True`; but in the controls, which feed constants, what thoughts would have been.
    inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
        All that was fed, images and thoughts in their places, with `return_inputs_embeds=True`.
    """

    thoughts: torch.Tensor | None = None
    states: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None


@dataclass
class MultiCoCoOutputWithPast(InternVLCausalLMOutputWithPast):
    r"""
    Output of [`MultiCoCoForConditionalGeneration`].

    loss (`torch.FloatTensor` of shape `(1,)`, *optional*): returned with `labels`.
    logits (`torch.FloatTensor` of shape `(batch_size, kept, vocab_size)`, *optional*):
        `None` with `labels` in training, and where `Trainer` evaluates and reads the loss only, unless
        `logits_to_keep` asks for them: over a long image prefix they would be the largest tensor of the step, and only
        the labelled positions are needed.
    thoughts (`torch.FloatTensor` of shape `(batch_size, num_thoughts, hidden_size)`, *optional*):
        What was fed at the latent positions, with `return_thoughts=True`; zeros after the last thought of a row.
    step_loss (`torch.FloatTensor` of shape `()`, *optional*):
        With `step_ids`: the part of the loss that is not of the words, before `config.step_loss_weight`.
    """

    thoughts: torch.Tensor | None = None
    step_loss: torch.Tensor | None = None


class MultiCoCoModel(InternVLChatBackbone):
    """InternVL's backbone that thinks: images, latent passes, last hidden states. `model.base_model` of the whole."""

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
        latent_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_thoughts: bool = False,
        edit_thoughts: EditThoughts | None = None,
        answer_sees: str = "all",
        return_states: bool = False,
        return_inputs_embeds: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...] | MultiCoCoModelOutputWithPast:
        """
        Arguments and errors as in [`MultiCoCoForConditionalGeneration.forward`], but for its head; with
        `return_states` and `return_inputs_embeds` the output has them.
        """
        tokens = self._check_inputs(input_ids, inputs_embeds, pixel_values, mm_encoder_outputs, **kwargs)
        check_shapes(tokens, attention_mask, latent_mask=latent_mask, has_past=past_key_values is not None)
        use_cache = self._resolve_cache(use_cache, past_key_values)
        tiles = None
        is_step = past_key_values is not None and tokens.shape[1] == 1 and latent_mask is None  # of decoding
        if input_ids is not None and mm_encoder_outputs is None and not is_step:
            pixel_values, tiles = self.place_images(input_ids, pixel_values, image_flags, num_patches_list)
        plan = self._plan(
            input_ids,
            tokens,
            attention_mask,
            position_ids,
            past_key_values,
            None if is_step else self.latent_mask(input_ids, latent_mask, past_key_values),
            answer_sees,
            needs_passes=edit_thoughts is not None or return_thoughts,
        )

        embeds: Any = inputs_embeds
        features = None
        if input_ids is not None:
            embeds, features = self.fuse(
                input_ids,
                pixel_values,
                tiles,
                mm_encoder_outputs,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
            )
        with settled_rotary(self.language_model, plan.position_ids if plan.columns else None):
            with checkpointed_with_cache(self.language_model.layers):  # they get a `PassCache` or no cache
                hidden_states, thoughts, chunks, outputs = run_passes(
                    self.language_model,
                    embeds,
                    plan,
                    self.config.thought_feedback,
                    past_key_values,
                    use_cache=use_cache,
                    edit_thoughts=edit_thoughts,
                    **kwargs,
                )
        return MultiCoCoModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=outputs[-1].past_key_values,
            hidden_states=join_hidden_states(outputs),
            attentions=join_attentions(outputs),
            image_hidden_states=features,
            thoughts=thoughts if return_thoughts else None,
            states=self._states(hidden_states, thoughts, plan) if return_states else None,
            inputs_embeds=torch.cat(chunks, dim=1) if return_inputs_embeds else None,
        )

    def _states(self, hidden_states: torch.Tensor, thoughts: torch.Tensor | None, plan: Plan) -> torch.Tensor | None:
        feeds_states = self.config.thought_feedback in STATE_FEEDBACKS
        states = thoughts if feeds_states else states_before(hidden_states, plan.numbers)
        if states is None and is_sharded(self):
            return hidden_states[:, :1]  # ZeRO-3 counts what comes back to each output, so all ranks have one
        return states

    def _check_inputs(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        mm_encoder_outputs: dict[str, Any] | None,
        step_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Something of shape (B, T), after refusing what would be lost or stand there twice."""
        if step_ids is not None:
            raise ValueError(
                "`step_ids` came to the model without its head, which has no step loss: it would be lost. Let the "
                "whole model compute the loss (in trl `loss_type='nll'`), or set `step_loss_weight` to 0."
            )
        if inputs_embeds is not None and (pixel_values is not None or mm_encoder_outputs):
            raise ValueError("With `inputs_embeds`, place the images yourself: `inputs_embeds=model.fuse(...)`.")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("Pass only one of `pixel_values` and `mm_encoder_outputs`: both are the images.")
        return tokens_of(input_ids, inputs_embeds)

    def _resolve_cache(self, use_cache: bool | None, past_key_values: Cache | None) -> bool:
        """Whether a cache is returned; refuses what activation checkpointing would silently compute wrongly."""
        if use_cache is None:
            use_cache = bool(self.language_model.config.use_cache and not self.training)
        checkpointed = [layer for layer in self.language_model.layers if layer.gradient_checkpointing]
        if not (checkpointed and self.training and torch.is_grad_enabled()):
            return use_cache
        if is_reentrant(checkpointed[0]):
            raise ValueError(REENTRANT)
        if past_key_values is not None:
            raise ValueError(
                "`past_key_values` cannot be used in training with activation checkpointing: a replayed layer would "
                "write to it twice. Pass the whole sequence, or disable checkpointing."
            )
        return False

    def latent_mask(
        self,
        input_ids: torch.Tensor | None,
        latent_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor | None:
        """
        Where thoughts are fed (B, T), `latent_mask` or the `<|latent|>` of `input_ids`; says so once if the checkpoint
        was trained to think and these inputs have no place for it.

        Raises:
            ValueError: a thought block was cut.
        """
        config: Any = self.config
        if latent_mask is not None or config.latent_token_id is None:
            return latent_mask
        if holds_tokens(past_key_values):
            return None if input_ids is None else input_ids == config.latent_token_id
        if input_ids is None:
            if config.num_thoughts is not None:
                logger.warning_once(
                    "`inputs_embeds` came without `latent_mask`, so nothing is fed back, but this checkpoint was "
                    f"trained with `num_thoughts` {config.num_thoughts}. Pass `input_ids`, or `latent_mask` (all "
                    "False for embeddings that hold their thoughts already)."
                )
            return None
        starts = (input_ids == config.start_latent_id).sum(dim=1)  # (B,)
        ends = (input_ids == config.end_latent_id).sum(dim=1)
        has_none, is_cut = torch.stack([(starts == 0).any(), (starts > ends).any()]).tolist()
        if is_cut:
            raise ValueError(
                f"`input_ids` hold a thought block without its {END_LATENT_TOKEN}: the sequence was cut inside. Raise "
                "the limit of its length (`max_length=None` in trl)."
            )
        if has_none and config.num_thoughts is not None:
            logger.warning_once(
                "`input_ids` hold a sample without a thought block, but this checkpoint was trained with "
                f"`num_thoughts` {config.num_thoughts} and answers worse without. Make prompts by its processor's or "
                "tokenizer's `apply_chat_template`, or ask by `chat`; to a text of your own, "
                f"`processor(..., num_thoughts={config.num_thoughts})` adds the block."
            )
        return input_ids == config.latent_token_id

    def _plan(
        self,
        input_ids: torch.Tensor | None,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        latent_mask: torch.Tensor | None,
        answer_sees: str,
        *,
        needs_passes: bool,
    ) -> Plan:
        """Reads and checks the batch. After this the host asks nothing of the device until the loss."""
        length = tokens.shape[1]
        samples = None
        if position_ids is not None and length > 1 and not holds_tokens(past_key_values):
            samples = packed_samples(position_ids, attention_mask, tokens)
        columns, numbers = [], torch.empty(0, dtype=torch.long)
        if latent_mask is not None:
            numbers = self.number_thoughts(input_ids, pad_mask(latent_mask, length), attention_mask, samples)
            if self.config.thought_feedback != "latent_one_pass" or needs_passes:
                columns = numbers.any(dim=0).nonzero().flatten().tolist()
            if columns and attention_mask is not None and not is_2d(attention_mask):
                raise ValueError("`attention_mask` must be (batch_size, sequence_length) when there are thoughts.")
        visible = None
        if answer_sees != "all":
            if holds_tokens(past_key_values):
                raise ValueError(
                    f"`answer_sees={answer_sees!r}` cannot continue `past_key_values`: which of its positions are to "
                    "be hidden is not known. Pass the whole sequence and no cache."
                )
            if samples is not None:
                raise ValueError(f"`answer_sees={answer_sees!r}` cannot be used with packed rows. Pad instead.")
            visible = answer_visibility(self.config, answer_sees, input_ids, latent_mask)
        elif samples is not None:
            language_config = self.language_model.config
            visible = packed_visibility(language_config, samples.to(tokens.device), has_thoughts=bool(columns))
        num_surplus, num_sweeps = 0, count_sweeps(self.config, columns, numbers, samples)
        if latent_mask is not None and is_sharded(self):  # asked before the passes, which gather parameters themselves
            num_passes = (len(columns) if num_sweeps is None else num_sweeps + 1) + 1
            num_surplus = most_of_all_ranks(num_passes, tokens.device) - num_passes
        position_ids = count_positions(position_ids, attention_mask, length)
        if columns and is_2d(attention_mask) and attention_mask.all():
            attention_mask = None  # without padding the passes use kernels that take no mask
        return Plan(columns, num_sweeps, numbers, num_surplus, visible, attention_mask, position_ids)

    def number_thoughts(
        self,
        input_ids: torch.Tensor | None,
        latent_mask: torch.Tensor,
        attention_mask: torch.Tensor | None,
        samples: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The number (from 1) of the thought at each position, (B, T), on the host; after [`check_thoughts`]."""
        latent_mask = latent_mask.cpu()
        length = latent_mask.shape[1]
        attention_mask = attention_mask[:, -length:].cpu() if is_2d(attention_mask) else None
        image_mask = torch.zeros_like(latent_mask)
        if input_ids is not None:
            image_mask = (input_ids == self.config.image_token_id).cpu()
        check_thoughts(latent_mask, attention_mask, image_mask, samples)
        return latent_mask.cumsum(dim=1) * latent_mask


class MultiCoCoForConditionalGeneration(StepDecoding, InternVLChatModel):
    r"""
    InternVL that thinks in continuous thoughts: [`MultiCoCoModel`] and a language model's head.

    Example:

    ```python
    >>> from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor, add_thought_tokens

    >>> name = "OpenGVLab/InternVL3-1B"  # or "-hf", or a checkpoint of our own
    >>> processor = MultiCoCoProcessor.from_pretrained(name)  # doctest: +SKIP
    >>> model = MultiCoCoForConditionalGeneration.from_pretrained(name, dtype="auto")  # doctest: +SKIP
    >>> add_thought_tokens(model, processor.tokenizer)  # doctest: +SKIP
    ```"""

    backbone_class = MultiCoCoModel
    model: MultiCoCoModel

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        shifts_smoothed_labels(cls)

    @takes_original_order
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
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        latent_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_thoughts: bool = False,
        edit_thoughts: EditThoughts | None = None,
        answer_sees: str = "all",
        step_ids: torch.Tensor | None = None,
        smoothing: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Any, ...] | MultiCoCoOutputWithPast:
        r"""
        By position it takes transformers' order, or that of the original program, which begins with `pixel_values`.
        What is not named here is as in [`InternVLChatModel.forward`].

        Args:
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Defaults to counting the real tokens of each row, padded on either side. Where they start again the row
                is packed: its samples do not see each other. Give the first token of each no label.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, -100 where none is; shifted inside. The loss is the mean over all labels of the batch,
                or their sum over `num_items_in_batch`. With `logits_to_keep` they may be those of the kept positions.
            latent_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Where thoughts are fed; by default at each `<|latent|>`. A shorter one is that of the prompt.
            return_thoughts (`bool`, defaults to `False`): Return what was fed at the latent positions.
            edit_thoughts (`Callable`, *optional*):
                `(thought (batch_size, hidden_size), index) -> thought`, called for every thought inside the loop:
                later thoughts and the answer follow from the edited one. It gets all rows; those without this thought
                there are ignored: swap only where thoughts are aligned. In a packed row they are counted through.
            answer_sees (`str`, defaults to `"all"`):
                What positions after the last thought may attend to: `"all"`, `"no_image"`, or `"thoughts_only"`
                (the thoughts, and what comes after them). The thoughts themselves see everything before them.
            step_ids (`torch.LongTensor` of shape `(batch_size, groups, length)`, *optional*):
                Text of each group of `config.c_thought` thoughts, -100 behind it; see [`~objectives.StepDecoding`].
            smoothing (`float`, defaults to 0): The share of each target that all tokens have in equal parts.

        Raises:
            ValueError: tiles and `<IMG_CONTEXT>` tokens do not match; a misplaced thought; wrong gradients to come.
        """
        tokens = tokens_of(input_ids, inputs_embeds)
        where = {"position_ids": position_ids, "attention_mask": attention_mask, **kwargs}
        targets = self.read_targets(labels, step_ids, tokens, latent_mask, logits_to_keep, smoothing, **where)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            mm_encoder_outputs=mm_encoder_outputs,
            image_flags=image_flags,
            num_patches_list=num_patches_list,
            latent_mask=latent_mask,
            use_cache=self.cache_beside(labels, past_key_values, use_cache=use_cache),
            return_thoughts=return_thoughts,
            edit_thoughts=edit_thoughts,
            answer_sees=answer_sees,
            return_states=step_ids is not None,
            return_dict=True,
            **kwargs,
        )
        return self._output(outputs, targets, logits_to_keep, **kwargs)

    def _output(
        self,
        outputs: Any,
        targets: Targets | None,
        logits_to_keep: int | torch.Tensor,
        **kwargs: Any,
    ) -> MultiCoCoOutputWithPast:
        """
        The head on the `outputs` of [`MultiCoCoModel`], only at the positions that are asked for, and the loss of the
        `targets`.
        """
        hidden_states = outputs.last_hidden_state  # (B, T, D)
        loss = logits = step_loss = None
        if targets is not None:
            loss = self.word_loss(hidden_states, targets, **kwargs)
            if targets.texts is not None:
                sums = self.step_loss(outputs.states, hidden_states, targets.texts, targets.smoothing)
                step_loss = targets.mean(sums.to(loss.device))
                loss = loss + self.config.step_loss_weight * step_loss
        are_asked = not isinstance(logits_to_keep, int) or logits_to_keep != 0
        if targets is None or are_asked or not (self.training or only_loss_is_read()):
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return MultiCoCoOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            thoughts=outputs.thoughts,
            step_loss=step_loss,
        )

    def embed_thoughts(self, input_ids: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        """
        The embeddings `(batch_size, sequence_length, hidden_size)` that the language model is fed, with images and
        thoughts in their places. One plain pass over them gives what the passes give, so hooks, captum, nnsight,
        exports and servers that take embeddings see one whole sequence:

            embeds = model.embed_thoughts(**inputs)
            model(inputs_embeds=embeds, latent_mask=torch.zeros(embeds.shape[:2], dtype=torch.bool), ...)
        """
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", "step_ids")}
        inputs |= {"use_cache": False, "return_inputs_embeds": True, "return_dict": True}
        return self.model(input_ids, **inputs).inputs_embeds

    def _thought_block(self, num_thoughts: NumThoughts) -> str:
        number = self.config.num_thoughts if num_thoughts == OWN else num_thoughts
        return "" if number is None else thought_block(number)

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the base's own arguments by keyword only
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        latent_mask: torch.Tensor | None = None,
        return_thoughts: bool = False,
        **kwargs: Any,
    ) -> Any:
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
        inputs_embeds: Any = kwargs.get("inputs_embeds")
        past = kwargs.get("past_key_values")
        if inputs_embeds is not None and kwargs.get("pixel_values") is not None:
            raise ValueError("With `inputs_embeds`, place the images yourself: `inputs_embeds=model.fuse(...)`.")
        if input_ids is not None or inputs_embeds is not None:
            tokens = input_ids if input_ids is not None else inputs_embeds[..., 0]
            check_shapes(tokens, kwargs.get("attention_mask"), latent_mask=latent_mask, has_past=past is not None)
        latent_mask = self.model.latent_mask(input_ids, latent_mask, past)
        answer_sees = kwargs.get("answer_sees", "all")
        if answer_sees != "all":
            answer_visibility(self.config, answer_sees, input_ids, latent_mask)  # for its checks, before the tower
        if latent_mask is not None:
            if input_ids is not None:  # an assistant gets the mask of the prompt, and ids that have grown
                latent_mask = pad_mask(latent_mask, input_ids.shape[1])
            numbers = self.model.number_thoughts(input_ids, latent_mask, kwargs.get("attention_mask"))
            new = (numbers > 0)[:, int(past.get_seq_length()) if holds_tokens(past) else 0 :]  # not of earlier turns
            num_thoughts, trained = int(new.sum(dim=1).max()), self.config.num_thoughts
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
        saved = self.generation_config.suppress_tokens or []
        if generation_config is not None and saved:  # another program's own (trl) would replace the saved list
            generation_config = copy.deepcopy(generation_config)
            generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or []), *saved})
        if return_thoughts:  # transformers hands on nothing else of a prefill's output, so a list goes along
            kwargs.update(thought_sink=[], return_dict_in_generate=True)
        output = super().generate(inputs, generation_config, **kwargs)
        if return_thoughts:
            thoughts = kwargs["thought_sink"][0] if kwargs["thought_sink"] else None
            if thoughts is not None and latent_mask is not None:  # beams share the thoughts of their prompt
                thoughts = thoughts[:: len(thoughts) // len(latent_mask)]
            output["thoughts"] = thoughts
        return output

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """
        [`~transformers.GenerationMixin.generate_batch`] (continuous batching), for prompts in words alone.

        Raises:
            ValueError: a prompt holds thoughts or images, for which its scheduler has no place; in its own thread
                the error would not be heard.
        """
        for sample, ids in enumerate(inputs):
            for name in ("latent_token_id", "image_token_id"):
                if getattr(self.config, name) is not None and getattr(self.config, name) in list(ids):
                    raise ValueError(
                        f"Prompt {sample} of `inputs` holds the token of `config.{name}`, and continuous batching "
                        "feeds tokens only: neither thoughts nor pictures. Use `generate`, which batches."
                    )
        return super().generate_batch(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """
        As [`~MultiCoCoForConditionalGeneration.generate_batch`], for those who add requests later.

        Raises:
            ValueError: this checkpoint thinks.
        """
        if self.config.num_thoughts:
            raise ValueError(
                f"`config.num_thoughts` is {self.config.num_thoughts}, and continuous batching feeds tokens only: its "
                "answers would come without thoughts. Use `generate`, which batches."
            )
        return super().init_continuous_batching(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        latent_mask: torch.Tensor | None = None,
        edit_thoughts: EditThoughts | None = None,
        answer_sees: str = "all",
        thought_sink: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Thoughts belong to the prompt: its prefill gets all that concerns them. What follows in the cache gets none of
        it, be it one token to decode or several candidates to check.
        """
        is_cached = past_key_values is not None and not is_first_iteration
        is_cached = is_cached and (next_sequence_length == 1 or holds_tokens(past_key_values))
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]  # its own kind of `self`
        model_inputs = prepare(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=(
                self._decode_mask(input_ids, attention_mask, latent_mask, answer_sees) if is_cached else attention_mask
            ),
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        ids = model_inputs["input_ids"] if model_inputs.get("input_ids") is not None else model_inputs["inputs_embeds"]
        if is_cached:
            return model_inputs if ids.shape[1] <= 1 else {**model_inputs, **self._candidate_inputs(ids)}
        features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        return {
            **model_inputs,
            **self._prefill_inputs(input_ids, ids.shape[1], latent_mask, features),
            "attention_mask": attention_mask,  # 2D also for a static cache: each pass makes its mask from it
            "edit_thoughts": edit_thoughts,
            "answer_sees": answer_sees,
            "return_thoughts": thought_sink is not None,
        }

    def _prefill_inputs(
        self, input_ids: torch.Tensor, num_new: int, latent_mask: torch.Tensor | None, features: Any
    ) -> dict[str, Any]:
        """Of a prompt's last `num_new` tokens, which are fed: where thoughts are, and the features of their images."""
        model_inputs: dict[str, Any] = {} if latent_mask is None else {"latent_mask": latent_mask[:, -num_new:]}
        if features is not None:  # transformers leaves them out of the prefill of an assistant
            if num_new < input_ids.shape[1]:  # the caller's cache holds the images before
                image_mask = input_ids == self.config.image_token_id
                fed = image_mask.clone()
                fed[:, :-num_new] = False
                features = type(features)(pooler_output=features.pooler_output.flatten(0, -2)[fed[image_mask]])
            model_inputs["mm_encoder_outputs"] = {"image": features}
        return model_inputs

    def _decode_mask(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        latent_mask: torch.Tensor | None,
        answer_sees: str,
    ) -> torch.Tensor | None:
        """What new tokens may see: all of them follow the thoughts, so a 2D mask can say it."""
        if answer_sees == "all":
            return attention_mask
        _, hidden = hidden_from_answer(self.config, answer_sees, input_ids, latent_mask)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        length = attention_mask.shape[1]
        return attention_mask.masked_fill(pad_mask(hidden, length)[:, :length], 0)

    def _candidate_inputs(self, ids: torch.Tensor) -> dict[str, Any]:
        """Candidates may be copied from the prompt; they are checked as the ordinary tokens they are."""
        no_thought = torch.zeros(ids.shape[:2], dtype=torch.bool, device=ids.device)
        return {"mm_encoder_outputs": {}, "latent_mask": no_thought}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if model_kwargs.get("thought_sink") is not None and outputs.get("thoughts") is not None:
            model_kwargs["thought_sink"].append(outputs.thoughts)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


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
    weights: list[Any] = [model.get_input_embeddings().weight]
    if model.lm_head.weight is not weights[0]:
        weights.append(model.lm_head.weight)
    for weight in weights:
        with gathered(weight), torch.no_grad():
            precise = torch.promote_types(weight.dtype, torch.float32)
            weight[list(wanted.values())] = weight[source].to(precise).mean(dim=0).to(weight.dtype)
    for name, token_id in wanted.items():
        setattr(config, name, token_id)
    hidden = [tokenizer.convert_tokens_to_ids(token) for token in RESERVED_TOKENS]
    suppressed = {*(model.generation_config.suppress_tokens or []), *hidden}
    model.generation_config.suppress_tokens = sorted(suppressed)


def export_internvl(
    model: InternVLChatModel, save_directory: str, processor: MultiCoCoProcessor | None = None
) -> None:
    """
    Saves a plain `InternVLForConditionalGeneration` with the same weights, which transformers and servers such as vLLM
    load without this code. It has the written reasoning of a model, not its thoughts: a latent token is a word to it,
    so a `processor` is saved beside it with a chat template that writes no thought block.

    Raises:
        ValueError: the parameters are sharded over ranks or carry unmerged adapters.
    """
    if is_sharded(model):
        raise ValueError("`model` is sharded over ranks. Save it by `Trainer.save_model`, load that, and export.")
    values = model.config.to_dict()
    ours = {field.name for field in fields(MultiCoCoConfig)} - {field.name for field in fields(InternVLConfig)}
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
    if processor is not None:
        plain_processor(processor).save_pretrained(save_directory)


register_checkpoint_names(MultiCoCoForConditionalGeneration)
shifts_smoothed_labels(MultiCoCoForConditionalGeneration)
MultiCoCoForConditionalGeneration.register_for_auto_class("AutoModel")
