r"""What a picture costs from its file to the batch, on one core: against plain PIL and torch, and against the library.

    python benchmarks/pictures.py                      # about a minute on an idle core
    python benchmarks/pictures.py --quick              # does it run? No figure to quote.

`plain` is what InternVL's own program does: open, convert, resize, crop, thumbnail, to floats, normalise, stack. Our
image processor and the library's give a batch with tokens, from `StageDataset` and `ReasoningCollator`. All take turns
in every repetition, and a ratio is the median of the ratios within a repetition. Times are the processor's, which on
one core is the time of an idle machine, whatever else runs on this one.
"""

import os


os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: one core, as a worker of a data loader has

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import HfArgumentParser
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)
from transformers.utils import logging

from multicoco import CurriculumArguments, MultiCoCoProcessor, ReasoningCollator, StageDataset
from multicoco.benchmarks.passes import print_table, verdict
from multicoco.recipes.trails.start_model import make_tokenizer


GOAL = 1.0
PARTS = ["open, decode", "resize, crop", "thumbnail", "to floats, normalise", "copies", "tokens, collate, rest"]
MEAN = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
STD = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]


@dataclass
class PictureArguments:
    """How often it is measured."""

    repetitions: int = field(default=15, metadata={"help": "Timed repetitions of each row, at least 5 to quote."})
    quick: bool = field(default=False, metadata={"help": "Small pictures, once: shows only that the script runs."})

    def __post_init__(self):
        if self.quick:
            self.repetitions = 1
        if self.repetitions < 1:
            raise ValueError(f"`--repetitions` must be at least 1, got {self.repetitions}.")


def make_photograph(path: Path, width: int, height: int) -> None:
    """A JPEG file with detail at every scale, as a photograph has: the finer, the fainter."""
    generator = np.random.default_rng(0)
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells in (4, 16, 64, 256):
        noise = generator.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer, dtype=np.float32) / cells**0.5
    total = (total - total.min()) / (total.max() - total.min()) * 255
    Image.fromarray(total.astype(np.uint8)).save(path, quality=90)


# --- the three ways ----------------------------------------------------------------------------------------------


class Laps:
    """Milliseconds of each part of one run."""

    def __init__(self):
        self.parts, self.last = dict.fromkeys(PARTS, 0.0), time.process_time()

    def __call__(self, part: str) -> None:
        now = time.process_time()
        self.parts[part] += 1000 * (now - self.last)
        self.last = now


def run_plain(path: str, max_patches: int, size: int, laps: Laps) -> torch.Tensor:
    """InternVL's own preprocessing, with what torchvision's `ToTensor` and `Normalize` do."""
    image = Image.open(path).convert("RGB")
    laps("open, decode")
    columns, rows = get_optimal_tiled_canvas(image.size[::-1], (size, size), 1, max_patches)
    canvas = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = [canvas.crop((x, y, x + size, y + size)) for x, y in corners]
    laps("resize, crop")
    if len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    laps("thumbnail")
    floats = []
    for tile in tiles:
        tensor = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous().float().div(255)
        floats.append(tensor.clone().sub_(MEAN).div_(STD))
    laps("to floats, normalise")
    batch = torch.stack(floats)
    laps("copies")
    return batch


def parts_of_the_library(image_processor: GotOcr2ImageProcessorPil, path: str, max_patches: int) -> Laps:
    """The library's own methods, in the order in which it calls them."""
    tile = image_processor.size
    laps = Laps()
    image = Image.open(path).convert("RGB")
    laps("open, decode")
    array = image_processor.process_image(image, do_convert_rgb=True)
    laps("copies")
    limits = {"min_patches": 1, "max_patches": max_patches}
    settings = {"patch_size": tile, "resample": image_processor.resample}
    tiles = image_processor.crop_image_to_patches(array, **limits, use_thumbnail=False, **settings)
    laps("resize, crop")
    if len(tiles) > 1:
        tiles.append(image_processor.resize(array, tile, resample=image_processor.resample))
    laps("thumbnail")
    floats = [
        image_processor.normalize(
            image_processor.rescale(one, image_processor.rescale_factor),
            image_processor.image_mean,
            image_processor.image_std,
        )
        for one in tiles
    ]
    laps("to floats, normalise")
    torch.from_numpy(np.array(floats))
    laps("copies")
    return laps


def parts_of_ours(processor: MultiCoCoProcessor, path: str, max_patches: int) -> Laps:
    """What our image processor does, spelled out; its table is the library's."""
    size = processor.image_processor.size.height
    table = np.zeros((3, 256), dtype=np.float32)
    laps = Laps()
    image = processor.open_image(path, 0, 0)
    laps("open, decode")
    columns, rows = get_optimal_tiled_canvas(image.size[::-1], (size, size), 1, max_patches)
    floats = np.empty((columns * rows + 1, 3, size, size), np.float32)
    canvas = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    laps("resize, crop")
    thumbnail = image.resize((size, size), Image.Resampling.BICUBIC)
    laps("thumbnail")
    planes = [[np.asarray(plane) for plane in picture.split()] for picture in (canvas, thumbnail)]
    laps("copies")
    for index in range(columns * rows + 1):
        row, column = divmod(index, columns) if index < columns * rows else (0, 0)
        for channel in range(3):
            plane = planes[index == columns * rows][channel]
            part = plane[row * size : (row + 1) * size, column * size : (column + 1) * size]
            np.take(table[channel], part, out=floats[index, channel], mode="clip")
    laps("to floats, normalise")
    return laps


