"""Makes the Trails data set: boards of coloured cells with arrows, a question about each, and its steps.

    python recipes/trails/prepare.py --output_dir data/trails --num_train 16000 --num_val 1024 --size 4 --max_arrows 5
    python recipes/trails/prepare.py --output_dir data/trails-sentences --style sentences

The same seed makes the same files, byte for byte, and the first boards of a split are the same whatever its size:
each board is drawn from a generator of its own, seeded by `(seed, split, index)`.

`same_step` and `follow` are for score.py and diagnose.py. Knows boards, their pictures and texts; no token, no model.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


FORMAT = 2  # of what is drawn and written: raise it with any change, so that older folders are made anew
SPLITS = ("train", "val", "test")
STYLES = ("cells", "sentences")  # what a written step is: the name of a cell, or a sentence about an arrow
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 200, 40),
    "purple": (150, 60, 190),
    "orange": (240, 130, 30),
    "cyan": (60, 200, 210),
    "brown": (120, 80, 40),
}
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # (row, column) of an arrow up, right, down, left
MOVE_NAMES = ("up", "right", "down", "left")
PHRASINGS = (
    "The arrow in {cell} points {move}, so the next cell is {next}.",
    "From {cell} the way goes {move} to {next}.",
    "{cell} has an arrow that points {move}: go on to {next}.",
)
CELL_PIXELS = 14
MAX_SIZE = 26  # columns are letters


class Board(NamedTuple):
    """
    colours, arrows (`np.ndarray` of shape `(size, size)`): indices into `COLOURS` and `MOVES`.
    trail (`list[tuple[int, int]]`): row and column of the start and of the cells that `max_arrows` arrows reach.
    num_arrows (`int`): how many of them the question follows.
    """

    colours: np.ndarray
    arrows: np.ndarray
    trail: list[tuple[int, int]]
    num_arrows: int


def make_board(rng: np.random.Generator, size: int, max_arrows: int, max_asked: int | None = None) -> Board:
    """
    Draws a board with a trail of `max_arrows`, and a question that follows 1 to `max_asked` of them (default: all).

    The trail never visits a cell twice: free arrows soon run back and forth between two cells, so that few answers
    need all steps. Colours are free, so a board's most frequent one is the answer in a quarter of all cases: a faint
    hint by which a small model may first learn to look at colours. Boards that have every colour equally often give
    none; with them, and a longer prompt, colours were learned late or never.
    """
    trail, moves = _draw_trail(rng, size, max_arrows)
    options, num_options = _moves_inside(size)
    choice = (rng.random((size, size)) * num_options).astype(np.intp)
    arrows = np.take_along_axis(options, choice[..., None], axis=-1)[..., 0]
    for cell, move in zip(trail, moves, strict=False):  # the last cell keeps its own arrow
        arrows[cell] = move
    colours = rng.integers(len(COLOURS), size=(size, size))
    return Board(colours, arrows, trail, int(rng.integers(1, (max_asked or max_arrows) + 1)))


def _draw_trail(rng, size, max_arrows) -> tuple[list[tuple[int, int]], list[int]]:
    """A trail that never visits a cell twice, and its moves; a walk that gets stuck too early is given up."""
    options, num_options = _moves_inside(size)
    while True:
        trail, moves = [(int(rng.integers(size)), int(rng.integers(size)))], []
        while len(moves) < max_arrows:
            row, column = trail[-1]
            moves_here = options[row, column, : num_options[row, column]].tolist()
            cells = {move: (row + MOVES[move][0], column + MOVES[move][1]) for move in moves_here}
            ahead = {move: cell for move, cell in cells.items() if cell not in trail}
            if not ahead:
                break
            move = list(ahead)[int(rng.random() * len(ahead))]
            moves.append(move)
            trail.append(ahead[move])
        else:
            return trail, moves


@functools.cache
def _moves_inside(size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each cell the moves that stay on the board, `(size, size, 4)` filled up by -1, and their number."""
    options = np.full((size, size, len(MOVES)), -1)
    num_options = np.zeros((size, size), dtype=int)
    for row, column in np.ndindex(size, size):
        for move, (down, right) in enumerate(MOVES):
            if 0 <= row + down < size and 0 <= column + right < size:
                options[row, column, num_options[row, column]] = move
                num_options[row, column] += 1
    return options, num_options


def draw_board(board: Board) -> np.ndarray:
    """The picture of a board, `(14 * size, 14 * size, 3)` of `uint8`; the start cell has a black frame and centre."""
    size = len(board.colours)
    start = np.zeros((size, size), dtype=int)
    start[board.trail[0]] = 1
    cells = _cell_pictures()[board.colours, board.arrows, start]  # (size, size, 14, 14, 3)
    return cells.transpose(0, 2, 1, 3, 4).reshape(size * CELL_PIXELS, size * CELL_PIXELS, 3)


