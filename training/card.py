"""The model card of a run: README.md with metadata that the Hub reads, made from the files in the run's folder.

It reads config.json, settings.json and results.json (of `train.py`), scores.json in the folder or in its `scores/` (of
`score.py`), diagnosis.json in the folder or in its `diagnosis/` (of `diagnose.py`), and adapter_config.json if
adapters were trained. What is not there is not claimed. Knows files, no model.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import logging

from ..compat import optional_file
from ..configuration_multicoco import CONTROL_FEEDBACK, MODES, MultiCoCoConfig
from ..evaluation.checkpoints import FILES, files_of
from ..evaluation.intervals import wilson_interval


logger = logging.get_logger(f"transformers.{__name__}")  # heard as the library is

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TASK = "image-text-to-text"
USE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{model_id}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{model_id}", trust_remote_code=True, dtype="auto")

content = [{{"type": "image", "path": "street.jpg"}}, {{"type": "text", "text": "How many cars are parked?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""
USE_ADAPTERS = """These are adapters. They need their base model, its thought tokens and the package multicoco:

```python
from peft import PeftModel

from multicoco import MultiCoCoForConditionalGeneration, MultiCoCoProcessor, add_thought_tokens

processor = MultiCoCoProcessor.from_pretrained("{base}")
model = MultiCoCoForConditionalGeneration.from_pretrained("{base}", dtype="auto")
add_thought_tokens(model, processor.tokenizer{init_from})
model = PeftModel.from_pretrained(model, "{model_id}").merge_and_unload()
model.config.num_thoughts = processor.num_thoughts = {num_thoughts}
model.config.thought_feedback = "{thought_feedback}"
```"""
# Where more belongs to them than that block sets: 4 bits that the base is rounded to, sweeps.
USE_LOADED = """These are adapters. They need their base model, its thought tokens and the package multicoco:

```python
from multicoco import MultiCoCoProcessor, load_checkpoint

processor = MultiCoCoProcessor.from_pretrained("{model_id}")
model = load_checkpoint("{model_id}", base_model="{base}")
```"""


def make_card(
    folder: str | Path,
    model_id: str | None = None,
    controls: Sequence[str | Path] = (),
    *,
    language: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """
    The card of the run in `folder`.

    Args:
        folder (`str` or `Path`): The `output_dir` of a run of `train.py`.
        model_id (`str`, *optional*): Its name on the Hub. Defaults to where it was pushed, else the folder's name.
        controls (`Sequence[str | Path]`): Folders of other finished runs, whose last answers stand beside this one's.
        language (`str`, *optional*): Language of the data, for the metadata.
        license (`str`, *optional*): Licence of the weights. Defaults to that of the base model's card, else `unknown`.
        tags (`Sequence[str]`): More tags.

    Raises:
        ValueError: `folder` holds no model, or a control is not a finished run.
    """
    folder = Path(folder)
    config = _read_config(folder)
    settings = _read(folder / "settings.json") or {}
    model_id = model_id or settings.get("hub_model_id") or folder.resolve().name
    base, is_adapter = settings.get("model_name_or_path"), (folder / "adapter_config.json").is_file()
    scores = _read_scores(folder, model_id)
    data_file = settings.get("eval_file")
    results = _read(folder / "results.json") or []
    others = [_last_answers(Path(control)) for control in controls]
    verdict = (_read_measured(folder, "diagnosis").get("thoughts") or {}).get("verdict")
    licence: dict[str, Any] = {"license": license} if license else _base_license(base)
    data = ModelCardData(
        model_name=model_id.split("/")[-1],
        base_model=base if _is_hub_name(base) else None,
        datasets=list(filter(_is_hub_name, _train_files(settings))) or None,
        language=language,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys(["multicoco", "coconut", *tags])),
        eval_results=_eval_results(results, scores, data_file) or None,
        **licence,
    )
    parts = [
        f"# {model_id.split('/')[-1]}",
        _summary(config, base),
        "## The run",
        _table(("", ""), _facts(config, settings)),
        "## Scores",
        *_scores_text(results, scores, others, data_file),
        *_verdict_text(config, verdict, {row["mode"] for row in (*others, *scores)}),
        "## Use",
        _use(model_id, base, config, settings, is_adapter=is_adapter),
        "## Limits",
        _limits(config),
        "## Licence",
        _licence_text(data, base),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def write_card(folder: str | Path, **kwargs: Any) -> Path:
    """Writes [`make_card`] to README.md in `folder`, over what is there; returns its path."""
    path = Path(folder) / "README.md"
    make_card(folder, **kwargs).save(path)
    return path


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _read_measured(folder: Path, what: str) -> dict[str, Any]:
    """What a command has measured of the model in this folder; nothing, if the model was saved after that."""
    path = next((path for path in (folder / f"{what}.json", folder / what / f"{what}.json") if path.is_file()), None)
    if path is None:
        return {}
    saved = max((weights.stat().st_mtime_ns for form in FILES for weights in files_of(folder, form)), default=0)
    if path.stat().st_mtime_ns < saved:
        logger.warning(
            f"{path} is older than the weights in {folder}, so that it may speak of an earlier model: the card leaves "
            "it out. Measure again, or, if the files were only copied, `touch` it."
        )
        return {}
    return cast(dict[str, Any], _read(path))


def _read_config(folder: Path) -> MultiCoCoConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"`{folder}` has no config.json, expected the folder of a finished run of train.py.")
    return MultiCoCoConfig.from_pretrained(folder)


def _read_scores(folder: Path, model_id: str) -> list[dict[str, Any]]:
    """Rows of score.py that have an accuracy, each with `mine`: whether it is this model's."""
    report = _read_measured(folder, "scores")
    mine = {model_id, str(folder), str(folder.resolve())}
    rows = [row for row in report.get("scores", []) if "accuracy" in row]
    return [
        {**row, "mine": row["model"] in mine or str(Path(row["model"]).resolve()) in mine, "settings": report}
        for row in rows
    ]


