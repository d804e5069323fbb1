"""lm-eval and lighteval, as they are, ask a saved folder what score.py asks, and get the same answers."""

import json

import datasets
import lm_eval
import pytest
import torch
from boards import NUM_BOARDS, answer_of, counted_passes
from lighteval.metrics import apply_metric
from lighteval.metrics.metrics import Metrics
from lighteval.models.transformers.vlm_transformers_model import VLMTransformersModel, VLMTransformersModelConfig
from lighteval.tasks.lighteval_task import LightevalTask, LightevalTaskConfig
from lighteval.tasks.requests import Doc
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.tasks import TaskManager
from transformers import AutoModel

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor


BATCH_SIZE = 20


@pytest.fixture(scope="module")
def parquet(boards, tmp_path_factory):
    """A folder that `load_dataset` reads: the boards with their pictures inside, as data sets on the Hub are."""
    folder = tmp_path_factory.mktemp("hub") / "trails"
    folder.mkdir()
    rows = [
        {"image": board["images"][0], "question": board["question"], "answer": board["answer"]} for board in boards
    ]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def lm_eval_tasks(parquet, tmp_path):
    task = {
        "task": "trails",
        "dataset_path": str(parquet),
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_image": ["image"],
        "doc_to_text": "<image>{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 8},
        "filter_list": [
            {
                "name": "answer",
                "filter": [{"function": "regex", "regex_pattern": "### (.+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match"}],
    }
    (tmp_path / "trails.yaml").write_text(json.dumps(task))  # JSON is YAML
    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.parametrize(("batch_size", "limit"), [(1, 20), (BATCH_SIZE, NUM_BOARDS)], ids=["one by one", "batches"])
def test_lm_eval_gets_the_answers_of_score(batch_size, limit, folder, boards, budget, score_boards, lm_eval_tasks):
    lm = HFMultimodalLM(folder, trust_remote_code=True, device="cpu", dtype="float32", batch_size=batch_size)
    with counted_passes(lm.model) as passes:
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=["trails"],
            task_manager=lm_eval_tasks,
            apply_chat_template=True,
            limit=limit,
            bootstrap_iters=0,
        )
    expected_accuracy, expected = score_boards(budget)
    samples = sorted(results["samples"]["trails"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == expected[:limit]
    if limit == NUM_BOARDS:
        assert results["results"]["trails"]["exact_match,answer"] == expected_accuracy >= 0.95
    passes.check(num_prefills=limit // batch_size, num_thoughts=budget)


def trails_doc(row, task_name):
    """A row of the data set as lighteval's tasks give it: what is asked, the pictures, the answer."""
    choices = ["### " + row["answer"]]
    return Doc(task_name=task_name, query=row["question"], choices=choices, gold_index=0, images=[row["image"]])


def test_lighteval_gets_our_answers(folder, boards, budget, parquet, tmp_path):
    """
    lighteval puts pictures behind the question, which this model has not learned: the answers are those of our model
    to that prompt. Its pipeline cannot start without a network (its list of tasks downloads one), so it is left out.
    """
    config = LightevalTaskConfig(
        name="trails",
        prompt_function=trails_doc,
        hf_repo=str(parquet),
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        metrics=[Metrics.exact_match],
        generation_size=8,
    )
    docs = LightevalTask(config).get_docs()
    boards = [boards[int(doc.id)] for doc in docs]  # it shuffles
    assert [doc.query for doc in docs] == [board["question"] for board in boards]
    lm = VLMTransformersModel(
        VLMTransformersModelConfig(
            model_name=folder,
            trust_remote_code=True,
            dtype="float32",
            device="cpu",
            batch_size=BATCH_SIZE,
            cache_dir=str(tmp_path / "cache"),
        )
    )
    with counted_passes(lm.model) as passes:
        responses = lm.greedy_until(docs)
    torch.set_grad_enabled(True)  # which lighteval leaves off
    passes.check(num_prefills=NUM_BOARDS // BATCH_SIZE, num_thoughts=budget)

    processor = MultiCoCoProcessor.from_pretrained(folder)
    model = MultiCoCoForConditionalGeneration.from_pretrained(folder)
    expected = []
    for board in boards:
        parts = [{"type": "text", "text": board["question"]}, {"type": "image", "path": board["images"][0]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=8)
        expected.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert [response.text for response in responses] == expected
    for response in responses:
        response.text = [response.text]  # it scores a list, and would take a string for one, letter by letter
    scores = apply_metric(responses=responses, docs=docs, metrics=config.metrics)
    assert [score["em"] for score in scores] == [
        float(text == f"### {board['answer']}") for text, board in zip(expected, boards, strict=True)
    ]


def test_chat_answers_as_score(folder, boards, score_boards, budget):
    """InternVL's own call, as VLMEvalKit and lmms-eval make it."""
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = MultiCoCoProcessor.from_pretrained(folder)
    accuracy, predictions = score_boards(budget)
    settings, answers = {"max_new_tokens": 8, "do_sample": False}, []
    with counted_passes(model) as passes:
        for board in boards:
            tiles = processor.image_processor(board["images"], return_tensors="pt")["pixel_values"]
            answers.append(answer_of(model.chat(processor.tokenizer, tiles, board["question"], settings)))
    passes.check(NUM_BOARDS, budget)
    assert answers == predictions
    assert accuracy >= 0.95
