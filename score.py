"""Scores checkpoints on a file of records: accuracy, generated tokens and time for each number of thoughts.

    python score.py --model out --data mine_val.jsonl --num_thoughts 0 2 4 6
    python score.py --model out/coconut out/pause --compare out/cot --data mine_val.jsonl --output_dir out/scores
    python score.py --model out --data val.jsonl --choices_by likelihood --metric metrics/aokvqa.py:multiple_choice
    python score.py settings.yaml --batch_size 8                                       # flags win over the file
    torchrun --nproc_per_node 8 score.py --model out --data mine_val.jsonl

A killed run goes on where it stopped when the same command is given again. What the figures mean: docs/scoring.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate import PartialState
from transformers.integrations import is_deepspeed_zero3_enabled

from multicoco.compat import leave, world_size
from multicoco.curriculum import check_settings, setting
from multicoco.evaluation.metric import check_records, load_metric
from multicoco.evaluation.predictions import Ranks, predict, read_submission, write_submission
from multicoco.evaluation.readings import load_same_step, share
from multicoco.evaluation.scores import compare, pair_numbers, score_table, summarise, write_scores
from multicoco.evaluation.settings import choose_device, folder_for, parse_settings
from multicoco.evaluation.subject import CHOICES_BY, AskArguments, Subject


@dataclass(kw_only=True)
class ScoreArguments(AskArguments):
    """What is asked, how, and where the results go."""

    model: list[str] = setting("Folders or Hub names of one or more checkpoints.")
    output_dir: str = setting(
        "Folder of the predictions, scores.json, scores.csv and scores.png. If not given, `scores` in the folder of "
        "the first `--model`, where the model card looks; out/scores if that is on the Hub.",
        default="",
    )
    num_thoughts: list[int] | None = setting(
        "Numbers of thoughts; each checkpoint's own if not given. A checkpoint that was trained without "
        "a thought block is asked once, without one.",
        default=None,
    )
    compare: str | None = setting(
        "Another checkpoint that each of `--model` is compared with, on the same samples.", default=None
    )
    choices_by: str = setting(
        "generation: the answer is what the model writes. likelihood: the answer is the choice whose "
        "text the model finds most likely.",
        default="generation",
        choices=CHOICES_BY,
    )
    batch_size: int = setting("Samples at a time on one rank.", default=16)
    predict_only: bool = setting("Answer without scoring: no accuracy, no comparison, no picture.", default=False)
    predictions_to: str | None = setting(
        "JSON file in A-OKVQA's form that the predictions of one number of thoughts are added to.", default=None
    )
    attn_implementation: str | None = setting(
        "eager, sdpa or flash_attention_2; transformers' choice if not given.", default=None
    )

    def __post_init__(self):
        super().__post_init__()
        for number in self.num_thoughts or []:
            if number < 0:
                raise ValueError(f"`--num_thoughts` must be at least 0, got {number}. 0 is a block without thoughts.")
        check_settings(self, batch_size=1)
        self.output_dir = self.output_dir or folder_for("scores", self.model[0])
        if self.predict_only and self.compare:
            raise ValueError("`--compare` needs accuracies, which `--predict_only` leaves out. Drop one of the two.")
        if self.predictions_to and (len(self.model) > 1 or self.compare or len(self.num_thoughts or [0]) > 1):
            raise ValueError(
                "`--predictions_to` holds the answers of one checkpoint at one number of thoughts, but more are "
                "asked. Give one `--model` and at most one of `--num_thoughts`, without `--compare`."
            )


def check_alone(alone: bool | None) -> None:
    """
    Checks how `main` is called from a program of several ranks; in one process nothing.

    Raises:
        ValueError: it was not said whether this rank scores alone, or ZeRO-3 would load its model on all of them.
    """
    if world_size() == 1:
        return
    if alone is None:
        raise ValueError(
            f"`score.main` was called in a program of {world_size()} ranks, and would wait until all of them call it. "
            "On one (in a callback) call `score.main(words, alone=True)`, on all `alone=False`; or start score.py "
            "as a program of its own."
        )
    if alone and is_deepspeed_zero3_enabled():
        raise ValueError(
            "`alone` is True, but in this program ZeRO-3 partitions every model that is loaded over all ranks. Start "
            "score.py as a program of its own."
        )


def main(words: Sequence[str] | None = None, *, alone: bool | None = None) -> list[dict[str, Any]]:
    """
    Scores as the flags say; returns the rows of the table (on the main process).

    Args:
        words (`Sequence[str]`, *optional*): The flags; those of the command line if not given.
        alone (`bool`, *optional*): In a program of several ranks, whether this one asks no other. There it must be
            said; several that are alone need an `--output_dir` each.
    """
    check_alone(alone)
    arguments = parse_settings(ScoreArguments, __doc__, sys.argv[1:] if words is None else words)
    # Without a GPU it must be told, or accelerate takes the processes of torchrun for runs of their own.
    state = PartialState(cpu=choose_device(use_cpu=arguments.use_cpu).type == "cpu")
    ranks = Ranks() if alone else Ranks(state.num_processes, state.process_index)
    records = arguments.read_data(needs_answer=not arguments.predict_only)
    asked = {name: getattr(arguments, name) for name in ("max_new_tokens", "choices_by", "predict_only")}
    check_records(records, arguments.metric, **asked)
    if arguments.predictions_to:
        read_submission(arguments.predictions_to)
    how: dict[str, Any] = {"choices_by": arguments.choices_by, "attn_implementation": arguments.attn_implementation}
    names = dict.fromkeys([*arguments.model, *([arguments.compare] if arguments.compare else [])])
    subjects = [Subject(name, records, arguments, state.device, **how) for name in names]  # errors before compute
    numbers = {subject.name: subject.numbers_of_thoughts(arguments.num_thoughts) for subject in subjects}
    is_scored = ranks.is_main and not arguments.predict_only
    metric = load_metric(arguments.metric, try_on=records[0]) if is_scored else None
    same_step = load_same_step(arguments.same_step)

    rows, scores = {}, {}
    for subject in subjects:
        for num_thoughts in numbers[subject.name]:
            predictions = predict(subject, num_thoughts, ranks, arguments.output_dir, arguments.batch_size)
            if ranks.is_main:
                both = zip(records, predictions, strict=True)
                key = subject.name, num_thoughts
                scores[key] = [metric(record, line["prediction"]) for record, line in both] if metric else []
                reads = share(records, [line.get("thoughts") for line in predictions], same_step)
                rows[key] = summarise(subject.name, subject.config, num_thoughts, predictions, scores[key], reads)
                if arguments.predictions_to:
                    write_submission(records, predictions, arguments.predictions_to)
        subject.model = None  # makes room for the next
    if not ranks.is_main:
        return []
    comparisons = []
    for name in dict.fromkeys(arguments.model) if arguments.compare else ():
        for mine, other in pair_numbers(numbers, name, str(arguments.compare)):
            comparisons.append(compare(rows[mine], rows[other], scores[mine], scores[other]))
    table = list(rows.values())
    written = write_scores(arguments.output_dir, asdict(arguments), table, comparisons)
    print(f"\n{score_table(table, comparisons)}\n\n{written}")
    return table


if __name__ == "__main__":
    main()
    leave()
