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
head, loss and generation. `modeling_internvl_chat.py` is InternVL's own interface, `passes.py` the cache of passes.

Shapes: B batch, T tokens, D hidden size, V vocabulary, N tiles, P visual tokens per tile.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.internvl.modeling_internvl import InternVLCausalLMOutputWithPast, InternVLModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .compat import (
    attention_of,
    checkpointed_with_cache,
    gathered,
    is_reentrant,
    is_sharded,
    most_of_all_ranks,
    settled_rotary,
)
from .configuration_multicoco import (
    CONSTANT_FEEDBACKS,
    END_LATENT_TOKEN,
    IMAGE_CONTEXT_TOKEN,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    LATENT_TOKEN,
    START_LATENT_TOKEN,
    MultiCoCoConfig,
)
from .modeling_internvl_chat import (
    InternVLChatBackbone,
    InternVLChatModel,
    check_shapes,
    count_positions,
    is_2d,
    register_checkpoint_names,
    takes_original_order,
)
from .passes import (
    PassCache,
    answer_visibility,
    causal_masks,
    check_thoughts,
    hidden_from_answer,
    holds_tokens,
    join_attentions,
    join_hidden_states,
    packed_samples,
    pad_mask,
)
from .processing_multicoco import OWN, MultiCoCoProcessor, plain_processor, prepare_tokenizer, thought_block


logger = logging.get_logger(__name__)


@dataclass
class MultiCoCoModelOutputWithPast(InternVLModelOutputWithPast):
    r"""
    Output of [`MultiCoCoModel`].

    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
        What the head reads. At the position before a thought it is that thought.
    thoughts (`torch.FloatTensor` of shape `(batch_size, num_thoughts, hidden_size)`, *optional*):
        What was fed at the latent positions, with `return_thoughts=True`; zeros after the last thought of a row.
    inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
        All that was fed, images and thoughts in their places, with `return_inputs_embeds=True`.
    """

    thoughts: torch.FloatTensor | None = None
    inputs_embeds: torch.FloatTensor | None = None


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


@dataclass
class _Plan:
    """All that the host reads of a batch: checked and read before any compute, once."""

    columns: list[int]  # where some row has a thought; the sequence is cut before each
    numbers: torch.LongTensor | None  # (B, T): 1 at a row's first thought, 2 at its second, 0 elsewhere
    num_surplus: int  # passes that other ranks make and this one does not need
    visible: Callable | None  # `(batch, head, query, key) -> allowed`, beside the causal rule
    attention_mask: torch.Tensor | None
    position_ids: torch.LongTensor | None


