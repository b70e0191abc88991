"""What flags or tables decide is answered in a line with a way out; chaos/bad_input.py has other bad inputs too."""

import contextlib
import importlib
import io
import sys
import time
from pathlib import Path

import pytest
import ray

from raysubset.cli import call
from raysubset.config import Config
from raysubset.data import load_full_set
from tests.chaos.bad_input import MISTAKES_IN_TABLES, WAY_OUT, Case, cases_of_flags, judge, make_tables


@pytest.mark.parametrize("case", [case for case in cases_of_flags() if case.rate], ids=lambda case: case.label)
def test_a_bad_input_is_answered_well(tmp_path: Path, case: Case) -> None:
    storage, errors, began = tmp_path / "storage", io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(errors):
        code = call([*case.arguments, *(("--storage-path", str(storage)) if case.storage else ())])
    seconds = time.monotonic() - began
    answer = judge(case, code, errors.getvalue(), seconds, ray_started=ray.is_initialized(), storage=storage)
    assert not answer.faults(case, most_s=60), answer.said


@pytest.mark.parametrize("label", MISTAKES_IN_TABLES)
def test_a_mistake_in_a_table_or_text_is_refused_in_a_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    name, flags, named = MISTAKES_IN_TABLES[label]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "bad_functions", raising=False)
    make_tables(tmp_path)
    importlib.invalidate_caches()
    fields = {"data.name": name, **dict(zip(flags[::2], flags[1::2], strict=True))}
    config = Config().with_overrides({field.removeprefix("--"): value for field, value in fields.items()})
    with pytest.raises(ValueError, match=named) as caught:
        load_full_set(config.data, config.task)
    assert WAY_OUT.search(str(caught.value))
    assert "\n" not in str(caught.value)
