"""Settings of a command: dataclasses from flags and a file, and what their values stand for. Knows no model."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from transformers import HfArgumentParser

from ..compat import flags_of
from ..curriculum import setting
from ..processing_multicoco import MultiCoCoProcessor
from ..records import STEPS_FROM, Records, load_records


T = TypeVar("T")
SETTINGS_FILES = (".yaml", ".yml", ".json")
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def read_settings(path: str | Path) -> dict[str, list[str]]:
    """
    For each name in the file the words that one would type: `{"model": ["--model", "a", "b"]}`. A name whose value
    is `null` is as if it were not there.

    Raises:
        ValueError: the file does not exist, or holds something other than names and values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`{path}` does not exist, expected a file of settings. Check the path.")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"`{path}` holds a {type(settings).__name__}, expected names and values of flags.")
    words = {}
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        if value is not None:
            words[name] = [
                f"--{name}",
                *(json.dumps(_numbers(one)) if isinstance(one, dict) else str(one) for one in values),
            ]
    return words


def _numbers(value: Any) -> Any:
    """The same with numbers for texts as 1e-7, which YAML does not take for one: it has no point."""
    if isinstance(value, dict):
        return {name: _numbers(one) for name, one in value.items()}
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def make_parser(*kinds: Any, description: str | None) -> HfArgumentParser:
    """Flags of these dataclasses, and a description that is shown as it is written."""
    return HfArgumentParser(kinds, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def _is_one_more(flag: argparse.Action | None, word: str) -> bool:
    """Whether a word that ends like a settings file is one more value of this flag."""
    if flag is None or flag.nargs not in ("+", "*"):
        return False
    if flag.type in (int, float):
        return not Path(word).is_file()
    return word.endswith(".json") or Path(word).is_dir()  # a checkpoint is a folder, of any name


def find_settings(parser: HfArgumentParser, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """
    Puts what a settings file among the arguments says before them, so that flags win over it. The file may stand
    anywhere but behind a flag that takes a value. Behind one that takes several texts a `.json` is one more of them,
    as records are; behind one that takes several numbers it is the file.

    Returns:
        The words to parse, and for each setting that is given where it comes from: the file or `"command line"`.

    Raises:
        ValueError: more than one file, or see [`read_settings`].
    """
    flags = flags_of(parser)
    switches = {flag for flag, action in flags.items() if action.nargs in ("?", 0)}
    files, words, sources = [], [], {}
    flag = None  # the one before
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before.startswith("--"):
            flag = flags.get(before)  # none where `=` has given its only value
        is_value = before.startswith("--") and "=" not in before and before not in switches
        is_value |= _is_one_more(flag, argument)
        if argument.endswith(SETTINGS_FILES) and not argument.startswith("--") and not is_value:
            files.append(argument)
            continue
        words.append(argument)
        if argument.startswith("--"):
            action = flags.get(argument.split("=")[0])
            sources[action.dest if action else argument] = "command line"
    if len(files) > 1:
        raise ValueError(f"Give one settings file, got {files}.")
    from_file = read_settings(files[0]) if files else {}
    sources = dict.fromkeys(from_file, *files) | sources
    return [*(word for typed in from_file.values() for word in typed), *words], sources


def parse_settings(kind: type[T], description: str | None, arguments: Sequence[str]) -> T:
    """A dataclass of this kind from a settings file, if there is one, and from flags, which win."""
    parser = make_parser(kind, description=description)
    words, _ = find_settings(parser, arguments)
    return parser.parse_args_into_dataclasses(args=words)[0]


def _read_mapping(text: str) -> dict[str, str]:
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = None
    if not isinstance(mapping, dict) or not all(isinstance(column, str) for column in mapping.values()):
        raise ValueError(
            '`--column_mapping` must be a JSON object from field to column name, as \'{"steps": "rationale"}\', got '
            f"{text!r}."
        )
    return mapping


@dataclass(kw_only=True)
class RecordArguments:
    """How records are read, for every command that reads them."""

    column_mapping: str | None = setting(
        'JSON object from field to column name, as {"steps": "rationale"}.', default=None
    )
    allow_outside: bool = setting("Allow image paths outside the folder of the file.", default=False)
    image_folder: str | None = setting(
        "What image paths are relative to; the folder of the file if not given.", default=None
    )
    steps_from: str = setting(
        "What of an answer in InternVL's `conversations` are steps. "
        + " ".join(f"{name}: {what}." for name, what in STEPS_FROM.items()),
        default="none",
        choices=STEPS_FROM,
    )
    dataset_num_proc: int | None = setting(
        "Processes that check and tokenize records; one for every 5,000, at most one a core, if not given.",
        default=None,
    )
    overwrite_cache: bool = setting("Check and tokenize again what was so before.", default=False)
    max_patches: int | None = setting(
        "Tiles per image at most; the checkpoint's own value (12) if not given.", default=None
    )

    def read(self, source: str | Sequence[str], **kwargs: Any) -> Records:
        """
        [`load_records`] with these settings.

        Raises:
            ValueError: `column_mapping` is no JSON object of texts; see also [`load_records`].
        """
        columns = _read_mapping(self.column_mapping) if self.column_mapping else None
        return load_records(
            source,
            columns=columns,
            allow_outside=self.allow_outside,
            image_folder=self.image_folder,
            steps_from=self.steps_from,
            num_proc=self.dataset_num_proc,
            overwrite_cache=self.overwrite_cache,
            **kwargs,
        )

    def load_processor(self, name: str) -> MultiCoCoProcessor:
        """The processor of a checkpoint, which cuts images as these settings say."""
        processor = MultiCoCoProcessor.from_pretrained(name)
        if self.max_patches is not None:
            processor.image_processor.max_patches = self.max_patches
        return processor


def folder_for(what: str, model: str) -> str:
    """Where results about a checkpoint go: into its own folder, if it is one, where its model card looks."""
    return str(Path(model) / what) if Path(model).is_dir() else f"out/{what}"


def choose_device(*, use_cpu: bool) -> torch.device:
    """The accelerator, if there is one and it is wanted."""
    found = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")
