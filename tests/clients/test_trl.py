"""trl's trainers, as they are: their scores of a batch are those of the model, with the thoughts.

Wherever trl scores tokens it calls the backbone and a head of its own. Each such forward of a trainer is put beside
the model's own forward over the same batch, and beside one that feeds no thought, from which it must differ.
"""

import contextlib
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from PIL import Image as PictureFile
from transformers.trainer_pt_utils import LabelSmoother
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor
from multicoco.curriculum import CurriculumArguments
from multicoco.data_multicoco import ReasoningCollator, StageDataset
from multicoco.examples import grpo
from multicoco.records import load_records
from multicoco.trainer_callbacks import CurriculumCallback


NUM_ROWS = 4
LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj")


class Scores(NamedTuple):
    """
    theirs, ours, unthought (`torch.Tensor` of shape `(num_labels,)`): log-probabilities of the labels.
    num_passes, num_columns (`int`): calls of the language model, and positions that hold a thought in any row.
    num_tiles (`int`): tiles that came with them.
    """

    theirs: torch.Tensor
    ours: torch.Tensor
    unthought: torch.Tensor
    num_passes: int
    num_columns: int
    num_tiles: int


@contextlib.contextmanager
def recorded(model):
    """The [`Scores`] of each forward in which trl scores tokens; `ours` with the same weights, at the same moment."""
    scores, passes = [], []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    @torch.no_grad()
    def own(inputs, labels, **kwargs):
        logits = type(inner).forward(inner, **inputs, **kwargs).logits  # not the instance's, which trl replaces
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return chosen[labels[:, 1:] != -100]

    def compare(module, args, kwargs, output):
        if getattr(output, "log_probs", None) is None:
            return
        num_passes = len(passes)
        inputs = {name: value for name, value in kwargs.items() if name not in ("labels", "fused_lm_head")}
        labels, latent_mask = kwargs["labels"], inputs["input_ids"] == inner.config.latent_token_id
        scores.append(
            Scores(
                theirs=output.log_probs.detach()[labels[:, 1:] != -100],
                ours=own(inputs, labels),
                unthought=own(inputs, labels, latent_mask=torch.zeros_like(latent_mask)),
                num_passes=num_passes,
                num_columns=int(latent_mask.any(dim=0).sum()),
                num_tiles=len(inputs.get("pixel_values", [])),
            )
        )

    handles = [
        inner.register_forward_pre_hook(lambda module, args: passes.clear()),
        inner.model.language_model.register_forward_pre_hook(lambda module, args: passes.append(module)),
        inner.register_forward_hook(compare, with_kwargs=True),
    ]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def check(scores, num_forwards, num_thoughts):
    assert len(scores) == num_forwards
    for score in scores:
        assert score.num_columns >= num_thoughts > 0
        assert score.num_passes == score.num_columns + 1
        torch.testing.assert_close(score.theirs, score.ours, rtol=1e-4, atol=1e-5)
        assert (score.unthought - score.ours).abs().max() > 0.01  # so that to be equal says something


@pytest.fixture
def processor(folder):
    return MultiCoCoProcessor.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return MultiCoCoForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def settings(tmp_path):
    """What the trainers' configurations share: two steps, each over all rows of `make_table`."""
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": NUM_ROWS,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


def make_table(boards, with_images=True, **columns):
    """A data set of `NUM_ROWS` boards, in the columns that trl reads; each is a function of the board."""
    boards = boards[:NUM_ROWS]
    table = Dataset.from_dict({name: [column(board) for board in boards] for name, column in columns.items()})
    if with_images:
        table = table.add_column("images", [board["images"] for board in boards]).cast_column("images", List(Image()))
    return table


def asked(board):
    return [{"role": "user", "content": board["question"]}]


def asked_at_length(board):
    """Prompts of different lengths, so that the thoughts of a batch padded on the right stand in different columns."""
    return [{"role": "user", "content": " ".join([board["question"]] * (1 + int(board["id"][-1]) % 3))}]


def answered(board):
    return [{"role": "assistant", "content": f"### {board['answer']}"}]


def answered_wrongly(board):
    return [{"role": "assistant", "content": f"### {other_than(board['answer'])}"}]


def other_than(answer):
    return "red" if answer != "red" else "blue"


def is_exact(completions, answer, **kwargs):
    return [float(message["content"] == f"### {right}") for (message,), right in zip(completions, answer, strict=True)]


def train(trainer, num_forwards, num_thoughts):
    """Trains; each time that trl scored a batch, it saw what the model sees."""
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    with recorded(trainer.model) as scores:
        trainer.train()
    check(scores, num_forwards, num_thoughts)
    assert trainer.state.global_step == 2
    return scores, [name for name, weight in trainer.model.named_parameters() if not weight.equal(before[name])]


