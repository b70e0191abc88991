"""A listener with which a test slows work down where it wants to meet it, however fast or slow the machine is.

slow_down(folder, "subsets", from_step=23)     # before, or as it goes on
config | {"actors.on_step": "tests.slow_steps:listen"}
speed_up(folder, "subsets")                    # at once
"""

import os
import time
from contextlib import suppress
from pathlib import Path

from raysubset.training import Step

FOLDER = "RAYSUBSET_TESTS_SLOW_STEPS"  # environment variable; where it is not set, the folder that the driver works in
STEP_S = 1.0


def slow_down(folder: str | Path, stage: str, *, from_step: int) -> None:
    """Have each step of the stage take a second from that one on."""
    written = Path(folder, f"{stage}-{os.getpid()}")
    written.write_text(str(from_step))
    written.rename(_path(folder, stage))  # at once, for who reads


def speed_up(folder: str | Path, stage: str) -> None:
    """Have the stage's steps take what they take."""
    _path(folder, stage).unlink(missing_ok=True)


def listen(step: Step) -> None:
    """Wait, as long as the stage is slow."""
    path, until = _path(os.environ.get(FOLDER, ""), step.stage), time.monotonic() + STEP_S
    with suppress(FileNotFoundError):  # which may come between any two looks
        while time.monotonic() < until and step.step >= int(path.read_text()):
            time.sleep(0.01)


def _path(folder: str | Path, stage: str) -> Path:
    return Path(folder, f"slow-{stage}")
