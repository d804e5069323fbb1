"""The plain definition that every fast path is compared with: no cache, no padding, one sample at a time.

A thought is computed by running the whole prefix again. Images are placed by a loop over positions. Nothing here calls
the code under test; it uses the same modules (tower, projector, language model, head) in the slowest, plainest way.
"""

import contextlib

import torch


@contextlib.contextmanager
def widened():
    """
    Keeps float64 where transformers casts to float32 inside: norms, eager softmax, loss. The rotary table stays as it
    is, provided that the model was made with `dtype=` (`model.to(torch.float64)` casts its frequencies too). Run
    forward *and* backward inside, as a checkpointed layer is computed again in the backward.
    """
    to, to_float, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax

    def wide_to(tensor, *args, **kwargs):
        narrows = any(arg is torch.float32 for arg in (*args, kwargs.get("dtype")))
        return tensor if narrows and tensor.dtype == torch.float64 else to(tensor, *args, **kwargs)

    def wide_float(tensor, *args, **kwargs):
        is_table = tensor.shape[-1:] == (1,)  # the frequencies of the rotary table
        return tensor if tensor.dtype == torch.float64 and not is_table else to_float(tensor, *args, **kwargs)

    def wide_softmax(tensor, *args, **kwargs):
        if tensor.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return softmax(tensor, *args, **kwargs)

    torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = wide_to, wide_float, wide_softmax
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax = to, to_float, softmax


def split_rows(batch):
    """Each row without its padding, with the tiles of its own images: a list of batches of one."""
    tiles = iter(batch.get("num_patches_list") or [])
    rows, first = [], 0
    for ids, mask, labels, counts in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], batch["images"], strict=True
    ):
        num_tiles = sum(next(tiles) for _ in counts)
        pixel_values = batch["pixel_values"][first : first + num_tiles] if num_tiles else None
        rows.append({"input_ids": ids[mask], "labels": labels[mask], "pixel_values": pixel_values})
        first += num_tiles
    return rows


def add_texts(batch, lengths):
    """The batch with random texts: `lengths` are those of each sample's groups, 0 where a group has none."""
    generator = torch.Generator().manual_seed(3)
    shape = (len(lengths), max(map(len, lengths)), max(map(max, filter(None, lengths)), default=0))
    step_ids = torch.full(shape, -100)
    for sample, groups in enumerate(lengths):
        for group, length in enumerate(groups):
            step_ids[sample, group, :length] = torch.randint(5, 600, (length,), generator=generator)
    return {**batch, "step_ids": step_ids}


def reference_embeds(model, input_ids, pixel_values, edit_thoughts=None, upto=None):
    """(T, D) input embeddings of one unpadded sample with its image features and its thoughts filled in."""
    embeds = list(model.get_input_embeddings()(input_ids))
    if pixel_values is not None:
        features = [model.get_image_features(tile[None], return_dict=True).pooler_output[0] for tile in pixel_values]
        features = iter(torch.cat(features))
        embeds = [
            next(features) if token == model.config.image_token_id else embed
            for token, embed in zip(input_ids.tolist(), embeds, strict=True)
        ]
    thoughts = []
    for position, token in enumerate(input_ids.tolist()):
        if token == model.config.latent_token_id:
            prefix = torch.stack(embeds[:position])[None]
            thought = model.model.language_model(inputs_embeds=prefix, use_cache=False).last_hidden_state[0, -1]
            if model.config.thought_feedback == "rms_match":
                thought = thought * (embeds[position].square().mean() / thought.square().mean()).sqrt()
            is_control = model.config.thought_feedback.startswith("latent")
            fed = embeds[position] if is_control else thought  # a control feeds its embedding
            if edit_thoughts is not None:
                fed = edit_thoughts(fed[None], len(thoughts))[0]
            embeds[position] = fed
            thoughts.append(thought if is_control else fed)  # of a control what would have been one
    return torch.stack(embeds), thoughts


def reference_logits(model, input_ids, pixel_values, edit_thoughts=None):
    """(T, V) logits and the list of thoughts of one unpadded sample."""
    embeds, thoughts = reference_embeds(model, input_ids, pixel_values, edit_thoughts)
    hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
    return model.lm_head(hidden), thoughts


