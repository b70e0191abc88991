"""Every program of jobs/ says what it does when it is asked, and does nothing then."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = [path for path in sorted((ROOT / "jobs").rglob("*.py")) if "__main__" in path.read_text()]


def test_each_has_a_help_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    helps: dict[str, str] = {}
    for path in PROGRAMS:
        with monkeypatch.context() as within:
            within.syspath_prepend(str(path.parent))  # as Python does
            within.setattr(sys, "argv", [str(path), "--help"])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(path.relative_to(ROOT)), run_name="__main__")
            assert not ended.value.code, path
        helps[capsys.readouterr().out] = path.name
    assert len(helps) == len(PROGRAMS) > 20
    assert all("usage: " in text and len(text) > 150 for text in helps), helps
