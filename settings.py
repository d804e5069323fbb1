"""Settings files of the commands: the names of their flags, in YAML or JSON."""

import json
from pathlib import Path

import yaml


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