def _last_answers(folder: Path) -> dict[str, Any]:
    rows = _read(folder / "results.json")
    if not rows:
        raise ValueError(f"`controls` names {folder}, which has no results.json with answers. Finish that run first.")
    return {"name": folder.name, "mode": _read_config(folder).mode, **rows[-1]}


def _is_hub_name(name: str | None) -> bool:
    if not name or Path(name).exists() or name.endswith((".json", ".jsonl", ".parquet")):
        return False
    return HUB_NAME.fullmatch(name) is not None


def _shown(name: str | None) -> str:
    """A name of the Hub as it is; of a path only the last part: the rest is nobody's business."""
    if not name:
        return "not recorded"
    return f"`{name}`" if _is_hub_name(name) else f"`{Path(name).name}` (local)"


def _train_files(settings: Mapping[str, Any]) -> list[str]:
    files = settings.get("train_file") or []
    return [files] if isinstance(files, str) else files  # one text before several sets could be given


def _shown_sets(settings: Mapping[str, Any]) -> str:
    """The sets that were trained on, each with its weight if weights were given."""
    names, weights = [_shown(name) for name in _train_files(settings)], settings.get("train_weights")
    if not weights:
        return ", ".join(names) or _shown(None)
    if len(weights) == len(names):
        return ", ".join(f"{name} x {weight:g}" for name, weight in zip(names, weights, strict=True))
    return f"{', '.join(names)}; weights {', '.join(f'{weight:g}' for weight in weights)}"  # a file of several sets


def _base_license(base: str | None) -> dict[str, Any]:
    """`license` of the base model's card, with its name and link if it has them."""
    path = base and optional_file(base, "README.md", needs_hub=False)
    found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path else {}
    licence = {name: found[name] for name in ("license", "license_name", "license_link") if found.get(name)}
    return licence if "license" in licence else {"license": "unknown"}


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _summary(config: MultiCoCoConfig, base: str | None) -> str:
    return (
        f"{_shown(base)}, trained by multicoco: Chain of Continuous Thought "
        "([Coconut](https://arxiv.org/abs/2412.06769)) for vision-language models. "
        f"Mode `{config.mode}`: {MODES[config.mode]}."
    )