# --- supervised ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stage_dataset(data, processor):
    """Wrong answers, and so are those of the other tests here: the loss of right ones has no digits to compare."""
    curriculum = CurriculumArguments(c_thought=1, max_latent_stage=5, final_stage=False)
    records = [{**record, "answer": other_than(record["answer"])} for record in load_records(data)[:NUM_ROWS]]
    dataset = StageDataset(records, processor, curriculum)
    dataset.set_stage(5)
    return dataset


def make_stage_trainer(model, processor, dataset, settings, **kwargs):
    """SFTTrainer takes nothing but a data set of `datasets`: here a view of ours, composed when a row is read."""
    collator = ReasoningCollator(processor)
    return SFTTrainer(
        model,
        args=SFTConfig(**settings, remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_dict({"index": range(len(dataset))}).with_transform(
            lambda rows: {"sample": [dataset[index] for index in rows["index"]]}
        ),
        data_collator=lambda rows: collator([row["sample"] for row in rows]),
        processing_class=processor,
        **kwargs,
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_sft_on_our_batches(model, processor, settings, stage_dataset, checkpointing):
    trainer = make_stage_trainer(
        model, processor, stage_dataset, {**settings, "gradient_checkpointing": checkpointing}
    )
    batch = ReasoningCollator(processor)([stage_dataset[index] for index in range(NUM_ROWS)])
    own = type(model).forward(model.train(), **batch).loss
    own.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()

    loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, own, rtol=1e-4, atol=0)
    loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    model.zero_grad()
    _, changed = train(trainer, num_forwards=2, num_thoughts=5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(own.item(), rel=1e-4)
    assert changed


def test_sft_through_the_curriculum(model, processor, settings, data):
    """The callback moves the stage under the view."""
    curriculum = CurriculumArguments(c_thought=1, max_latent_stage=2, epochs_per_stage=1)
    dataset = StageDataset(load_records(data)[:NUM_ROWS], processor, curriculum)
    callbacks = [CurriculumCallback(curriculum, dataset)]
    trainer = make_stage_trainer(model, processor, dataset, {**settings, "max_steps": 3}, callbacks=callbacks)
    with recorded(trainer.model) as scores:
        trainer.train()
    assert [score.num_columns for score in scores] == [0, 1, 2]
    check(scores[1:], num_forwards=2, num_thoughts=1)


def test_sft_on_prompts_and_completions(model, processor, settings, boards, stage_dataset):
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings),
        train_dataset=make_table(boards, prompt=asked, completion=answered_wrongly),
        processing_class=processor,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    ours = ReasoningCollator(processor)([stage_dataset[index] for index in range(NUM_ROWS)])
    newline = processor.tokenizer("\n")["input_ids"][0]
    for row in range(NUM_ROWS):  # the same tokens, and one line break behind the turn, which trl trains too
        ids, labels = (
            batch[name][row][batch["attention_mask"][row] == 1].tolist() for name in ("input_ids", "labels")
        )
        own = [ours[name][row][ours["attention_mask"][row] == 1].tolist() for name in ("input_ids", "labels")]
        assert [ids, labels] == [[*own[0], newline], [*own[1], newline]]
    assert batch["pixel_values"].equal(ours["pixel_values"])

    own = type(model).forward(model.train(), **batch).loss
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), own, rtol=1e-4, atol=0)
    train(trainer, num_forwards=2, num_thoughts=5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(own.item(), rel=1e-4)


def test_sft_of_the_assistants_words_only(model, processor, settings, boards):
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings, assistant_only_loss=True),
        train_dataset=make_table(boards, messages=lambda board: asked(board) + answered_wrongly(board)),
        processing_class=processor,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    for labels, board in zip(batch["labels"], boards, strict=False):
        assert processor.decode(labels[labels != -100]).rstrip("\n") == f"### {other_than(board['answer'])}<|im_end|>"
    train(trainer, num_forwards=2, num_thoughts=5)


def test_sft_of_whole_conversations(model, processor, settings, boards):
    """Every token is a label, the thoughts' places too."""
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings),
        train_dataset=make_table(boards, messages=lambda board: asked_at_length(board) + answered_wrongly(board)),
        processing_class=processor,
    )
    train(trainer, num_forwards=2, num_thoughts=5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_with_label_smoothing_has_logits(model, processor, settings, boards):
    """One of two switches of SFTTrainer that read `outputs.logits` in training."""
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings, label_smoothing_factor=0.1),
        train_dataset=make_table(boards, prompt=asked, completion=answered_wrongly),
        processing_class=processor,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    output = type(model).forward(model.train(), **inputs)
    own = LabelSmoother(epsilon=0.1)(output, labels, shift_labels=True)
    torch.testing.assert_close(trainer.compute_loss(model, {**inputs, "labels": labels}), own, rtol=1e-4, atol=0)
    train(trainer, num_forwards=2, num_thoughts=5)


