"""Scores checkpoints on a file of records: accuracy, generated tokens and time for each budget of thoughts.

    python score.py --model out --data mine_val.jsonl --num_thoughts 0 2 4 6
    python score.py --model out/coconut out/pause --compare out/cot --data mine_val.jsonl --output_dir out/scores
    python score.py --model out --data val.jsonl --choices_by likelihood --metric metrics/aokvqa.py:multiple_choice
    python score.py settings.yaml --batch_size 8                                       # flags win over the file
    torchrun --nproc_per_node 8 score.py --model out --data mine_val.jsonl

A killed run goes on where it stopped when the same command is given again. What the figures mean: docs/scoring.md.
"""

import csv
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tqdm.auto import tqdm

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor
from multicoco.data_multicoco import ANSWER_MARK, CurriculumArguments, ReasoningCollator, StageDataset, load_records
from multicoco.intervals import mcnemar, paired_bootstrap, wilson_interval
from multicoco.settings import leave, parse_settings


# What decides how a checkpoint answers; other files of its folder may change without making its predictions stale.
MODEL_FILES = ("*.safetensors", "*config.json", "tokenizer*", "*.jinja")
CHOICES_BY = ("generation", "likelihood")
PERCENT = ("multiple_choice", "direct_answer", "direct_answer_vqa_normalized")  # A-OKVQA's, as its program prints them


