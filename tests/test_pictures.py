"""Pictures: the library's pixels bit for bit in fewer passes, bytes for the device, drafts, and errors that name."""

import copy
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHECKPOINT
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, TrainingArguments
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from multicoco import (
    CurriculumArguments,
    MultiCoCoForConditionalGeneration,
    MultiCoCoProcessor,
    ReasoningCollator,
    StageDataset,
    load_records,
)
from multicoco.evaluation.settings import RecordArguments
from multicoco.recipes.trails.prepare import prepare
from multicoco.training.arguments import parse
from multicoco.training.trainer import StageTrainer


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TILING = {"size": {"height": 28, "width": 28}, "crop_to_patches": True, **IMAGENET}


def noise(width, height, mode="RGB", seed=0):
    """A picture in which every pixel counts."""
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def smooth(width, height, mode="RGB"):
    """A picture that JPEG keeps well."""
    return noise(8, 6, mode).resize((width, height), Image.Resampling.BICUBIC)


def write_jpeg(path, image):
    image.save(path, quality=95)
    return str(path)


def image_processors(**settings):
    """Ours as a processor has it, and the library's."""
    library = GotOcr2ImageProcessorPil(**{**TILING, **settings})
    tokenizer = MultiCoCoProcessor.from_pretrained(CHECKPOINT).tokenizer
    ours = MultiCoCoProcessor(copy.deepcopy(library), tokenizer, 4).image_processor
    assert type(ours) is not type(library)
    return ours, library


def assert_same(given, expected):
    """The same keys, types, shapes and bits."""
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert type(given[name]) is type(value), name
        pairs = zip(given[name], value, strict=True) if isinstance(value, list) else [(given[name], value)]
        for one, other in pairs:
            assert type(one) is type(other)
            if isinstance(other, np.ndarray | torch.Tensor):
                assert one.dtype == other.dtype
                assert one.shape == other.shape
                assert np.array_equal(np.asarray(one), np.asarray(other))
            else:
                assert one == other


# --- the library's pixels ----------------------------------------------------------------------------------------

SIZES = [
    (1, 1),
    (28, 28),
    (40, 40),
    (90, 30),
    (30, 90),
    (28, 200),
    (200, 28),
    (84, 56),
    (83, 57),
    (640, 480),
    (3, 300),
]


@pytest.mark.parametrize("return_tensors", [None, "np", "pt"])
def test_pixels_are_the_librarys_at_every_size_in_one_batch(return_tensors):
    ours, library = image_processors()
    images = [noise(*size, seed=seed) for seed, size in enumerate(SIZES)]
    expected = library(images, return_tensors=return_tensors)
    assert_same(ours(images, return_tensors=return_tensors), expected)
    assert max(expected["num_patches"]) == 13


