"""What the commands share: settings files in YAML or JSON with the names of their flags, and how ranks leave."""

import argparse
import atexit
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
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


def leave():
    """
    Ends a rank whose work is done; nothing in a run of one process.

    No rank leaves while another still writes. On gloo the process then ends without destructors: now and then one of
    a thread of torch aborts ("terminate called without an active exception"), and a run that was saved whole would
    be told to have failed.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    if dist.get_backend() != "gloo":
        dist.destroy_process_group()
        return
    atexit._run_exitfuncs()  # of loggers, as at any other end
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
