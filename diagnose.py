"""Do the thoughts of a checkpoint matter? Interventions on thoughts and pictures, as one page that opens from disk.

    python diagnose.py --model out --data mine_val.jsonl --report report.html
    python diagnose.py --model out/coconut --control out/pause --data mine_val.jsonl --batch_size 256
    python diagnose.py settings.yaml --max_samples 500                                 # flags win over the file

A thought is replaced by `edit_thoughts`, inside the loop of passes. Two places are told apart:

- *inside the loop*: one thought is replaced, and all later thoughts and the answer follow from the replaced one.
- *after the loop*: all thoughts are first computed untouched and recorded. In a second run the recorded ones are fed,
  but for the one that is replaced: later thoughts stay what they were, only what follows reads the replaced one.

Where all thoughts are replaced by something that does not depend on them, the two are the same run. What is fed is
the input embedding of a thought's position; the layers above it still attend to prompt and picture.

A killed run goes on where it stopped when the same command is given again. What each experiment can and cannot show:
docs/truth.md.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.modeling_outputs import BaseModelOutputWithPooling

from multicoco import MultiCoCoConfig
from multicoco.data_multicoco import ANSWER_MARK, load_records
from multicoco.intervals import mcnemar, wilson_interval
from multicoco.processing_multicoco import open_image
from multicoco.score import ScoreArguments, Subject, check_records, describe, load_metric, read_predictions


FORMAT = 1  # of experiments and their files: raise it when an experiment of the same name means something else
ALPHA = 0.05
KINDS = {
    "zero": "zeros",
    "mean": "the data set's mean thought of that index",
    "noise": "noise of the thought's norm",
    "pause": "the embedding of <|latent|>",
    "swap": "the thought of a sample with another answer",
}
USED, NOT_SHOWN = "used", "not shown to be used"
COLLAPSED_SHARE, COLLAPSED_COSINE = 0.01, 0.99


@dataclass
class DiagnoseArguments:
    """What is examined, how, and where the results go."""

    model: str = field(metadata={"help": "Folder or Hub name of a checkpoint."})
    data: str = field(metadata={"help": "Records: .jsonl, .json, a folder, or a Hub data set."})
    report: str = field(default="report.html", metadata={"help": "The page to write."})
    output_dir: str = field(
        default="out/diagnosis",
        metadata={"help": "Folder of diagnosis.json and of the predictions of each experiment."},
    )
    control: str | None = field(
        default=None,
        metadata={"help": "A checkpoint without thoughts, or with constant ones, to set beside it (train.py --mode)."},
    )
    num_thoughts: int | None = field(
        default=None, metadata={"help": "Thoughts to examine; what the checkpoint was trained with if not given."}
    )
    max_samples: int | None = field(default=None, metadata={"help": "Only the first records; all if not given."})
    metric: str = field(default="exact", metadata={"help": "exact, or FILE:RESULT, as in score.py."})
    batch_size: int = field(default=64, metadata={"help": "Samples at a time."})
    num_drawn: int = field(default=4, metadata={"help": "Samples whose attention is drawn over the picture."})
    num_attention: int = field(default=32, metadata={"help": "Samples whose attention is averaged."})
    seed: int = field(default=0, metadata={"help": "Seed of noise, donors and resampling."})
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

    def __post_init__(self):
        for name, least in (
            ("num_thoughts", 0),
            ("max_samples", 2),
            ("batch_size", 1),
            ("num_drawn", 0),
            ("num_attention", 1),
            ("seed", 0),
            ("max_new_tokens", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`--{name}` must be at least {least}, got {value}.")


def parse(arguments: Sequence[str]) -> DiagnoseArguments:
    """Settings from a YAML or JSON file, if the first argument is one, and from flags, which win."""
    parser = HfArgumentParser(
        DiagnoseArguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        path = Path(arguments.pop(0))
        if not path.is_file():
            raise ValueError(f"`{path}` does not exist, expected a file of settings. Check the path.")
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"{path} holds a {type(settings).__name__}, expected names and values of flags.")
        texts = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in settings.items()}
        arguments = [
            word for name, value in texts.items() if value is not None for word in (f"--{name}", str(value))
        ] + arguments
    return parser.parse_args_into_dataclasses(args=arguments)[0]


# --- experiments -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """
    One way to ask every record.

    Args:
        name (`str`): Name in files and JSON.
        num_thoughts (`int`, *optional*): Latents in the prompt; `None` for no block.
        picture (`str`): `"own"`, `"grey"`, or `"other"`: that of another record with as many tiles.
        feed (`str`, *optional*): The experiment whose recorded thoughts are fed in place of the computed ones.
        replace (`str`, *optional*): A key of [`KINDS`], or `"swap_same"`: what thoughts are replaced by.
        index (`int`, *optional*): The only thought that is replaced; all if not given.
        answer_sees (`str`): As in [`MultiCoCoForConditionalGeneration.forward`].
        records (`bool`): Keep the thoughts that were fed.
    """

    name: str
    num_thoughts: int | None
    picture: str = "own"
    feed: str | None = None
    replace: str | None = None
    index: int | None = None
    answer_sees: str = "all"
    records: bool = False


def plan(
    num_thoughts: int | None, budgets: Sequence[int], has_images: bool, is_control: bool
) -> tuple[list[Experiment], list[Experiment]]:
    """The experiments that need nothing, and those that need thoughts and answers of the first."""
    count = num_thoughts or 0
    pictures = ("grey", "other") if has_images else ()
    first = [Experiment("intact", num_thoughts, records=count > 0)]
    first += [Experiment(f"{name}-both", num_thoughts, picture=name, records=count > 0) for name in pictures]
    if is_control:
        return first, []
    first += [Experiment(f"budget-{budget}", budget) for budget in budgets if budget != num_thoughts]
    if not count:
        return first, []
    sees = ("no_image", "thoughts_only") if has_images else ("thoughts_only",)
    first += [Experiment(f"sees-{name}", count, answer_sees=name) for name in sees]
    second = []
    for kind in KINDS:
        second.append(Experiment(f"{kind}-all", count, replace=kind))
        for index in range(count) if count > 1 else ():
            second.append(Experiment(f"{kind}-{index}-inside", count, replace=kind, index=index))
            if index < count - 1:  # nothing comes after the last thought: the two places are one
                second.append(Experiment(f"{kind}-{index}-after", count, feed="intact", replace=kind, index=index))
    second.append(Experiment("noise-all-after", count, feed="intact", replace="noise"))
    second.append(Experiment("swap_same-all", count, replace="swap_same"))
    for name in pictures:
        second.append(Experiment(f"{name}-thoughts", count, feed=f"{name}-both"))
        second.append(Experiment(f"{name}-answer", count, picture=name, feed="intact"))
    return first, second


def name_of(kind: str, index: int, place: str, count: int) -> str:
    """The experiment that replaces one of `count` thoughts, where some are the same run as another."""
    if count == 1:
        return f"{kind}-all"
    return f"{kind}-{index}-{'inside' if index == count - 1 else place}"


def choose_budgets(trained: int) -> list[int]:
    """0 to 2 more than trained; about ten of them."""
    return sorted({round(part * trained / 8) for part in range(9)} | {trained + 1, trained + 2})


def choose_donors(answers: Sequence[str], same: bool, rng: np.random.Generator) -> np.ndarray:
    """For each sample another one whose answer is the same, or another; -1 where there is none."""
    _, codes = np.unique(np.asarray(answers, dtype=object).astype(str), return_inverse=True)
    donors = np.full(len(codes), -1)
    for sample, code in enumerate(codes):
        candidates = np.flatnonzero(codes == code if same else codes != code)
        candidates = candidates[candidates != sample]
        if len(candidates):
            donors[sample] = rng.choice(candidates)
    return donors


def choose_pictures(records: Sequence[Mapping[str, Any]], tiles: Sequence[list[int]], rng) -> np.ndarray:
    """For each sample another one with other pictures of as many tiles; -1 where there is none."""
    groups = {}
    for sample, counts in enumerate(tiles):
        if counts:
            groups.setdefault(tuple(counts), []).append(sample)
    others = np.full(len(records), -1)
    for members in groups.values():
        for sample in members:
            for candidate in rng.permutation(members)[:32].tolist():
                if candidate != sample and records[candidate]["images"] != records[sample]["images"]:
                    others[sample] = candidate
                    break
    return others


class Diagnosis:
    """
    A checkpoint, the records, and what has been found out so far.

    Args:
        name (`str`): Folder or Hub name of the checkpoint.
        records (`list[dict]`): From [`load_records`].
        arguments ([`DiagnoseArguments`]): Settings.
        device (`torch.device`): Where the model runs.
        is_control (`bool`, defaults to `False`): Only the experiments that are set beside another checkpoint's.
    """

    def __init__(self, name, records, arguments: DiagnoseArguments, device, is_control: bool = False):
        try:
            config = MultiCoCoConfig.from_pretrained(name)
        except OSError as error:
            raise ValueError(
                f"`--{'control' if is_control else 'model'}` {name}: no checkpoint can be read there: {error}. Give "
                "the folder that train.py wrote, or the Hub name of a model."
            ) from error
        self.records, self.arguments, self.device = records, arguments, device
        self.num_thoughts = config.num_thoughts
        if arguments.num_thoughts is not None and config.num_thoughts is not None:
            self.num_thoughts = arguments.num_thoughts
        budgets = [] if self.num_thoughts is None or is_control else choose_budgets(self.num_thoughts)
        self.subject = Subject(
            name,
            records,
            ScoreArguments(
                model=[name],
                data=arguments.data,
                num_thoughts=sorted({*budgets, self.num_thoughts or 0}),
                batch_size=arguments.batch_size,
                max_new_tokens=arguments.max_new_tokens,
                max_patches=arguments.max_patches,
                dtype=arguments.dtype,
            ),
            device,
        )
        self.dataset = self.subject.dataset
        self.tiles = [row.num_patches_list for row in self.dataset.rows]
        self.budgets = budgets
        has_images = any(self.tiles)
        self.first, self.second = plan(self.num_thoughts, budgets, has_images, is_control)
        self.picture_of = choose_pictures(records, self.tiles, np.random.default_rng((arguments.seed, 0)))
        self.settings = {
            **describe(self.subject, records, self.num_thoughts),
            "format": FORMAT,
            "seed": arguments.seed,
        }
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = Path(arguments.output_dir) / "experiments" / f"{Path(name).resolve().name}-{digest}"
        self.lines, self.thoughts = {}, {}  # by experiment: a dictionary per sample; (N, n, D) on the host
        self.donors = self.mean = self.noise = None

    def run(self):
        """Asks what has not been asked yet."""
        self._run(self.first)
        if not self.second:
            return
        thoughts = self.thoughts["intact"]
        answers = [line["prediction"] for line in self.lines["intact"]]
        rng = np.random.default_rng((self.arguments.seed, 1))
        # The decoy is drawn like the donor, but no thought of it is fed: how often answers agree by chance.
        self.donors = {
            "swap": choose_donors(answers, False, rng),
            "decoy": choose_donors(answers, False, rng),
            "swap_same": choose_donors(answers, True, rng),
        }
        self.mean = thoughts.mean(dim=0)  # (n, D)
        generator = torch.Generator().manual_seed(self.arguments.seed)
        noise = torch.randn(thoughts.shape, generator=generator, dtype=torch.float64)
        self.noise = (noise / noise.norm(dim=-1, keepdim=True)).to(thoughts.dtype)  # (N, n, D), of norm 1
        self._run(self.second)

    def _run(self, experiments: Sequence[Experiment]):
        count, batch_size = len(self.records), self.arguments.batch_size
        done, recorded = {}, {}
        for experiment in experiments:
            path = self.folder / f"{experiment.name}.jsonl"
            if experiment.records and not path.with_suffix(".safetensors").is_file():
                path.unlink(missing_ok=True)  # lines without their thoughts are of no use
                recorded[experiment.name] = []
            done[experiment.name] = read_predictions(path, {**self.settings, "experiment": asdict(experiment)})
        progress = tqdm(
            total=count * len(experiments), initial=sum(map(len, done.values())), desc=self.subject.name, unit="answer"
        )
        for start in range(0, count, batch_size):  # batches outside, so that each picture is opened and encoded once
            rows = list(range(start, min(start + batch_size, count)))
            features = {}
            for experiment in experiments:
                todo = [row for row in rows if row not in done[experiment.name]]
                if not todo:
                    continue
                self.subject.load()
                progress.set_postfix_str(experiment.name)
                lines, thoughts = self.ask(experiment, rows, features)
                lines = [line for line in lines if line["index"] in todo]
                if experiment.records:
                    recorded[experiment.name].append(thoughts)
                with open(self.folder / f"{experiment.name}.jsonl", "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                done[experiment.name].update({line["index"]: line for line in lines})
                progress.update(len(lines))
        progress.close()
        for experiment in experiments:
            self.lines[experiment.name] = [done[experiment.name][row] for row in range(count)]
            if experiment.records:
                path = self.folder / f"{experiment.name}.safetensors"
                if not path.is_file():
                    save_file({"thoughts": torch.cat(recorded[experiment.name])}, path.with_suffix(".partial"))
                    os.replace(path.with_suffix(".partial"), path)
                self.thoughts[experiment.name] = load_file(path)["thoughts"]

    def ask(self, experiment: Experiment, rows: Sequence[int], features: dict | None = None):
        """
        The answers of these records in an experiment, and the thoughts `(rows, n, D)` that were fed, if it records.

        Args:
            features (`dict`, *optional*): Visual features of these rows by kind of picture; filled when needed.
        """
        model = self.subject.model
        batch = self.prompts(rows, experiment.num_thoughts)
        features = {} if features is None else features
        if any(self.tiles[row] for row in rows):
            if experiment.picture not in features:
                features[experiment.picture] = self.encode(rows, experiment.picture)
            batch["mm_encoder_outputs"] = {
                "image": BaseModelOutputWithPooling(pooler_output=features[experiment.picture])
            }
            batch["num_patches_list"] = [count for row in rows for count in self.tiles[row]]
        if experiment.answer_sees != "all":
            batch["answer_sees"] = experiment.answer_sees
        if experiment.feed or experiment.replace:
            batch["edit_thoughts"] = self.edit(experiment, rows)
        with torch.no_grad():
            output = model.generate(
                **batch,
                max_new_tokens=self.subject.max_new_tokens,
                do_sample=False,
                num_beams=1,
                return_thoughts=experiment.records,
            )
        thoughts = output.thoughts.cpu() if experiment.records else None
        tokens = output.sequences if experiment.records else output
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        lines = []
        for row, new in zip(rows, tokens[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            new_tokens = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
            text = self.subject.processor.tokenizer.decode(new[:new_tokens], skip_special_tokens=True)
            prediction = text.rsplit(ANSWER_MARK, 1)[-1].strip()
            lines.append({"index": row, "prediction": prediction, "text": text, "new_tokens": new_tokens})
        return lines, thoughts

    def prompts(self, rows: Sequence[int], num_thoughts: int | None) -> dict[str, torch.Tensor]:
        """Token ids and mask of prompts, padded on the left."""
        prompts = [self.dataset.prompt(row, num_thoughts or 0)["input_ids"] for row in rows]
        width = max(map(len, prompts))
        pad = self.subject.processor.tokenizer.pad_token_id
        ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }

    def encode(self, rows: Sequence[int], picture: str) -> torch.Tensor:
        """Visual features `(tiles, P, D)`: of the own, of another or of a grey picture."""
        sources = [self.picture_of[row] if picture == "other" and self.picture_of[row] >= 0 else row for row in rows]
        prompts = [self.dataset.prompt(int(source), 0) for source in sources]
        pixels = self.subject.collator.prompts(prompts)["pixel_values"]
        if picture == "grey":
            processor = self.subject.processor.image_processor
            middle = (0.5 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
            pixels = middle[None, :, None, None].expand_as(pixels)
        model = self.subject.model
        with torch.no_grad():
            return model.extract_feature(pixels.to(self.device, model.dtype))

    def edit(self, experiment: Experiment, rows: Sequence[int]):
        """The function `(thought (rows, D), index) -> thought` of an experiment."""
        feed = self.thoughts[experiment.feed][rows].to(self.device) if experiment.feed else None  # (rows, n, D)

        def edit_thoughts(thought, index):
            if feed is not None:
                thought = feed[:, index]
            if experiment.replace is None or experiment.index not in (None, index):
                return thought
            return self.replacement(experiment.replace, thought, index, rows)

        return edit_thoughts

    def replacement(self, kind: str, thought: torch.Tensor, index: int, rows: Sequence[int]) -> torch.Tensor:
        """What takes the place of the thoughts `(rows, D)` of one index. Without a donor a thought stays."""
        if kind == "zero":
            return torch.zeros_like(thought)
        if kind == "mean":
            return self.mean[index].to(thought).expand_as(thought)
        if kind == "noise":
            return self.noise[rows, index].to(thought) * thought.norm(dim=-1, keepdim=True)
        if kind == "pause":
            model = self.subject.model
            return model.get_input_embeddings().weight[model.config.latent_token_id].expand_as(thought)
        donors = torch.from_numpy(self.donors[kind][rows])
        given = self.thoughts["intact"][donors.clamp(min=0), index].to(thought)
        return torch.where((donors >= 0)[:, None].to(thought.device), given, thought)

    def valid(self, experiment: Experiment) -> np.ndarray:
        """Which samples an experiment changed: those with a donor, with another picture, with a picture."""
        if experiment.replace in ("swap", "swap_same"):
            return self.donors[experiment.replace] >= 0
        if experiment.name.startswith("other-"):
            return self.picture_of >= 0
        if experiment.name.startswith("grey-"):
            return np.array([bool(counts) for counts in self.tiles])
        return np.ones(len(self.records), dtype=bool)

    def kept(self, name: str, compute, **settings):
        """The result of `compute()`, or that of an earlier run with the same settings."""
        path = self.folder / f"{name}.json"
        settings = json.loads(json.dumps({**self.settings, **settings}))
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["settings"] == settings:
                return found["result"]
        self.subject.load()
        result = json.loads(json.dumps(compute(), allow_nan=False))
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"settings": settings, "result": result}), encoding="utf-8")
        os.replace(partial, path)
        return result
