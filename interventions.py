"""Interventions on thoughts and pictures, and what they show: the experiments, figures and verdicts of diagnose.py.

A thought is replaced by `edit_thoughts`, inside the loop of passes. Two places are told apart:

- *inside the loop*: one thought is replaced, and all later thoughts and the answer follow from the replaced one.
- *after the loop*: all thoughts are first computed untouched and recorded. In a second run the recorded ones are fed,
  but for the one that is replaced: later thoughts stay what they were, only what follows reads the replaced one.

Where all thoughts are replaced by something that does not depend on them, the two are the same run. What is fed is
the input embedding of a thought's position; the layers above it still attend to prompt and picture.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from multicoco import MultiCoCoConfig
from multicoco.intervals import mcnemar, paired_bootstrap, wilson_interval
from multicoco.score import ScoreArguments, Subject, describe, read_predictions


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
        arguments ([`~diagnose.DiagnoseArguments`]): Settings.
        device (`torch.device`): Where the model runs.
        is_control (`bool`, defaults to `False`): Only the experiments that are set beside another checkpoint's.
    """

    def __init__(self, name, records, arguments, device, is_control: bool = False):
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
            header = {**self.settings, "experiment": asdict(experiment)}
            done[experiment.name] = read_predictions(path, header)
            if experiment.records and experiment.name not in recorded and len(done[experiment.name]) < count:
                path.unlink()  # nor are thoughts without all their lines
                path.with_suffix(".safetensors").unlink()
                done[experiment.name], recorded[experiment.name] = read_predictions(path, header), []
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
        of_picture = experiment.picture != "own" or experiment.answer_sees == "no_image"
        if of_picture or experiment.feed in ("grey-both", "other-both"):
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

    Where states are fed back, this state is the thought. A model with constant thoughts has such states too, and they
    may hold steps just as well: they are what a control has to show.
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
    order = np.random.default_rng((seed, 2)).permutation(rows).tolist()
    others = dict(zip(order, order[1:] + order[:1], strict=True)) if len(rows) > 1 else {}  # a ring: none is its own
    return {
        "top1": {row: lens[row][index][0] == steps[row][step] for row in rows},
        "top5": {row: steps[row][step] in lens[row][index] for row in rows},
        "chance": {row: lens[row][index][0] == steps[others[row]][step] for row in rows if others},
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
        size = diagnosis.arguments.batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        parts = [part for part in parts if any(diagnosis.tiles[row] for row in part)]
        images = [diagnosis.encode(part, "own").double().flatten(0, 1).norm(dim=-1) for part in parts]
        norms["image"] = torch.cat(images)
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
    hooks = [  # before they are recorded: the weights of all heads of a long prompt would be tens of gigabytes
        layer.self_attn.register_forward_hook(_mean_over_heads, prepend=True)
        for layer in model.model.language_model.layers
    ]
    found = []
    for row in range(min(max(arguments.num_attention, arguments.num_drawn), len(diagnosis.records))):
        batch = diagnosis.prompts([row], diagnosis.num_thoughts)
        if diagnosis.tiles[row]:
            features = BaseModelOutputWithPooling(pooler_output=diagnosis.encode([row], "own"))
            batch["mm_encoder_outputs"] = {"image": features}
        with torch.no_grad():
            attentions = model(**batch, output_attentions=True).attentions  # a (1, 1, T, T) for each layer
        weights = torch.stack([layer[0, 0].double() for layer in attentions]).mean(dim=0).cpu()  # (T, T)
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
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation(before)
    return found


def _mean_over_heads(module, args, output):
    hidden_states, weights = output
    return hidden_states, weights.mean(dim=1, keepdim=True)


# --- figures -----------------------------------------------------------------------------------------------------


def difference(first: Sequence[float], second: Sequence[float], num_tests: int = 1) -> dict[str, Any] | None:
    """
    `mean(first) - mean(second)` of paired scores: its 95 % interval, McNemar's exact p where all scores are 0 or 1,
    and whether it is above 0 when `num_tests` are made: the interval, and the p of the sign test (which McNemar's is),
    at the level `ALPHA / num_tests`. The interval alone would not do: that of a few samples is too short.
    """
    if not len(first):
        return None
    first, second = np.asarray(first, float), np.asarray(second, float)
    low, high = paired_bootstrap(first, second)
    corrected_low, _ = paired_bootstrap(first, second, 1 - ALPHA / num_tests)
    is_binary = bool(np.isin(np.concatenate([first, second]), (0, 1)).all())
    sign = mcnemar(first > second, first < second)
    return {
        "samples": len(first),
        "difference": float(first.mean() - second.mean()),
        "low": low,
        "high": high,
        "mcnemar_p": sign if is_binary else None,
        "num_tests": num_tests,
        "above_0": corrected_low > 0 and sign < ALPHA / num_tests,
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
        known = {}
        for experiment in (*diagnosis.first, *diagnosis.second):
            name, lines = experiment.name, diagnosis.lines[experiment.name]
            values = []
            for row, line in enumerate(lines):  # most experiments repeat an answer, and a metric may be slow
                key = row, line["prediction"]
                if key not in known:
                    known[key] = metric(diagnosis.records[row], line["prediction"])
                values.append(known[key])
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
    of_thoughts = len(KINDS) + 2 + 2 * count if count else 0  # damage, following, each thought by itself
    of_pictures = 2 + (1 + 4 if count else 0)  # the picture; following under the donor's, through the thoughts
    return of_thoughts + (of_pictures if has_images else 0)


def judge_thoughts(scores: Scores, num_tests: int) -> dict[str, Any]:
    """
    The verdict, by tests that each hold at the level 0.05 / `num_tests` (interval and McNemar's p).

    "used": at least one kind of damage to all thoughts costs accuracy, *and* answers follow the donor of the thoughts.
    That damage alone costs accuracy says only that thoughts must look familiar. Following is shown if, with the
    donor's thoughts, the answer is the donor's

    - more often than it is a decoy's, a sample drawn in the same way whose thoughts are not fed (own picture); or
    - more often than with the thoughts of a sample that had the own answer (own picture): where there are only two
      answers, a decoy's is always the donor's; or
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
    rows = np.flatnonzero((donors >= 0) & (diagnosis.donors["swap_same"] >= 0))
    following["same_answer"] = tuple(
        (scores.predictions[f"{kind}-all"] == answers[donors])[rows] for kind in ("swap", "swap_same")
    )
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
            "above_chance": difference(top1, chance) if chance else None,
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
