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
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.modeling_outputs import BaseModelOutputWithPooling

from multicoco import MultiCoCoConfig
from multicoco.data_multicoco import load_records
from multicoco.intervals import mcnemar, paired_bootstrap, wilson_interval
from multicoco.processing_multicoco import open_image
from multicoco.score import ScoreArguments, Subject, check_records, describe, load_metric, read_predictions
from multicoco.settings import read_settings


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
        from_file = read_settings(arguments.pop(0))
        arguments = [word for words in from_file.values() for word in words] + arguments
    return parser.parse_args_into_dataclasses(args=arguments)[0]


# --- experiments -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """
    One way to ask every record.

    Args:
        name (`str`): Name in files and JSON.
        num_thoughts (`int`, *optional*): Latents in the prompt; `None` for no block.
        picture (`str`): `"own"`, `"grey"`, `"other"`: that of another record, or `"swap"`: that of the donor.
        feed (`str`, *optional*): The experiment whose recorded thoughts are fed in place of the computed ones.
        replace (`str`, *optional*): What thoughts are replaced by: a key of [`KINDS`], `"swap_same"` or `"decoy"`.
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
    if has_images:
        second += [Experiment(f"{kind}-picture", count, picture="swap", replace=kind) for kind in ("swap", "decoy")]
    return first, second


def name_of(kind: str, index: int, place: str, count: int) -> str:
    """The experiment that replaces one of `count` thoughts, where some are the same run as another."""
    if count == 1:
        return f"{kind}-all"
    return f"{kind}-{index}-{'inside' if index == count - 1 else place}"


def choose_budgets(trained: int) -> list[int]:
    """0 to 2 more than trained; about ten of them."""
    return sorted({round(part * trained / 8) for part in range(9)} | {trained + 1, trained + 2})


def choose_donors(answers: Sequence[str], tiles: Sequence[list[int]], same: bool, rng) -> np.ndarray:
    """For each sample one with as many tiles whose answer is the same, or another; -1 where there is none."""
    _, codes = np.unique(np.asarray(answers, dtype=str), return_inverse=True)
    _, shapes = np.unique(np.asarray([str(counts) for counts in tiles]), return_inverse=True)
    donors = np.full(len(codes), -1)
    for sample, (code, shape) in enumerate(zip(codes, shapes, strict=True)):
        candidates = np.flatnonzero(((codes == code) == same) & (shapes == shape))
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
            "swap": choose_donors(answers, self.tiles, False, rng),
            "decoy": choose_donors(answers, self.tiles, False, rng),
            "swap_same": choose_donors(answers, self.tiles, True, rng),
        }
        self.mean = thoughts.double().mean(dim=0).to(thoughts.dtype)  # (n, D)
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
        answers = self.subject.read_answers(tokens[:, batch["input_ids"].shape[1] :])
        lines = [{"index": row, **answer} for row, answer in zip(rows, answers, strict=True)]
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
        """Visual features `(tiles, P, D)` of the pictures that [`Experiment`] names; the own where there is none."""
        sources = np.array(rows)
        if picture in ("other", "swap"):
            others = (self.picture_of if picture == "other" else self.donors["swap"])[sources]
            sources = np.where(others >= 0, others, sources)
        prompts = [self.dataset.prompt(int(source), 0) for source in sources]
        pixels = self.subject.collator.prompts(prompts)["pixel_values"]
        if picture == "grey":
            processor = self.subject.processor.image_processor
            mean, std = torch.tensor([processor.image_mean, processor.image_std], dtype=torch.float64)
            middle = (0.5 - mean) / std
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
        changed = np.ones(len(self.records), dtype=bool)
        if experiment.replace in ("swap", "swap_same", "decoy"):
            changed &= self.donors[experiment.replace] >= 0
        if experiment.picture == "swap":
            changed &= self.donors["swap"] >= 0
        if "other" in (experiment.picture, (experiment.feed or "").removesuffix("-both")):
            changed &= self.picture_of >= 0
        if experiment.picture != "own" or experiment.feed in ("grey-both", "other-both"):
            changed &= np.array([bool(counts) for counts in self.tiles])
        return changed

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


# --- a look at the thoughts themselves ---------------------------------------------------------------------------


def read_lens(diagnosis: Diagnosis, top: int = 5) -> list[list[list[int]]]:
    """
    The `top` tokens that `lm_head` reads from the state that makes each thought: for each sample, for each index.

    With `mode` "coconut" this state is the thought. A model with constant thoughts has such states too, and they may
    hold steps just as well: they are what a control has to show.
    """
    model, count, found = diagnosis.subject.model, diagnosis.num_thoughts, []
    for start in range(0, len(diagnosis.records), diagnosis.arguments.batch_size):
        rows = list(range(start, min(start + diagnosis.arguments.batch_size, len(diagnosis.records))))
        batch = diagnosis.prompts(rows, count)
        if any(diagnosis.tiles[row] for row in rows):
            features = BaseModelOutputWithPooling(pooler_output=diagnosis.encode(rows, "own"))
            batch["mm_encoder_outputs"] = {"image": features}
        with torch.no_grad():  # every prompt ends in start marker, thoughts and end marker
            logits = model(**batch, logits_to_keep=count + 2).logits[:, :count]  # (rows, n, V)
        found += logits.topk(top, dim=-1).indices.tolist()
    return found


def first_tokens(diagnosis: Diagnosis) -> list[list[int]]:
    """For each sample the first token of each written step (of the first rationale, where there are several)."""
    return [[step[0] for step in row.rationales[0]] for row in diagnosis.dataset.rows]


def lens_hits(lens, steps, c_thought: int, index: int, seed: int) -> dict[str, dict[int, list[bool]]]:
    """
    Whether the lens reads, from the thought at `index`, the first token of the step that it replaced.

    Returns for `"top1"`, `"top5"` and `"chance"` a dictionary from sample to hit. Chance: the same lens against that
    step of another sample. Samples without that step are left out.
    """
    step = index // c_thought
    rows = [row for row, firsts in enumerate(steps) if step < len(firsts)]
    others = [rows[place] for place in np.roll(np.random.default_rng((seed, 2)).permutation(len(rows)), 1)]
    return {
        "top1": {row: lens[row][index][0] == steps[row][step] for row in rows},
        "top5": {row: steps[row][step] in lens[row][index] for row in rows},
        "chance": {row: lens[row][index][0] == steps[other][step] for row, other in zip(rows, others, strict=True)},
    }


