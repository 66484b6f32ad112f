"""Bringing the service up on one machine's Ray: what `s2ft serve` does. Glue.

Invariant: it listens on loopback alone, so that a service without keys is its own machine's.
"""

import http.client
import json
import logging
import time
import urllib.error
import urllib.request

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from s2ft_ray.errors import ConfigError, ServingError
from s2ft_ray.serving.app import APP_NAME, build_app
from s2ft_ray.serving.settings import ServingSettings

LOOPBACK = "127.0.0.1"
_START_TIMEOUT_S = 600.0
"""For the first look at the registry, once the bases are loaded."""
_STEP_S = 0.5


def gpu_share(num_bases: int) -> float:
    """Return how much of the cluster's GPUs each of `num_bases` replicas gets, at most one."""
    ray.init(log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
    return min(1.0, float(ray.cluster_resources().get("GPU", 0.0)) / num_bases)


def deploy(settings: ServingSettings, port: int) -> str:
    """Start or update the service on the Ray of ``$RAY_ADDRESS``; return its URL once it answers.

    Raises ConfigError where Serve listens on another port already, ServingError where the service
    doesn't come up.
    """
    ray.init(log_to_driver=False, configure_logging=False, ignore_reinit_error=True)
    _check_port(port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its steps are no news to an operator
    serve.start(
        http_options={"host": LOOPBACK, "port": port}, proxy_location=ProxyLocation.HeadOnly
    )
    try:
        serve.run(build_app(settings), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:  # Serve's own, with the replica's traceback in it
        status = serve.status().applications.get(APP_NAME)
        message = str(error) if status is None else status.message
        raise ServingError(f"the service can't start: {message.strip()}") from error
    url = f"http://{LOOPBACK}:{port}"
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not _answers(url):
        if time.monotonic() > deadline:
            raise ServingError(f"{url}: no answer in {_START_TIMEOUT_S:.0f} s")
        time.sleep(_STEP_S)
    return url


def _check_port(port: int) -> None:
    try:
        running = _get_global_client().http_config.port
    except RayServeException:
        return
    if running != port:
        raise ConfigError(
            f"--port {port}: Serve listens on {running} already, and can't move; take"
            f" --port {running}, or `s2ft down` and `s2ft up` first"
        )


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/healthz", timeout=5) as reply:
            return bool(json.loads(reply.read()).get("status") == "ok")
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False
