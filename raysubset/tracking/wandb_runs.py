"""Track a run in Weights & Biases; offline, in the run directory, if there is no API key."""

import logging
import netrc
import os
import shutil
import urllib.parse
from collections.abc import Sequence
from typing import Any

from raysubset.errors import one_line
from raysubset.tracking.records import Header, Point, Result

logger = logging.getLogger(__name__)

HOST = "https://api.wandb.ai"
INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 30.0, 50.0
EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 255}


class WandbRun:
    """One run of a project. What was logged before a process died is in its folder: `wandb sync` sends it.

    The process's console, code, commit, arguments, packages and machine are not sent: a command line may hold keys.
    """

    def __init__(self) -> None:
        self._run: Any = None
        self._series: set[str] = set()

    def begin(self, header: Header, run_id: str | None) -> str:
        """Continue the run of that id, or create one; return its id. Offline, a resumed run adds another folder."""
        from wandb.errors import CommError

        mode = os.environ.get("WANDB_MODE")
        try:
            self._run = _init(header, run_id, mode or ("online" if has_key() else "offline"))
        except CommError as error:
            if mode:
                raise
            logger.warning("%s: tracking offline, `wandb sync` sends it later", one_line(error))
            self._run = _init(header, run_id, "offline")
        return self._run.id

    def log(self, points: Sequence[Point]) -> None:
        """Log metrics series/key over series/step: each series has its own steps, while wandb has one count."""
        for point in points:
            name = point.series
            if name not in self._series:
                self._series.add(name)
                self._run.define_metric(f"{name}/step", hidden=True)
                self._run.define_metric(f"{name}/*", step_metric=f"{name}/step")
            self._run.log({f"{name}/step": point.step, **{f"{name}/{key}": v for key, v in point.values.items()}})

    def end(self, result: Result) -> None:
        """Send the summary, the run's files and the outcome."""
        self._run.summary.update({**result.summary, **result.tags})
        for path in () if self._run.disabled else result.files:  # WANDB_MODE=disabled: there is no folder
            copy = shutil.copy(path, self._run.dir)  # wandb would link to the file, which may be a temporary one
            self._run.save(copy, base_path=self._run.dir, policy="now")
        self._run.finish(exit_code=EXIT_CODES[result.outcome])


def _init(header: Header, run_id: str | None, mode: Any) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        disable_git=True,
        save_code=False,
        disable_code=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
    )
    return wandb.init(
        project=header.project,
        name=header.name,
        group=header.group,
        id=run_id,
        resume="allow" if run_id and mode == "online" else None,
        dir=None if "WANDB_DIR" in os.environ else header.folder,
        config={"parameters": dict(header.parameters), **header.tags},
        mode=mode,
        reinit="create_new",
        settings=settings,
    )


def has_key() -> bool:
    """Return True if wandb will find an API key: in the environment, or where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", HOST)).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False
