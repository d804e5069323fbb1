"""Runs the experiments on a checkpoint, in files that a killed run goes on with. Knows no score."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..configuration_multicoco import MultiCoCoConfig
from .experiments import FORMAT, Experiment, choose_budgets, choose_donors, choose_pictures, plan
from .predictions import describe, read_predictions
from .subject import Subject


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
            arguments,
            device,
        )
        self.dataset = self.subject.dataset
        self.tiles = [row.num_patches_list for row in self.dataset.tokenized]
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
        prompts = [self.dataset.prompt(row, num_thoughts)["input_ids"] for row in rows]
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
        prompts = [self.dataset.prompt(int(source), None) for source in sources]
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