@functools.cache
def _cell_pictures() -> np.ndarray:
    """Every possible cell: `(colours, moves, 2, 14, 14, 3)`, the third axis for the start mark."""
    arrow = np.zeros((CELL_PIXELS, CELL_PIXELS), dtype=bool)  # upwards: a shaft from the centre and a head
    arrow[1:9, 6:8] = arrow[2, 5:9] = arrow[3, 4:10] = arrow[4, 3:11] = True
    mark = np.ones_like(arrow)
    mark[1:-1, 1:-1] = False
    mark[5:9, 5:9] = True
    cells = np.empty((len(COLOURS), len(MOVES), 2, *arrow.shape, 3), dtype=np.uint8)
    cells[:] = np.array(list(COLOURS.values()), dtype=np.uint8)[:, None, None, None, None]
    for move in range(len(MOVES)):
        cells[:, move, :, np.rot90(arrow, -move)] = 255
    cells[:, :, 1, mark] = 0
    return cells


def cell_name(row: int, column: int) -> str:
    """`A1` is the cell in the top left corner, `B1` the one right of it, `A2` the one below."""
    return f"{chr(ord('A') + column)}{row + 1}"


def parse_cell(name: str) -> tuple[int, int] | None:
    """Row and column of a name, as [`cell_name`] gives it, of the largest board; `None` if it is none."""
    found = re.fullmatch(r"([A-Z])([1-9][0-9]?)", name)
    if found is None or int(found[2]) > MAX_SIZE:
        return None
    return int(found[2]) - 1, ord(found[1]) - ord("A")


def make_question(start: str, num_arrows: int) -> str:
    """The text of a question, as `recipe_words` of start_model.py knows it."""
    return f"Start at {start} and follow {num_arrows} arrow{'s'[: num_arrows > 1]}. Which colour do you reach?"


def make_sentences(board: Board, rng: np.random.Generator) -> list[str]:
    """The steps of a board, each in a phrasing of its own, drawn from `PHRASINGS`."""
    trail = board.trail[: board.num_arrows + 1]
    choice = rng.integers(len(PHRASINGS), size=board.num_arrows)
    return [
        PHRASINGS[number].format(
            cell=cell_name(*cell), move=MOVE_NAMES[board.arrows[cell]], next=cell_name(*following)
        )
        for number, cell, following in zip(choice, trail[:-1], trail[1:], strict=True)
    ]


def make_record(board: Board, split: str, index: int, phrasings: np.random.Generator | None = None) -> dict:
    """
    The line of the JSONL file; the path of the picture is relative to that file. Steps are names of cells, or, with a
    generator that draws the phrasings, sentences.
    """
    names = [cell_name(*cell) for cell in board.trail[: board.num_arrows + 1]]
    return {
        "id": f"{split}-{index:06d}",
        "images": [f"{split}/{index:06d}.png"],
        "question": make_question(names[0], board.num_arrows),
        "steps": names[1:] if phrasings is None else make_sentences(board, phrasings),
        "answer": list(COLOURS)[board.colours[board.trail[board.num_arrows]]],
    }


def parse_step(text: str) -> tuple[str, tuple[int, int]] | None:
    """
    The style of a step and row and column of the cell that it reaches. `None` for any other text, and for a sentence
    that contradicts itself: its move does not lead from its first cell to its last.
    """
    text = text.strip()
    if (cell := parse_cell(text)) is not None:
        return "cells", cell
    names = re.findall(r"[A-Z][0-9]+", text)
    cells = [cell for name in names if (cell := parse_cell(name)) is not None]
    if not len(names) == len(cells) == 2:
        return None
    move = (cells[1][0] - cells[0][0], cells[1][1] - cells[0][1])
    if move not in MOVES:
        return None
    words = {"cell": names[0], "move": MOVE_NAMES[MOVES.index(move)], "next": names[1]}
    return ("sentences", cells[1]) if text in [phrasing.format(**words) for phrasing in PHRASINGS] else None


def same_step(text: str, step: str) -> bool:
    """
    Whether a text that was read names the same fact as a step: the same cell reached, whatever the phrasing.

    Args:
        text (`str`): What was read; blanks at its ends do not count. A malformed one names nothing.
        step (`str`): A step of a record, or the name of a cell, as [`follow`] returns it.
    """
    named, expected = parse_step(text), parse_step(step)
    return named is not None and expected is not None and named[1] == expected[1]


