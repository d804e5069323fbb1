"""Settings files of the commands: the names of their flags, in YAML or JSON."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser


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
            words[name] = [f"--{name}", *(json.dumps(one) if isinstance(one, dict) else str(one) for one in values)]
    return words


def parse_settings(kind: type, description: str, arguments: Sequence[str]):
    """A dataclass of this kind from a settings file, if the first argument is one, and from flags, which win."""
    parser = HfArgumentParser(kind, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        from_file = read_settings(arguments.pop(0))
        arguments = [word for words in from_file.values() for word in words] + arguments
    return parser.parse_args_into_dataclasses(args=arguments)[0]