def reference_loss(model, batch, edit_thoughts=None):
    """Mean of the negative log-likelihood over all labels of the batch."""
    total, count = 0.0, 0
    for row in split_rows(batch):
        logits, _ = reference_logits(model, row["input_ids"], row["pixel_values"], edit_thoughts)
        logprobs = logits.log_softmax(dim=-1)
        for position, label in enumerate(row["labels"].tolist()):
            if label != -100 and position > 0:
                total = total - logprobs[position - 1, label]
                count += 1
    return total / count


def reference_text_losses(model, thoughts, texts):
    """Of one sample's thoughts, a list of (D,), the negative log-likelihood of each token of its groups' texts."""
    embed, c_thought, losses = model.get_input_embeddings(), model.config.c_thought, []
    for group, text in enumerate(texts):
        group = thoughts[group * c_thought : (group + 1) * c_thought]
        text = torch.tensor([token for token in text if token != -100], dtype=torch.long)
        for place, token in enumerate(text.tolist()):
            prefix = torch.stack([*group, *embed(text[:place])])[None]
            hidden = model.model.language_model(inputs_embeds=prefix, use_cache=False).last_hidden_state[0, -1]
            losses.append(-model.lm_head(hidden).log_softmax(dim=-1)[token])
    return losses


def reference_step_losses(model, batch):
    """
    The loss with `batch["step_ids"]`, and its part that is not of the words: sum of n (words + weight * steps) over
    sum of n. Of a sample n is the number of its labels, `words` their mean, and `steps` the mean over the tokens of
    its texts, each of which is written after its group of thoughts alone.
    """
    words, steps, count = 0.0, 0.0, 0
    for row, texts in zip(split_rows(batch), batch["step_ids"].tolist(), strict=True):
        logits, thoughts = reference_logits(model, row["input_ids"], row["pixel_values"])
        logprobs = logits.log_softmax(dim=-1)
        labels = [(place, label) for place, label in enumerate(row["labels"].tolist()) if place and label != -100]
        words = words - sum(logprobs[place - 1, label] for place, label in labels)
        losses = reference_text_losses(model, thoughts, texts)
        steps = steps + (len(labels) * sum(losses) / len(losses) if losses else 0.0)
        count += len(labels)
    return (words + model.config.step_loss_weight * steps) / count, steps / count


def reference_generate(model, input_ids, pixel_values, max_new_tokens, suppress=(), eos=()):
    """Greedy new tokens of one sample; the whole sequence is run again for every token."""
    embeds, _ = reference_embeds(model, input_ids, pixel_values)
    return reference_continuation(model, embeds, max_new_tokens, suppress, eos)


def reference_continuation(model, embeds, max_new_tokens, suppress=(), eos=()):
    """Greedy new tokens after embeddings (T, D)."""
    new_tokens = []
    for _ in range(max_new_tokens):
        hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, -1]
        scores = model.lm_head(hidden)
        scores[list(suppress)] = -torch.inf
        new_tokens.append(int(scores.argmax()))
        if new_tokens[-1] in eos:
            break
        token = torch.tensor(new_tokens[-1:], device=embeds.device)
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)])
    return new_tokens


def loss_and_grads(model, loss_fn):
    """The loss and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    with widened():
        loss = loss_fn()
        loss.backward()
    grads = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def assert_same_grads(grads, expected, atol=1e-9, ignore_zero=()):
    """All gradients equal, and the same parameters have one (a gradient of exact zeros counts as none)."""
    names = {name for name, grad in grads.items() if grad.any()}
    expected_names = {name for name, grad in expected.items() if grad.any()}
    assert names == expected_names
    for name in sorted(names):
        torch.testing.assert_close(
            grads[name], expected[name], atol=atol, rtol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


@contextlib.contextmanager
def training(model, checkpointing=False):
    """The model in training mode, with or without activation checkpointing; as it was afterwards."""
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    try:
        yield model
    finally:
        if checkpointing:
            model.activation_checkpointing_disable()
        model.eval()