def read_board(picture: Image.Image | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    The colours and arrows of a picture, the inverse of [`draw_board`].

    Args:
        picture (`PIL.Image.Image` or `np.ndarray`): Of any mode, or `(14 * size, 14 * size, 3)` of `uint8`.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: as a [`Board`] has them.

    Raises:
        ValueError: it is no picture of a board, pixel by pixel.
    """
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    size = len(pixels) // CELL_PIXELS if pixels.ndim else 0
    if pixels.shape != (size * CELL_PIXELS, size * CELL_PIXELS, 3) or not 2 <= size <= MAX_SIZE:
        raise ValueError(
            f"`picture` has the shape {pixels.shape}, expected (n, n, 3) with n a multiple of {CELL_PIXELS}. Give one "
            "that `draw_board` made."
        )
    cells = pixels.reshape(size, CELL_PIXELS, size, CELL_PIXELS, 3).transpose(0, 2, 1, 3, 4)
    known, places = _cell_pictures(), _places_of_cells()
    found = np.empty((3, size, size), dtype=int)  # colour, arrow, whether it is the start
    for row, column in np.ndindex(size, size):
        place = places.get(cells[row, column].tobytes())
        if place is None or cells.dtype != known.dtype:
            raise ValueError(f"`picture` has no cell of a board at {cell_name(row, column)}. Give the file itself.")
        found[:, row, column] = place
    colours, arrows, start = found
    if start.sum() != 1 or not (arrows[..., None] == _moves_inside(size)[0]).any(axis=-1).all():
        raise ValueError(
            f"`picture` is no board: {start.sum()} cells are marked as the start, expected 1, or an arrow leaves it."
        )
    return colours, arrows


@functools.cache
def _places_of_cells() -> dict[bytes, tuple[int, ...]]:
    """Where each cell picture stands in `_cell_pictures`."""
    cells = _cell_pictures()
    return {cells[place].tobytes(): place for place in np.ndindex(cells.shape[:3])}


def follow(record: Mapping[str, Any], index: int, step: str) -> tuple[list[str], str]:
    """
    What would follow if a step of a record were another one, on the record's own picture.

    Args:
        record (`Mapping`): With `steps`, and `images`, whose first is a path or a `PIL.Image.Image`.
        index (`int`): The step that is replaced, from 0.
        step (`str`): What replaces it, in either style.

    Returns:
        `tuple[list[str], str]`: the names of the cells at the later steps, and the colour of the last cell.

    Raises:
        ValueError: `index` is no step of the record, `step` names no cell of the board, or the picture is no board.
    """
    num_steps = len(record["steps"])
    if not 0 <= index < num_steps:
        raise ValueError(f"`index` must be between 0 and {num_steps - 1}, the last step of the record, got {index}.")
    picture = record["images"][0]
    if isinstance(picture, (str, os.PathLike)):
        with Image.open(picture) as file:
            picture = file.convert("RGB")
    colours, arrows = read_board(picture)
    parsed = parse_step(step)
    if parsed is None or max(parsed[1]) >= len(colours):
        raise ValueError(f"`step` {step!r} names no cell of a board of {len(colours)} x {len(colours)} cells.")
    (row, column), names = parsed[1], []
    for _ in range(num_steps - 1 - index):
        down, right = MOVES[arrows[row, column]]
        row, column = row + down, column + right
        names.append(cell_name(row, column))
    return names, list(COLOURS)[colours[row, column]]


def follow_trail(record: Mapping[str, Any], index: int, step: str) -> tuple[list[str], str] | None:
    """As [`follow`]; `None` where it would visit a cell twice, or the start, as no trail of the data set does."""
    names, colour = follow(record, index, step)
    start = re.search(r"[A-Z][0-9]+", record["question"])
    parsed = parse_step(step)
    cells = [cell for name in (start and start[0], *names) if name and (cell := parse_cell(name))]
    cells += [parsed[1]] if parsed else []
    return (names, colour) if len(set(cells)) == len(cells) else None


def iter_boards(
    split: str, count: int, size: int, max_arrows: int, seed: int, max_asked: int | None = None
) -> Iterator[Board]:
    """The first `count` boards of a split, each drawn for itself."""
    for index in range(count):
        yield make_board(np.random.default_rng((seed, SPLITS.index(split), index)), size, max_arrows, max_asked)


def write_split(
    output_dir: str | Path, split: str, count: int, *, seed: int, style: str = "cells", **board: Any
) -> set[bytes]:
    """Writes `{split}.jsonl` and the pictures in `{split}/`; returns the digests of the pictures."""
    output_dir = Path(output_dir)
    (output_dir / split).mkdir(parents=True, exist_ok=True)
    digests = set()
    with open(output_dir / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for index, drawn in enumerate(iter_boards(split, count, seed=seed, **board)):
            phrasings = None
            if style == "sentences":  # 1: another stream than the board's, which is that of the other style
                phrasings = np.random.default_rng((seed, SPLITS.index(split), index, 1))
            picture, record = draw_board(drawn), make_record(drawn, split, index, phrasings)
            digests.add(hashlib.sha256(picture).digest())
            Image.fromarray(picture).save(output_dir / record["images"][0], compress_level=1)
            file.write(json.dumps(record) + "\n")
    return digests


def prepare(
    output_dir: str | Path,
    num_train: int = 16000,
    num_val: int = 1024,
    num_test: int = 0,
    size: int = 4,
    max_arrows: int = 5,
    seed: int = 0,
    max_train_arrows: int | None = None,
    style: str = "cells",
) -> bool:
    """
    Makes the whole data set, or nothing where it is already. It appears under its name only when it is complete.
    With `max_train_arrows` the questions of the train split follow at most so many arrows of the same trails. `style`
    is one of `STYLES`; boards, questions and answers are the same with each.

    Returns:
        `bool`: whether anything was made.

    Raises:
        ValueError: an argument is out of range, the folder holds something else, or a board is in two splits.
    """
    counts = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
    numbers = {f"num_{split}": count for split, count in counts.items()}
    for name, value in {**numbers, "seed": seed}.items():
        if value < 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
    if not 2 <= size <= MAX_SIZE:
        raise ValueError(f"`size` must be between 2 and {MAX_SIZE} (columns are letters), got {size}.")
    if not 1 <= max_arrows < size * size:
        raise ValueError(
            f"`max_arrows` must be between 1 and {size * size - 1}, got {max_arrows}: a longer trail on "
            f"{size} x {size} cells visits one of them twice."
        )
    if max_train_arrows is not None and not 1 <= max_train_arrows <= max_arrows:
        raise ValueError(
            f"`max_train_arrows` must be between 1 and `max_arrows` {max_arrows}, got {max_train_arrows}."
        )
    if style not in STYLES:
        raise ValueError(f"`style` must be one of {', '.join(STYLES)}, got {style!r}.")
    output_dir = Path(output_dir)
    board = {"size": size, "max_arrows": max_arrows, "seed": seed}
    settings = {"data_set": "trails", "format": FORMAT, **numbers, **board}
    if max_train_arrows is not None:
        settings["max_train_arrows"] = max_train_arrows
    if style != "cells":  # which folders are that name none
        settings["style"] = style
    found = _read_settings(output_dir)
    if found == settings:
        return False
    if found is None and output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` {output_dir} holds files that are not a Trails data set. Choose another folder."
        )

    partial = output_dir.with_name(output_dir.name + ".partial")  # what an interrupted run leaves; replaced
    shutil.rmtree(partial, ignore_errors=True)
    owners = {}
    for split, count in counts.items():
        if not count:
            continue
        max_asked = max_train_arrows if split == "train" else None
        digests = write_split(partial, split, count, **board, max_asked=max_asked, style=style)
        for other in {owners[digest] for digest in digests if digest in owners}:
            raise ValueError(
                f"A board of `{split}` is also in `{other}`: boards of {size} x {size} cells are too few for "
                f"{sum(counts.values())} different ones. Ask for fewer, or raise `size`."
            )
        owners |= dict.fromkeys(digests, split)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(output_dir, ignore_errors=True)
    os.replace(partial, output_dir)
    return True


def _read_settings(output_dir: Path) -> dict | None:
    """The settings of the Trails data set in a folder; `None` if there is none."""
    try:
        settings = json.loads((output_dir / "settings.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return settings if isinstance(settings, dict) and settings.get("data_set") == "trails" else None


def main() -> None:
    """Makes the data set that the flags describe."""
    parser = argparse.ArgumentParser(
        description="Make the Trails data set (PNG files and JSONL records).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output_dir", default="data/trails", help="Folder to make; kept if its settings are the same."
    )
    parser.add_argument("--num_train", type=int, default=16000, help="Boards to train on.")
    parser.add_argument("--num_val", type=int, default=1024, help="Boards to validate on.")
    parser.add_argument("--num_test", type=int, default=0, help="Boards to test on.")
    parser.add_argument("--size", type=int, default=4, help="Cells along each side of a board.")
    parser.add_argument("--max_arrows", type=int, default=5, help="A question follows 1 to this many arrows.")
    parser.add_argument("--seed", type=int, default=0, help="Other seeds give other boards.")
    parser.add_argument(
        "--max_train_arrows", type=int, help="A question to train on follows at most this many (default: max_arrows)."
    )
    parser.add_argument("--style", choices=STYLES, default="cells", help="Steps are names of cells, or sentences.")
    args = parser.parse_args()
    made = prepare(**vars(args))
    print(f"{args.output_dir}: {'made' if made else 'already there, with the same settings'}")


if __name__ == "__main__":
    main()
