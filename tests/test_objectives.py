"""The step loss is its definition written out one sample at a time, in float64, with all gradients, from the words of
records to the weights after a step of the stock `Trainer`; and thoughts are read as a loop over tokens reads them."""

import copy

import pytest
import torch
from conftest import model_inputs
from reference import (
    add_texts,
    assert_same_grads,
    loss_and_grads,
    reference_continuation,
    reference_loss,
    reference_step_losses,
    split_rows,
    training,
    widened,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GenerationConfig, Trainer, TrainingArguments

from multicoco.configuration_multicoco import CONTROL_FEEDBACK, FEEDBACKS
from multicoco.curriculum import CurriculumArguments, draw_rationale
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.objectives import Targets
from multicoco.records import load_records


WEIGHT = 0.7


def prepare(model, c_thought, feedback="identity"):
    model.config.step_loss_weight, model.config.c_thought = WEIGHT, c_thought
    model.config.thought_feedback = feedback
    return model


def assert_is_the_definition(model, batch, base=None, checkpointing=False, expects_texts=True):
    """Loss, step loss and the gradients of all parameters; `base` is the model inside adapters."""
    base, expected, found = base or model, [], []
    expected_loss, expected_grads = loss_and_grads(
        model, lambda: expected.extend(reference_step_losses(base, batch)) or expected[0]
    )
    with training(model), training(base, checkpointing):
        loss, grads = loss_and_grads(model, lambda: found.append(model(**model_inputs(batch))) or found[0].loss)
    torch.testing.assert_close(loss, expected_loss, atol=1e-11, rtol=0)
    step_loss = torch.as_tensor(expected[1], dtype=torch.float64).detach()
    torch.testing.assert_close(found[0].step_loss.detach(), step_loss, atol=1e-11, rtol=0, check_dtype=False)
    assert (step_loss > 0) == expects_texts
    assert_same_grads(grads, expected_grads)


CASES = {
    "one_thought_each": (dict(num_thoughts=(3, 2), images=((1,), (2,))), 1, ((2, 3, 1), (1, 4))),
    "two_thoughts_each": (dict(num_thoughts=(4, 3), images=((1,), ()), padding="right"), 2, ((3, 2), (2,))),
    "rows_without_thoughts": (
        dict(num_thoughts=(3, 0, 1), images=((1, 2), (1,), ()), padding="left", answer_lengths=(1, 7, 4)),
        1,
        ((2, 0, 1), (), (4,)),
    ),
    "some_without_texts": (dict(num_thoughts=(2, 2), images=((), ()), answer_lengths=(2, 6)), 2, ((3,), ())),
    "words_between": (dict(num_thoughts=(3, 1), images=((1,), ()), split_block=True), 1, ((1, 2, 2), (3,))),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_definition(model, make_batch, case, checkpointing):
    drawn, c_thought, lengths = CASES[case]
    batch = add_texts(make_batch(**drawn), lengths)
    assert_is_the_definition(prepare(model, c_thought), batch, checkpointing=checkpointing)


@pytest.mark.parametrize("feedback", sorted(set(FEEDBACKS) - {"identity"}))
def test_what_is_decoded_is_the_thought_or_in_a_control_what_it_would_have_been(model, make_batch, feedback):
    drawn, _, _ = CASES["rows_without_thoughts"]
    batch = add_texts(make_batch(**{**drawn, "num_thoughts": (4, 0, 2)}), ((2, 3), (), (4,)))
    assert_is_the_definition(prepare(model, 2, feedback), batch)
    if feedback in CONTROL_FEEDBACK.values():  # nothing of it reaches the words
        batch["step_ids"] = torch.nn.functional.pad(batch["step_ids"], (0, 0, 0, 2), value=-100)  # groups of one, too
        with torch.no_grad():
            logits = [prepare(model, c, feedback)(**model_inputs(batch)).logits for c in (1, 2)]
            without = model(**{name: value for name, value in model_inputs(batch).items() if name != "step_ids"})
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], without.logits)


def test_adapters_get_the_gradients_of_the_definition(model, make_batch):
    peft = pytest.importorskip("peft", reason="LoRA needs the package peft (`pip install multicoco[peft]`)")
    drawn, c_thought, lengths = CASES["rows_without_thoughts"]
    config = peft.LoraConfig(r=2, lora_dropout=0.0, target_modules=r"model\.language_model.*\.(q_proj|down_proj)")
    adapted = peft.get_peft_model(prepare(model, c_thought), config, autocast_adapter_dtype=False)
    for name, param in adapted.named_parameters():
        if "lora_B" in name:  # which start as zeros
            torch.nn.init.normal_(param, std=0.2, generator=torch.Generator().manual_seed(param.numel()))
    assert_is_the_definition(adapted, add_texts(make_batch(**drawn), lengths), base=model)


