"""ValidationWatch: measures validation data during training, keeps the best weights, and says when to stop."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from raysubset.training.records import EpochRecord, Metrics, Progress


class ValidationWatch:
    """Measures validation data at epochs' ends, from the Progress that minimize() gives to on_step().

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
            validate: measures the model as it is, and counts the cost of doing so.
            every: epochs (shortened ones under epoch_fraction) between two measurements; the last is always measured.
            patience: end the minimization after this many measurements without a lower loss; 0: never.
            keeps_best: True if the weights of the least loss are the result; with patience they always are.
        """
        self._model, self._validate, self._every, self._patience = model, validate, every, patience
        self._keeps_best = keeps_best or patience > 0
        self.looks: list[dict[str, Any]] = []  # epoch records with "validation"
        self._best: dict[str, Any] = {}

    def look(self, progress: Progress) -> str | None:
        """Measure if it is due. Return the outcome "validation" if patience has run out, else None."""
        num_epochs = len(progress.history)
        if not progress.epoch_ended or (num_epochs % self._every and progress.step < progress.num_steps):
            return None
        self._measure(progress.history[-1], progress.validation)
        return self._outcome()

    def _measure(self, record: EpochRecord, known: Metrics | None) -> None:
        metrics = self._validate() if known is None else known
        self.looks.append({**record.to_dict(), "validation": metrics.to_dict()})
        if not self._best or metrics.compared_loss < self._best["loss"]:
            self._best = {"loss": metrics.compared_loss}
            if self._patience:
                self._best["at"] = len(self.looks)
            if self._keeps_best:
                self._best["model"] = {key: v.detach().clone() for key, v in self._model.state_dict().items()}

    def _outcome(self) -> str | None:
        is_over = self._patience and len(self.looks) - self._best.get("at", len(self.looks)) >= self._patience
        return "validation" if is_over else None

    def settle(self, history: Sequence[EpochRecord]) -> None:
        """Load the weights that are the result into the model of a finished minimization.

        Its last epoch is measured first if it was not: nobody knew in look() that a tolerance had ended it.
        """
        if history and (not self.looks or self.looks[-1]["num_steps"] != history[-1].num_steps):
            self._measure(history[-1], None)
        if self._keeps_best and self._best:
            self._model.load_state_dict(self._best["model"])

    def history(self, progress: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return a training curve's records, with the validation metrics of the epochs that were measured."""
        measured = {look["num_steps"]: look for look in self.looks}
        return [measured.get(record["num_steps"], record) for record in progress]

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints hold beside minimize()'s state, not copied. "asked" ends minimize() at once."""
        return {"validated": self.looks, "best_validated": self._best, "asked": self._outcome()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a checkpoint. One of a minimization without a watch has nothing to resume."""
        self.looks, self._best = list(state.get("validated", ())), state.get("best_validated", {})
