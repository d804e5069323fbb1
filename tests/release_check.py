"""What a release must pass beside the gate: what takes longer, or needs environments of its own.

    make release-check          # prints one table, and keeps it in docs/release_check.md

Each step is a target of the Makefile that makes its own environment. A step that fails does not stop the others.
"""

import datetime
import platform
import re
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
STEPS = {  # target of the Makefile -> environment whose versions count
    "test-clients": ".venv-clients",
    "test-extras": ".venv-extras",
    "check-records": ".venv",
}
PACKAGES = re.compile(
    r"^(accelerate|apollo-torch|bitsandbytes|captum|fastapi|galore-torch|gradio|grokadamw|lighteval|lm_eval|lomo-optim|nnsight|openai|"
    r"peft|pillow|schedulefree|tensorboard|torch|torch-optimi|torchao|trackio|transformers|trl|wandb)==",
    re.I,
)


def run(target: str) -> tuple[bool, str, float]:
    """Whether it passed, its last line that counts tests, and its minutes; the output goes on to the terminal."""
    start, counts = time.monotonic(), ""
    with subprocess.Popen(
        ["make", target], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        for line in job.stdout:
            sys.stdout.write(line)
            if found := re.search(r"(\d+ (?:passed|failed)[^=]*?) in ", line):
                counts = found[1]
    return job.returncode == 0, counts, (time.monotonic() - start) / 60


def versions(environment: str) -> str:
    frozen = subprocess.run(
        [ROOT / environment / "bin" / "pip", "freeze"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return ", ".join(line.replace("==", " ") for line in frozen if PACKAGES.match(line))


def main() -> int:
    rows = []
    for target, environment in STEPS.items():
        passed, counts, minutes = run(target)
        rows.append((f"`make {target}`", "passed" if passed else "**failed**", counts, f"{minutes:.1f}"))
        rows.append((f"versions in `{environment}`", "", versions(environment), ""))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    table = "\n".join(
        [
            "| step | result | counts | minutes |",
            "| --- | --- | --- | --: |",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )
    page = (
        "# Release check\n\nThe last run of `make release-check`: what a release must pass beside the gate.\n\n"
        f"{datetime.date.today()}, commit {commit}, Python {platform.python_version()}, {platform.machine()}.\n\n"
        f"{table}\n"
    )
    (ROOT / "docs" / "release_check.md").write_text(page, encoding="utf-8")
    sys.stdout.write(f"\n{table}\n")
    return int(any("failed" in row[1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
