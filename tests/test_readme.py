"""The README's code runs, on the golden checkpoint in the place of the Hub's; its commands exist."""

import re
from pathlib import Path

import pytest
from conftest import CHECKPOINT, GOLDEN


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_one_after_the_other(tmp_path):
    scope = {}
    replaced = {
        '"OpenGVLab/InternVL3-1B"': f'"{CHECKPOINT}"',
        '"street.jpg"': f'"{GOLDEN / "internvl" / "images" / "square.png"}"',
        '"me/multicoco-1b"': f'"{tmp_path / "own"}"',
    }
    for number, block in enumerate(blocks("python")):
        for name, value in replaced.items():
            block = block.replace(name, value)
        exec(compile(block, f"README.md, python block {number + 1}", "exec"), scope)
        if number == 0:
            scope["model"].save_pretrained(tmp_path / "own")
            scope["processor"].save_pretrained(tmp_path / "own")
    assert type(scope["model"]).__name__ == "MultiCoCoForConditionalGeneration"
    assert isinstance(scope["answer"], str)


@pytest.mark.parametrize("command", [line for block in blocks("bash") for line in block.splitlines() if line.strip()])
def test_commands_exist(command):
    """What they do is proved elsewhere: `make test` is this run, the benchmarks run in `test_benchmarks.py`."""
    words = command.split("#")[0].split()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    else:
        assert words[0] == "python"
        assert (ROOT / words[1]).is_file()