def effective_rank(vectors: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised squared singular values of centred `vectors` (count, D)."""
    vectors = vectors.double()
    values = torch.linalg.svdvals(vectors - vectors.mean(dim=0)).square()
    total = values.sum()
    if total <= 1e-12 * vectors.square().sum().clamp(min=1e-300):  # all the same, up to rounding
        return 1.0
    shares = values[values > 0] / total
    return float((-(shares * shares.log()).sum()).exp())


def measure_geometry(diagnosis: Diagnosis, num_prompts: int = 64) -> dict[str, Any]:
    """Norms of what the language model is fed; cosines, spread and effective rank of thoughts."""
    thoughts = diagnosis.thoughts["intact"].double()  # (N, n, D)
    rows = list(range(min(num_prompts, len(diagnosis.records))))
    model, batch = diagnosis.subject.model, diagnosis.prompts(rows, diagnosis.num_thoughts)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
    is_image = ids == model.config.image_token_id
    norms = {"text": text[real & ~is_image & (ids != model.config.latent_token_id)].double().norm(dim=-1)}
    if any(diagnosis.tiles[row] for row in rows):
        norms["image"] = diagnosis.encode(rows, "own").double().flatten(0, 1).norm(dim=-1)
    norms |= {f"thought {index + 1}": thoughts[:, index].norm(dim=-1) for index in range(thoughts.shape[1])}
    units = thoughts / thoughts.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    count = len(units)
    # The mean of all pairs of different samples, from the sum of the unit vectors.
    across = (units.sum(dim=0).square().sum(dim=-1) - units.square().sum(dim=(0, 2))) / (count * (count - 1))
    within = (units[:, 1:] * units[:, :-1]).sum(dim=-1).mean(dim=0)  # (n - 1,)
    spread = (thoughts - thoughts.mean(dim=0)).square().sum(dim=(0, 2)) / thoughts.square().sum(dim=(0, 2)).clamp(
        min=1e-300
    )
    return {
        "norms": {
            name: {
                "mean": float(values.mean()),
                "low": float(values.quantile(0.05)),
                "high": float(values.quantile(0.95)),
            }
            for name, values in norms.items()
        },
        "cosine_across_samples": across.tolist(),
        "cosine_with_next": within.tolist(),
        "spread": spread.tolist(),
        "effective_rank": [effective_rank(thoughts[:, index]) for index in range(thoughts.shape[1])],
        "effective_rank_of_all": effective_rank(thoughts.flatten(0, 1)),
    }


def collapse_warnings(geometry: Mapping[str, Any]) -> list[str]:
    """In words, what the rule of collapse finds."""
    same = [f"{index + 1}" for index, share in enumerate(geometry["spread"]) if share < COLLAPSED_SHARE]
    equal = [
        f"{index + 1} and {index + 2}"
        for index, cosine in enumerate(geometry["cosine_with_next"])
        if cosine > COLLAPSED_COSINE
    ]
    found = []
    if same:
        found.append(f"thought {', '.join(same)}: nearly the same vector for every sample")
    if equal:
        found.append(f"thoughts {', '.join(equal)}: nearly the same direction within a sample")
    return found


def measure_attention(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    """
    Attention of some samples, one at a time: mean over layers and heads, from the position that makes each thought
    and, last, from the one that writes the answer's first token.

    Returns for each sample `shares`, one row a query: image, question (all other text), thoughts; and `picture`, one
    row a query: weights of the visual tokens of the first image's last tile (its thumbnail, if it has several).
    """
    model, arguments = diagnosis.subject.model, diagnosis.arguments
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found = []
    for row in range(min(max(arguments.num_attention, arguments.num_drawn), len(diagnosis.records))):
        batch = diagnosis.prompts([row], diagnosis.num_thoughts)
        if diagnosis.tiles[row]:
            features = BaseModelOutputWithPooling(pooler_output=diagnosis.encode([row], "own"))
            batch["mm_encoder_outputs"] = {"image": features}
        with torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions  # a (1, heads, T, T) for each layer
        weights = torch.stack([layer[0].double().mean(dim=0) for layer in attentions]).mean(dim=0).cpu()  # (T, T)
        ids = batch["input_ids"][0].cpu()
        latents, image = ids == model.config.latent_token_id, ids == model.config.image_token_id
        queries = [*(latents.nonzero().flatten() - 1).tolist(), len(ids) - 1]
        shares = [
            [float(weights[query][group].sum()) for group in (image, ~image & ~latents, latents)] for query in queries
        ]
        sample = {"shares": shares, "picture": []}
        if diagnosis.tiles[row] and row < arguments.num_drawn:
            size = diagnosis.dataset.num_image_token
            last = image.nonzero().flatten()[: size * diagnosis.tiles[row][0]][-size:]
            sample["picture"] = weights[queries][:, last].tolist()
        found.append(sample)
    model.set_attn_implementation(before)
    return found


# --- figures -----------------------------------------------------------------------------------------------------


def difference(first: Sequence[float], second: Sequence[float], num_tests: int = 1) -> dict[str, Any] | None:
    """
    `mean(first) - mean(second)` of paired scores: its 95 % interval, McNemar's exact p where all scores are 0 or 1,
    and whether it is above 0 when `num_tests` are made: interval and p at the level `ALPHA / num_tests`.
    """
    if not len(first):
        return None
    first, second = np.asarray(first, float), np.asarray(second, float)
    low, high = paired_bootstrap(first, second)
    corrected_low, _ = paired_bootstrap(first, second, 1 - ALPHA / num_tests)
    is_binary = bool(np.isin(np.concatenate([first, second]), (0, 1)).all())
    p = mcnemar(first == 1, second == 1) if is_binary else None
    return {
        "samples": len(first),
        "difference": float(first.mean() - second.mean()),
        "low": low,
        "high": high,
        "mcnemar_p": p,
        "num_tests": num_tests,
        "above_0": corrected_low > 0 and (p is None or p < ALPHA / num_tests),
    }


def rate(hits: Sequence[float]) -> dict[str, Any]:
    """A share with its 95 % interval; of 0 samples `None`."""
    values = np.asarray(hits, float)
    if not len(values):
        return {"rate": None, "low": None, "high": None, "samples": 0}
    if np.isin(values, (0, 1)).all():
        low, high = wilson_interval(float(values.mean()), len(values))
    else:
        low, high = paired_bootstrap(values, np.zeros(len(values)))
    return {"rate": float(values.mean()), "low": low, "high": high, "samples": len(values)}


class Scores:
    """Predictions and scores of all experiments of a checkpoint as arrays; NaN is the score of what does not count."""

    def __init__(self, diagnosis: Diagnosis, metric):
        self.diagnosis = diagnosis
        self.predictions, self.scores, self.valid, self.new_tokens = {}, {}, {}, {}
        for experiment in (*diagnosis.first, *diagnosis.second):
            name, lines = experiment.name, diagnosis.lines[experiment.name]
            values = [
                metric(record, line["prediction"]) for record, line in zip(diagnosis.records, lines, strict=True)
            ]
            self.predictions[name] = np.array([line["prediction"] for line in lines], dtype=object)
            self.scores[name] = np.array([math.nan if value is None else value for value in values])
            self.new_tokens[name] = np.array([line["new_tokens"] for line in lines])
            self.valid[name] = diagnosis.valid(experiment)

    def minus(self, first: str, second: str, num_tests: int = 1, other: "Scores | None" = None):
        """[`difference`] of the accuracies of two experiments; the second may be another checkpoint's."""
        other = other or self
        keep = self.valid[first] & other.valid[second]
        keep &= ~np.isnan(self.scores[first]) & ~np.isnan(other.scores[second])
        return difference(self.scores[first][keep], other.scores[second][keep], num_tests)

    def table(self) -> dict[str, dict[str, Any]]:
        """For each experiment: settings, accuracy, tokens, and how it differs from the intact run."""
        rows = {}
        for experiment in (*self.diagnosis.first, *self.diagnosis.second):
            name = experiment.name
            valid = self.valid[name]
            scored = valid & ~np.isnan(self.scores[name])
            flips = self.predictions[name][valid] != self.predictions["intact"][valid]
            rows[name] = {
                **asdict(experiment),
                "accuracy": rate(self.scores[name][scored]),
                "new_tokens": float(self.new_tokens[name][valid].mean()) if valid.any() else None,
                "flips": rate(flips.astype(float)),
                "loss": self.minus("intact", name),
            }
        return rows


def count_tests(num_thoughts: int | None, has_images: bool) -> int:
    """Tests that the verdicts of a page are made of: each holds at the level `ALPHA` / this number."""
    count = num_thoughts or 0
    of_thoughts = len(KINDS) + 1 + 2 * count if count else 0  # damage, following, each thought by itself
    of_pictures = 2 + (1 + 4 if count else 0)  # the picture; following under the donor's, through the thoughts
    return of_thoughts + (of_pictures if has_images else 0)


def judge_thoughts(scores: Scores, num_tests: int) -> dict[str, Any]:
    """
    The verdict, by tests that each hold at the level 0.05 / `num_tests` (interval and McNemar's p).

    "used": at least one kind of damage to all thoughts costs accuracy, *and* answers follow the donor of the thoughts.
    That damage alone costs accuracy says only that thoughts must look familiar. Following is shown if, with the
    donor's thoughts, the answer is the donor's

    - more often than it is a decoy's, a sample drawn in the same way whose thoughts are not fed (own picture); or
    - more often than with the decoy's thoughts, both times under the donor's picture and the own question: thoughts
      that say *where* to look give the donor's answer only there.

    A thought by itself is used if the verdict is "used" and accuracy falls, after the loop, when it alone is replaced
    by the mean or by the donor's.
    """
    diagnosis, count = scores.diagnosis, scores.diagnosis.num_thoughts
    damage = {kind: scores.minus("intact", f"{kind}-all", num_tests) for kind in KINDS}
    answers, swapped = scores.predictions["intact"], scores.predictions["swap-all"]
    donors, decoys = diagnosis.donors["swap"], diagnosis.donors["decoy"]
    rows = np.flatnonzero((donors >= 0) & (decoys >= 0))
    following = {"own_picture": ((swapped == answers[donors])[rows], (swapped == answers[decoys])[rows])}
    if "swap-picture" in scores.scores:
        rows = np.flatnonzero(scores.valid["swap-picture"] & scores.valid["decoy-picture"])
        following["donors_picture"] = tuple(
            (scores.predictions[f"{kind}-picture"] == answers[donors])[rows] for kind in ("swap", "decoy")
        )
    following = {
        name: {"donor": rate(found), "decoy": rate(chance), "test": difference(found, chance, num_tests)}
        for name, (found, chance) in following.items()
    }
    harmful = [kind for kind, test in damage.items() if _above_0(test)]
    followed = [name for name, found in following.items() if _above_0(found["test"])]
    indices = []
    for index in range(count if harmful and followed else 0):
        names = [name_of(kind, index, "after", count) for kind in ("mean", "swap")]
        if any(_above_0(scores.minus("intact", name, num_tests)) for name in names):
            indices.append(index)
    same, another = (np.flatnonzero(diagnosis.donors[kind] >= 0) for kind in ("swap_same", "swap"))
    return {
        "verdict": USED if harmful and followed else NOT_SHOWN,
        "damage": damage,
        "harmful": harmful,
        "following": following,
        "followed": followed,
        "stays": rate((swapped == answers)[another]),
        "stays_with_same_answer": rate((scores.predictions["swap_same-all"] == answers)[same]),
        "used_indices": indices,
    }


def judge_picture(scores: Scores, num_tests: int) -> dict[str, Any]:
    """
    "used" by the model: a grey or another picture for thoughts and answer costs accuracy. Through the thoughts:
    whichever picture is given to the answer, the right or the wrong one, it is right more often with the thoughts of
    the right one than of the wrong one, in at least one of four cases.
    """
    names = ("grey", "other")
    whole = {name: scores.minus("intact", f"{name}-both", num_tests) for name in names}
    found = {"tests": whole, "verdict": USED if any(map(_above_0, whole.values())) else NOT_SHOWN}
    if "grey-answer" in scores.scores:
        pairs = {f"{name}, wrong for the answer": (f"{name}-answer", f"{name}-both") for name in names}
        pairs |= {f"{name}, right for the answer": ("intact", f"{name}-thoughts") for name in names}
        through = {label: scores.minus(*pair, num_tests) for label, pair in pairs.items()}
        verdict = USED if any(map(_above_0, through.values())) else NOT_SHOWN
        found |= {"through_thoughts": through, "through_verdict": verdict}
    return found


def _above_0(test: Mapping[str, Any] | None) -> bool:
    return test is not None and test["above_0"]


def lens_table(diagnosis: Diagnosis, lens, steps, control: Diagnosis | None, control_lens) -> list[dict[str, Any]]:
    """Hit rates for each index that replaced a step of some sample, beside chance and the control."""
    c_thought, seed, table = diagnosis.subject.config.c_thought, diagnosis.arguments.seed, []
    for index in range(diagnosis.num_thoughts):
        hits = lens_hits(lens, steps, c_thought, index, seed)
        if not hits["top1"]:
            continue
        top1 = [float(hit) for hit in hits["top1"].values()]
        chance = [float(hit) for hit in hits["chance"].values()]
        row = {
            "index": index,
            "step": index // c_thought,
            "top1": rate(top1),
            "top5": rate([float(hit) for hit in hits["top5"].values()]),
            "chance": rate(chance),
            "above_chance": difference(top1, chance),
        }
        if control_lens is not None and index < control.num_thoughts:
            other = lens_hits(control_lens, first_tokens(control), control.subject.config.c_thought, index, seed)
            both = [sample for sample in hits["top1"] if sample in other["top1"]]
            row["control"] = rate([float(hit) for hit in other["top1"].values()])
            row["above_control"] = difference(
                [float(hits["top1"][sample]) for sample in both], [float(other["top1"][sample]) for sample in both]
            )
        table.append(row)
    return table


def examine(diagnosis: Diagnosis) -> dict[str, Any]:
    """What is read from a model that thinks, beside the answers of its experiments."""
    if not diagnosis.num_thoughts:
        return {}
    found = {
        "lens": diagnosis.kept("lens", lambda: read_lens(diagnosis)),
        "geometry": diagnosis.kept("geometry", lambda: measure_geometry(diagnosis)),
    }
    arguments = diagnosis.arguments
    if diagnosis.second:
        found["attention"] = diagnosis.kept(
            "attention",
            lambda: measure_attention(diagnosis),
            num_drawn=arguments.num_drawn,
            num_attention=arguments.num_attention,
        )
    return found


def summarise(diagnosis: Diagnosis, scores: Scores, seen: Mapping[str, Any], control, control_scores, control_seen):
    """All figures of the page; what a checkpoint or its data do not have is left out."""
    config = diagnosis.subject.config
    report = {
        "model": {
            "name": diagnosis.subject.name,
            "mode": config.mode,
            "stage": config.stage,
            "trained_thoughts": config.num_thoughts,
            "num_thoughts": diagnosis.num_thoughts,
            "c_thought": config.c_thought,
        },
        "samples": len(diagnosis.records),
        "experiments": scores.table(),
    }
    has_images = "grey-both" in scores.scores
    num_tests = count_tests(diagnosis.num_thoughts, has_images)
    report["verdict_tests"] = {"number": num_tests, "alpha": ALPHA}
    if diagnosis.num_thoughts:
        report["thoughts"] = judge_thoughts(scores, num_tests)
        steps = first_tokens(diagnosis)
        lens = control_seen.get("lens")
        report["lens"] = lens_table(diagnosis, seen["lens"], steps, control, lens)
        report["geometry"] = {**seen["geometry"], "warnings": collapse_warnings(seen["geometry"])}
        shares = np.array([sample["shares"] for sample in seen["attention"]][: diagnosis.arguments.num_attention])
        report["attention"] = {"samples": len(shares), "shares": shares.mean(axis=0).tolist()}
    if has_images:
        report["picture"] = judge_picture(scores, num_tests)
    if control is not None:
        report["control"] = {
            "name": control.subject.name,
            "mode": control.subject.config.mode,
            "num_thoughts": control.num_thoughts,
            "experiments": control_scores.table(),
            "accuracy_above_control": scores.minus("intact", "intact", other=control_scores),
        }
        if has_images:
            report["control"]["picture"] = judge_picture(control_scores, num_tests)
        if "geometry" in control_seen:
            geometry = control_seen["geometry"]
            report["control"]["geometry"] = {**geometry, "warnings": collapse_warnings(geometry)}
    report["examples"] = [show_example(diagnosis, row, seen) for row in range(min(6, len(diagnosis.records)))]
    return report


def show_example(diagnosis: Diagnosis, row: int, seen: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what was written and read, as plain text."""
    record, tokenizer = diagnosis.records[row], diagnosis.subject.processor.tokenizer
    example = {
        "id": str(record["id"]),
        "question": record["question"],
        "steps": record["steps"],
        "answer": record["answer"],
        "written": {"intact": diagnosis.lines["intact"][row]["text"]},
    }
    if "budget-0" in diagnosis.lines:
        example["written"]["no thoughts"] = diagnosis.lines["budget-0"][row]["text"]
    if diagnosis.donors is not None and (donor := int(diagnosis.donors["swap"][row])) >= 0:
        example["written"]["thoughts of another"] = diagnosis.lines["swap-all"][row]["text"]
        example["donor"] = {
            "id": str(diagnosis.records[donor]["id"]),
            "prediction": diagnosis.lines["intact"][donor]["prediction"],
        }
    if "lens" in seen:
        example["lens"] = [[tokenizer.decode([token]) for token in tokens[:3]] for tokens in seen["lens"][row]]
    return example


# --- the page ----------------------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--soft:#5b6570;--line:#d6dbe0;--page:#fafbfc;--card:#fff;--mark:#1f6feb;
--good:#1a7f37;--warn:#9a6700}
@media (prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#98a3ae;--line:#353c44;--page:#15181c;--card:#1d2126;
--mark:#6cb0ff;--good:#57c26f;--warn:#e0b341}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:76rem;margin:0 auto;padding:1rem}h1{font-size:1.5rem;margin:.5rem 0}
h2{font-size:1.15rem;margin:0 0 .5rem}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem;margin:1rem 0}
p{margin:.4rem 0;max-width:46rem}.soft{color:var(--soft);font-size:.9rem}.verdict{font-size:1.25rem;font-weight:600}
.used{color:var(--good)}.unshown,.warning{color:var(--warn)}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;min-width:9rem}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
td.heat{background:color-mix(in srgb,var(--mark) calc(var(--v)*70%),transparent);text-align:center}
td.text,th.text{text-align:left}svg{display:block;max-width:100%}
svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.axis{stroke:var(--line);stroke-width:1.5}.mark{stroke:var(--mark);fill:var(--mark)}.line{stroke:var(--mark);fill:none;stroke-width:2}
.other{stroke:var(--soft);stroke-dasharray:4 3}.two{display:grid;gap:0 2rem}
.two>*{min-width:0}.chart{width:100%;max-width:36rem}
@media (min-width:64rem){.two{grid-template-columns:2fr 3fr}}
.pictures{display:flex;flex-wrap:wrap;gap:.5rem}figure{margin:0}figcaption{font-size:.8rem;color:var(--soft)}
figure img{width:7rem;height:auto;display:block;image-rendering:pixelated}
code,.said{font-family:ui-monospace,monospace;font-size:.85rem;white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(6rem,auto) 1fr;gap:.15rem .8rem;margin:.3rem 0}dt{color:var(--soft)}
dd{margin:0;min-width:0}
"""


def text(value: Any) -> str:
    """Any text that did not stand in this file, safe inside HTML and its attributes."""
    return html.escape(str(value), quote=True)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def points(found: Mapping[str, Any] | None) -> str:
    """A difference with its interval, in points of a percent."""
    if found is None:
        return "-"
    return f"{100 * found['difference']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def p_value(found: Mapping[str, Any] | None) -> str:
    if found is None or found["mcnemar_p"] is None:
        return "-"
    return f"{found['mcnemar_p']:.2g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself on a narrow screen. Cells are HTML; a cell that begins with `<td` is whole."""
    lines = ["<div class=scroll><table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in rows:
        cells = (cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table></div>"])


def heat(value: float | None) -> str:
    """A table cell that is the darker, the larger the share."""
    return "<td>-</td>" if value is None else f'<td class=heat style="--v:{value:.3f}">{percent(value)}</td>'


def span(found: Mapping[str, Any] | None) -> str:
    """The interval of a difference, drawn from -100 to +100 points with a line at 0."""
    if found is None:
        return ""
    low, middle, high = (100 + 100 * found[name] for name in ("low", "difference", "high"))
    return (
        '<svg viewBox="0 0 200 14" width="160" height="11" role="img" aria-label="interval">'
        '<path class=axis d="M0 7H200M100 0V14"/>'
        f'<path class=line d="M{low:.1f} 7H{high:.1f}"/><circle class=mark cx="{middle:.1f}" cy="7" r="4"/></svg>'
    )


def line_chart(
    places: Sequence[tuple[float, Mapping[str, Any]]], across: str, other: float | None, mark: float
) -> str:
    """Rates with intervals against a number; a dashed line at `other`, a dotted one at the number `mark`."""
    width, height, left, top, bottom = 360, 210, 38, 8, 36
    first, last = places[0][0], max(places[-1][0], places[0][0] + 1)
    at = lambda x: left + 10 + (x - first) / (last - first) * (width - left - 24)  # noqa: E731
    up = lambda y: top + (1 - y) * (height - top - bottom)  # noqa: E731
    parts = [f'<svg class=chart viewBox="0 0 {width} {height}" role="img" aria-label="accuracy against {across}">']
    for y in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path class=axis d="M{left} {up(y):.1f}H{width}"/>')
        parts.append(f'<text x="{left - 5}" y="{up(y) + 4:.1f}" text-anchor="end">{100 * y:.0f}</text>')
    parts.append(f'<path class=axis stroke-dasharray="2 3" d="M{at(mark):.1f} {top}V{up(0):.1f}"/>')
    if other is not None:
        parts.append(f'<path class=other d="M{left} {up(other):.1f}H{width}"/>')
    known = [(x, found) for x, found in places if found["rate"] is not None]
    line = " ".join(f"{at(x):.1f},{up(found['rate']):.1f}" for x, found in known)
    parts.append(f'<polyline class=line points="{line}"/>')
    for x, found in known:
        parts.append(f'<path class=line d="M{at(x):.1f} {up(found["low"]):.1f}V{up(found["high"]):.1f}"/>')
        parts.append(f'<circle class=mark cx="{at(x):.1f}" cy="{up(found["rate"]):.1f}" r="3.5"/>')
    for x, _ in places:
        parts.append(f'<text x="{at(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{x}</text>')
    parts.append(f'<text x="{(left + width) / 2:.1f}" y="{height - 4}" text-anchor="middle">{across}</text></svg>')
    return "".join(parts)


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def loss_rows(experiments: Mapping[str, Any], names: Mapping[str, str]) -> list[list[str]]:
    """One table row for each experiment: accuracy, flips, loss against the intact run."""
    rows = []
    for name, label in names.items():
        if name in experiments:
            row = experiments[name]
            rows.append(
                [
                    label,
                    percent(row["accuracy"]["rate"]),
                    percent(row["flips"]["rate"]),
                    points(row["loss"]),
                    span(row["loss"]),
                    p_value(row["loss"]),
                    str(row["accuracy"]["samples"]),
                ]
            )
    return rows


LOSS_HEAD = ("", "accuracy", "answers flipped", "intact minus this, points [95 %]", "", "McNemar's p", "samples")


def draw_attention(diagnosis: Diagnosis, attention: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each drawn sample its picture as data URIs: plain, then under the attention of each query."""
    drawn = []
    for row, sample in enumerate(attention[: diagnosis.arguments.num_drawn]):
        if not sample["picture"]:
            continue
        image = diagnosis.records[row]["images"][0]
        image = open_image(image.open() if hasattr(image, "row") else image, row, 0)
        image = image.resize((112, max(1, round(112 * image.height / image.width))), Image.Resampling.NEAREST)
        weights = np.array(sample["picture"])  # (queries, P)
        weights /= weights.max()
        side = math.isqrt(weights.shape[1])
        pictures = [_data_uri(image)]
        for query in weights:
            mask = Image.fromarray((255 * query.reshape(side, side)).astype(np.uint8))
            mask = mask.resize(image.size, Image.Resampling.NEAREST)
            dark = Image.eval(image, lambda value: value // 5)
            pictures.append(_data_uri(Image.composite(image, dark, mask)))
        drawn.append(pictures)
    return drawn


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


FOLLOWING = {"own_picture": "the own picture", "donors_picture": "the donor's picture"}


def verdict_section(report: Mapping[str, Any]) -> str:
    found = report.get("thoughts")
    parts = []
    if found is None:
        parts.append("<p class=verdict>No thoughts: this checkpoint answers without them.</p>")
    else:
        kind = "used" if found["verdict"] == USED else "unshown"
        parts.append(f"<p class='verdict {kind}'>The thoughts are {found['verdict']}.</p>")
        harm = ", or ".join(text(KINDS[kind]) for kind in found["harmful"])
        harm = f"accuracy falls when all thoughts are replaced by {harm}" if harm else "no replacement costs accuracy"
        follows = "; ".join(
            f"under {FOLLOWING[name]} in <b>{percent(row['donor']['rate'])}</b> of {row['donor']['samples']} cases "
            f"(decoy: {percent(row['decoy']['rate'])})"
            for name, row in found["following"].items()
        )
        parts.append(
            f"<p>Damage: {harm}.</p><p>Content: with the thoughts of a sample that had another answer, the answer is "
            f"that sample's {follows}.</p>"
        )
        if found["used_indices"]:
            names = ", ".join(str(index + 1) for index in found["used_indices"])
            parts.append(f"<p>Shown to be used by itself: thought {names} of {report['model']['num_thoughts']}.</p>")
        for warning in report["geometry"]["warnings"]:
            parts.append(f"<p class=warning>Collapse: {text(warning)} (section Geometry).</p>")
    if picture := report.get("picture"):
        parts.append(f"<p>The picture is <b>{picture['verdict']}</b>.</p>")
        if "through_verdict" in picture:
            parts.append(f"<p>What the thoughts took from the picture is <b>{picture['through_verdict']}</b>.</p>")
    if control := report.get("control"):
        parts.append(
            f"<p>Against the control <code>{text(control['name'])}</code> ({text(control['mode'])}): accuracy "
            f"{points(control['accuracy_above_control'])} points.</p>"
        )
    if report["verdict_tests"]["number"]:
        parts.append(rule(report["verdict_tests"]["number"]))
    return section("Verdict", *parts)


def rule(num_tests: int) -> str:
    """How the verdicts are reached, in the page's words; [`judge_thoughts`] and [`judge_picture`] are the rule."""
    return (
        f"<details class=soft><summary>The rule</summary><p>The verdicts of this page rest on {num_tests} tests. A "
        f"test holds if the paired bootstrap interval at the level 1 - {ALPHA} / {num_tests} lies above 0 and "
        f"McNemar's exact p is below {ALPHA} / {num_tests}.</p><p>Thoughts are “{USED}” if at least one of "
        f"{len(KINDS)} kinds of damage to all of them costs accuracy <i>and</i> answers follow the donor of the "
        "thoughts: under the own picture more often than they agree with a decoy, a sample drawn in the same way "
        "whose thoughts are not fed; or under the donor's picture more often than with the decoy's thoughts. A single "
        "thought is, if besides accuracy falls when, after the loop, it alone is replaced by the mean or by the "
        "donor's.</p><p>The picture is, if a grey or another one costs accuracy. What thoughts took from it is, if "
        "with the right or the wrong picture for the answer, thoughts of the right one give more right answers than "
        f"those of the wrong one.</p><p>Anything else is “{NOT_SHOWN}”, which is not “not used”.</p></details>"
    )


def budget_section(report: Mapping[str, Any]) -> str:
    experiments, trained = report["experiments"], report["model"]["num_thoughts"]
    rows = {
        row["num_thoughts"]: row for name, row in experiments.items() if name == "intact" or name.startswith("budget-")
    }
    rows = dict(sorted(rows.items()))
    control = report.get("control")
    other = control["experiments"]["intact"]["accuracy"]["rate"] if control else None
    chart = line_chart([(count, row["accuracy"]) for count, row in rows.items()], "thoughts", other, trained)
    body = [
        [
            str(count),
            percent(row["accuracy"]["rate"]),
            f"{percent(row['accuracy']['low'])} - {percent(row['accuracy']['high'])}",
            f"{row['new_tokens']:.1f}",
            points(row["loss"]) if count != trained else "",
            p_value(row["loss"]) if count != trained else "",
        ]
        for count, row in rows.items()
    ]
    head = ("thoughts", "accuracy", "95 %", "generated tokens", "asked minus this, points [95 %]", "McNemar's p")
    note = f"<p class=soft>Accuracy in percent. Dotted: the {trained} thoughts that all else on this page is about."
    note += " Dashed: the control.</p>" if control else "</p>"
    return section("How many thoughts", f"<div class=two><div>{chart}{note}</div><div>{table(head, body)}</div></div>")


def damage_section(report: Mapping[str, Any]) -> str:
    experiments, count = report["experiments"], report["model"]["num_thoughts"]
    names = {"intact": "intact"} | {f"{kind}-all": text(label) for kind, label in KINDS.items()}
    names |= {"noise-all-after": "noise of the norm of the untouched thought, after the loop"}
    parts = [
        "<p class=soft>All thoughts replaced. Zeros, noise and the pause embedding are unlike any thought, so a loss "
        "there may only say that the input is unfamiliar; the mean and a swap are closer to what was trained.</p>",
        table(LOSS_HEAD, loss_rows(experiments, names)),
    ]
    for place, words in (
        ("inside", "inside the loop: later thoughts follow from the replaced one"),
        ("after", "after the loop: the other thoughts stay as they were"),
    ):
        rows = [
            [text(label)]
            + [heat(experiments[name_of(kind, index, place, count)]["flips"]["rate"]) for index in range(count)]
            for kind, label in KINDS.items()
        ]
        head = ("answers flipped", *(f"thought {index + 1}" for index in range(count)))
        parts += [f"<p>One thought replaced, {words}</p>", table(head, rows)]
    return section("Thoughts replaced", *parts)


def swap_section(report: Mapping[str, Any]) -> str:
    found = report["thoughts"]
    names = {"swap-all": "donor had another answer", "swap_same-all": "donor had the same answer"}
    shares = {
        "own as before; the donor had another": found["stays"],
        "own as before; the donor had the same": found["stays_with_same_answer"],
    }
    rows = []
    for name, row in found["following"].items():
        words = "a decoy's" if name == "own_picture" else "donor's, with a decoy's thoughts"
        shares |= {f"donor's; {FOLLOWING[name]}": row["donor"], f"{words}; {FOLLOWING[name]}": row["decoy"]}
        rows.append([FOLLOWING[name], points(row["test"]), span(row["test"]), p_value(row["test"])])
    answers = [
        [label, percent(value["rate"]), f"{percent(value['low'])} - {percent(value['high'])}", str(value["samples"])]
        for label, value in shares.items()
    ]
    return section(
        "Thoughts of another sample",
        "<p class=soft>“Answer” is here what the model itself answers untouched, right or wrong. The question is the "
        "sample's own. Thoughts that hold a place rather than the answer give the donor's answer only under the "
        "donor's picture.</p>",
        table(("the answer is", "share", "95 %", "samples"), answers),
        table(("donor minus decoy", "points [95 %]", "", "McNemar's p"), rows),
        table(LOSS_HEAD, loss_rows(report["experiments"], names)),
    )


def picture_section(report: Mapping[str, Any]) -> str:
    names = {"intact": "own picture"}
    for name, label in (("grey", "a grey picture"), ("other", "another sample's picture")):
        names |= {
            f"{name}-both": f"{label} for both",
            f"{name}-thoughts": f"{label} for the thoughts only",
            f"{name}-answer": f"{label} for the answer only",
        }
    parts = [
        "<p class=soft>Thoughts recorded under one picture are fed while the prompt holds the other. The layers above "
        "a fed thought still attend to the picture of the prompt.</p>",
        table(LOSS_HEAD, loss_rows(report["experiments"], names)),
    ]
    if control := report.get("control"):
        parts.append(f"<p>The control <code>{text(control['name'])}</code>:</p>")
        parts.append(table(LOSS_HEAD, loss_rows(control["experiments"], names)))
    return section("Picture", *parts)


def bottleneck_section(report: Mapping[str, Any]) -> str:
    names = {
        "intact": "the answer sees all",
        "sees-no_image": "all but the picture",
        "sees-thoughts_only": "only the thoughts",
    }
    return section(
        "What the answer sees",
        "<p class=soft>A bottleneck, not a seal: thoughts have seen picture and question, and their keys and values "
        "in every layer carry what they saw. The model was not trained this way, so a loss may only say that it is "
        "unfamiliar.</p>",
        table(LOSS_HEAD, loss_rows(report["experiments"], names)),
    )


def lens_section(report: Mapping[str, Any]) -> str:
    has_control = any("control" in row for row in report["lens"])
    head = ["", "step", "first", "first five", "by chance", "first minus chance [95 %]", "McNemar's p"]
    head += ["control", "first minus control [95 %]", "McNemar's p"] if has_control else []
    rows = []
    for row in report["lens"]:
        cells = [f"thought {row['index'] + 1}", str(row["step"] + 1), heat(row["top1"]["rate"])]
        cells += [heat(row["top5"]["rate"]), heat(row["chance"]["rate"])]
        cells += [points(row["above_chance"]), p_value(row["above_chance"])]
        if has_control:
            cells += (
                [heat(row["control"]["rate"]), points(row["above_control"]), p_value(row["above_control"])]
                if ("control" in row)
                else ["", "", ""]
            )
        rows.append(cells)
    return section(
        "Logit lens",
        "<p class=soft>How often the token that <code>lm_head</code> reads from the state that makes a thought (with "
        "constant thoughts: the state before it) is the first token of the written step that the thought replaced. "
        "By chance: the step of another sample. It shows what can be read, not what is used: the last hidden state is "
        "trained to predict tokens in any model, so compare with a control.</p>",
        table(head, rows) if rows else "<p>The records have no written steps.</p>",
    )


def geometry_section(report: Mapping[str, Any]) -> str:
    parts = []
    for name, geometry in (("", report["geometry"]), ("control: ", report.get("control", {}).get("geometry"))):
        if geometry is None:
            continue
        norms = [
            [name + label, f"{row['mean']:.3g}", f"{row['low']:.3g} - {row['high']:.3g}"]
            for label, row in geometry["norms"].items()
        ]
        within = [*(f"{cosine:.3f}" for cosine in geometry["cosine_with_next"]), ""]
        shape = [
            [f"{name}thought {index + 1}", f"{across:.3f}", cosine, percent(share), f"{rank:.1f}"]
            for index, (across, cosine, share, rank) in enumerate(
                zip(
                    geometry["cosine_across_samples"],
                    within,
                    geometry["spread"],
                    geometry["effective_rank"],
                    strict=True,
                )
            )
        ]
        shape.append([name + "all", "", "", "", f"{geometry['effective_rank_of_all']:.1f}"])
        head = ("", "cosine across samples", "cosine with the next", "spread", "effective rank")
        parts += [table(("norm of", "mean", "90 % of them"), norms), "<br>", table(head, shape), "<br>"]
        parts += [f"<p class=warning>Collapse: {text(name + warning)}.</p>" for warning in geometry["warnings"]]
    parts.append(
        "<p class=soft>Spread: squared distance from the mean over squared norm, the share of a thought that differs "
        "between samples. Effective rank: exponential of the entropy of the squared singular values, centred. The "
        f"rule of collapse: a spread under {percent(COLLAPSED_SHARE)}, or a mean cosine with the next thought over "
        f"{COLLAPSED_COSINE}.</p>"
    )
    return section("Geometry", *parts)


def attention_section(report: Mapping[str, Any], pictures: Sequence[Sequence[str]]) -> str:
    found = report["attention"]
    count = len(found["shares"]) - 1
    labels = [f"makes thought {index + 1}" for index in range(count)] + ["writes the answer's first token"]
    rows = [[label, *(heat(share) for share in shares)] for label, shares in zip(labels, found["shares"], strict=True)]
    parts = [
        f"<p class=soft>Mean over layers, heads and {found['samples']} samples, from the position that does what is "
        "named. Attention says where a position looks, not what it takes from there.</p>",
        table(("position that", "picture", "question and other text", "thoughts"), rows),
    ]
    captions = ["picture", *(f"makes thought {index + 1}" for index in range(count)), "writes the answer"]
    for sample, uris in enumerate(pictures):
        question = text(report["examples"][sample]["question"]) if sample < len(report["examples"]) else ""
        figures = [
            f'<figure><img src="{uri}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
            for uri, caption in zip(uris, captions, strict=True)
        ]
        parts.append(f"<p class=said>{question}</p><div class=pictures>{''.join(figures)}</div>")
    return section("Attention", *parts)


def example_section(report: Mapping[str, Any]) -> str:
    parts = []
    for example in report["examples"]:
        items = {"record": example["id"], "question": example["question"]}
        items |= {"steps": " → ".join(example["steps"]), "answer": example["answer"]}
        items |= {f"written, {name}": written for name, written in example["written"].items()}
        if "donor" in example:
            items["that other's answer"] = example["donor"]["prediction"]
        if "lens" in example:
            items["lens"] = " | ".join(" ".join(repr(token) for token in tokens) for tokens in example["lens"])
        body = "".join(f"<dt>{text(name)}</dt><dd class=said>{text(value)}</dd>" for name, value in items.items())
        parts.append(f"<dl>{body}</dl><hr>")
    return section("Samples", *parts)


def page(report: Mapping[str, Any], pictures: Sequence[Sequence[str]]) -> str:
    """The whole report as one HTML page that asks nothing of a network."""
    model = report["model"]
    parts = [verdict_section(report)]
    if "thoughts" in report:
        parts += [budget_section(report), damage_section(report), swap_section(report)]
    if "picture" in report:
        parts.append(picture_section(report))
    if "thoughts" in report:
        parts += [bottleneck_section(report), lens_section(report), geometry_section(report)]
        parts.append(attention_section(report, pictures))
    parts.append(example_section(report))
    title, data = f"Diagnosis of {text(model['name'])}", text(report["settings"]["data"])
    return f"""<!DOCTYPE html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none';style-src 'unsafe-inline';img-src data:">
<link rel=icon href="data:,"><title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{title}</h1>
<p class=soft>mode {text(model["mode"])}, {model["num_thoughts"] or "no"} thoughts (trained with
{text(model["trained_thoughts"] or "none")}), {report["samples"]} samples of <code>{data}</code>. Intervals are of
95 %, paired by sample (bootstrap, 10,000 draws); p is McNemar's exact one, not corrected unless a rule says so.</p>
{chr(10).join(parts)}
</main></body></html>
"""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Diagnoses as the flags say; returns what diagnosis.json holds."""
    arguments = parse(sys.argv[1:] if arguments is None else arguments)
    device = torch.device("cpu")
    if torch.accelerator.is_available() and not arguments.use_cpu:
        device = torch.accelerator.current_accelerator()
    records = load_records(
        arguments.data,
        columns=json.loads(arguments.column_mapping) if arguments.column_mapping else None,
        split=arguments.split,
        needs_steps=False,
        allow_outside=arguments.allow_outside,
    )[: arguments.max_samples]
    if len(records) < 2:
        raise ValueError(f"`--data` {arguments.data} has {len(records)} record, expected at least 2 to compare.")
    check_records(records, ScoreArguments(model=[arguments.model], data=arguments.data, metric=arguments.metric))
    metric = load_metric(arguments.metric)
    metric(records[0], "")  # names of results that do not exist show now
    diagnosis, control, pictures = Diagnosis(arguments.model, records, arguments, device), None, []
    if arguments.control:
        control = Diagnosis(arguments.control, records, arguments, device, is_control=True)
    diagnosis.run()
    seen = examine(diagnosis)
    diagnosis.subject.model = None  # makes room for the control
    control_scores, control_seen = None, {}
    if control is not None:
        control.run()
        control_scores, control_seen = Scores(control, metric), examine(control)
        control.subject.model = None
    if seen:
        pictures = draw_attention(diagnosis, seen["attention"])
    report = {
        "settings": asdict(arguments),
        **summarise(diagnosis, Scores(diagnosis, metric), seen, control, control_scores, control_seen),
    }
    output_dir = Path(arguments.output_dir)
    content = json.dumps(report, indent=1, allow_nan=False)
    (output_dir / "diagnosis.json").write_text(content, encoding="utf-8")
    Path(arguments.report).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.report).write_text(page(report, pictures), encoding="utf-8")
    show(report)
    print(f"\n{arguments.report} and {output_dir / 'diagnosis.json'} are written")
    return report


def show(report: Mapping[str, Any]):
    """The table in the terminal."""
    width = max(map(len, report["experiments"])) + 2
    print(f"\n{'experiment':{width}}{'accuracy':>9}{'flipped':>9}  {'intact minus this, points [95 %]':>32}  {'p':>8}")
    for name, row in report["experiments"].items():
        accuracy, flips = percent(row["accuracy"]["rate"]), percent(row["flips"]["rate"])
        print(f"{name:{width}}{accuracy:>9}{flips:>9}  {points(row['loss']):>32}  {p_value(row['loss']):>8}")
    if found := report.get("thoughts"):
        print(f"\nThe thoughts are {found['verdict']}.")
        for name, row in found["following"].items():
            rates = percent(row["donor"]["rate"]), percent(row["decoy"]["rate"])
            print(f"Under {FOLLOWING[name]}, answers follow the donor in {rates[0]} (decoy: {rates[1]}).")


if __name__ == "__main__":
    main()