SETTINGS = {
    "one_tile": {"max_patches": 1},
    "six_tiles": {"max_patches": 6},
    "four_at_least": {"min_patches": 4},
    "not_cut": {"crop_to_patches": False},
    "other_size": {"size": {"height": 20, "width": 36}},
    "mean_of_clip": {"image_mean": [0.48145466, 0.4578275, 0.40821073]},
    "one_mean": {"image_mean": 0.5, "image_std": 0.25},
    "not_rescaled": {"do_rescale": False},
    "not_normalised": {"do_normalize": False},
    "bytes": {"do_rescale": False, "do_normalize": False},
    "other_factor": {"rescale_factor": 1 / 127.5},
    "not_converted": {"do_convert_rgb": False},
    "no_filter": {"do_resize": False, "resample": None},
    "padded": {"do_pad": True, "pad_size": {"height": 64, "width": 64}},
    "shortest_edge": {"size": {"shortest_edge": 30}, "crop_to_patches": False},
    **{f"filter_{one.name.lower()}": {"resample": int(one)} for one in list(Image.Resampling)[:6]},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("way", ["made", "called"])
def test_pixels_are_the_librarys_with_any_settings(settings, way):
    made, called = (settings, {}) if way == "made" else ({}, settings)
    ours, library = image_processors(**made)
    images = (
        [noise(90, 60), noise(28, 40)] if settings.get("size", {}).keys() != {"shortest_edge"} else [noise(90, 60)]
    )
    assert_same(ours(images, return_tensors="pt", **called), library(images, return_tensors="pt", **called))


def test_pixels_are_the_librarys_where_nothing_is_resized():
    ours, library = image_processors(do_resize=False, max_patches=1)
    images = [noise(90, 60), noise(28, 40)]
    assert_same(ours(images), library(images))


def with_transparent_colour(mode):
    file = io.BytesIO()
    image = noise(60, 40, "L").point(lambda value: value // 64)
    if mode == "P":
        image.putpalette([value for index in range(4) for value in (60 * index, 10, 200 - 60 * index)])
        image.save(file, "PNG", transparency=2)
    else:
        image.convert("RGB").save(file, "PNG", transparency=(2, 2, 2))
    return file.getvalue()


INPUTS = {
    "gray": lambda: noise(90, 60, "L"),
    "rgba": lambda: noise(90, 60, "RGBA"),
    "cmyk": lambda: noise(90, 60, "CMYK"),
    "transparent_colour": lambda: Image.open(io.BytesIO(with_transparent_colour("RGB"))),
    "palette": lambda: Image.open(io.BytesIO(with_transparent_colour("P"))),
    "array": lambda: np.asarray(noise(90, 60)),
    "array_first": lambda: np.moveaxis(np.asarray(noise(90, 60)), -1, 0),
    "floats": lambda: np.asarray(noise(90, 60), dtype=np.float32) / 255,
    "tensor": lambda: torch.from_numpy(np.asarray(noise(90, 60)).copy()).permute(2, 0, 1),
    "list": lambda: [noise(90, 60), noise(28, 40)],
    "nested": lambda: [[noise(90, 60)], [noise(28, 40), noise(60, 90)]],
    "mixed": lambda: [noise(90, 60), noise(90, 60, "RGBA")],
    "path": lambda: str(Path(__file__).parent / "golden" / "internvl" / "images" / "big.png"),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_pixels_are_the_librarys_whatever_comes(make):
    ours, library = image_processors()
    assert_same(ours(make(), return_tensors="pt"), library(make(), return_tensors="pt"))


@pytest.mark.parametrize("mode", ["P", "RGB"])
def test_a_transparent_colour_is_kept_as_internvl_keeps_it(processor, mode):
    """The library lays it over white, which it did with such files until now, against what is said of transparency."""
    content = with_transparent_colour(mode)
    kept = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert (kept != 255).any(axis=-1).all()  # no pixel is white
    expected = processor(images=[Image.fromarray(kept)], text="<image>", return_tensors="pt")["pixel_values"]
    given = Image.open(io.BytesIO(content))
    for image in (content, given):
        found = processor(images=[image], text="<image>", return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)
    assert "transparency" in given.info  # the caller's picture is left alone


def test_no_picture_of_a_caller_is_changed(processor):
    processor = copy.deepcopy(processor)
    processor.image_processor.draft_jpeg = True
    file = io.BytesIO()
    smooth(640, 480).save(file, "JPEG")
    image, other = Image.open(file), Image.open(file)
    other.load()
    processor(images=[image], text="<image>")
    assert image == other
    assert vars(image).keys() == vars(other).keys()


# --- files and copies --------------------------------------------------------------------------------------------


def saved(processor, folder):
    processor.save_pretrained(folder)
    return json.loads((Path(folder) / "processor_config.json").read_text())["image_processor"]


def test_what_is_saved_is_the_librarys(tmp_path):
    ours, library = image_processors()
    assert ours.to_dict() == library.to_dict()
    assert json.loads(ours.to_json_string()) == json.loads(library.to_json_string())
    values = saved(MultiCoCoProcessor.from_pretrained(CHECKPOINT), tmp_path)
    assert values["image_processor_type"] == "GotOcr2ImageProcessor"
    assert "draft_jpeg" not in values
    alone = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(alone) is GotOcr2ImageProcessorPil
    image = noise(90, 60)
    assert_same(MultiCoCoProcessor.from_pretrained(tmp_path).image_processor(image), alone(image))


@pytest.mark.parametrize("draft_jpeg", [False, True])
def test_every_copy_is_ours_and_keeps_the_settings(tmp_path, draft_jpeg):
    processor = MultiCoCoProcessor.from_pretrained(CHECKPOINT, draft_jpeg=draft_jpeg)
    processor.image_processor.max_patches = 5
    assert saved(processor, tmp_path / "one").get("draft_jpeg", False) is draft_jpeg
    loaded = MultiCoCoProcessor.from_pretrained(tmp_path / "one")
    again = MultiCoCoProcessor.from_pretrained(tmp_path / "one")
    assert saved(again, tmp_path / "two") == saved(processor, tmp_path / "one")
    for other in (loaded, copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        part = other.image_processor
        assert type(part) is type(processor.image_processor)
        assert (part.draft_jpeg, part.max_patches) == (draft_jpeg, 5)
        assert_same(part(noise(90, 60)), processor.image_processor(noise(90, 60)))


def test_a_users_own_image_processor_stays():
    class Grey(GotOcr2ImageProcessorPil):
        def rescale(self, image, scale, **kwargs):
            return np.full_like(image, 0.5, dtype=np.float32)

    tokenizer = MultiCoCoProcessor.from_pretrained(CHECKPOINT).tokenizer
    processor = MultiCoCoProcessor(Grey(**TILING), tokenizer, 4)
    assert type(processor.image_processor) is Grey
    batch = processor(images=[noise(90, 60)], text="<image>", return_tensors="pt")
    grey = (0.5 - torch.tensor(IMAGENET["image_mean"])) / torch.tensor(IMAGENET["image_std"])
    torch.testing.assert_close(batch["pixel_values"], grey[:, None, None].expand_as(batch["pixel_values"]))
    tiles = torch.zeros((1, 3, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(processor.normalize_pixels(tiles), grey[:, None, None].expand(1, 3, 28, 28))


# --- records -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a", (28, 28)), ("b", (90, 60)), ("c", (60, 90))):
        noise(*size).save(tmp_path / f"{name}.png")
    return tmp_path


def make_dataset(folder, processor, images=("a.png", "b.png", "c.png")):
    rows = [
        {"id": f"r{number}", "images": [name], "question": "Where?", "steps": ["up"], "answer": "red"}
        for number, name in enumerate(images)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return StageDataset(load_records(folder / "rows.json"), processor, CurriculumArguments())


def features_of(dataset, *, with_id=True):
    """Its samples; the id comes from the data set as soon as that gives it."""
    features = [{**dataset[index], "id": dataset.records[index]["id"]} for index in range(len(dataset))]
    return features if with_id else [{name: feature[name] for name in feature if name != "id"} for feature in features]


@pytest.mark.parametrize("settings", [{}, {"do_normalize": False}, {"image_mean": 0.5, "image_std": 0.25}], ids=str)
def test_bytes_are_normalised_to_the_same_bits(folder, settings):
    processor = MultiCoCoProcessor.from_pretrained(CHECKPOINT, **settings)
    features = features_of(make_dataset(folder, processor))
    plain = ReasoningCollator(processor)(features)
    collator = ReasoningCollator(processor, normalize_on_device=True)
    batch = collator(features)
    assert batch["pixel_values"].dtype == torch.uint8
    numbers = processor.normalize_pixels(batch["pixel_values"])
    assert numbers.dtype == torch.float32
    assert torch.equal(numbers, plain["pixel_values"])
    assert batch["num_patches_list"] == plain["num_patches_list"]
    prompts = collator.prompts(features)["pixel_values"]  # what `generate` takes
    assert torch.equal(prompts, plain["pixel_values"])
    with pytest.raises(ValueError, match=r"torch\.float32, expected torch\.uint8.*once"):
        processor.normalize_pixels(numbers)


def test_a_model_refuses_bytes(model, processor, folder, computed):
    features = features_of(make_dataset(folder, processor))
    batch = ReasoningCollator(processor, normalize_on_device=True)(features)
    tiles = batch["pixel_values"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    question = {"question": "Where?", "generation_config": {"max_new_tokens": 1}}
    calls = {
        "forward": lambda: model(**batch),
        "original_order": lambda: model(tiles, batch["input_ids"]),
        "generate": lambda: model.generate(**inputs, max_new_tokens=1),
        "features": lambda: model.extract_feature(tiles),
        "embed": lambda: model.embed_thoughts(**inputs),
        "fuse": lambda: model.fuse(batch["input_ids"], tiles),
        "chat": lambda: model.chat(processor.tokenizer, tiles[:1], **question),
    }
    for name, call in calls.items():
        with pytest.raises(
            ValueError, match=r"`pixel_values` is torch\.uint8, expected .*`processor.normalize_pixels`"
        ):
            pytest.fail(f"{name} took them: {call()}")
    assert torch.isfinite(model(**{**batch, "pixel_values": processor.normalize_pixels(tiles)}).loss)


def test_training_on_bytes_is_training_on_numbers(trails_start, tmp_path):
    processor = MultiCoCoProcessor.from_pretrained(trails_start)
    prepare(tmp_path / "data", num_train=8, num_val=1)
    dtypes, logs = [], []
    for normalize_on_device in (False, True):
        curriculum = CurriculumArguments(c_thought=1, max_latent_stage=0)
        model = MultiCoCoForConditionalGeneration.from_pretrained(trails_start)
        dataset = StageDataset(load_records(tmp_path / "data" / "train.jsonl"), processor, curriculum)
        collator = ReasoningCollator(processor, normalize_on_device=normalize_on_device)
        dtypes.append(collator([dataset[0]])["pixel_values"].dtype)
        values = {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "num_train_epochs": 1}
        values |= {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "epoch", "disable_tqdm": True}
        trainer = StageTrainer(
            model=model,
            args=TrainingArguments(**values, remove_unused_columns=False, use_cpu=True, learning_rate=1e-3),
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=collator,
            processing_class=processor,
            curriculum=curriculum,
        )
        trainer.train()
        history = trainer.state.log_history
        logs.append([entry[name] for entry in history for name in ("loss", "grad_norm", "eval_loss") if name in entry])
    assert dtypes == [torch.float32, torch.uint8]
    assert len(logs[0]) == 5
    assert logs[0] == logs[1]


WORDS = ["--model_name_or_path", "m", "--train_file", "t.jsonl", "--output_dir", "out"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], (False, True)), (["--draft_jpeg", "true"], (True, True)), (["--draft_jpeg", "false"], (False, False))],
    ids=["not_given", "on", "off"],
)
def test_training_says_how_files_are_decoded_and_the_checkpoint_keeps_it(tmp_path, words, expected):
    MultiCoCoProcessor.from_pretrained(CHECKPOINT, draft_jpeg=True).save_pretrained(tmp_path / "on")
    MultiCoCoProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path / "off")
    data = parse(None, [*WORDS, *words]).data
    for name, value in zip(("off", "on"), expected, strict=True):
        data.load_processor(str(tmp_path / name)).save_pretrained(tmp_path / "trained")
        asked = RecordArguments().load_processor(str(tmp_path / "trained"))
        assert asked.image_processor.draft_jpeg is value


def test_bytes_for_the_device_are_asked_for():
    assert not parse(None, WORDS).data.normalize_on_device
    assert parse(None, [*WORDS, "--normalize_on_device"]).data.normalize_on_device


# --- drafts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafting():
    return MultiCoCoProcessor.from_pretrained(CHECKPOINT, draft_jpeg=True)


def pixels_of(processor, image, **kwargs):
    return processor(images=[image], text="<image>", return_tensors="pt", **kwargs)["pixel_values"]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("form", ["path", "bytes"])
def test_a_draft_has_other_pixels_of_the_same_picture(processor, drafting, tmp_path, mode, form):
    path = write_jpeg(tmp_path / "large.jpg", smooth(1203, 901, mode))
    image = path if form == "path" else Path(path).read_bytes()
    plain, draft = pixels_of(processor, image), pixels_of(drafting, image)
    assert plain.shape == draft.shape == (13, 3, 28, 28)
    assert not torch.equal(plain, draft)
    assert (plain - draft).abs().max() < 0.15  # of numbers from -2 to 2.6
    assert torch.equal(pixels_of(drafting, image, draft_jpeg=False), plain)
    assert torch.equal(pixels_of(processor, image, draft_jpeg=True), draft)


@pytest.mark.parametrize(
    "size", [(1203, 901), (113, 85), (111, 85), (223, 170), (895, 673), (60, 1200), (31, 29)], ids=str
)
def test_a_draft_is_never_below_what_the_tiles_need(drafting, tmp_path, size):
    """And it is the smallest of the halvings that is not."""
    path = write_jpeg(tmp_path / "a.jpg", smooth(*size))
    tiles = len(pixels_of(drafting, path))
    opened = drafting.open_image(path, 0, 0)
    columns, rows = get_optimal_tiled_canvas(size[::-1], (28, 28), 1, 12)
    assert tiles == columns * rows + (columns * rows > 1)
    needed = columns * 28, rows * 28
    fitting = [s for s in (1, 2, 4, 8) if size[0] // s >= needed[0] and size[1] // s >= needed[1]]
    scale = max(fitting, default=1)
    assert opened.size == (-(-size[0] // scale), -(-size[1] // scale))


def test_tiles_are_those_of_the_full_size(processor, drafting, tmp_path):
    """By the size of its draft, 61 x 86, this picture would have 3 x 4 tiles."""
    path = write_jpeg(tmp_path / "a.jpg", smooth(121, 171))
    assert drafting.open_image(path, 0, 0).size == (61, 86)
    assert len(pixels_of(processor, smooth(61, 86))) == 13
    assert len(pixels_of(drafting, path)) == len(pixels_of(processor, path)) == 7
    dataset = make_dataset(tmp_path, drafting, images=["a.jpg"])
    batch = ReasoningCollator(drafting)([dataset[0]])
    assert batch["num_patches_list"] == dataset[0]["num_patches_list"] == [7]
    assert torch.equal(batch["pixel_values"], pixels_of(drafting, path))
    draft = Image.open(path)
    draft.draft(None, (56, 84))
    canvas = draft.resize((56, 84), Image.Resampling.BICUBIC, (0, 0, 60.5, 85.5))  # where the picture lies in it
    corner = canvas.crop((28, 56, 56, 84))
    assert torch.equal(batch["pixel_values"][5], pixels_of(processor, corner)[0])
    assert not torch.equal(batch["pixel_values"], ReasoningCollator(processor)([dataset[0]])["pixel_values"])


def test_only_jpeg_files_are_drafted(processor, drafting, tmp_path):
    image = smooth(1203, 901)
    image.save(tmp_path / "large.png")
    for one in (tmp_path / "large.png", image, np.asarray(image)):
        assert torch.equal(pixels_of(drafting, one), pixels_of(processor, one))
    with Image.open(write_jpeg(tmp_path / "large.jpg", image)) as opened:
        assert torch.equal(pixels_of(drafting, opened), pixels_of(processor, opened))


def test_settings_of_the_librarys_own_way_are_not_drafted(tmp_path):
    path = write_jpeg(tmp_path / "large.jpg", smooth(601, 401))
    settings = {"size": {"shortest_edge": 20}, "crop_to_patches": False}
    for draft_jpeg in (False, True):
        processor = MultiCoCoProcessor.from_pretrained(CHECKPOINT, draft_jpeg=draft_jpeg)
        assert processor.image_processor.draft(Image.open(path), **settings).size == (601, 401)


# --- errors ------------------------------------------------------------------------------------------------------


def error_of(features, processor, num_workers):
    """What a loader says of these samples; only the text, since a traceback keeps its workers from ending."""
    collator = ReasoningCollator(processor)
    iterator = iter(DataLoader(features, batch_size=len(features), collate_fn=collator, num_workers=num_workers))
    try:
        pytest.fail(f"no error: {next(iterator).keys()}")
    except ValueError as error:
        return str(error)


WAYS = pytest.mark.parametrize(("with_id", "num_workers"), [(True, 0), (False, 0)], ids=str)


@WAYS
@pytest.mark.parametrize("damage", ["cut", "gone", "text"])
def test_a_picture_that_fails_names_its_record(folder, processor, num_workers, with_id, damage):
    features = features_of(make_dataset(folder, processor), with_id=with_id)
    path = folder / "b.png"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:400] if damage == "cut" else b"no picture")
    name = re.escape(str(path))
    start = f"Record 'r1': `images` {name} cannot be read: " if with_id else f"Sample 1, image 0 \\({name}\\): cannot"
    assert re.search(start, error_of(features, processor, num_workers))


@pytest.mark.parametrize(("with_id", "num_workers"), [(True, 0), (True, 2)], ids=str)  # workers take 5 s to end
def test_a_picture_of_a_data_set_that_fails_names_its_record(tmp_path, processor, num_workers, with_id):
    """What `datasets` raises when it decodes; the header is whole, so the count at the start does not see it."""
    path = Path(write_jpeg(tmp_path / "a.jpg", smooth(90, 60)))
    columns = {"question": ["Where?"], "steps": [["up"]], "answer": ["red"], "id": ["r7"], "image": [str(path)]}
    source = Dataset.from_dict(columns).cast_column("image", ImageFeature())
    dataset = StageDataset(load_records(source), processor, CurriculumArguments())
    features = features_of(dataset, with_id=with_id)
    path.write_bytes(path.read_bytes()[:700])
    start = "Record 'r7'" if with_id else "Sample 0"
    assert re.search(
        f"{start}: `images` number 0 cannot be read: .*Mend the file", error_of(features, processor, num_workers)
    )


class Broken:
    """A picture of a data set whose decoder raises what no list of errors foresees."""

    def open(self):
        raise EOFError("the archive ends here")


def test_whatever_a_decoder_raises_names_the_record(folder, processor, monkeypatch):
    monkeypatch.setattr("multicoco.data_multicoco.DatasetImage", Broken)
    features = features_of(make_dataset(folder, processor))
    features[2]["images"] = [Broken()]
    with pytest.raises(ValueError, match="Record 'r2': `images` number 0 cannot be read: the archive ends here"):
        ReasoningCollator(processor)(features)


@WAYS
def test_tiles_that_changed_name_their_record(folder, processor, num_workers, with_id):
    features = features_of(make_dataset(folder, processor), with_id=with_id)
    noise(28, 28).save(folder / "b.png")
    start = "Record 'r1'" if with_id else "Sample 1"
    assert re.search(
        rf"{start}: `images` give \[1\] tiles, but gave \[7\].*changed", error_of(features, processor, num_workers)
    )


def test_two_changes_that_cancel_are_seen(folder, processor):
    """The same counts in the batch, in another order."""
    features = features_of(make_dataset(folder, processor))
    noise(28, 28).save(folder / "b.png")
    noise(90, 60).save(folder / "a.png")
    with pytest.raises(ValueError, match=r"Record 'r0': `images` give \[7\] tiles, but gave \[1\]"):
        ReasoningCollator(processor)(features)


def test_a_pickled_collator_gives_the_same_pixels(folder, drafting):
    """As workers that are spawned get it."""
    write_jpeg(folder / "a.png", smooth(1203, 901))  # a JPEG by its content
    features = features_of(make_dataset(folder, drafting))
    collator = ReasoningCollator(drafting, normalize_on_device=True)
    batch = pickle.loads(pickle.dumps(collator))(pickle.loads(pickle.dumps(features)))
    assert torch.equal(batch["pixel_values"], collator(features)["pixel_values"])
    assert batch["num_patches_list"] == [13, 7, 7]
