"""A run at an MLflow server, by MLflow's own client."""

import os
from typing import Any, Final

_TAG: Final = "tunewright.uid"
_MOST_METRICS: Final = 1000  # that the server takes at once
_MOST_PARAMETERS: Final = 100
_LONGEST: Final = 500  # characters of a parameter, for servers of before 2.8 too
_PATIENCE: Final = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # we try again ourselves


class MlflowRun:
    """See `tunewright_trainer.tracking.__main__.Run`. An MLflow run has an id of the server's; the job's is the one with its uid as a tag."""

    def begin(self, about: dict[str, Any]) -> None:
        os.environ.update(_PATIENCE)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=about["uri"])
        experiment = self._client.get_experiment_by_name(about["experiment"])
        within = experiment.experiment_id if experiment else self._client.create_experiment(about["experiment"])
        found = self._client.search_runs([within], filter_string=f"tags.`{_TAG}` = '{about['uid']}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {_TAG: about["uid"], "tunewright.job": f"{about['namespace']}/{about['name']}"}
            self._id = self._client.create_run(within, tags=tags, run_name=about["name"]).info.run_id
        parameters = [Param(name, value[:_LONGEST]) for name, value in about["spec"].items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[start : start + _MOST_PARAMETERS])
        self._client.set_tag(self._id, "tunewright.attempt", str(about["attempt"]))

    def add(self, points: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, one["at"], one["step"]) for one in points for name, value in one["metrics"].items()]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MOST_METRICS])

    def end(self, *, done: bool) -> None:
        """An attempt that ends before the job does may be followed by another: its run goes on."""
        if done:
            self._client.set_terminated(self._id, "FINISHED")
