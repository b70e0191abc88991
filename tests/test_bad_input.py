"""What flags alone decide is answered in a line with a way out; chaos/bad_input.py has other bad inputs too."""

import contextlib
import io
import time
from pathlib import Path

import pytest
import ray

from raysubset.cli import call
from tests.chaos.bad_input import Case, cases_of_flags, judge


@pytest.mark.parametrize("case", [case for case in cases_of_flags() if case.rate], ids=lambda case: case.label)
def test_a_bad_input_is_answered_well(tmp_path: Path, case: Case) -> None:
    storage, errors, began = tmp_path / "storage", io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(errors):
        code = call([*case.arguments, *(("--storage-path", str(storage)) if case.storage else ())])
    seconds = time.monotonic() - began
    answer = judge(case, code, errors.getvalue(), seconds, ray_started=ray.is_initialized(), storage=storage)
    assert not answer.faults(case, most_s=60), answer.said
