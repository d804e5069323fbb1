"""The benchmark scripts run from any folder and print their tables. Their figures are never tested."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize(
    ("script", "rows", "num_verdicts"),
    [
        (
            "passes.py",
            ["native", "multicoco", "native, checkpointing", "multicoco, checkpointing", "6 groups of 10 tokens"],
            6,
        ),
        ("generation.py", ["native", "multicoco", "Coconut's way"], 2),
    ],
    ids=["passes", "generation"],
)
def test_quick_benchmark_prints_every_row_and_verdict(script, rows, num_verdicts, tmp_path):
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--quick"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    for row in rows:
        assert any(line.startswith(row + " ") or line.startswith(row + ",") for line in lines), result.stdout
    assert result.stdout.count(" met") + result.stdout.count(" missed") == num_verdicts
