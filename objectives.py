"""What a training step minimises: where labels stand, and the *step loss*, which makes thoughts readable.

A group of `c_thought` thoughts stands for a text: the written step that it replaced, or, for surplus groups, the
answer. Beside the words after its thoughts, a sample must write these texts, each from its group *alone*:

    <thought> <thought>   D  4  \\n <|im_end|>        the same language model and head, positions from 0,
    `---- a group ----'   `- what it must write -'    no picture, no question

The idea is SIM-CoT's (arXiv 2509.20317), without its second model, and with the answer for surplus thoughts.

Knows a language model, embeddings and a head as functions; no images, no text; of the passes only packed rows.

Shapes: B batch, T tokens, D hidden size, n thoughts, G groups, L tokens of the longest text, M texts of a batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad

from .compat import is_sharded
from .modeling_internvl_chat import check_shapes
from .passes import packed_samples


IGNORED = -100


def tokens_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Something of shape (B, T): ids, or one number of each embedding."""
    if input_ids is not None and inputs_embeds is None:
        return input_ids
    if inputs_embeds is not None and input_ids is None:
        return inputs_embeds[..., 0]
    raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")


def place_labels(
    labels: torch.Tensor, tokens: torch.Tensor, logits_to_keep: int | torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """
    Labels (B, kept) that go with the positions of `logits_to_keep`, in their places (B, T): the logits of the i-th
    kept position predict label i + 1, whatever lies between (ms-swift). And, on the host, the rows and positions whose
    next token has a label. `tokens` is anything of shape (B, T).
    """
    kept = torch.arange(tokens.shape[1], device=labels.device)
    if isinstance(logits_to_keep, int):
        kept = kept[-logits_to_keep:]  # 0 keeps all
    else:
        kept = kept[logits_to_keep.to(labels.device)]
    if len(kept) != tokens.shape[1] and labels.dim() == 2 and labels.shape[1] == len(kept):
        spread = labels.new_full((len(labels), tokens.shape[1]), IGNORED)
        spread[:, kept[0]] = labels[:, 0]
        spread[:, kept[:-1] + 1] = labels[:, 1:]
        labels = spread
    check_shapes(tokens, labels=labels)
    return labels, (labels[:, 1:].cpu() != IGNORED).nonzero(as_tuple=True)


@dataclass
class StepTexts:
    """The texts that groups of thoughts stand for, on the host: checked and read before any compute."""

    rows: torch.Tensor  # (M,), of the batch
    groups: torch.Tensor  # (M,), from 0
    ids: torch.Tensor  # (M, L), filled up by -100
    shares: torch.Tensor  # (M,): what each token of a text counts, before it is divided by the labels of the batch


# For a rank that has no text where others have: the same calls, and nothing of it counts.
NO_TEXT = StepTexts(torch.tensor([0]), torch.tensor([0]), torch.tensor([[0, 0]]), torch.tensor([0.0]))


@dataclass
class Targets:
    """What a batch must predict: the labels (B, T), the rows and positions (on the host) that predict one, texts."""

    labels: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    texts: StepTexts | None
    num_items: Any  # what sums of losses are divided by
    smoothing: float

    def mean(self, total: torch.Tensor) -> torch.Tensor:
        """A sum of losses over all labels; of a model on several devices their number may be on another one."""
        return total / (self.num_items.to(total.device) if torch.is_tensor(self.num_items) else self.num_items)


def states_before(hidden_states: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor | None:
    """
    The states (B, n, D) before latent positions, which thoughts are or, in a control, would have been; zeros after
    the last of a row. `hidden_states` (B, T, D); `numbers` (B, T), on the host, as in [`~passes.Plan`].
    """
    if not numbers.any():
        return None
    rows, positions = numbers.nonzero(as_tuple=True)
    states = hidden_states.new_zeros(len(hidden_states), int(numbers.max()), hidden_states.shape[-1])
    return states.index_put((rows, numbers[rows, positions] - 1), hidden_states[rows, positions - 1])


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class StepDecoding:
    """What a model with a head learns from: labels, and the texts of groups of thoughts, which it can also write."""

    config: Any
    loss_function: Any
    generation_config: Any
    model: Any
    lm_head: Any
    generate: Any

    def cache_beside(self, labels: Any, past_key_values: Any, *, use_cache: bool | None) -> bool | None:
        """
        What `use_cache` is taken for: nobody goes on from a forward with labels, unless that is asked for, here or in
        the configuration, where `Trainer` writes its own.
        """
        is_open = use_cache is None and past_key_values is None and labels is not None
        return False if is_open and not getattr(self.config, "use_cache", False) else use_cache

    def read_targets(
        self,
        labels: torch.Tensor | None,
        step_ids: torch.Tensor | None,
        tokens: torch.Tensor,
        latent_mask: torch.Tensor | None,
        logits_to_keep: int | torch.Tensor,
        smoothing: float = 0.0,
        num_items_in_batch: Any = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Targets | None:
        """
        What a batch must predict, checked and on the host; `None` without labels.

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): As in `forward`.
            step_ids (`torch.LongTensor` of shape `(B, G, L)`, *optional*): As in `forward`.
            tokens (`torch.Tensor` of shape `(B, T)`): Ids, or without them anything.
            latent_mask (`torch.BoolTensor` of shape `(B, T)`, *optional*): Where thoughts are; where ids say so.
            logits_to_keep (`int` or `torch.LongTensor`): The positions that labels of another length belong to.
            smoothing (`float`, defaults to 0): The share of each target that all tokens have in equal parts.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): Labels of the whole optimizer step.
            position_ids, attention_mask (`torch.Tensor`, *optional*): As in `forward`; they tell packed rows.

        Raises:
            ValueError: no label at all, or texts of packed rows; see also `read_step_ids`.
        """
        if labels is None:
            if step_ids is not None:
                raise ValueError(
                    "`step_ids` came without `labels`, so the loss that they are part of would be lost. Pass both or "
                    "neither (`label_smoothing_factor` and `compute_loss_func` take labels away). "
                    "`StageTrainer` smooths both losses."
                )
            return None
        labels, (rows, positions) = place_labels(labels, tokens, logits_to_keep)
        if len(rows) == 0 and num_items_in_batch is None:
            raise ValueError("`labels` are all -100, so there is no loss. Give at least one position a label.")
        latent_id = -1 if self.config.latent_token_id is None else self.config.latent_token_id
        latents = tokens == latent_id if latent_mask is None else latent_mask
        texts = None if step_ids is None else self.read_step_ids(step_ids, rows, latents)
        if texts is not None and position_ids is not None:
            if packed_samples(position_ids, attention_mask, tokens) is not None:
                raise ValueError(
                    "`step_ids` cannot be used with packed rows: groups and shares of the loss are those of a row, "
                    "not of its samples. Pad instead."
                )
        num_items = len(rows) if num_items_in_batch is None else num_items_in_batch
        return Targets(labels, rows, positions, texts, num_items, smoothing)

    def read_step_ids(self, step_ids: torch.Tensor, labelled_rows: torch.Tensor, latents: torch.Tensor) -> StepTexts:
        """
        The texts of a batch.

        Args:
            step_ids (`torch.LongTensor` of shape `(B, G, L)`): Token ids of each group's text; -100 behind it, and
                where a group stands for none.
            labelled_rows (`torch.LongTensor`): The row of each label, on the host.
            latents (`torch.BoolTensor` of shape `(B, T)`): Where thoughts are.

        Raises:
            ValueError: no weight; a text with a gap, without its thoughts, or without labels beside it.
        """
        if not self.config.step_loss_weight:
            raise ValueError(
                "`step_ids` came, but `config.step_loss_weight` is 0, so their loss would be lost. Set it (as "
                "`CurriculumCallback` does), or leave `step_ids` out."
            )
        if step_ids.dim() != 3 or len(latents) != len(step_ids):
            raise ValueError(
                f"`step_ids` has shape {tuple(step_ids.shape)}, expected (batch_size, groups, length) of the batch. "
                "Take all inputs from one collator."
            )
        ids, c_thought = step_ids.cpu().long(), self.config.c_thought
        is_text = ids != IGNORED  # (B, G, L)
        lengths = is_text.sum(dim=-1)  # (B, G)
        if ((torch.arange(ids.shape[-1]) < lengths[..., None]) != is_text).any() or (ids[is_text] < 0).any():
            raise ValueError("`step_ids` must be token ids, and -100 only behind those of a text. Mend the collator.")
        rows, groups = (lengths > 0).nonzero(as_tuple=True)
        num_thoughts = latents.sum(dim=1).cpu()
        num_labels = torch.bincount(labelled_rows, minlength=len(ids))  # (B,)
        for wrong, reason in (
            ((groups + 1) * c_thought > num_thoughts[rows], "more groups than it has thoughts for"),
            (num_thoughts[rows] // c_thought > ids.shape[1], "fewer groups than its thoughts are"),
            (num_labels[rows] == 0, "texts but no label, so that they would count nothing"),
        ):
            if wrong.any():
                sample = int(rows[wrong][0])
                raise ValueError(
                    f"Sample {sample}: `step_ids` has {reason}: {int((lengths[sample] > 0).sum())} texts, "
                    f"{int(num_thoughts[sample])} thoughts of which {c_thought} are a group (`config.c_thought`), "
                    f"{int(num_labels[sample])} labels. Take them all from the same StageDataset."
                )
        # (B,): a sample's texts count as much as its words. In float64, so that the loss of such a model is exact.
        shares = num_labels.double() / lengths.sum(dim=1).clamp(min=1)
        return StepTexts(rows, groups, ids[rows, groups], shares[rows])

    def word_loss(self, hidden_states: torch.Tensor, targets: Targets, **kwargs: Any) -> torch.Tensor:
        """
        The cross-entropy of all labels of a batch, whose logits alone are computed, as a sum over `num_items`.

        Args:
            hidden_states (`torch.FloatTensor` of shape `(B, T, D)`): What the head reads.
            targets ([`Targets`]): Of the batch.
            kwargs: For the model's `loss_function`, which computes it unless labels are smoothed.
        """
        rows, positions = (index.to(hidden_states.device) for index in (targets.rows, targets.positions))
        logits = self.lm_head(hidden_states[rows, positions])  # (labels, V)
        labels = targets.labels.to(hidden_states.device)[rows, positions + 1]
        if not targets.smoothing:
            vocab_size = self.config.text_config.vocab_size
            return self.loss_function(logits=logits, labels=None, shift_labels=labels, vocab_size=vocab_size, **kwargs)
        logits, smoothing = _widened(logits), targets.smoothing
        labels = labels.to(logits.device)
        return targets.mean(cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing))

    def step_loss(
        self,
        states: torch.Tensor | None,
        hidden_states: torch.Tensor,
        texts: StepTexts,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """
        The sum over samples of `number of labels * mean cross-entropy of the tokens of its texts`. Divided by all
        labels of a step it is a mean that does not change with how samples are split into batches and ranks.

        Args:
            states (`torch.FloatTensor` of shape `(B, n, D)`, *optional*): What thoughts are made of.
            hidden_states (`torch.FloatTensor` of shape `(B, T, D)`): Any of the batch.
            texts ([`StepTexts`]): Of the batch.
            smoothing (`float`, defaults to 0): As of the words.
        """
        if len(texts.rows) == 0 or states is None:
            if states is None or not is_sharded(self.model):
                return hidden_states.new_zeros((), dtype=torch.float32)
            texts, states = NO_TEXT, states[:1, :1].expand(-1, self.config.c_thought, -1)
        ids = texts.ids  # (M, L)
        thoughts = self._groups(states)[texts.rows, texts.groups]  # (M, c_thought, D)
        words = self.model.get_input_embeddings()(ids[:, :-1].clamp(min=0).to(thoughts.device))  # (M, L - 1, D)
        inputs_embeds = torch.cat([thoughts, words.to(thoughts)], dim=1)
        outputs = self.model.language_model(inputs_embeds=inputs_embeds, use_cache=False)
        rows, places = (ids != IGNORED).nonzero(as_tuple=True)  # the K tokens of all texts
        places_of_logits = places + self.config.c_thought - 1
        logits = _widened(self.lm_head(outputs.last_hidden_state[rows, places_of_logits]))  # (K, V)
        wanted = ids[rows, places].to(logits.device)
        losses = cross_entropy(logits, wanted, reduction="none", label_smoothing=smoothing)  # (K,)
        return (losses * texts.shares[rows].to(losses)).sum()

    @torch.no_grad()
    def read_thoughts(
        self, thoughts: torch.Tensor | None, *, max_new_tokens: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """
        What thoughts stand for, in words: each group of `config.c_thought` is given alone to the language model, which
        was trained to write the step, or the answer, that it stands for (`step_loss_weight`). Readable is not used:
        diagnose.py says whether answers follow from them.

        Args:
            thoughts (`torch.FloatTensor` of shape `(batch_size, num_thoughts, hidden_size)`): Such as `generate(...,
                return_thoughts=True)` returns. Groups of zeros, behind the last thought of a row, are read as nothing.
            max_new_tokens (`int`, *optional*): Of the longest text; that of a `generation_config` given here, else 64.
            kwargs: Any argument of [`~transformers.GenerationMixin.generate`] with which it returns token ids.

        Returns:
            `torch.LongTensor` of shape `(batch_size, groups * num_return_sequences, length)`, padded on the right.

        Raises:
            ValueError: thoughts that are no whole groups, in any row; or of a model without a step loss.
        """
        c_thought = self.config.c_thought
        if not self.config.step_loss_weight:
            raise ValueError(
                "`config.step_loss_weight` is 0: the thoughts of this checkpoint were not trained to be read. Train "
                "with `--step_loss_weight 1`."
            )
        if thoughts is None:  # as `generate` returns them of such prompts
            raise ValueError(
                "`thoughts` is None: the prompts had no thoughts to read. Ask with `num_thoughts`, at least "
                f"`config.c_thought` {c_thought}."
            )
        if thoughts.dim() != 3 or thoughts.shape[1] % c_thought or kwargs.get("return_dict_in_generate"):
            raise ValueError(
                f"`thoughts` have shape {tuple(thoughts.shape)}, expected (batch_size, num_thoughts, hidden_size), "
                f"in whole groups of `config.c_thought` {c_thought}; and `return_dict_in_generate` is not taken."
            )
        places = torch.arange(1, thoughts.shape[1] + 1, device=thoughts.device)
        num_thoughts = pad(thoughts.any(dim=-1) * places, (1, 0)).amax(dim=1)  # (B,): up to the last that is not zero
        if (num_thoughts % c_thought).any():
            row = int((num_thoughts % c_thought).nonzero()[0])
            raise ValueError(
                f"Row {row} of `thoughts` has {int(num_thoughts[row])} thoughts before its zeros, which are no whole "
                f"groups of `config.c_thought` {c_thought}. Leave out those behind its last whole group."
            )
        groups = self._groups(thoughts).flatten(0, 1)  # (B * groups, c_thought, D)
        is_read = groups.flatten(1).any(dim=1)
        given = kwargs.get("generation_config")
        chosen = {name: value for name, value in vars(given or self.generation_config).items() if value is not None}
        settings = vars(self.generation_config) | chosen | kwargs  # what is left open is the checkpoint's
        if not is_read.any():
            num_texts = thoughts.shape[1] // c_thought * (settings.get("num_return_sequences") or 1)
            return thoughts.new_empty(len(thoughts), num_texts, 0, dtype=torch.long)
        embeds = groups[is_read].to(self.model.get_input_embeddings().weight)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        inputs = {"inputs_embeds": embeds, "attention_mask": mask, "latent_mask": mask == 0}
        if max_new_tokens is None:
            max_new_tokens = (given and given.max_new_tokens) or 64
        kwargs |= inputs | {"max_new_tokens": max_new_tokens, "return_dict_in_generate": False}
        written = self.generate(**kwargs).unflatten(0, (len(embeds), -1))  # (groups, sequences, length)
        fill = settings.get("pad_token_id")
        if fill is None:  # as `generate` does
            ends = settings.get("eos_token_id")
            fill = ends[0] if isinstance(ends, (list, tuple)) else ends or 0
        ids = written.new_full((len(groups), *written.shape[1:]), fill)
        ids[is_read.to(ids.device)] = written
        return ids.flatten(0, 1).unflatten(0, (len(thoughts), -1))

    def _groups(self, thoughts: torch.Tensor) -> torch.Tensor:
        """Thoughts (B, n, D) as whole groups (B, n // c_thought, c_thought, D)."""
        c_thought = self.config.c_thought
        return thoughts[:, : thoughts.shape[1] // c_thought * c_thought].unflatten(1, (-1, c_thought))