@pytest.mark.parametrize("num_thoughts", [(0, 0), (2, 1)], ids=["no_thoughts", "thoughts_without_texts"])
def test_without_texts_the_loss_is_that_of_the_words(model, make_batch, num_thoughts):
    batch = add_texts(make_batch(num_thoughts=num_thoughts), ((), ()))
    assert batch["step_ids"].shape == (2, 0, 0)
    assert_is_the_definition(prepare(model, 1), batch, expects_texts=False)
    with widened():
        torch.testing.assert_close(model(**model_inputs(batch)).loss, reference_loss(model, batch), atol=1e-11, rtol=0)


def test_of_accumulated_batches_the_sum_is_the_whole(model, make_batch):
    """By `num_items_in_batch`, as trainers pass it, also where a batch has nothing to read or no label."""
    drawn = dict(num_thoughts=(2, 0, 2, 1), images=((1,), (), (), ()), answer_lengths=(1, 3, 8, 0))
    batch = add_texts(make_batch(**drawn), ((3, 1), (), (2,), ()))
    prepare(model, 1)
    with training(model):
        whole, grads = loss_and_grads(model, lambda: model(**model_inputs(batch)).loss)
        parts = []
        for sample in range(4):
            part = {name: batch[name][[sample]] for name in ("input_ids", "attention_mask", "labels", "step_ids")}
            if sample == 0:
                part |= {name: batch[name] for name in ("pixel_values", "num_patches_list")}
            parts.append(part)
        losses, accumulated = loss_and_grads(
            model, lambda: sum(model(**part, num_items_in_batch=torch.tensor(12)).loss for part in parts)
        )
    torch.testing.assert_close(losses, whole, atol=1e-11, rtol=0)
    assert_same_grads(accumulated, grads)


def test_the_number_of_labels_may_be_on_another_device():
    """`Trainer` counts where the inputs are; the last layers of a model on several devices, and its loss, are not."""
    with FakeTensorMode():
        total, count = torch.ones((), device="cuda:1"), torch.ones((), device="cuda:0")
        targets = Targets(labels=total, rows=total, positions=total, texts=None, num_items=count, smoothing=0.0)
        assert targets.mean(total).device == total.device


def test_in_bfloat16_it_trains(model, make_batch):
    model = prepare(model, 2).to(torch.bfloat16)
    batch = add_texts(make_batch(num_thoughts=(4, 2), images=((), ())), ((3, 2), (4,)))
    with training(model):
        output = model(**model_inputs(batch))
        output.loss.backward()
    assert output.step_loss.dtype == torch.float32
    assert all(param.grad is None or param.grad.isfinite().all() for param in model.parameters())


# --- from records to weights -------------------------------------------------------------------------------------


RECORDS = [
    {"question": "Where?", "steps": ["go up", "go left", "stop"], "answer": "red"},
    {"question": "Where to, then?", "steps": ["stay here"], "answer": "dark blue"},
    {"question": "How?", "rationales": [["by car"], ["on foot", "by bus"], ["by car", "a", "b"]], "answer": "both"},
    {"question": "1 + 1?", "steps": ["add 1", "get 2", "so 2", "so it is"], "answer": "2, as everyone can see"},
]


@pytest.fixture(scope="module")
def make_dataset(processor):
    records = load_records([{"id": str(number), "images": [], **row} for number, row in enumerate(RECORDS)])

    def make(**settings):
        settings = {"c_thought": 1, "max_latent_stage": 4, "step_loss_weight": WEIGHT, **settings}
        return StageDataset(records, processor, CurriculumArguments(**settings), seed=5)

    return make


def texts_by_hand(dataset, index, num_groups):
    """What the groups of a sample stand for, from its record, in words."""
    record = RECORDS[dataset.record_of(index)]
    steps = record.get("steps")
    if steps is None:
        number = draw_rationale(len(record["rationales"]), (dataset.seed, dataset.epoch, index))
        steps = record["rationales"][number]
    answer = f"### {record['answer']}<|im_end|>"
    return [f"{steps[group]}\n<|im_end|>" if group < len(steps) else answer for group in range(num_groups)]


SETTINGS = {  # and whether there are surplus groups
    "scheduled": ({}, True),
    "two_thoughts_a_step": ({"c_thought": 2}, True),
    "drawn_surplus": ({"draw_surplus": True}, True),
    "mixed_linearly": ({"mix": "linear", "draw_surplus": True}, True),
    "mixed_uniformly": ({"mix": "uniform", "draw_surplus": True}, False),
    "pause": ({"mode": "pause", "c_thought": 2}, True),
}


