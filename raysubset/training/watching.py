"""ValidationWatch: validation along the way, the weights where it was best, and when to stop."""

from collections.abc import Callable
from typing import Any

from torch import nn

from raysubset.training.records import Metrics, Progress


class ValidationWatch:
    """Looks at validation data at epochs' ends, of what on_step() of minimize() sees.

    Its state goes into checkpoints, so that a minimization resumed elsewhere stops where it would have stopped.
    """

    def __init__(
        self,
        model: nn.Module,
        validate: Callable[[], Metrics],
        *,
        every: int = 1,
        patience: int = 0,
        keeps_best: bool = False,
    ) -> None:
        """Begin to watch a model.

        Args:
            validate: measures the model as it is; what that costs is counted there.
            every: epochs (turns of epoch_fraction) between two looks; the last one is looked at always.
            patience: looks without a lower loss after which it stops; 0: never.
            keeps_best: whether the weights of the least loss are the result; with patience they are.
        """
        self._model, self._validate, self._every, self._patience = model, validate, every, patience
        self._keeps_best = keeps_best or patience > 0
        self.looks: list[dict[str, Any]] = []  # epoch records with "validation"
        self._best: dict[str, Any] = {}

    def look(self, progress: Progress) -> str | None:
        """Look if it is time; the outcome "validation" where patience has run out."""
        number = len(progress.history)
        if not progress.epoch_ended or (number % self._every and progress.step < progress.num_steps):
            return None
        metrics = self._validate()
        self.looks.append({**progress.history[-1].to_dict(), "validation": metrics.to_dict()})
        if not self._best or metrics.loss < self._best["loss"]:
            self._best = {"loss": metrics.loss}
            if self._patience:
                self._best["at"] = len(self.looks)
            if self._keeps_best:
                self._best["model"] = {key: v.detach().clone() for key, v in self._model.state_dict().items()}
        return self._outcome()

    def _outcome(self) -> str | None:
        is_over = self._patience and len(self.looks) - self._best.get("at", len(self.looks)) >= self._patience
        return "validation" if is_over else None

    def settle(self) -> None:
        """Give the model the weights that are the result."""
        if self._keeps_best and self._best:
            self._model.load_state_dict(self._best["model"])

    def history(self, progress: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A training curve's records, with what was seen at the epochs that were looked at."""
        seen = {look["num_steps"]: look for look in self.looks}
        return [seen.get(record["num_steps"], record) for record in progress]

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints, beside what minimize() captures, which "asked" ends at once; nothing is copied."""
        return {"validated": self.looks, "best_validated": self._best, "asked": self._outcome()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint; one of a minimization that was not watched has nothing to resume."""
        self.looks, self._best = list(state.get("validated", ())), state.get("best_validated", {})