def _thoughts(num_thoughts: int | None) -> str:
    return "no thought block" if num_thoughts is None else str(num_thoughts)


def _facts(config: MultiCoCoConfig, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows = [
        ("base model", _shown(settings.get("model_name_or_path"))),
        ("training data", _shown_sets(settings)),
        ("mode", f"`{config.mode}`"),
        ("stage reached", f"{config.stage} (of {config.max_latent_stage} that replace a step each)"),
        ("thoughts at inference", _thoughts(config.num_thoughts)),
        ("thoughts for each written step", config.c_thought),
        ("how a state becomes a thought", f"`{config.thought_feedback}`"),
    ]
    if config.thought_sweeps:
        rows.append(("sweeps in which thoughts are computed together", config.thought_sweeps))
    if config.step_loss_weight:
        rows.append(("weight of the step loss", config.step_loss_weight))
    shown = ("mix", "samples", "epochs", "optimizer_steps", "global_batch_size", "learning_rate", "bf16", "seed")
    rows += [(name.replace("_", " "), settings[name]) for name in (*shown, "lora_rank") if settings.get(name)]
    frozen = [name for name in ("freeze_backbone", "freeze_mlp", "freeze_llm") if settings.get(name)]
    return rows + ([("frozen", ", ".join(frozen))] if frozen else [])


def _interval(low: float, high: float) -> str:
    return f"{low:.1%} - {high:.1%}"


def _answered(row: Mapping[str, Any]) -> tuple[str, str, int]:
    """Of what a run answered at the end of a stage: accuracy, its interval, samples."""
    rate, count = row["eval/accuracy"], row["eval/samples"]
    return f"{rate:.1%}", _interval(*wilson_interval(rate, count)), count


def _stage(row: Mapping[str, Any]) -> str:
    step = row.get("eval/best_step")
    return f"{row['eval/stage']}" + ("" if step is None else f" (this model, of step {step})")


def _scores_text(
    results: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    data_file: str | None,
) -> list[str]:
    parts: list[str] = []
    rows: list[tuple[Any, ...]]
    if results:
        rows = [(_stage(row), row["eval/num_thoughts"], *_answered(row)) for row in results]
        parts.append(f"Exact match of greedy answers on {_shown(data_file)}, at the end of each stage:")
        parts.append(_table(("stage", "thoughts", "accuracy", "95 % interval (Wilson)", "samples"), rows))
    if scores:
        asked = scores[0]["settings"].get("settings", {})
        parts.append(
            f"By `score.py` on {_shown(asked.get('data'))}, metric `{Path(asked.get('metric', 'exact')).name}`:"
        )
        rows = [
            (
                "this model" if row["mine"] else f"`{Path(row['model']).name}`",
                f"`{row['mode']}`",
                _thoughts(row["num_thoughts"]),
                f"{row['accuracy']:.1%}",
                _interval(row["low"], row["high"]),
                f"{row['new_tokens']:.1f}",
                row.get("scored", row["samples"]),
            )
            for row in scores
        ]
        head = ("model", "mode", "thoughts", "accuracy", "95 % interval", "new tokens", "samples")
        parts.append(_table(head, rows))
        parts += [_readings(row) for row in scores if row.get("reads") is not None]
    if not parts:
        parts.append("None were measured.")
    if others:
        rows = [(f"`{row['name']}`", f"`{row['mode']}`", *_answered(row)) for row in others]
        parts.append("Other runs, at their last stage:")
        parts.append(_table(("run", "mode", "accuracy", "95 % interval (Wilson)", "samples"), rows))
    return parts


def _readings(row: Mapping[str, Any]) -> str:
    """How often thoughts that were trained to be readable read as what they stand for."""
    name = "this model" if row["mine"] else f"`{Path(row['model']).name}`"
    what = "thoughts" if row["mode"] == "coconut" else "states that thoughts would have been"
    return (
        f"Of {name}, with {_thoughts(row['num_thoughts'])} thoughts: {row['reads']:.1%} of the groups of {what} read "
        f"as their step, or behind the last step as the answer (95 % interval "
        f"{_interval(row['reads_low'], row['reads_high'])}, {row['reads_samples']} samples)."
    )


def _verdict_text(config: MultiCoCoConfig, verdict: str | None, modes: set[str]) -> list[str]:
    """Whether the thoughts are used: what diagnose.py found, or that nobody has looked."""
    if config.mode != "coconut":
        return []
    if verdict:
        return [f"By `diagnose.py`, which damages and swaps thoughts: they are **{verdict}**."]
    if modes & {*CONTROL_FEEDBACK, "no_thoughts"}:
        return []
    return [
        "No control (`pause`, `pause_loop`, `no_thoughts`) was measured beside it, so these figures do not show that "
        "the thoughts are used: constants in their place may score alike."
    ]


def _eval_results(
    results: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], data_file: str | None
) -> list[EvalResult]:
    """For the metadata: each row that score.py has of this model, else the last answers of the run."""

    def entry(data: str | None, rate: float, name: str) -> EvalResult:
        name_of_data = Path(data).name if data else "not recorded"
        return EvalResult(
            task_type=TASK,
            dataset_type=str(data) if _is_hub_name(data) else name_of_data,
            dataset_name=name_of_data,
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(rate, 6),
        )

    mine = [row for row in scores if row["mine"]]
    if mine:
        data = mine[0]["settings"].get("settings", {}).get("data")
        return [entry(data, row["accuracy"], _metric_name(row)) for row in mine]
    if results:
        last = results[-1]
        name = f"accuracy at stage {last['eval/stage']}, 95 % interval {_answered(last)[1]}"
        return [entry(data_file, last["eval/accuracy"], name)]
    return []