@pytest.mark.parametrize(("settings", "has_surplus"), SETTINGS.values(), ids=SETTINGS.keys())
def test_each_group_stands_for_its_step_and_a_surplus_one_for_the_answer(
    make_dataset, processor, settings, has_surplus
):
    dataset, seen = make_dataset(**settings), set()
    latent = processor.tokenizer.convert_tokens_to_ids("<|latent|>")
    for epoch in range(8):
        for stage in range(dataset.curriculum.last_stage + 1):
            dataset.set_stage(stage, epoch)
            for index in range(len(dataset)):
                sample = dataset[index]
                num_groups = sample["input_ids"].count(latent) // dataset.curriculum.c_thought
                texts = texts_by_hand(dataset, index, num_groups)
                assert [processor.tokenizer.decode(ids) for ids in sample["step_ids"]] == texts
                seen |= {text.startswith("###") for text in texts}
    assert seen == {False, has_surplus}


@pytest.mark.parametrize("settings", [{"mode": "cot"}, {"mode": "no_thoughts"}, {"step_loss_weight": 0.0}], ids=str)
def test_where_nothing_is_to_be_read_no_texts_are_made(make_dataset, processor, settings):
    dataset = make_dataset(**settings)
    dataset.set_stage(dataset.curriculum.last_stage)
    assert "step_ids" not in dataset[0]
    assert "step_ids" not in ReasoningCollator(processor)([dataset[0], dataset[1]])


@pytest.mark.parametrize("c_thought", [1, 2])
def test_batches_of_records_have_the_loss_of_the_definition(model, make_dataset, processor, c_thought):
    dataset = make_dataset(c_thought=c_thought, draw_surplus=True, mix="linear", mix_prob=0.5)
    dataset.set_stage(dataset.curriculum.last_stage, epoch=1)
    batch = ReasoningCollator(processor)([dataset[index] for index in range(len(dataset))])
    texts = [texts_by_hand(dataset, row, int(count)) for row, count in enumerate(num_groups(model, batch, c_thought))]
    written = copy.deepcopy(batch) | {"images": [()] * len(dataset)}
    written["step_ids"].fill_(-100)
    for row, groups in enumerate(texts):
        for group, text in enumerate(groups):
            ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            written["step_ids"][row, group, : len(ids)] = torch.tensor(ids)
    with torch.no_grad(), widened():
        expected, _ = reference_step_losses(prepare(model, c_thought), written)
        torch.testing.assert_close(model(**batch).loss, expected, atol=1e-11, rtol=0)


def num_groups(model, batch, c_thought):
    return (batch["input_ids"] == model.config.latent_token_id).sum(dim=1) // c_thought


