"""Inputs on which raysubset once failed: scripts that print a line a check. Run by name, beside the default suite.

pytest tests/cases/all_cases.py            all of them; those that start Ray take most of the time
pytest tests/cases/all_cases.py -k 17      one; python tests/cases/case_17_frozen_batch_norm.py shows its lines

README.md has the table of what was tried and the public reports behind it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", sorted(path.stem for path in HERE.glob("case_*.py")))
def test_every_check_of_the_case_is_ok(case: str, tmp_path: Path):
    folders = os.pathsep.join(map(str, (HERE.parents[1], HERE)))
    environment = os.environ | {"PYTHONPATH": folders, "HOME": str(tmp_path)}
    command = [sys.executable, str(HERE / f"{case}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines
    assert [line for line in lines if not line.startswith("ok")] == []
