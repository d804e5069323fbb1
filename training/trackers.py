"""Sample answers as a table in what a run reports to: wandb, trackio, TensorBoard. Knows no model and no data."""

import importlib
from collections.abc import Sequence
from typing import Any


TABLE = "eval/answers"
COLUMNS = ["id", "question", "answer", "written", "right"]


def report_answers(callbacks: Sequence[Any], rows: Sequence[Sequence[Any]], step: int) -> None:
    """
    Gives a table to each tracker among a trainer's callbacks.

    Args:
        callbacks (`Sequence[TrainerCallback]`): Of the trainer. The library's own hold the tracker, in an attribute
            that is not public.
        rows (`Sequence`): One for each sample, with the values of `COLUMNS`.
        step (`int`): The optimizer step after which they were written.
    """
    for callback in callbacks:
        kind = type(callback).__name__
        if kind == "WandbCallback":
            wandb = callback._wandb
            wandb.log(
                {TABLE: wandb.Table(columns=COLUMNS, data=[list(row) for row in rows]), "train/global_step": step}
            )
        elif kind == "TrackioCallback":
            pandas: Any = importlib.import_module("pandas")  # comes with trackio
            table = callback._trackio.Table(dataframe=pandas.DataFrame(list(rows), columns=COLUMNS))
            callback._trackio.log({TABLE: table, "train/global_step": step})
        elif kind == "TensorBoardCallback":
            lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
            cells = [[str(value).replace("|", "\\|").replace("\n", "<br>") for value in line] for line in lines]
            callback.tb_writer.add_text(TABLE, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)
