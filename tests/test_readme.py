"""The code in README and docs runs, on the golden checkpoint in the place of the Hub's; their commands are right."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import CHECKPOINT, GOLDEN, TRAILS

from multicoco.diagnose import DiagnoseArguments
from multicoco.score import ScoreArguments
from multicoco.training import arguments
from multicoco.training.arguments import parse


ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*/README.md"), *ROOT.glob("benchmarks/*.md")]
)
PICTURE = GOLDEN / "internvl" / "images" / "square.png"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield pytest.param(line, id=f"{page.relative_to(ROOT)}: {line.split('#')[0].strip()}")


def pages_with_python():
    return [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def replaced(tmp_path):
    """What stands in the pages in the place of a user's own files and of the Hub's, and what we put there."""
    record = {"id": "7", "images": ["street.png"], "question": "How many?", "steps": ["Two left.", "One right."]}
    lines = [json.dumps({**record, "id": name, "answer": "3"}) for name in "78"]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    (tmp_path / "street.png").write_bytes(PICTURE.read_bytes())
    return {
        '"OpenGVLab/InternVL3-1B"': f'"{CHECKPOINT}"',
        '"tests/golden/trails"': f'"{TRAILS}"',
        '"assets/trail.png"': f'"{ROOT / "assets" / "trail.png"}"',
        '"street.jpg"': f'"{PICTURE}"',
        '"me/multicoco-1b"': f'"{tmp_path / "own"}"',
        '"mine.jsonl"': f'"{tmp_path / "mine.jsonl"}"',
    }


@pytest.mark.parametrize("page", pages_with_python(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_one_after_the_other(page, replaced, tmp_path):
    scope = {}
    for number, block in enumerate(blocks(page, "python")):
        for name, value in replaced.items():
            block = block.replace(name, value)
        exec(compile(block, f"{page.name}, python block {number + 1}", "exec"), scope)
        if "model" in scope and not (tmp_path / "own").exists():
            scope["model"].save_pretrained(tmp_path / "own")
            scope["processor"].save_pretrained(tmp_path / "own")
    if page.name == "README.md":
        assert type(scope["model"]).__name__ == "MultiCoCoForConditionalGeneration"
        assert isinstance(scope["answer"], str)
        assert scope["colour"] == "### cyan"


@pytest.mark.parametrize("line", commands())
def test_commands_are_right(line, monkeypatch):
    """
    The target or file exists and its flags are known, those of train.py to its own parser. What commands do is
    proved elsewhere: `make test` is this run, training in `test_train.py`, launchers in `test_launchers.py`.
    """
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        return
    assert words[0] in ("python", "torchrun", "deepspeed", "pip", "pytest", "git", "cat"), line
    scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        assert words[0] in ("pip", "pytest", "git", "cat"), line
        return
    script, flags = words[scripts[0]], words[scripts[0] + 1 :]
    assert (ROOT / script).is_file()
    for word in flags:
        if word.startswith(("recipes/", "ds_configs/")):
            path, _, function = word.partition(":")  # a flag FILE:FUNCTION
            assert (ROOT / path).is_file(), word
            assert not function or f"def {function}" in (ROOT / path).read_text(encoding="utf-8"), word
    if script == "train.py":
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(arguments, "_prepare_deepspeed_on_cpu", list)  # would start a process group
        flags = [word for place, word in enumerate(flags) if "--deepspeed" not in flags[max(0, place - 1) : place + 1]]
        if "--load_in_4bit" in flags:
            pytest.importorskip("bitsandbytes", reason="--load_in_4bit needs the package bitsandbytes")
        _, _, curriculum, args, _ = parse(None, flags)
        assert args.num_train_epochs >= 1
        assert curriculum.num_epochs >= 1
    elif script in ("score.py", "diagnose.py"):
        kind = ScoreArguments if script == "score.py" else DiagnoseArguments
        assert {flag.split("=")[0][2:] for flag in flags if flag.startswith("--")} <= set(kind.__dataclass_fields__)
    else:
        source = (ROOT / script).read_text(encoding="utf-8")
        names = [word.split("=")[0].removeprefix("--") for word in flags if word.startswith("--")]
        assert [name for name in names if not re.search(rf"\b{name}\b", source)] == []