@dataclass(kw_only=True)
class AskArguments:
    """How records are read and a checkpoint is loaded and asked: common to score.py and diagnose.py."""

    data: str = field(metadata={"help": "Records: .jsonl, .json, a folder, or a Hub data set."})
    metric: str = field(
        default="exact",
        metadata={
            "help": "exact: what is written after the last '### ' is, letter by letter, the record's answer. Else "
            "FILE:RESULT, a metric in the form of `evaluate` and the name of its result, as "
            "metrics/answer_accuracy.py:numeric_match."
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer in tokens; the data's longest steps and answer if not given."}
    )
    column_mapping: str | None = field(
        default=None, metadata={"help": 'JSON object from field to column name, as {"steps": "rationale"}.'}
    )
    split: str = field(default="validation", metadata={"help": "Split of a folder or Hub data set."})
    allow_outside: bool = field(default=False, metadata={"help": "Allow image paths outside the folder of the file."})
    max_patches: int | None = field(
        default=None, metadata={"help": "Tiles per image at most; the checkpoint's own value (12) if not given."}
    )
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ...; the checkpoint's own if auto."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is a GPU."})


@dataclass(kw_only=True)
class ScoreArguments(AskArguments):
    """What is asked, how, and where the results go."""

    model: list[str] = field(metadata={"help": "Folders or Hub names of one or more checkpoints."})
    output_dir: str = field(
        default="out/scores", metadata={"help": "Folder of the predictions, scores.json, scores.csv and scores.png."}
    )
    num_thoughts: list[int] | None = field(
        default=None,
        metadata={
            "help": "Budgets of thoughts; each checkpoint's own if not given. A checkpoint that was trained without "
            "a thought block is asked once, without one."
        },
    )
    compare: str | None = field(
        default=None,
        metadata={"help": "Another checkpoint that each of `--model` is compared with, on the same samples."},
    )
    choices_by: str = field(
        default="generation",
        metadata={
            "help": "generation: the answer is what the model writes. likelihood: the answer is the choice whose "
            "text the model finds most likely.",
            "choices": list(CHOICES_BY),
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Samples at a time on one rank."})
    predict_only: bool = field(
        default=False, metadata={"help": "Answer without scoring: no accuracy, no comparison, no picture."}
    )
    predictions_to: str | None = field(
        default=None, metadata={"help": "JSON file in A-OKVQA's form that the predictions of one budget are added to."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa or flash_attention_2; transformers' choice if not given."}
    )

    def __post_init__(self):
        for budget in self.num_thoughts or []:
            if budget < 0:
                raise ValueError(f"`--num_thoughts` must be at least 0, got {budget}. 0 is a block without thoughts.")
        for name in ("batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` must be at least 1, got {value}.")
        if self.choices_by not in CHOICES_BY:
            raise ValueError(f"`--choices_by` must be one of {', '.join(CHOICES_BY)}, got {self.choices_by!r}.")
        path, _, result = self.metric.rpartition(":")
        if self.metric != "exact" and not (result and os.path.isfile(path)):
            raise ValueError(
                f"`--metric` is {self.metric!r}, expected 'exact' or FILE:RESULT with an existing file, as "
                "metrics/answer_accuracy.py:numeric_match. Correct the path, or name the result."
            )
        if self.predict_only and self.compare:
            raise ValueError("`--compare` needs accuracies, which `--predict_only` leaves out. Drop one of the two.")
        if self.predictions_to and (len(self.model) > 1 or self.compare or len(self.num_thoughts or [0]) > 1):
            raise ValueError(
                "`--predictions_to` holds the answers of one checkpoint at one budget, but more are asked. Give one "
                "`--model` and at most one of `--num_thoughts`, without `--compare`."
            )


# --- what is asked -----------------------------------------------------------------------------------------------


def as_written(record: Mapping[str, Any], text: str) -> str:
    """The choice that `text` is, with the blanks at its ends, which answers are read without; else `text` itself."""
    return next((choice for choice in record["choices"] if choice.strip() == text), text)


def check_records(records: Sequence[Mapping[str, Any]], arguments: ScoreArguments):
    """What scoring asks of records beyond what training does."""
    result = arguments.metric.rpartition(":")[2]
    if arguments.choices_by == "likelihood" or result == "multiple_choice":
        for record in records:
            if len(record["choices"]) < 2:
                raise ValueError(
                    f"Record {record['id']!r}: `choices` is {record['choices']}, expected at least two to choose "
                    "from. Fill it in, or score by generation with another metric."
                )
            if not arguments.predict_only and as_written(record, record["answer"]) not in record["choices"]:
                raise ValueError(
                    f"Record {record['id']!r}: `answer` {record['answer']!r} is none of its `choices` "
                    f"{record['choices']}, so no choice would be right. Write it as it stands among them."
                )
    unanswered = [record["id"] for record in records if not record["answer"]]
    if unanswered and arguments.choices_by == "generation" and arguments.max_new_tokens is None:
        raise ValueError(
            f"Record {unanswered[0]!r} has no `answer`, so how long the answers may be is not known. Give "
            "`--max_new_tokens`."
        )
    if (
        not arguments.predict_only
        and result.startswith("direct_answer")
        and not any(record["answers"] for record in records)
    ):
        raise ValueError(
            f"`--metric {arguments.metric}` compares with `answers`, which no record has. Fill in the direct answers "
            "(only of difficult questions, which do not count, they may be left out)."
        )


class Subject:
    """
    A checkpoint, and the records as it is asked them.

    Raises:
        ValueError: the checkpoint cannot be read, or a record cannot be asked, see [`StageDataset`].
    """

    def __init__(
        self, name: str, records: Sequence[Mapping[str, Any]], arguments: ScoreArguments, device: torch.device
    ):
        try:
            self.config = MultiCoCoConfig.from_pretrained(name)
            self.processor = MultiCoCoProcessor.from_pretrained(name)
        except OSError as error:
            raise ValueError(
                f"`--model` {name}: no checkpoint can be read there: {error}. Give the folder that train.py wrote, or "
                "the Hub name of a model."
            ) from error
        if arguments.max_patches is not None:
            self.processor.image_processor.max_patches = arguments.max_patches
        self.name, self.arguments, self.device = name, arguments, device
        self.model = None  # of several checkpoints only one is loaded at a time
        self.collator = ReasoningCollator(self.processor)
        has_block = self.config.num_thoughts is not None
        self.budgets = [self.config.num_thoughts]
        if has_block and arguments.num_thoughts:
            self.budgets = list(dict.fromkeys(arguments.num_thoughts))
        # With one thought a stage, stage n asks every record with n thoughts, whatever schedule it was trained by.
        curriculum = CurriculumArguments(
            mode="coconut" if has_block else "no_cot",
            c_thought=1,
            max_latent_stage=max(self.budgets) if has_block else 0,
            final_stage=False,
        )
        if arguments.choices_by == "likelihood":  # every choice as the answer of a record without steps
            self.choices = [record["choices"] for record in records]
            self.first_rows = [0, *itertools.accumulate(map(len, self.choices))]
            records = [
                {**record, "steps": [], "rationales": [[]], "answer": choice}
                for record in records
                for choice in record["choices"]
            ]
        self.dataset = StageDataset(records, self.processor, curriculum)
        self.max_new_tokens = arguments.max_new_tokens or self.dataset.max_new_tokens()

    def load(self):
        """Loads the model, if it is not there yet."""
        if self.model is not None:
            return
        attention = self.arguments.attn_implementation
        kwargs = {"attn_implementation": attention} if attention else {}
        model = MultiCoCoForConditionalGeneration.from_pretrained(self.name, dtype=self.arguments.dtype, **kwargs)
        self.model = model.to(self.device).eval()

    def answer(self, indices: Sequence[int], num_thoughts: int | None) -> list[dict[str, Any]]:
        """Asks the records of these indices; one dictionary each with `prediction` and `new_tokens`, and more."""
        ask = self._choose if self.arguments.choices_by == "likelihood" else self._generate
        with torch.no_grad():
            return ask(indices, num_thoughts or 0)

    def _generate(self, indices, stage):
        batch = self.collator.prompts([self.dataset.prompt(index, stage) for index in indices])
        length = batch["input_ids"].shape[1]
        batch = _to(batch, self.device)
        output = self.model.generate(**batch, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        return self.read_answers(output[:, length:])

    def read_answers(self, tokens: torch.Tensor) -> list[dict[str, Any]]:
        """From new tokens `(rows, number)` the text, its number of tokens, and what stands after the last `### `."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        answers = []
        for row in tokens.tolist():
            num_tokens = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
            text = self.processor.tokenizer.decode(row[:num_tokens], skip_special_tokens=True)
            prediction = text.rsplit(ANSWER_MARK, 1)[-1].strip()
            answers.append({"prediction": prediction, "text": text, "new_tokens": num_tokens})
        return answers

    def _choose(self, indices, stage):
        """The choice with the largest summed log-probability of its text, mark before and end of turn behind it."""
        self.dataset.set_stage(stage)
        rows = [self.first_rows[index] + place for index in indices for place in range(len(self.choices[index]))]
        batch = _to(self.collator([self.dataset[row] for row in rows]), self.device)
        labels = batch.pop("labels")[:, 1:]  # (B, T - 1): what the logits of each position are to predict
        first = int((labels != -100).any(dim=0).nonzero()[0])
        labels = labels[:, first:]  # (B, A): only where an answer is
        kept = labels.shape[1] + 1
        logits = self.model(**batch, use_cache=False, logits_to_keep=kept).logits[:, :-1]  # (B, A, V)
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        log_probs = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)  # (B, A)
        sums = iter(log_probs.sum(dim=1).tolist())
        answers = []
        for index in indices:
            scores = [next(sums) for _ in self.choices[index]]
            prediction = self.choices[index][scores.index(max(scores))]
            answers.append({"prediction": prediction, "log_probs": scores, "new_tokens": 0})
        return answers


def _to(batch: Mapping[str, Any], device) -> dict[str, Any]:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


# --- predictions, one file for each checkpoint and budget ----------------------------------------------------------


def describe(subject: Subject, records: Sequence[Mapping[str, Any]], num_thoughts: int | None) -> dict[str, Any]:
    """All that the predictions depend on. Files of models and images go in by size and time, not by content."""
    arguments = subject.arguments
    model_files = [path for pattern in MODEL_FILES for path in sorted(Path(subject.name).glob(pattern))]
    digest = hashlib.sha256()
    for record in records:
        images = [
            [image, *_stamp(image)] if isinstance(image, str) else [image.row, image.column, image.index]
            for image in record["images"]
        ]
        digest.update(json.dumps({**record, "images": images}, sort_keys=True).encode())
    return {
        "model": subject.name,
        "model_files": {path.name: _stamp(path) for path in model_files},
        "model_commit": getattr(subject.config, "_commit_hash", None),
        "data": arguments.data,
        "data_digest": digest.hexdigest(),
        "num_thoughts": num_thoughts,
        "choices_by": arguments.choices_by,
        "max_new_tokens": subject.max_new_tokens,
        "max_patches": arguments.max_patches,
        "dtype": arguments.dtype,
        "attn_implementation": arguments.attn_implementation,
    }


def _stamp(path: str | Path) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def predictions_path(output_dir: str | Path, header: Mapping[str, Any]) -> Path:
    """Other settings have another file: they start anew, and what was predicted before stays."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    budget = "no_block" if header["num_thoughts"] is None else header["num_thoughts"]
    return Path(output_dir) / "predictions" / f"{Path(header['model']).resolve().name}-{budget}-{digest[:8]}.jsonl"


def read_predictions(path: Path, header: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """
    Predictions of an earlier run by the index of their record; the file is begun if it is not there.

    A line that a killed run left half-written is cut off, with all that follows it.
    """
    found = path.read_bytes() if path.is_file() else b""
    lines, kept = [], b""
    for line in found.split(b"\n")[:-1]:  # behind the last line break stands nothing, or half a line
        try:
            lines.append(json.loads(line))
        except ValueError:  # not JSON, or not even text
            break
        kept += line + b"\n"
    if not lines or lines[0] != header:
        lines, kept = [header], json.dumps(header).encode() + b"\n"
    if kept != found:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(kept)
        os.replace(partial, path)
    return {line["index"]: line for line in lines[1:]}


def predict(
    subject: Subject, records: Sequence[Mapping[str, Any]], num_thoughts: int | None, state: PartialState
) -> list[dict[str, Any]]:
    """
    The prediction of each record, in order; complete on the main process, which alone reads the file.

    All ranks share what is not in the file yet and ask equally often; surplus places repeat a record, uncounted.
    """
    done, path = {}, None
    if state.is_main_process:
        header = describe(subject, records, num_thoughts)
        path = predictions_path(subject.arguments.output_dir, header)
        done = read_predictions(path, header)
    shared = [[index for index in range(len(records)) if index not in done]]
    broadcast_object_list(shared)
    todo, world, batch_size = shared[0], state.num_processes, subject.arguments.batch_size
    if todo:
        subject.load()  # not while the clock runs
    share = -(-len(todo) // world)
    name = f"{subject.name}, {'no block' if num_thoughts is None else f'{num_thoughts} thoughts'}"
    progress = tqdm(total=len(records), initial=len(done), desc=name, disable=not state.is_main_process)
    for start in range(0, share, batch_size):
        places = [place * world + state.process_index for place in range(start, min(start + batch_size, share))]
        indices = [todo[place % len(todo)] for place in places]
        began = time.perf_counter()
        answers = subject.answer(indices, num_thoughts)
        seconds = (time.perf_counter() - began) / len(indices)
        lines = gather_object(
            [
                {"index": index, "id": records[index]["id"], **answer, "seconds": seconds}
                for place, index, answer in zip(places, indices, answers, strict=True)
                if place < len(todo)
            ]
        )
        if path is not None:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        done.update({line["index"]: line for line in lines})
        progress.update(len(lines))
    progress.close()
    return [done[index] for index in range(len(records)) if index in done]


# --- figures -----------------------------------------------------------------------------------------------------


def load_metric(name: str) -> Callable[[Mapping[str, Any], str], float | None]:
    """`(record, prediction) -> score` from 0 to 1, or `None` for a record that does not count."""
    if name == "exact":
        return lambda record, prediction: float(prediction == record["answer"])
    import datasets
    import evaluate

    path, _, result = name.rpartition(":")
    metric = evaluate.load(path, result, keep_in_memory=True)
    takes_text = isinstance(metric.features["references"], datasets.Value)

    def score(record, prediction):
        answer, choices = record["answer"], record["choices"]
        if not takes_text:
            answer, prediction = as_written(record, answer), as_written(record, prediction)
        row = {
            "question_id": str(record["id"]),
            "choices": choices,
            "correct_choice_idx": choices.index(answer) if answer in choices else None,
            "direct_answers": record["answers"],
            "difficult_direct_answer": not record["answers"],
            **(record.get("extra") or {}),
        }
        if result.startswith("direct_answer") and row["difficult_direct_answer"]:
            return None
        scores = metric.compute(predictions=[prediction], references=[answer if takes_text else row])
        if result not in scores:
            raise ValueError(f"`--metric {name}`: {path} has no result {result!r}, expected one of {list(scores)}.")
        value = scores[result] / (100 if result in PERCENT else 1)
        if not 0 <= value <= 1:
            raise ValueError(f"`--metric {name}`: a sample scores {value}, expected a share from 0 to 1. Rescale it.")
        return value

    return score


def summarise(
    subject: Subject,
    num_thoughts: int | None,
    predictions: Sequence[Mapping[str, Any]],
    scores: Sequence[float | None],
) -> dict[str, Any]:
    """One row of the table; `scores` is empty where none were asked for."""
    count = len(predictions)
    row = {
        "model": subject.name,
        "mode": subject.config.mode,
        "stage": subject.config.stage,
        "num_thoughts": num_thoughts,
        "samples": count,
        "new_tokens": sum(line["new_tokens"] for line in predictions) / count,
        "seconds_per_sample": sum(line["seconds"] for line in predictions) / count,
    }
    scores = [score for score in scores if score is not None]
    if scores:
        rate = sum(scores) / len(scores)
        if set(scores) <= {0.0, 1.0}:
            low, high = wilson_interval(rate, len(scores))
        else:  # shares of a point, for which Wilson's does not hold
            low, high = paired_bootstrap(scores, [0.0] * len(scores))
        row |= {"scored": len(scores), "accuracy": rate, "low": low, "high": high}
    return row


def pair_budgets(first: Subject, second: Subject) -> list[tuple]:
    """Keys of rows to compare: the same budget asked of both; of a checkpoint without a block its only row."""
    count = max(len(first.budgets), len(second.budgets))
    keys = [
        [(subject.name, budget) for budget in subject.budgets] * (count if len(subject.budgets) == 1 else 1)
        for subject in (first, second)
    ]
    return [(mine, other) for mine, other in zip(*keys, strict=True) if mine != other]


def compare(first: Mapping[str, Any], second: Mapping[str, Any], first_scores, second_scores) -> dict[str, Any]:
    """Two rows on the same samples: the difference of their accuracies, its interval, and McNemar's p-value."""
    pairs = [pair for pair in zip(first_scores, second_scores, strict=True) if None not in pair]
    one, other = zip(*pairs, strict=True)
    low, high = paired_bootstrap(one, other)
    row = {
        "model": first["model"],
        "num_thoughts": first["num_thoughts"],
        "other": second["model"],
        "other_num_thoughts": second["num_thoughts"],
        "samples": len(pairs),
        "difference": (sum(one) - sum(other)) / len(pairs),
        "low": low,
        "high": high,
    }
    if set(one) | set(other) <= {0.0, 1.0}:  # McNemar's test knows right and wrong only
        row["only_model"] = sum(a > b for a, b in pairs)
        row["only_other"] = sum(a < b for a, b in pairs)
        row["mcnemar_p"] = mcnemar([a == 1 for a in one], [b == 1 for b in other])
    return row


def show(rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]):
    """The tables in the terminal."""
    width = max(len("model"), *(len(row["model"]) for row in rows)) + 2
    print(
        f"\n{'model':{width}}{'mode':13}{'thoughts':>8}  {'accuracy':>8}  {'95 % interval':>16}  {'new tokens':>10}  "
        f"{'s/sample':>8}  {'samples':>7}"
    )
    for row in rows:
        accuracy, interval = "-", "-"
        if "accuracy" in row:
            accuracy, interval = f"{row['accuracy']:.1%}", f"{row['low']:.1%} - {row['high']:>6.1%}"
        print(
            f"{row['model']:{width}}{row['mode']:13}{_budget(row['num_thoughts']):>8}  {accuracy:>8}  {interval:>16}  "
            f"{row['new_tokens']:>10.1f}  {row['seconds_per_sample']:>8.3f}  {row.get('scored', row['samples']):>7}"
        )
    print("s/sample: wall time of a batch over its samples, on one rank, pictures and prompts included.")
    for row in comparisons:
        test = f", McNemar's exact p = {row['mcnemar_p']:.3g}" if "mcnemar_p" in row else ""
        test += f" (only one right: {row['only_model']}, {row['only_other']})" if test else ""
        names = f"{row['model']} ({_budget(row['num_thoughts'])}) - "
        names += f"{row['other']} ({_budget(row['other_num_thoughts'])})"
        print(f"{names}: {row['difference']:+.1%}, 95 % interval {row['low']:+.1%} to {row['high']:+.1%}{test}")


def _budget(num_thoughts: int | None) -> str:
    return "no block" if num_thoughts is None else str(num_thoughts)


def draw(rows: Sequence[Mapping[str, Any]], path: str | Path):
    """Accuracy against the budget of thoughts and against generated tokens, with 95 % intervals."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    budget_axes, token_axes = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, model in enumerate(models):
        mine = sorted(
            (row for row in rows if row["model"] == model),
            key=lambda row: -1 if row["num_thoughts"] is None else row["num_thoughts"],
        )
        rates = [row["accuracy"] for row in mine]
        low_high = [[max(0, row["accuracy"] - row["low"]) for row in mine]]
        low_high.append([max(0, row["high"] - row["accuracy"]) for row in mine])
        style = {"yerr": low_high, "color": f"C{number}", "marker": "o", "markersize": 4, "capsize": 3}
        if mine[0]["num_thoughts"] is None:  # no block: the same beside every budget
            budget_axes.axhline(rates[0], color=f"C{number}", linewidth=1, linestyle="--")
        else:
            budget_axes.errorbar([row["num_thoughts"] for row in mine], rates, linewidth=1, **style)
        tokens = [row["new_tokens"] for row in mine]
        token_axes.errorbar(tokens, rates, linestyle="none", label=model, **style)
        for row in mine:
            place = (row["new_tokens"], row["accuracy"])
            token_axes.annotate(_budget(row["num_thoughts"]), place, (4, 4), textcoords="offset points", fontsize=7)
    for axes in (budget_axes, token_axes):
        axes.set(ylim=(0, 1.05), ylabel="accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y", color="0.92")
    budget_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    budget_axes.set(xlabel="thoughts (95 % intervals; dashed: trained without a block)")
    most = max(row["new_tokens"] for row in rows)
    token_axes.set(xlabel="generated tokens per answer (labels: thoughts)", xlim=(0, max(1, most) * 1.15))
    figure.legend(*token_axes.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def read_submission(path: str | Path) -> dict[str, dict[str, str]]:
    """
    A file in A-OKVQA's form, empty if there is none.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(path)
    try:
        answers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"`--predictions_to` {path} is there, but is not JSON ({error}). Name another.") from error
    if not isinstance(answers, dict) or not all(isinstance(value, dict) for value in answers.values()):
        raise ValueError(
            f"`--predictions_to` {path} is there, but is no file of predictions by question. Name another."
        )
    return answers


def write_submission(records, predictions, path: str | Path):
    """Adds to a file in A-OKVQA's form: multiple choice from records with choices, direct answers from the others."""
    answers = read_submission(path)
    for record, line in zip(records, predictions, strict=True):
        name = "multiple_choice" if record["choices"] else "direct_answer"
        answers.setdefault(str(record["id"]), {})[name] = as_written(record, line["prediction"])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(answers, indent=2), encoding="utf-8")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Scores as the flags say; returns the rows of the table (on the main process)."""
    arguments = parse_settings(ScoreArguments, __doc__, sys.argv[1:] if arguments is None else arguments)
    # Without a GPU it must be told, or accelerate takes the processes of torchrun for runs of their own.
    state = PartialState(cpu=arguments.use_cpu or not torch.accelerator.is_available())
    records = load_records(
        arguments.data,
        columns=json.loads(arguments.column_mapping) if arguments.column_mapping else None,
        split=arguments.split,
        needs_steps=False,
        needs_answer=not arguments.predict_only,
        allow_outside=arguments.allow_outside,
    )
    check_records(records, arguments)
    if arguments.predictions_to:
        read_submission(arguments.predictions_to)
    names = dict.fromkeys([*arguments.model, *([arguments.compare] if arguments.compare else [])])
    subjects = {name: Subject(name, records, arguments, state.device) for name in names}  # all: errors before compute
    metric = load_metric(arguments.metric) if state.is_main_process and not arguments.predict_only else None
    if metric:
        metric(records[0], "")  # names of results that do not exist show now

    rows, scores = {}, {}
    for subject in subjects.values():
        for num_thoughts in subject.budgets:
            predictions = predict(subject, records, num_thoughts, state)
            if state.is_main_process:
                pairs = zip(records, predictions, strict=True)
                values = [metric(record, line["prediction"]) for record, line in pairs] if metric else []
                scores[subject.name, num_thoughts] = values
                rows[subject.name, num_thoughts] = summarise(subject, num_thoughts, predictions, values)
                if arguments.predictions_to:
                    write_submission(records, predictions, arguments.predictions_to)
        subject.model = None  # makes room for the next
    if not state.is_main_process:
        return []
    comparisons = [
        compare(rows[mine], rows[other], scores[mine], scores[other])
        for name in (dict.fromkeys(arguments.model) if arguments.compare else ())
        for mine, other in pair_budgets(subjects[name], subjects[arguments.compare])
    ]
    rows = list(rows.values())
    output_dir = Path(arguments.output_dir)
    report = {"settings": asdict(arguments), "scores": rows, "comparisons": comparisons}
    (output_dir / "scores.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    with open(output_dir / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    if metric:
        draw(rows, output_dir / "scores.png")
    show(rows, comparisons)
    print(f"\npredictions, scores.json, scores.csv{' and scores.png' if metric else ''} are in {output_dir}")
    return rows


if __name__ == "__main__":
    main()
    leave()
