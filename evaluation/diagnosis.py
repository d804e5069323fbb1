"""Runs experiments and measurements on a subject, in files that a killed run goes on with. Knows no score."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .edits import FEWEST_MEMBERS, MeanThoughts, feed_group, mean_thoughts
from .experiments import FORMAT, Experiment, Results, plan
from .measurements import Measurements, first_tokens, measure_attention, measure_geometry, read_lens, texts_of
from .predictions import describe, read_predictions
from .readings import SameStep, draw_edits, steps_among
from .subject import Subject


class Diagnosis:
    """
    A subject and the experiments that it is asked in.

    Args:
        subject ([`Subject`]): The checkpoint and the records; it answers by generation.
        output_dir (`str`): All files go to a folder of it that the settings name.
        num_thoughts (`int`, *optional*): Thoughts to examine; what the checkpoint was trained with if not given.
        batch_size (`int`, defaults to 64): Records at a time.
        seed (`int`, defaults to 0): Seed of all that is drawn.
        is_control (`bool`, defaults to `False`): Only the experiments that are set beside another checkpoint's.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        output_dir: str | Path,
        num_thoughts: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
        is_control: bool = False,
    ):
        self.subject, self.batch_size, self.seed = subject, batch_size, seed
        self.num_thoughts = subject.numbers_of_thoughts(None if num_thoughts is None else [num_thoughts])[0]
        self.tiles = [subject.dataset.shape(row).num_patches_list for row in range(len(subject.dataset))]
        self.first, self.second = plan(self.num_thoughts, has_images=any(self.tiles), is_control=is_control)
        self.settings = {**describe(subject, self.num_thoughts), "format": FORMAT, "seed": seed}
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        self.folder = Path(output_dir) / "experiments" / f"{Path(subject.name).resolve().name}-{digest}"

    def run(self) -> Results:
        """Asks what has not been asked yet."""
        subject, experiments = self.subject, [*self.first, *self.second]
        results = Results(
            subject.name, subject.config, self.num_thoughts, subject.records, self.tiles, self.seed, experiments
        )
        self._run(self.first, results)
        if self.second:
            results.draw()
            self._run(self.second, results)
        return results

    def measure(self, results: Results, *, num_attention: int, num_drawn: int) -> Measurements | None:
        """
        What is read from a model that thinks, beside its answers; `None` of one that does not.

        Args:
            num_attention (`int`): Records whose attention is averaged; not for a control.
            num_drawn (`int`): Records whose attention is drawn over the picture; not for a control.
        """
        subject, count, size = self.subject, self.num_thoughts, self.batch_size
        if not count:
            return None
        lens = self._kept("lens", lambda: read_lens(subject, count, size))
        readings = self._kept("readings", lambda: self._read(results)) if subject.can_read(count) else None
        geometry = self._kept("geometry", lambda: measure_geometry(subject, results.thoughts["intact"], size))
        attention = []
        if self.second:
            attention = self._kept(
                "attention",
                lambda: measure_attention(subject, count, max(num_attention, num_drawn), num_drawn),
                num_drawn=num_drawn,
                num_attention=num_attention,
            )
        return Measurements(
            lens=lens,
            texts=texts_of(subject, lens),
            steps=first_tokens(subject),
            geometry=geometry,
            attention=attention[:num_attention],
            drawn=attention[:num_drawn],
            readings=readings,
        )

    def edit_readings(
        self, donors: Subject, readings: Sequence[Sequence[str]], same_step: SameStep
    ) -> dict[int, list[dict[str, Any]]]:
        """
        The read-edit experiment: each group that replaces a step is made to read as another one, inside the loop.

        Args:
            donors ([`Subject`]): The same checkpoint and the records that means are taken over.
            readings (`list[list[str]]`): From [`~Diagnosis.measure`].

        Returns:
            `dict[int, list[dict]]`: by group the lines of the records that were edited, as
            [`~readings.edit_table`] takes them.
        """
        subject, records = self.subject, self.subject.records
        means, found = self._means(donors), {}
        for group, texts in enumerate(means.texts):
            if all(group >= len(record["steps"]) for record in records):
                continue
            said = steps_among(texts, donors.records, group, same_step)
            drawn = draw_edits(records, readings, [texts[number] for number in said], group, same_step, self.seed)
            chosen = {row: said[number] for row, number in drawn.items()}
            found[group] = self._ask_edited(subject, group, chosen, means)
        return found

    def _ask_edited(
        self, subject: Subject, group: int, chosen: dict[int, int], means: MeanThoughts
    ) -> list[dict[str, Any]]:
        """The lines of one group: those of an earlier run, and the rest asked now."""
        count = self.num_thoughts or 0
        path, texts, vectors = self.folder / f"edit-{group}.jsonl", means.texts[group], means.means[group]
        content = json.dumps([texts, sorted(chosen.items())]).encode() + vectors.contiguous().numpy().tobytes()
        header = {**self.settings, "edit": {"group": group, "digest": hashlib.sha256(content).hexdigest()}}
        done = read_predictions(path, header)
        todo = [row for row in chosen if row not in done]
        for start in tqdm(range(0, len(todo), self.batch_size), desc=f"edit-{group}", disable=not todo):
            rows = todo[start : start + self.batch_size]
            subject.load()
            batch = subject.inputs(rows, count, subject.encode(rows))
            batch["edit_thoughts"] = feed_group(vectors, [chosen[row] for row in rows], group)
            answers, thoughts = subject.write(batch, return_thoughts=True)
            read = subject.read(rows, count, thoughts)
            lines = [
                {"index": row, "step": texts[chosen[row]], **answer, "thoughts": said}
                for row, answer, said in zip(rows, answers, read, strict=True)
            ]
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            done.update({line["index"]: line for line in lines})
        return [done[row] for row in chosen]

    def _means(self, donors: Subject) -> MeanThoughts:
        """Those of `donors`, or of an earlier run over the same records."""
        count = self.num_thoughts or 0
        settings = {"donors": describe(donors, count), "fewest_members": FEWEST_MEMBERS}
        name = f"edit-means-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"
        path = self.folder / f"{name}.safetensors"

        def compute() -> dict[str, Any]:
            donors.model = self.subject.model
            found = mean_thoughts(donors, count, self.batch_size)
            donors.model = None
            save_file({str(group): means for group, means in enumerate(found.means)}, path.with_suffix(".partial"))
            os.replace(path.with_suffix(".partial"), path)
            return {"texts": found.texts, "counts": found.counts}

        if not path.is_file():  # killed between the two files, or one was deleted
            path.with_suffix(".json").unlink(missing_ok=True)
        kept = self._kept(name, compute, **settings)
        means = load_file(path)
        return MeanThoughts(kept["texts"], kept["counts"], [means[str(group)] for group in range(len(means))])

    def _read(self, results: Results) -> list[list[str]]:
        """What each group of thoughts reads as, of each record in the intact run."""
        subject, count, found = self.subject, self.num_thoughts or 0, []
        for start in range(0, len(results.records), self.batch_size):
            rows = list(range(start, min(start + self.batch_size, len(results.records))))
            fed = results.thoughts["intact"][rows] if subject.feeds_states else None
            found += subject.read(rows, count, fed)
        return found

    def _run(self, experiments: Sequence[Experiment], results: Results) -> None:
        count = len(results.records)
        recorded: dict[str, list[Any]] = defaultdict(list)
        done = {experiment.name: self._begin(experiment) for experiment in experiments}
        progress = tqdm(
            total=count * len(experiments), initial=sum(map(len, done.values())), desc=self.subject.name, unit="answer"
        )
        for start in range(0, count, self.batch_size):  # batches outside: each picture is opened and encoded once
            rows = list(range(start, min(start + self.batch_size, count)))
            features: dict[str, torch.Tensor | None] = {}
            for experiment in experiments:
                todo = [row for row in rows if row not in done[experiment.name]]
                if not todo:
                    continue
                self.subject.load()
                progress.set_postfix_str(experiment.name)
                lines, thoughts = self.ask(experiment, rows, results, features)
                lines = [line for line in lines if line["index"] in todo]
                recorded[experiment.name].append(thoughts)
                with open(self._path(experiment), "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                done[experiment.name].update({line["index"]: line for line in lines})
                progress.update(len(lines))
        progress.close()
        for experiment in experiments:
            results.lines[experiment.name] = [done[experiment.name][row] for row in range(count)]
            if experiment.records:
                path = self._path(experiment).with_suffix(".safetensors")
                if not path.is_file():
                    save_file({"thoughts": torch.cat(recorded[experiment.name])}, path.with_suffix(".partial"))
                    os.replace(path.with_suffix(".partial"), path)
                results.thoughts[experiment.name] = load_file(path)["thoughts"]

    def _path(self, experiment: Experiment) -> Path:
        return self.folder / f"{experiment.name}.jsonl"

    def _begin(self, experiment: Experiment) -> dict[int, dict[str, Any]]:
        """Lines of an earlier run by index; where thoughts are recorded, all lines and thoughts or none."""
        path, header = self._path(experiment), {**self.settings, "experiment": asdict(experiment)}
        done, thoughts = read_predictions(path, header), path.with_suffix(".safetensors")
        if experiment.records and (len(done) < len(self.subject.records) or not thoughts.is_file()):
            path.unlink()
            thoughts.unlink(missing_ok=True)
            done = read_predictions(path, header)
        return done

    def ask(
        self, experiment: Experiment, rows: Sequence[int], results: Results, features: dict | None = None
    ) -> tuple[list[dict[str, Any]], torch.Tensor | None]:
        """
        The answers of these records in an experiment, and the thoughts `(rows, n, D)` that were fed, if it records.

        Args:
            results ([`Results`]): Of the experiments before, whose thoughts it may feed.
            features (`dict`, *optional*): Visual features of these rows by kind of picture; filled when needed.
        """
        features = {} if features is None else features
        if experiment.picture not in features:
            features[experiment.picture] = self.encode(rows, experiment.picture, results)
        batch = self.subject.inputs(rows, experiment.num_thoughts, features[experiment.picture])
        if experiment.answer_sees != "all":
            batch["answer_sees"] = experiment.answer_sees
        if experiment.feed or experiment.replace:
            batch["edit_thoughts"] = self.edit(experiment, rows, results)
        answers, thoughts = self.subject.write(batch, return_thoughts=experiment.records)
        return [{"index": row, **answer} for row, answer in zip(rows, answers, strict=True)], thoughts

    def encode(self, rows: Sequence[int], picture: str, results: Results) -> torch.Tensor | None:
        """Visual features `(tiles, P, D)` of the pictures that [`Experiment`] names; the own where there is none."""
        sources = np.array(rows)
        if picture in ("other", "swap"):
            others = (results.pictures if picture == "other" else results.donors["swap"])[sources]
            sources = np.where(others >= 0, others, sources)
        return self.subject.encode(sources.tolist(), self._grey if picture == "grey" else None)

    def _grey(self, pixels: torch.Tensor) -> torch.Tensor:
        processor = self.subject.processor.image_processor
        mean, std = torch.tensor([processor.image_mean, processor.image_std], dtype=torch.float64)
        return ((0.5 - mean) / std)[None, :, None, None].expand_as(pixels)

    def edit(
        self, experiment: Experiment, rows: Sequence[int], results: Results
    ) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """The function `(thought (rows, D), index) -> thought` of an experiment."""
        feed = results.thoughts[experiment.feed][rows].to(self.subject.device) if experiment.feed else None

        def edit_thoughts(thought, index):
            if feed is not None:
                thought = feed[:, index]  # of (rows, n, D)
            if experiment.replace is None or experiment.index not in (None, index):
                return thought
            return self._replacement(experiment.replace, thought, index, rows, results)

        return edit_thoughts

    def _replacement(
        self, kind: str, thought: torch.Tensor, index: int, rows: Sequence[int], results: Results
    ) -> torch.Tensor:
        """What takes the place of the thoughts `(rows, D)` of one index. Without a donor a thought stays."""
        if kind == "zero":
            return torch.zeros_like(thought)
        if kind == "mean":
            return results.mean[index].to(thought).expand_as(thought)
        if kind == "noise":
            return results.noise[rows, index].to(thought) * thought.norm(dim=-1, keepdim=True)
        if kind == "pause":
            model = self.subject.model
            return model.get_input_embeddings().weight[model.config.latent_token_id].expand_as(thought)
        donors = torch.from_numpy(results.donors[kind][rows])
        given = results.thoughts["intact"][donors.clamp(min=0), index].to(thought)
        return torch.where((donors >= 0)[:, None].to(thought.device), given, thought)

    def _kept(self, name: str, compute: Callable[[], Any], **settings: Any) -> Any:
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