class MultiCoCoModel(InternVLChatBackbone):
    """InternVL's backbone that thinks: images, latent passes, last hidden states. `model.base_model` of the whole."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        mm_encoder_outputs: dict | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        latent_mask: torch.BoolTensor | None = None,
        use_cache: bool | None = None,
        return_thoughts: bool = False,
        edit_thoughts: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        answer_sees: str = "all",
        return_inputs_embeds: bool = False,
        **kwargs,
    ) -> tuple | MultiCoCoModelOutputWithPast:
        """Arguments and errors as in [`MultiCoCoForConditionalGeneration.forward`]."""
        tokens = tokens_of(input_ids, inputs_embeds)
        if inputs_embeds is not None and (pixel_values is not None or mm_encoder_outputs):
            raise ValueError("With `inputs_embeds`, place the images yourself: `inputs_embeds=model.fuse(...)`.")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("Pass only one of `pixel_values` and `mm_encoder_outputs`: both are the images.")
        check_shapes(tokens, past_key_values is not None, attention_mask, None, latent_mask)
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

        features, layers = None, self.language_model.layers
        if inputs_embeds is None:
            inputs_embeds, features = self.fuse(
                input_ids,
                pixel_values,
                tiles,
                mm_encoder_outputs,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
            )
        with settled_rotary(self.language_model, plan.position_ids if plan.columns else None):
            with checkpointed_with_cache(layers):  # they get a `PassCache` or no cache
                hidden_states, embeds, outputs, thoughts = self._run_passes(
                    inputs_embeds, plan, past_key_values, use_cache, edit_thoughts, **kwargs
                )
        return MultiCoCoModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=outputs[-1].past_key_values,
            hidden_states=join_hidden_states(outputs),
            attentions=join_attentions(outputs),
            image_hidden_states=features,
            thoughts=thoughts if return_thoughts else None,
            inputs_embeds=torch.cat(embeds, dim=1) if return_inputs_embeds else None,
        )

    def _plan(
        self,
        input_ids,
        tokens,
        attention_mask,
        position_ids,
        past_key_values,
        latent_mask,
        answer_sees,
        needs_passes,
    ) -> _Plan:
        """Reads and checks the batch. After this the host asks nothing of the device until the loss."""
        length = tokens.shape[1]
        samples = None
        if position_ids is not None and length > 1 and not holds_tokens(past_key_values):
            samples = packed_samples(position_ids, attention_mask, tokens)
        columns, numbers = [], None
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
        elif samples is not None and not self._has_flash:
            packed = samples.to(tokens.device)
            visible = lambda batch, head, query, key: packed[batch, query] == packed[batch, key]  # noqa: E731
        elif samples is not None and columns:
            raise ValueError(
                "`position_ids` restart, so the rows are packed: thoughts need masks then, which flash attention does "
                "not take. Load the model with `attn_implementation='sdpa'`."
            )

        num_surplus = 0
        if numbers is not None and is_sharded(self):  # asked before the passes, which gather parameters themselves
            num_passes = len(columns) + 1
            num_surplus = most_of_all_ranks(num_passes, tokens.device) - num_passes
        position_ids = count_positions(position_ids, attention_mask, length)
        if columns and is_2d(attention_mask) and attention_mask.all():
            attention_mask = None  # without padding the passes use kernels that take no mask
        return _Plan(columns, numbers, num_surplus, visible, attention_mask, position_ids)

    def _run_passes(self, inputs_embeds, plan: _Plan, past_key_values, use_cache, edit_thoughts, **kwargs):
        """
        Coconut. Returns the last hidden states (B, T, D), the embeddings that were fed, piece by piece, the output of
        each pass, and the thoughts (B, num_thoughts, D).
        """
        language_model, columns = self.language_model, plan.columns
        batch_size, length, hidden_size = inputs_embeds.shape
        num_thoughts = int(plan.numbers.max()) if columns else 0
        thoughts = [inputs_embeds.new_zeros(batch_size, hidden_size)] * num_thoughts
        if columns:
            numbers = plan.numbers.to(inputs_embeds.device, non_blocking=True)
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=language_model.config)
        past_length = plan.attention_mask.shape[1] - length if is_2d(plan.attention_mask) else 0
        # transformers asks the device whether a 2D mask has padding, once per pass; a mask made here does not wait.
        makes_mask = plan.visible is not None or (columns and plan.attention_mask is not None)

        cache, chunks, outputs, states = past_key_values, [], [], []
        for start, stop in zip([0, *columns], [*columns, length], strict=True):
            chunk = inputs_embeds[:, start:stop]  # (B, stop - start, D)
            if start > 0:
                first = chunk[:, 0]  # (B, D)
                state = self._feed_back(states[-1][:, -1].to(first.device), first)  # layers may be on other devices
                for number in sorted(set(plan.numbers[:, start].tolist()) - {0}):
                    thought = state if edit_thoughts is None else edit_thoughts(state, number - 1)
                    rows = numbers[:, start, None] == number  # (B, 1)
                    first = torch.where(rows, thought, first)
                    thoughts[number - 1] = torch.where(rows, thought, thoughts[number - 1])
                chunk = torch.cat([first[:, None], chunk[:, 1:]], dim=1)
            if columns and past_key_values is None:
                cache = PassCache(len(language_model.layers), previous=cache)
            mask = plan.attention_mask
            mask = mask[:, : past_length + stop] if is_2d(mask) else mask
            positions = plan.position_ids[:, start:stop] if plan.position_ids is not None else None
            if makes_mask and not self._has_flash:
                mask = causal_masks(
                    config=language_model.config,
                    inputs_embeds=chunk,
                    attention_mask=mask,
                    past_key_values=cache,
                    and_mask_function=plan.visible,
                    allow_is_causal_skip=False,
                )
            output = language_model(
                inputs_embeds=chunk,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=use_cache,
                **kwargs,
            )
            chunks.append(chunk)
            outputs.append(output)
            states.append(output.last_hidden_state)
        hidden_states = torch.cat(states, dim=1) if columns else states[0]  # (B, T, D)
        for _ in range(plan.num_surplus):
            surplus = language_model(inputs_embeds=inputs_embeds[:1, :1], use_cache=False).last_hidden_state
            hidden_states = hidden_states + 0.0 * surplus.sum()
        return hidden_states, chunks, outputs, torch.stack(thoughts, dim=1) if thoughts else None

    def _feed_back(self, state, latent):
        """The thought (B, D) that `state` (B, D) becomes where the embedding `latent` (B, D) stands."""
        if self.config.thought_feedback in CONSTANT_FEEDBACKS:
            return latent
        if self.config.thought_feedback == "identity":
            return state
        # Not the mean norm of all embeddings: under ZeRO-3 no rank has them, and this one can be learned.
        norm = state.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(state.dtype).tiny)
        return state * (latent.norm(dim=-1, keepdim=True) / norm)

    def _resolve_cache(self, use_cache: bool | None, past_key_values: Cache | None) -> bool:
        """Whether a cache is returned; refuses what activation checkpointing would silently compute wrongly."""
        if use_cache is None:
            use_cache = self.language_model.config.use_cache and not self.training
        checkpointed = [layer for layer in self.language_model.layers if layer.gradient_checkpointing]
        if not (checkpointed and self.training and torch.is_grad_enabled()):
            return use_cache
        if is_reentrant(checkpointed[0]):
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

    @property
    def _has_flash(self) -> bool:
        return "flash" in attention_of(self.language_model.config)  # the tower may have another

    def latent_mask(self, input_ids, latent_mask=None, past_key_values=None) -> torch.BoolTensor | None:
        """
        Where thoughts are fed, `latent_mask` or the `<|latent|>` of `input_ids`; says so once if the checkpoint was
        trained to think and these inputs have no place for it.
        """
        config = self.config
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

    def number_thoughts(self, input_ids, latent_mask, attention_mask, samples=None) -> torch.LongTensor:
        """The number (from 1) of the thought at each position, (B, T), on the host; after [`check_thoughts`]."""
        latent_mask = latent_mask.cpu()
        length = latent_mask.shape[1]
        attention_mask = attention_mask[:, -length:].cpu() if is_2d(attention_mask) else None
        image_mask = torch.zeros_like(latent_mask)
        if input_ids is not None:
            image_mask = (input_ids == self.config.image_token_id).cpu()
        check_thoughts(latent_mask, attention_mask, image_mask, samples)
        return latent_mask.cumsum(dim=1) * latent_mask


class MultiCoCoForConditionalGeneration(InternVLChatModel):
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

    @takes_original_order
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        image_flags: torch.Tensor | None = None,
        num_patches_list: Sequence[int] | None = None,
        latent_mask: torch.BoolTensor | None = None,
        use_cache: bool | None = None,
        return_thoughts: bool = False,
        edit_thoughts: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        answer_sees: str = "all",
        **kwargs,
    ) -> tuple | MultiCoCoOutputWithPast:
        r"""
        By position it takes transformers' order, or that of the original program, which begins with `pixel_values`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_tiles, 3, height, width)`, *optional*):
                Tiles of all images of the batch, in order.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for real tokens. Padding may stand on either side.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Defaults to counting the real tokens of each row. Positions that start again within the real tokens of
                a row mean that it is packed: its samples do not see each other. Give the first token of each no label.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, -100 where none is; shifted inside. The loss is the mean over all labels of the batch,
                or their sum over `num_items_in_batch`. With `logits_to_keep` they may be those of the kept positions.
            image_flags (`torch.Tensor` of shape `(num_tiles,)` or `(num_tiles, 1)`, *optional*):
                0 marks a dummy tile, which is encoded and then left out.
            num_patches_list (`Sequence[int]` or `torch.LongTensor`, *optional*):
                Tiles of each image (without dummies); makes the check of tiles and tokens exact per sample.
            latent_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Where thoughts are fed. Defaults to the positions of `<|latent|>` in `input_ids`. If it is shorter than
                `input_ids`, it is that of the prompt, and what follows holds no thought.
            return_thoughts (`bool`, defaults to `False`): Return what was fed at the latent positions.
            edit_thoughts (`Callable`, *optional*):
                `(thought (batch_size, hidden_size), index) -> thought`, called for every thought inside the loop, so
                that later thoughts and the answer follow from the edited one. It gets all rows; those that do not
                have this thought at this position are ignored, so swap rows only where thoughts are aligned. In a
                packed row thoughts are counted through.
            answer_sees (`str`, defaults to `"all"`):
                What positions after the last thought may attend to: `"all"`, `"no_image"`, or `"thoughts_only"`
                (the thoughts, and what comes after them). The thoughts themselves see everything before them.

        Raises:
            ValueError: tiles and `<IMG_CONTEXT>` tokens do not match; a thought that has no state before it, or that
                stands in the padding or before an image; checkpointing that would give wrong gradients.
        """
        labelled = None
        if labels is not None:
            tokens = tokens_of(input_ids, inputs_embeds)
            labels = spread_labels(labels, tokens, logits_to_keep)
            check_shapes(tokens, past_key_values is not None, None, labels, None)
            labelled = (labels[:, 1:].cpu() != -100).nonzero(as_tuple=True)
            if len(labelled[0]) == 0 and kwargs.get("num_items_in_batch") is None:
                raise ValueError("`labels` are all -100, so there is no loss. Give at least one position a label.")
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
            use_cache=use_cache,
            return_thoughts=return_thoughts,
            edit_thoughts=edit_thoughts,
            answer_sees=answer_sees,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state  # (B, T, D)
        loss = logits = None
        if labelled is not None:  # logits only where there is a label: (labels, V)
            rows, positions = (index.to(hidden_states.device) for index in labelled)
            loss = self.loss_function(
                logits=self.lm_head(hidden_states[rows, positions]),
                labels=None,
                shift_labels=labels.to(hidden_states.device)[rows, positions + 1],
                vocab_size=self.config.text_config.vocab_size,
                **kwargs,
            )
        if labels is None or not self.training or not isinstance(logits_to_keep, int) or logits_to_keep:
            logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        return MultiCoCoOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            thoughts=outputs.thoughts,
        )

    def embed_thoughts(self, input_ids: torch.LongTensor | None = None, **inputs) -> torch.FloatTensor:
        """
        The embeddings `(batch_size, sequence_length, hidden_size)` that the language model is fed, with images and
        thoughts in their places. One plain pass over them gives what the passes give, so hooks, captum, nnsight,
        exports and servers that take embeddings see one whole sequence:

            embeds = model.embed_thoughts(**inputs)
            model(inputs_embeds=embeds, latent_mask=torch.zeros(embeds.shape[:2], dtype=torch.bool), ...)
        """
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        inputs |= {"use_cache": False, "return_inputs_embeds": True, "return_dict": True}
        return self.model(input_ids, **inputs).inputs_embeds

    def _thought_block(self, num_thoughts: int | str | None) -> str:
        num_thoughts = self.config.num_thoughts if num_thoughts == OWN else num_thoughts
        return "" if num_thoughts is None else thought_block(num_thoughts)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
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
        tokens = input_ids
        if tokens is None and kwargs.get("inputs_embeds") is not None:
            tokens = kwargs["inputs_embeds"][..., 0]
        if tokens is not None:
            has_past = kwargs.get("past_key_values") is not None
            check_shapes(tokens, has_past, kwargs.get("attention_mask"), None, latent_mask)
        latent_mask = self.model.latent_mask(input_ids, latent_mask, kwargs.get("past_key_values"))
        answer_sees = kwargs.get("answer_sees", "all")
        if answer_sees != "all":
            answer_visibility(self.config, answer_sees, input_ids, latent_mask)  # for its checks, before the tower
        if latent_mask is not None:
            if input_ids is not None:  # an assistant gets the mask of the prompt, and ids that have grown
                latent_mask = pad_mask(latent_mask, input_ids.shape[1])
            numbers = self.model.number_thoughts(input_ids, latent_mask, kwargs.get("attention_mask"))
            past = kwargs.get("past_key_values")
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
        if return_thoughts:
            kwargs.update(thought_sink=[], return_dict_in_generate=True)
        output = super().generate(inputs, generation_config, **kwargs)
        if return_thoughts:
            thoughts = kwargs["thought_sink"][0] if kwargs["thought_sink"] else None
            if thoughts is not None:  # beams and returned sequences share the thoughts of their prompt
                thoughts = thoughts[:: len(thoughts) // len(latent_mask)]
            output["thoughts"] = thoughts
        return output

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
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

    def init_continuous_batching(self, *args, **kwargs):
        """As [`~MultiCoCoForConditionalGeneration.generate_batch`], for those who add requests later."""
        if self.config.num_thoughts:
            raise ValueError(
                f"`config.num_thoughts` is {self.config.num_thoughts}, and continuous batching feeds tokens only: its "
                "answers would come without thoughts. Use `generate`, which batches."
            )
        return super().init_continuous_batching(*args, **kwargs)

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
            _, hidden = hidden_from_answer(self.config, answer_sees, input_ids[:, :length], latent_mask)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_mask = attention_mask.masked_fill(pad_mask(hidden, attention_mask.shape[1]), 0)
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
        with gathered(weight), torch.no_grad():
            precise = torch.promote_types(weight.dtype, torch.float32)
            weight[list(wanted.values())] = weight[source].to(precise).mean(dim=0).to(weight.dtype)
    for name, token_id in wanted.items():
        setattr(config, name, token_id)
    hidden = [IMAGE_START_TOKEN, IMAGE_END_TOKEN, IMAGE_CONTEXT_TOKEN, *names.values()]
    suppressed = set(model.generation_config.suppress_tokens or []) | set(tokenizer.convert_tokens_to_ids(hidden))
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
    if processor is not None:
        plain_processor(processor).save_pretrained(save_directory)


def tokens_of(input_ids, inputs_embeds) -> torch.Tensor:
    """Something of shape (B, T): ids, or one number of each embedding."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    return input_ids if input_ids is not None else inputs_embeds[..., 0]


def spread_labels(labels: torch.LongTensor, tokens: torch.Tensor, logits_to_keep: int | torch.Tensor):
    """
    Labels `(batch_size, kept)` that go with the positions of `logits_to_keep`, in their places `(batch_size,
    sequence_length)`: the logits of the i-th kept position predict label i + 1, whatever lies between (ms-swift).
    """
    kept = torch.arange(tokens.shape[1], device=labels.device)
    if isinstance(logits_to_keep, int):
        kept = kept[-logits_to_keep:]  # 0 keeps all
    else:
        kept = kept[logits_to_keep.to(labels.device)]
    if len(kept) == tokens.shape[1] or labels.dim() != 2 or labels.shape[1] != len(kept):
        return labels
    spread = labels.new_full((len(labels), tokens.shape[1]), -100)
    spread[:, kept[0]] = labels[:, 0]
    spread[:, kept[:-1] + 1] = labels[:, 1:]
    return spread


register_checkpoint_names(MultiCoCoForConditionalGeneration)
MultiCoCoForConditionalGeneration.register_for_auto_class("AutoModel")