@pytest.mark.parametrize(
    "packed",
    [{}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 200}],
    ids=["padded", "padding-free", "packed"],
)
def test_sft_on_text_alone(model, processor, settings, boards, packed):
    """In a row of several samples each sees itself only, in the passes too."""
    settings = {**settings, "per_device_train_batch_size": 2 if "packing" in packed else NUM_ROWS}
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings, **packed),
        train_dataset=make_table(boards, with_images=False, prompt=asked, completion=answered_wrongly),
        processing_class=processor,
    )
    rows = list(trainer.train_dataset)
    alone = [{name: torch.tensor([value]) for name, value in row.items()} for row in split_samples(rows)]
    assert len(alone) == NUM_ROWS
    sums = [type(model).forward(model.train(), **sample, num_items_in_batch=1).loss for sample in alone]
    num_labels = sum(int((sample["labels"][:, 1:] != -100).sum()) for sample in alone)
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    torch.testing.assert_close(loss, torch.stack(sums).sum() / num_labels, rtol=1e-4, atol=0)
    trainer.train()
    assert trainer.state.global_step == 2


def split_samples(rows):
    """The samples of rows as trl prepares them, packed or not."""
    for row in rows:
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            yield {name: row[name][start : start + length] for name in ("input_ids", "labels")}
            start += length


def test_sft_of_adapters(model, processor, settings, boards):
    trainer = SFTTrainer(
        model,
        args=SFTConfig(**settings),
        train_dataset=make_table(boards, prompt=asked, completion=answered_wrongly),
        processing_class=processor,
        peft_config=LORA,
    )
    _, changed = train(trainer, num_forwards=2, num_thoughts=5)
    assert changed
    assert all("lora" in name for name in changed)


# --- by reward -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reward_processor(processor):
    """GRPOTrainer with `beta` and RLOOTrainer pass all that a processor returns to a function of fixed names."""
    processor.return_num_patches_list = False
    return processor


def reward_settings(settings):
    return {**settings, "num_generations": 2, "max_completion_length": 8}


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo(model, reward_processor, settings, boards, beta, adapters):
    """The trained model answers rightly in what it samples, so it thought there too."""
    trainer = GRPOTrainer(
        model,
        reward_funcs=is_exact,
        args=GRPOConfig(**reward_settings(settings), beta=beta),
        train_dataset=make_table(boards, prompt=asked, answer=lambda board: board["answer"]),
        processing_class=reward_processor,
        peft_config=LORA if adapters else None,
    )
    # With adapters the reference is the same model without them: two forwards a step.
    train(trainer, num_forwards=4 if beta and adapters else 2, num_thoughts=5)
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert len(rewards) == 2
    assert min(rewards) > 0.9
    if beta and not adapters:
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_grpo_asks_with_another_number_of_thoughts(model, reward_processor, settings, boards):
    trainer = GRPOTrainer(
        model,
        reward_funcs=is_exact,
        args=GRPOConfig(**reward_settings(settings), beta=0.04, chat_template_kwargs={"num_thoughts": 2}),
        train_dataset=make_table(boards, prompt=asked, answer=lambda board: board["answer"]),
        processing_class=reward_processor,
    )
    scores, _ = train(trainer, num_forwards=2, num_thoughts=2)
    assert {score.num_columns for score in scores} == {2}


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer], ids=["grpo", "rloo"])
def test_pictures_of_several_tiles(model, reward_processor, settings, boards, trainer_class, tmp_path):
    """Samples of 1, 3 and 1 + 3 tiles: trl counts them by itself and deals them out to its micro batches."""
    reward_processor.image_processor.max_patches = 4
    boards = [dict(board) for board in boards[:NUM_ROWS]]
    wide = tmp_path / "wide.png"
    with PictureFile.open(boards[1]["images"][0]) as picture:
        picture.resize((2 * picture.width, picture.height)).save(wide)
    boards[1]["images"] = [str(wide)]
    boards[2]["images"] = [*boards[2]["images"], str(wide)]
    config = GRPOConfig if trainer_class is GRPOTrainer else RLOOConfig
    args = {**reward_settings(settings), "per_device_train_batch_size": 2, "steps_per_generation": 4, "beta": 0.04}
    trainer = trainer_class(
        model,
        reward_funcs=is_exact,
        args=config(**args),
        train_dataset=make_table(boards, prompt=asked, answer=lambda board: board["answer"]),
        processing_class=reward_processor,
    )
    with recorded(trainer.model) as scores:
        trainer.train()
    check(scores, num_forwards=4 + 2, num_thoughts=5)  # the old log-probabilities of 8 rows by 2, and two steps
    assert sum(score.num_tiles for score in scores[:4]) == 2 * (1 + 3 + (1 + 3) + 1)


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer], ids=["grpo", "rloo"])
def test_samples_hold_no_reserved_token(model, reward_processor, settings, boards, trainer_class):
    """trl sets `suppress_tokens` of its own. A sampled `<|latent|>` would be fed a thought where it is scored."""
    seen = []

    def look(completion_ids, **kwargs):
        seen.extend(token for ids in completion_ids for token in ids)
        return [0.0 for _ in completion_ids]

    config = GRPOConfig if trainer_class is GRPOTrainer else RLOOConfig
    trainer = trainer_class(
        model,
        reward_funcs=look,
        args=config(**{**reward_settings(settings), "max_completion_length": 64, "max_steps": 4, "temperature": 1e4}),
        train_dataset=make_table(boards, prompt=asked),
        processing_class=reward_processor,
    )
    trainer.train()
    reserved = ("<img>", "</img>", "<IMG_CONTEXT>", "<|start-latent|>", "<|latent|>", "<|end-latent|>")
    assert len(set(seen)) > 100
    assert not set(seen) & set(reward_processor.tokenizer.convert_tokens_to_ids(list(reserved)))


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo(model, reward_processor, settings, boards, beta):
    trainer = RLOOTrainer(
        model,
        reward_funcs=is_exact,
        args=RLOOConfig(**reward_settings(settings), beta=beta),
        train_dataset=make_table(boards, prompt=asked, answer=lambda board: board["answer"]),
        processing_class=reward_processor,
    )
    train(trainer, num_forwards=4, num_thoughts=5)  # each step scores before it and in it
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert min(rewards) > 0.9