# --- the tables --------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way to a batch, timed as a whole and by its parts."""

    name: str
    run: Callable[[], object]
    measure_parts: Callable[[], Laps] | None = None
    milliseconds: list[float] = field(default_factory=list)
    laps: list[dict[str, float]] = field(default_factory=list)

    def measure(self) -> None:
        start = time.process_time()
        self.run()
        self.milliseconds.append(1000 * (time.process_time() - start))
        if self.measure_parts is not None:
            self.laps.append(self.measure_parts().parts)

    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def part(self, name: str) -> float:
        if name == PARTS[-1]:
            known = sum(map(self.part, PARTS[:-1]))
            return max(0.0, self.median() - known) if self.name != "plain" else 0.0
        return statistics.median(laps[name] for laps in self.laps)


def ratio_of(way: Way, other: Way) -> float:
    return statistics.median(a / b for a, b in zip(way.milliseconds, other.milliseconds, strict=True))


def make_processor(size: int, max_patches: int, **settings) -> MultiCoCoProcessor:
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": size, "width": size},
        crop_to_patches=True,
        max_patches=max_patches,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    processor = MultiCoCoProcessor(image_processor, make_tokenizer(4, 4), num_image_token=(size // 28) ** 2)
    for name, value in settings.items():
        setattr(processor.image_processor, name, value)
    return processor


def compare(path: Path, size: int, max_patches: int, repetitions: int) -> None:
    """Prints one picture's table."""
    record = {"id": "0", "images": [str(path)], "question": "<image>\nWhere?", "choices": None}
    record |= {"steps": ["There."], "answer": "here", "answers": [], "extra": {}}
    processor = make_processor(size, max_patches)
    library = make_processor(size, max_patches)
    library.image_processor = GotOcr2ImageProcessorPil.from_dict(processor.image_processor.to_dict())
    draft = make_processor(size, max_patches, draft_jpeg=True)
    dataset = StageDataset([record], processor, CurriculumArguments())

    def batch_of(one: MultiCoCoProcessor, **options: bool) -> Callable[[], object]:
        collator = ReasoningCollator(one, **options)
        return lambda: collator([dataset[0]])

    def plain() -> Laps:
        laps = Laps()
        run_plain(str(path), max_patches, size, laps)
        return laps

    ways = [
        Way("plain", lambda: run_plain(str(path), max_patches, size, Laps()), plain),
        Way(
            "library",
            batch_of(library),
            lambda: parts_of_the_library(library.image_processor, str(path), max_patches),
        ),
        Way("multicoco", batch_of(processor), lambda: parts_of_ours(processor, str(path), max_patches)),
        Way("multicoco, normalize_on_device", batch_of(processor, normalize_on_device=True)),
        Way("multicoco, draft_jpeg", batch_of(draft)),
    ]
    check_same_pixels(ways, str(path), max_patches, size)
    for repetition in range(repetitions):
        for way in ways if repetition % 2 == 0 else ways[::-1]:
            way.measure()

    plain_way, library_way, ours = ways[:3]
    width, height = Image.open(path).size
    count = dataset[0]["num_patches_list"][0]
    print(f"{width}x{height} JPEG of {path.stat().st_size / 1000:.0f} kB, {count - 1} tiles and the thumbnail")
    lines = []
    for part in PARTS:
        times = [way.part(part) for way in (plain_way, library_way, ours)]
        lines.append([part, *(f"{value:.1f}" for value in times)])
    ratio = ratio_of(ours, plain_way)
    whole = ["whole record", *(f"{way.median():.1f}" for way in (plain_way, library_way, ours))]
    lines.append([*whole, f"{ratio_of(library_way, plain_way):.3f}", f"{ratio:.3f}", verdict(ratio, GOAL)])
    for way in ways[3:]:
        lines.append([way.name.split(", ")[1], "", "", f"{way.median():.1f}", "", f"{ratio_of(way, plain_way):.3f}"])
    header = ["ms", "plain", "library", "multicoco", "library / plain", "multicoco / plain", "goal"]
    print_table(header, lines)
    print()


def check_same_pixels(ways: list[Way], path: str, max_patches: int, size: int) -> None:
    """Ours are the library's bit for bit and the plain ones to 1e-6, or the comparison means nothing."""
    plain = run_plain(path, max_patches, size, Laps())
    library, ours = (way.run()["pixel_values"] for way in ways[1:3])
    if not torch.equal(ours, library) or not torch.allclose(ours, plain, rtol=0, atol=1e-6):
        raise RuntimeError(f"The pixels differ, at most by {float((ours - plain).abs().max())}.")


def main(args: PictureArguments) -> None:
    torch.set_num_threads(1)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"One core, torch {torch.__version__}, Pillow {Image.__version__}, load {load}\n")
    size = 56 if args.quick else 448
    small, large = ((80, 60), (500, 375)) if args.quick else ((640, 480), (4000, 3000))
    with tempfile.TemporaryDirectory() as folder:
        for (width, height), max_patches in ((small, 6), (small, 12), (large, 12)):
            path = Path(folder) / f"{width}.jpg"
            make_photograph(path, width, height)
            compare(path, size, max_patches, args.repetitions)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(
        f"Medians of {args.repetitions} repetitions in turns after a warm-up. Parts are timed beside the whole; the "
        f"rest is what remains of it. Load at the end: {load}."
    )
    if args.quick:
        print("--quick: the script runs; no figure of it means anything.")


if __name__ == "__main__":
    logging.set_verbosity_error()
    (arguments,) = HfArgumentParser(PictureArguments).parse_args_into_dataclasses()
    main(arguments)