def test_eight_small_batches_train_as_a_large_one_in_the_stock_trainer(
    shared_model, make_dataset, processor, tmp_path
):
    dataset = make_dataset(mix="linear", draw_surplus=True)
    dataset.set_stage(4, epoch=2)
    data = [dataset[index % 4] for index in range(8)]
    assert len({sum(label != -100 for label in sample["labels"]) for sample in data}) > 2
    weights = []
    for size, steps in ((8, 1), (1, 8), (2, 4)):
        model = prepare(copy.deepcopy(shared_model), 1)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        settings |= {"learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        settings |= {"remove_unused_columns": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        settings |= {"save_strategy": "no", "output_dir": str(tmp_path)}
        trainer = Trainer(model, TrainingArguments(**settings), ReasoningCollator(processor), data)
        with widened():
            trainer.train()
        weights.append(dict(model.named_parameters()))
    before = dict(shared_model.named_parameters())
    assert any((weights[0][name] - before[name]).abs().max() > 1e-3 for name in before)
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(
                other[name], weight, atol=1e-11, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
            )


# --- errors ------------------------------------------------------------------------------------------------------


def two_rows(make_batch, lengths=((2, 3), (1,)), **drawn):
    return add_texts(make_batch(**{"num_thoughts": (2, 1), "images": ((), ()), **drawn}), lengths)


WRONG = {
    "no_weight": (lambda batch: batch, 0.0, "`config.step_loss_weight` is 0.*Set it"),
    "no_labels": (lambda batch: {**batch, "labels": None}, 1.0, "came without `labels`.*Pass both"),
    "two_dimensions": (lambda batch: {**batch, "step_ids": batch["step_ids"][0]}, 1.0, r"shape \(2, 3\).*collator"),
    "other_rows": (lambda batch: {**batch, "step_ids": batch["step_ids"][:1]}, 1.0, r"shape \(1, 2, 3\).*collator"),
}


@pytest.mark.parametrize(("change", "weight", "message"), WRONG.values(), ids=WRONG.keys())
def test_texts_that_would_be_lost_are_refused(
    shared_model, computed, make_batch, change, weight, message, monkeypatch
):
    monkeypatch.setattr(shared_model.config, "step_loss_weight", weight)
    monkeypatch.setattr(shared_model.config, "c_thought", 1)
    computed.clear()
    with pytest.raises(ValueError, match=f"`step_ids`.*{message}"):
        shared_model(**model_inputs(change(two_rows(make_batch))))
    assert computed == []


ROWS = {
    "more_groups": (dict(lengths=((1, 1), (1, 1))), "Sample 1: `step_ids` has more groups.*2 texts, 1 thoughts"),
    "fewer_groups": (dict(lengths=((1,), (1,))), "Sample 0: `step_ids` has fewer groups.*1 texts, 2 thoughts"),
    "no_label": (dict(answer_lengths=(2, 0)), "Sample 1: `step_ids` has texts but no label.*0 labels"),
}


@pytest.mark.parametrize(("drawn", "message"), ROWS.values(), ids=ROWS.keys())
def test_texts_without_their_thoughts_or_labels_are_refused(shared_model, make_batch, drawn, message, monkeypatch):
    monkeypatch.setattr(shared_model.config, "step_loss_weight", 1.0)
    monkeypatch.setattr(shared_model.config, "c_thought", 1)
    with pytest.raises(ValueError, match=message):
        shared_model(**model_inputs(two_rows(make_batch, **drawn)))


def test_texts_of_packed_rows_are_refused(shared_model, make_batch, monkeypatch):
    """The share of a text in the loss was that of its row, not that of its sample."""
    monkeypatch.setattr(shared_model.config, "step_loss_weight", 1.0)
    monkeypatch.setattr(shared_model.config, "c_thought", 1)
    batch = two_rows(make_batch)
    rows = split_rows(batch)
    inputs = {name: torch.cat([row[name] for row in rows])[None] for name in ("input_ids", "labels")}
    inputs["step_ids"] = batch["step_ids"].flatten(0, 1)[None]
    starts_again = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
    with pytest.raises(ValueError, match="`step_ids` cannot be used with packed rows.*Pad instead"):
        shared_model(**inputs, position_ids=starts_again)
    with torch.no_grad():
        assert shared_model(**inputs, position_ids=torch.arange(starts_again.shape[1])[None]).step_loss > 0


@pytest.mark.parametrize("value", [-100, -1], ids=["gap", "no_token"])
def test_a_text_with_a_hole_is_refused(shared_model, make_batch, value, monkeypatch):
    monkeypatch.setattr(shared_model.config, "step_loss_weight", 1.0)
    monkeypatch.setattr(shared_model.config, "c_thought", 1)
    batch = two_rows(make_batch)
    batch["step_ids"][0, 1, 1] = value
    with pytest.raises(ValueError, match="`step_ids` must be token ids, and -100 only behind"):
        shared_model(**model_inputs(batch))


def test_the_backbone_alone_refuses_texts(shared_model, make_batch):
    inputs = {name: value for name, value in model_inputs(two_rows(make_batch)).items() if name != "labels"}
    with pytest.raises(ValueError, match="`step_ids` came to the model without its head.*`step_loss_weight` to 0"):
        shared_model.base_model(**inputs)


def test_a_batch_of_samples_with_and_without_texts_is_refused(make_dataset, processor):
    samples = [make_dataset()[0], make_dataset(step_loss_weight=0.0)[1]]
    with pytest.raises(ValueError, match="Record '1': `step_ids` are missing.*same `step_loss_weight`"):
        ReasoningCollator(processor)(samples)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.fixture
def thoughts(shared_model, make_batch):
    """Of rows with 4, 2 and no thoughts: zeros behind the last one of each."""
    batch = make_batch(num_thoughts=(4, 2, 0), images=((1,), (), ()))
    with torch.no_grad(), widened():
        return shared_model(**model_inputs(batch), return_thoughts=True).thoughts


def by_hand(model, thoughts, c_thought, length, eos=(), pad=0):
    """Each group alone, a token at a time."""
    suppress = model.generation_config.suppress_tokens
    rows = []
    for row in thoughts:
        groups = row.unflatten(0, (-1, c_thought))
        texts = [
            reference_continuation(model, group, length, suppress, eos) if group.any() else [] for group in groups
        ]
        rows.append([text + [pad] * (length - len(text)) for text in texts])
    return rows


@pytest.mark.parametrize("c_thought", [1, 2])
def test_thoughts_are_read_group_by_group_as_by_hand(model, thoughts, c_thought):
    prepare(model, c_thought)
    with torch.no_grad(), widened():
        plain = by_hand(model, thoughts, c_thought, 5)
        ends = [plain[0][0][2]]  # so that a text ends before the others
        expected = by_hand(model, thoughts, c_thought, 5, ends, pad=9)
        found = model.read_thoughts(thoughts, max_new_tokens=5, eos_token_id=ends, pad_token_id=9, do_sample=False)
    assert found.tolist() == expected
    assert found[0, 0, 2:].tolist() == [ends[0], 9, 9]
    assert (found[2] == 9).all()
    assert (found[1, 2 // c_thought :] == 9).all()


@pytest.mark.parametrize(
    "settings",
    [dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=2)],
    ids=["beams", "sampling"],
)
def test_any_generation_setting_is_taken(model, thoughts, settings):
    prepare(model, 2)
    settings = {**settings, "max_new_tokens": 3, "pad_token_id": 9}
    found = model.read_thoughts(thoughts, **settings)
    assert found.shape == (3, 2 * 2, 3)
    assert (found[2] == 9).all()
    assert (found[1, 2:] == 9).all()  # of the second group, both sequences
    if "num_beams" in settings:
        with widened():
            alone = [model.read_thoughts(thoughts[row : row + 1, :2], **settings)[0].tolist() for row in range(2)]
            assert [model.read_thoughts(thoughts, **settings)[row, :2].tolist() for row in range(2)] == alone


def test_nothing_is_read_where_nothing_was_thought(model, thoughts):
    assert prepare(model, 2).read_thoughts(0 * thoughts, num_return_sequences=3).shape == (3, 2 * 3, 0)


def test_thoughts_that_cannot_be_read_are_refused(model, thoughts):
    with pytest.raises(ValueError, match="`config.step_loss_weight` is 0: the thoughts.*were not trained"):
        model.read_thoughts(thoughts)
    prepare(model, 3)
    with pytest.raises(ValueError, match="`thoughts` is None: the prompts had no thoughts.*at least .* 3"):
        model.read_thoughts(None)
    for wrong, settings in ((thoughts, {}), (thoughts[0], {}), (thoughts[:, :3], {"return_dict_in_generate": True})):
        with pytest.raises(ValueError, match="`thoughts` have shape.*in whole groups"):
            model.read_thoughts(wrong, **settings)


def test_a_row_that_ends_within_a_group_is_refused(model, thoughts):
    """Its last thought would be read beside zeros."""
    ragged = thoughts.clone()
    ragged[1, 1] = 0
    with pytest.raises(ValueError, match="Row 1 of `thoughts` has 1 thoughts before its zeros.*`config.c_thought` 2"):
        prepare(model, 2).read_thoughts(ragged)
    assert prepare(model, 1).read_thoughts(ragged, max_new_tokens=2, pad_token_id=9)[1, 1:].eq(9).all()


def test_settings_that_a_checkpoint_saved_are_taken(model, thoughts):
    """As of `generate`: no padding token but two ends, a dictionary, more sequences than one."""
    saved = prepare(model, 2).generation_config
    saved.pad_token_id, saved.eos_token_id, saved.return_dict_in_generate = None, [7, 8], True
    found = model.read_thoughts(thoughts, max_new_tokens=3, do_sample=False)
    assert (found[2] == 7).all()
    given = GenerationConfig(do_sample=True, num_return_sequences=2, pad_token_id=9, eos_token_id=7)
    for count in (4, 2, 0):
        found = model.read_thoughts(thoughts * (torch.arange(4) < count)[:, None], generation_config=given)
        assert found.shape[:2] == (3, 4)
    assert model.read_thoughts(thoughts, generation_config=given)[2].eq(9).all()


def test_what_a_given_configuration_leaves_open_is_that_of_the_checkpoint(model, thoughts):
    """A row without thoughts was read as so many tokens 0, a word; and its `max_new_tokens` was not heard."""
    saved = prepare(model, 2).generation_config
    saved.pad_token_id, saved.eos_token_id, saved.num_return_sequences = 9, 7, 2
    given = GenerationConfig(do_sample=True, max_new_tokens=3)
    found = model.read_thoughts(thoughts, generation_config=given)
    assert found.shape == (3, 4, 3)
    assert found[2].eq(9).all()
    assert model.read_thoughts(0 * thoughts, generation_config=given).shape == (3, 4, 0)
    assert model.read_thoughts(thoughts, generation_config=given, max_new_tokens=2).shape == (3, 4, 2)
