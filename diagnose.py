"""Do the thoughts of a checkpoint matter? Interventions on thoughts and pictures, as one page that opens from disk.

    python diagnose.py --model out --data mine_val.jsonl --report report.html
    python diagnose.py --model out/coconut --control out/pause --data mine_val.jsonl --batch_size 256
    python diagnose.py settings.yaml --max_samples 500                                 # flags win over the file
    python diagnose.py --model out --data mine_val.jsonl --edits_from mine_train.jsonl \\
        --same_step recipes/trails/prepare.py:same_step --follow recipes/trails/prepare.py:follow

A killed run goes on where it stopped when the same command is given again. What each experiment can and cannot show:
docs/truth.md.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multicoco.curriculum import check_settings, setting
from multicoco.evaluation.diagnosis import Diagnosis
from multicoco.evaluation.edits import choose_records
from multicoco.evaluation.metric import check_records, load_metric
from multicoco.evaluation.page import draw_attention, draw_pictures, page, report_table
from multicoco.evaluation.readings import check_function, load_follow, load_same_step
from multicoco.evaluation.settings import choose_device, folder_for, parse_settings
from multicoco.evaluation.subject import AskArguments, Subject
from multicoco.evaluation.verdicts import Examined, Reading, Scores, make_report


@dataclass(kw_only=True)
class DiagnoseArguments(AskArguments):
    """What is examined, how, and where the results go."""

    model: str = setting("Folder or Hub name of a checkpoint.")
    report: str = setting("The page to write.", default="report.html")
    output_dir: str = setting(
        "Folder of diagnosis.json and of the predictions of each experiment. If not given, `diagnosis` in the folder "
        "of `--model`, where the model card looks; out/diagnosis if that is on the Hub.",
        default="",
    )
    control: str | None = setting(
        "A checkpoint without thoughts, or with constant ones, to set beside it (train.py --mode).", default=None
    )
    num_thoughts: int | None = setting(
        "Thoughts to examine; what the checkpoint was trained with if not given.", default=None
    )
    max_samples: int | None = setting("Only the first records; all if not given.", default=None)
    batch_size: int = setting("Samples at a time.", default=64)
    num_drawn: int = setting("Samples whose attention is drawn over the picture.", default=4)
    num_attention: int = setting("Samples whose attention is averaged.", default=32)
    num_read: int = setting("Samples whose thoughts are shown as they read, if they can be read.", default=8)
    edits_from: str | None = setting(
        "Records, of the training, for the read-edit experiment: the mean of thoughts that read there as another step "
        "is fed in the place of a sample's own. With `--follow`.",
        default=None,
    )
    follow: str | None = setting(
        "FILE:FUNCTION, (record, index, step) -> (later steps, answer): what follows on the record's own picture if "
        "this were its step at this index, as recipes/trails/prepare.py:follow. With `--edits_from`.",
        default=None,
    )
    seed: int = setting("Seed of noise, donors and resampling.", default=0)

    def __post_init__(self):
        super().__post_init__()
        self.output_dir = self.output_dir or folder_for("diagnosis", self.model)
        least = {"num_thoughts": 0, "max_samples": 2, "batch_size": 1, "num_drawn": 0, "num_read": 0}
        check_settings(self, **least, num_attention=1, seed=0)
        check_function(self.follow, "follow")
        if (self.edits_from is None) != (self.follow is None):
            raise ValueError(
                f"`--edits_from` is {self.edits_from!r} and `--follow` {self.follow!r}, but the read-edit experiment "
                "needs both: records to take thoughts from, and the rule of what follows. Give both or neither."
            )


def read_donors(arguments: DiagnoseArguments, diagnosis: Diagnosis) -> Subject:
    """
    The checkpoint with the records of `--edits_from`, at most 2,000 of them.

    Raises:
        ValueError: its thoughts are no states, or cannot be read.
    """
    subject = diagnosis.subject
    if not (subject.feeds_states and subject.can_read(diagnosis.num_thoughts)):
        raise ValueError(
            f"`--edits_from` needs a checkpoint that feeds states back and whose thoughts can be read, but "
            f"`{subject.name}` has mode {subject.config.mode!r}, `step_loss_weight` {subject.config.step_loss_weight} "
            f"and is asked with {diagnosis.num_thoughts} thoughts. Leave out `--edits_from` and `--follow`, or train "
            "with `--step_loss_weight 1`."
        )
    records = arguments.read(str(arguments.edits_from), split="train", needs_steps=False, needs_answer=False)
    chosen = records.select(choose_records(len(records), arguments.seed))
    return Subject(subject.name, chosen, arguments, subject.device)


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    """Diagnoses as the flags say; returns what diagnosis.json holds."""
    arguments = parse_settings(DiagnoseArguments, __doc__, sys.argv[1:] if words is None else words)
    device = choose_device(use_cpu=arguments.use_cpu)
    records = arguments.read_data()[: arguments.max_samples]
    if len(records) < 2:
        raise ValueError(f"`--data` {arguments.data} has {len(records)} record, expected at least 2 to compare.")
    check_records(records, arguments.metric)
    metric = load_metric(arguments.metric, try_on=records[0])
    subjects = [Subject(arguments.model, records, arguments, device)]
    if arguments.control:
        subjects.append(Subject(arguments.control, records, arguments, device, flag="--control"))
    same_step, num_shown = load_same_step(arguments.same_step), arguments.num_read
    how = {name: getattr(arguments, name) for name in ("output_dir", "num_thoughts", "batch_size", "seed")}
    diagnoses = [Diagnosis(subject, is_control=subject is not subjects[0], **how) for subject in subjects]
    follow = load_follow(arguments.follow, try_on=records) if arguments.follow else None
    donors = read_donors(arguments, diagnoses[0]) if arguments.edits_from else None
    examined, edits = [], None
    for diagnosis in diagnoses:
        results = diagnosis.run()
        found = diagnosis.measure(results, num_attention=arguments.num_attention, num_drawn=arguments.num_drawn)
        if donors and diagnosis is diagnoses[0] and found and found.readings is not None:
            edits = diagnosis.edit_readings(donors, found.readings, same_step)
        diagnosis.subject.model = None  # makes room for the control
        examined.append(Examined(Scores(results, metric), found))
    control = examined[1] if arguments.control else None
    reading = Reading(same_step, num_shown, edits, follow)
    report = {"settings": asdict(arguments), **make_report(examined[0], control, reading)}
    found = examined[0].measurements
    pictures = draw_attention(records, found.drawn) if found else []
    pictures_read = draw_pictures(records, num_shown) if "readings" in report else []
    output_dir = Path(arguments.output_dir)
    content = json.dumps(report, indent=1, allow_nan=False)
    (output_dir / "diagnosis.json").write_text(content, encoding="utf-8")
    Path(arguments.report).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.report).write_text(page(report, pictures, pictures_read), encoding="utf-8")
    print(f"\n{report_table(report)}\n\n{arguments.report} and {output_dir / 'diagnosis.json'} are written")
    return report


if __name__ == "__main__":
    main()
