"""Tools that look inside see the whole sequence through `embed_thoughts`; docs/inside.md, which shows it, runs."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from boards import counted_passes
from captum.attr import FeatureAblation, IntegratedGradients
from nnsight import NNsight
from peft import LoraConfig, PeftModel, get_peft_model

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor


ROOT = Path(__file__).parents[2]
INTERNVL = ROOT / "tests" / "golden" / "internvl"


@pytest.fixture(scope="module")
def model(folder):
    return MultiCoCoForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def asked(folder, boards):
    """Eight boards as one batch, with padding on the left."""
    processor = MultiCoCoProcessor.from_pretrained(folder)
    chats = []
    for number, board in enumerate(boards[:8]):
        question = board["question"] + (" Think." if number == 0 else "")
        parts = [{"type": "image", "path": board["images"][0]}, {"type": "text", "text": question}]
        chats.append([{"role": "user", "content": parts}])
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert not inputs["attention_mask"].all()
    return inputs.to(torch.float64)


@pytest.fixture(scope="module")
def embedded(model, asked):
    """What one plain pass takes, and what the passes gave: logits (B, T, V)."""
    with torch.no_grad():
        embeds = model.embed_thoughts(**asked)
        expected = model(**asked).logits
    mask = asked["attention_mask"]
    plain = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    return plain, expected


def test_the_page_runs(tmp_path, capsys):
    page = (ROOT / "docs" / "inside.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|py)\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == page.count("```") // 2
    script = "\n\n".join(blocks)
    for name, value in (
        ('"OpenGVLab/InternVL3-1B"', INTERNVL / "checkpoint"),
        ('"street.jpg"', INTERNVL / "images" / "square.png"),
    ):
        assert name in script
        script = script.replace(name, f'"{value}"')
    (tmp_path / "inside.py").write_text(script)  # a file: nnsight reads the source of its blocks
    runpy.run_path(str(tmp_path / "inside.py"))
    assert "thoughts:" in capsys.readouterr().out


def test_one_plain_pass_gives_what_the_passes_give(model, asked, embedded, budget):
    plain, expected = embedded
    nowhere = torch.zeros(plain["inputs_embeds"].shape[:2], dtype=torch.bool)
    with counted_passes(model) as passes, torch.no_grad():
        model(**asked)
        again = model(**plain, latent_mask=nowhere).logits
    assert passes.counts == [budget + 1, 1]
    real = plain["attention_mask"].bool()
    torch.testing.assert_close(again[real], expected[real], atol=1e-12, rtol=1e-12)


def test_captum_attributes_the_answer(model, asked, embedded):
    plain, expected = embedded
    answers = expected[:, -1].argmax(dim=-1)
    embeds, others = plain["inputs_embeds"], (plain["attention_mask"], plain["position_ids"])
    neutral = model.get_input_embeddings().weight.mean(dim=0).detach()  # zeros are no input: the norm scales them up

    def next_word(inputs_embeds, attention_mask, position_ids):
        states = model.model.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids
        ).last_hidden_state
        return model.lm_head(states[:, -1])

    shares, error = IntegratedGradients(next_word).attribute(
        embeds,
        baselines=neutral.expand_as(embeds).contiguous(),
        target=answers,
        additional_forward_args=others,
        n_steps=200,
        internal_batch_size=64,
        return_convergence_delta=True,
    )
    with torch.no_grad():
        fall = next_word(embeds, *others) - next_word(neutral.expand_as(embeds), *others)
    fall = fall.gather(1, answers[:, None])[:, 0]
    assert (error.abs() < 0.01 * fall.abs()).all()  # the shares add up to what is to be shared
    assert torch.allclose(shares.sum(dim=(1, 2)) - error, fall)

    latent = asked["input_ids"] == model.config.latent_token_id
    without = FeatureAblation(next_word).attribute(
        embeds,
        baselines=neutral.expand_as(embeds).contiguous(),
        target=answers,
        additional_forward_args=others,
        feature_mask=latent.long()[..., None].expand_as(embeds),
    )
    lost = without[latent].view(*latent.shape[:1], -1)
    assert (lost == lost[:, :1]).all()
    assert lost.min() > 3  # of the answer's logit: the thoughts carry it


def test_nnsight_sees_all_positions_and_changes_one(model, embedded, asked):
    plain, _ = embedded
    seen = []
    layer = model.model.language_model.layers[-1]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        expected = model.model.language_model(**plain).last_hidden_state
    handle.remove()
    traced = NNsight(model.model.language_model)
    with torch.no_grad(), traced.trace(**plain):
        output = traced.layers[-1].output.save()
        states = traced.output.last_hidden_state.save()
    torch.testing.assert_close(output, seen[0], atol=0, rtol=0)
    torch.testing.assert_close(states, expected, atol=0, rtol=0)

    place = int((asked["input_ids"][0] == model.config.latent_token_id).nonzero()[0])
    with torch.no_grad(), traced.trace(**plain):
        traced.layers[0].output[:, place] = 0
        changed = traced.output.last_hidden_state.save()
    torch.testing.assert_close(changed[:, :place], expected[:, :place], atol=0, rtol=0)
    assert (changed[:, place:] - expected[:, place:]).abs().amax(dim=(1, 2)).min() > 1e-3


class Plain(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head

    def forward(self, inputs_embeds, attention_mask, position_ids):
        states = self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return self.lm_head(states)


def test_a_plain_pass_is_exported_and_loaded(model, embedded, tmp_path):
    plain, expected = embedded
    with torch.no_grad():
        program = torch.export.export(Plain(model), (), plain, strict=False)
    torch.export.save(program, tmp_path / "plain.pt2")
    logits = torch.export.load(tmp_path / "plain.pt2").module()(**plain)
    real = plain["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-12, rtol=1e-12)


def test_peft_trains_the_rows_of_the_thought_tokens(folder, asked, boards, budget, tmp_path):
    """LoRA and three rows, which are those of the head too, since this checkpoint ties them."""

    def load():
        return MultiCoCoForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)

    model = load()
    config = model.config
    rows = [config.start_latent_id, config.latent_token_id, config.end_latent_id]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    peft_model = get_peft_model(
        model,
        LoraConfig(
            r=4,
            target_modules=r".*language_model.*\.(q_proj|v_proj)",
            trainable_token_indices={"language_model.embed_tokens": rows},
        ),
    )
    processor = MultiCoCoProcessor.from_pretrained(folder)
    labels = torch.full_like(asked["input_ids"], -100)
    labels[:, -1] = torch.tensor(
        [processor.tokenizer.encode(f"### {board['answer']}")[0] for board in boards[1:9]]  # others', to move at all
    )
    trained = [weight for weight in peft_model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(3):
        with counted_passes(peft_model.get_base_model()) as passes:
            loss = peft_model(**asked, labels=labels).loss
        assert passes.counts == [budget + 1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    peft_model.eval()
    with torch.no_grad():
        expected = peft_model(**asked).logits
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**asked).logits, expected, atol=1e-12, rtol=1e-12)

    merged = loaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(**asked).logits, expected, atol=1e-9, rtol=1e-9)
    after = merged.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    embeddings, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
    assert torch.equal(after[embeddings], after[head])
    adapted = {name for name in before if re.search(r"language_model.*(q|v)_proj.weight", name)}
    assert changed == {embeddings, head} | adapted
    moved = (after[embeddings] != before[embeddings]).any(dim=1).nonzero().flatten().tolist()
    assert moved == sorted(rows)

    merged.save_pretrained(tmp_path / "merged")
    answers = MultiCoCoForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    output = answers.generate(**asked, max_new_tokens=2)
    assert torch.equal(output, merged.generate(**asked, max_new_tokens=2))