# --- by preference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_dpo(model, processor, settings, boards, adapters):
    trainer = DPOTrainer(
        model,
        args=DPOConfig(**settings),
        train_dataset=make_table(boards, prompt=asked_at_length, chosen=answered, rejected=answered_wrongly),
        processing_class=processor,
        peft_config=LORA if adapters else None,
    )
    _, changed = train(trainer, num_forwards=4 if adapters else 2, num_thoughts=5)
    assert changed
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)  # the model and its reference are one
    assert first["logps/chosen"] > first["logps/rejected"] + 1  # it has thought of the right one


def test_kto(model, processor, settings, boards):
    table = make_table(
        boards,
        prompt=asked_at_length,
        completion=lambda board: (answered if board in boards[::2] else answered_wrongly)(board),
        label=lambda board: board in boards[::2],
    )
    trainer = KTOTrainer(
        model,
        args=KTOConfig(**settings),
        train_dataset=table,
        processing_class=processor,
    )
    _, changed = train(trainer, num_forwards=4, num_thoughts=5)  # each step also scores completions of other rows
    assert changed
    first = trainer.state.log_history[0]
    assert first["logps/chosen"] > first["logps/rejected"] + 1


@pytest.mark.parametrize("trainer_class", [DPOTrainer, KTOTrainer], ids=["dpo", "kto"])
def test_preferences_of_text_alone(model, processor, settings, boards, trainer_class):
    if trainer_class is DPOTrainer:
        config, columns = DPOConfig, {"chosen": answered, "rejected": answered_wrongly}
    else:
        config, columns = KTOConfig, {"completion": answered, "label": lambda board: board in boards[::2]}
    trainer = trainer_class(
        model,
        args=config(**settings),
        train_dataset=make_table(boards, with_images=False, prompt=asked_at_length, **columns),
        processing_class=processor,
    )
    train(trainer, num_forwards=2 if trainer_class is DPOTrainer else 4, num_thoughts=5)


# --- the example ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "num_thoughts"), [(0, 5), (0.04, 3)], ids=["own thoughts", "beta, fewer thoughts"])
def test_the_example(folder, data, tmp_path, beta, num_thoughts):
    out = tmp_path / "out"
    flags = ["--model", folder, "--data", data, "--output_dir", out, "--beta", beta, "--max_steps", 2, "--use_cpu"]
    flags += ["--num_thoughts", num_thoughts] if num_thoughts != 5 else []
    trainer = grpo.main(list(map(str, [*flags, "--batch_size", 4, "--num_generations", 2])))
    assert trainer.state.log_history[0]["reward"] > 0.9
    assert MultiCoCoForConditionalGeneration.from_pretrained(out).config.num_thoughts == num_thoughts
    processor = MultiCoCoProcessor.from_pretrained(out)
    assert (processor.num_thoughts, processor.return_num_patches_list) == (num_thoughts, True)
