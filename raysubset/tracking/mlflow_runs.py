"""Track a run in MLflow as a run of an experiment, by MLflow's client and without its global state."""

import time
from collections.abc import Sequence

from raysubset.tracking.records import Header, Point, Result

LONGEST_PARAMETER = 6000  # characters, MLflow's limit
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MLflowRun:
    """One run in a store or on a server. A process that dies leaves it RUNNING, and the next process continues it."""

    def __init__(self, uri: str | None) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        self._id = ""

    def begin(self, header: Header, run_id: str | None) -> str:
        """Continue the run of that id if the store still has it, else create one; return its id."""
        from mlflow.entities import Param

        if run_id is not None and self._reopened(run_id):
            self._id = run_id
            return run_id
        tags = {"mlflow.runName": header.name, **header.tags}
        if header.group is not None:
            tags["raysubset.group"] = header.group
        run = self._client.create_run(self._experiment(header.project), tags=tags)
        self._id = run.info.run_id
        parameters = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in header.parameters.items()]
        self._client.log_batch(self._id, params=parameters)
        return self._id

    def _reopened(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # the store is not the one of the earlier session
                raise
            return False
        if run.info.lifecycle_stage == "deleted":
            return False
        self._client.update_run(run_id, status="RUNNING")
        return True

    def _experiment(self, name: str) -> str:
        """Return the experiment's id; create it if it does not exist, maybe while other trials do the same."""
        from mlflow.exceptions import MlflowException

        if (experiment := self._client.get_experiment_by_name(name)) is not None:
            return experiment.experiment_id
        try:
            return self._client.create_experiment(name)
        except MlflowException as error:
            experiment = self._client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                raise
            return experiment.experiment_id

    def log(self, points: Sequence[Point]) -> None:
        """Send the points as metrics named series/key."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(f"{p.series}/{key}", value, now, p.step) for p in points for key, value in p.values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, result: Result) -> None:
        """Send the summary as metrics at step 0, tags, files as artefacts, and the outcome."""
        from mlflow.entities import Metric, RunTag

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, 0) for key, value in result.summary.items()]
        self._client.log_batch(self._id, metrics=metrics, tags=[RunTag(k, v) for k, v in result.tags.items()])
        for path in result.files:
            self._client.log_artifact(self._id, path)
        self._client.set_terminated(self._id, STATUS[result.outcome])
