"""An evaluation's scores as an MLflow run of their own, beside the tenant's training runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from s2ft_ray.registry.connection import connect, default_tracking_uri, ensure_experiment, reaching


def log_evaluation(
    name: str,
    metrics: Mapping[str, float],
    *,
    experiment: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
    files: Sequence[Path] = (),
    tracking_uri: str | None = None,
) -> str:
    """Write one finished run called `name` and return its id.

    Raises JobError where MLflow can't be used; a run that was begun is then marked as failed
    where that is possible.
    """
    uri = tracking_uri or default_tracking_uri()
    with reaching(uri, f"{name}: the scores can't be logged"):
        client = connect(uri)
        run = client.create_run(
            ensure_experiment(client, experiment),
            run_name=name,
            tags={**tags, "kind": "evaluation"},
        )
        run_id: str = run.info.run_id
        status = "FAILED"
        try:
            for key, value in params.items():
                client.log_param(run_id, key, value)
            for key, score in metrics.items():
                client.log_metric(run_id, key, score)
            for file in files:
                client.log_artifact(run_id, str(file))
            status = "FINISHED"
        finally:
            client.set_terminated(run_id, status)
    return run_id