def _metric_name(row: Mapping[str, Any]) -> str:
    return f"accuracy, thoughts: {_thoughts(row['num_thoughts'])}, 95 % interval {_interval(row['low'], row['high'])}"


def _use(
    model_id: str, base: str | None, config: MultiCoCoConfig, settings: Mapping[str, Any], *, is_adapter: bool
) -> str:
    if not is_adapter:
        return USE.format(model_id=model_id)
    init_from = settings.get("init_latents_from")
    is_more = getattr(config, "quantization_config", None) is not None or config.thought_sweeps is not None
    return (USE_LOADED if is_more else USE_ADAPTERS).format(
        model_id=model_id,
        base=base if _is_hub_name(base) else "the base model",
        init_from=f", {init_from!r}" if init_from else "",
        num_thoughts=config.num_thoughts,
        thought_feedback=config.thought_feedback,
    )


def _limits(config: MultiCoCoConfig) -> str:
    lines = ["The scores speak of the data above; nothing else was measured."]
    if config.mode == "coconut":
        lines.append(
            "Thoughts were trained to be readable (`model.read_thoughts`). That a step can be read from one does not "
            "say that the answer follows from it."
            if config.step_loss_weight
            else "Thoughts are not words: what the model did with them cannot be read off."
        )
    if config.num_thoughts is not None:
        lines.append(f"Budgets of thoughts other than those trained (up to {config.num_thoughts}) are untested.")
        lines.append(
            "Servers that take only tokens (vLLM, SGLang) cannot feed hidden states back: use transformers, as above."
        )
    lines.append("`trust_remote_code=True` runs the Python files of this repository: read them, or pin a `revision`.")
    return "\n".join(f"- {line}" for line in lines)


def _licence_text(data: ModelCardData, base: str | None) -> str:
    if data.license == "unknown":
        return f"Weights: that of the base model, {_shown(base)}; it was not found, so look it up. Code: Apache-2.0."
    return f"Weights: `{getattr(data, 'license_name', None) or data.license}`. Code: Apache-2.0."
