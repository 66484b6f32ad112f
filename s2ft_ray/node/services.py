"""What a node is made of: the commands of its services, their environment, and their health.

Invariant: everything binds to loopback, every port is explicit, and what a service is depends on
the home alone: addresses and tokens that the caller's shell holds for another node don't leak in.
"""

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from s2ft_ray.node.ports import LOOPBACK, Port
from s2ft_ray.node.processes import MARK
from s2ft_ray.serving.settings import SERVE_ENV

ServiceName = Literal["ray", "mlflow", "scheduler"]
SERVICES: tuple[ServiceName, ...] = ("ray", "mlflow", "scheduler")
PACKAGES: dict[ServiceName, str] = {"ray": "ray", "mlflow": "mlflow", "scheduler": "s2ft-ray"}
"""What is installed for each."""

_OBJECT_STORE_BYTES = 256 * 2**20
"""Nothing large goes through it: workers read their data and write checkpoints in the run folder.
Ray's own default is 30% of the machine's memory."""
_SCHEDULER_SILENT_S = 30.0
"""It is asked every 5 s."""
_OF_ANOTHER_NODE = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_REGISTRY_URI",
)


@dataclass(frozen=True)
class Site:
    """Where a node lives: its home and its port base."""

    home: Path
    port_base: int

    def address(self, port: Port) -> str:
        """Return host:port."""
        return f"{LOOPBACK}:{self.port_base + port}"

    def url(self, service: ServiceName) -> str:
        """Return what a browser opens: Ray's dashboard, MLflow's UI, the scheduler among actors."""
        if service == "mlflow":
            return f"http://{self.address(Port.MLFLOW)}"
        dashboard = f"http://{self.address(Port.DASHBOARD)}"
        return f"{dashboard}/#/actors" if service == "scheduler" else dashboard


def temp_dir(home: Path) -> Path:
    """Return the folder of Ray's sessions: /tmp/s2ft-<8 hex of the home's path>.

    Its unix sockets' paths may have 107 bytes, of which Ray's own part takes about 65.
    """
    digest = hashlib.sha256(str(home.resolve()).encode()).hexdigest()
    return Path("/tmp") / f"s2ft-{digest[:8]}"


def token_path(home: Path) -> Path:
    """Return the file of the token that Ray asks of every client of this node."""
    return home / "ray_token"


def log_path(home: Path, service: ServiceName) -> Path:
    """Return the file to which the service's own output goes."""
    return home / "logs" / f"{service}.log"


def alive_path(home: Path) -> Path:
    """Return the file that is written anew each time the scheduler has answered."""
    return home / "scheduler.alive"


def mark(home: Path, service: ServiceName) -> str:
    """Return the mark that the service's processes carry in their environment."""
    return f"{temp_dir(home)}/{service}"


def client_env(site: Site) -> dict[str, str]:
    """Return the variables that make a shell a client of the node."""
    return {
        "RAY_ADDRESS": site.address(Port.GCS),
        "RAY_API_SERVER_ADDRESS": site.url("ray"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(site.home)),
        # Ray turns a loopback address into the machine's own, on which nothing listens here,
        # unless it is told that there is no cluster beyond this machine
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "MLFLOW_TRACKING_URI": site.url("mlflow"),
        "S2FT_HOME": str(site.home),
    }


def service_env(site: Site, service: ServiceName, outer: Mapping[str, str]) -> dict[str, str]:
    """Return a service's environment, which Ray hands on to its jobs.

    The interpreter's own folder comes first on PATH: a job's `python` is else not found.
    """
    env = {key: value for key, value in outer.items() if key not in _OF_ANOTHER_NODE}
    bin_dir = os.path.dirname(sys.executable)
    env["PATH"] = os.pathsep.join(filter(None, [bin_dir, outer.get("PATH")]))
    env["S2FT_HOME"] = str(site.home)
    env[MARK] = mark(site.home, service)
    env["MLFLOW_DISABLE_TELEMETRY"] = "true"
    if service == "mlflow":
        # a second process of 200 MB that evaluates LLM traces, which nobody writes here
        env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        return env
    if service == "scheduler":
        return {**env, **client_env(site)}
    client = client_env(site)
    for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        env[key] = client[key]
    # Train's watcher of a run's placement group asks there whether the run still lives; by itself
    # it looks for a cluster on another address, and dies of it
    env["RAY_API_SERVER_ADDRESS"] = client["RAY_API_SERVER_ADDRESS"]
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    for key, value in SERVE_ENV.items():
        env.setdefault(key, value)
    # there is no other node that what runs could go to: Ray would wait the whole time for nothing
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    env["DASHBOARD_METRIC_PORT"] = str(site.port_base + Port.DASHBOARD_METRICS)
    env["AUTOSCALER_METRIC_PORT"] = str(site.port_base + Port.AUTOSCALER_METRICS)
    return env


def ray_command(site: Site, num_cpus: int | None) -> list[str]:
    """Return the command of the head node, which ends its children when it ends."""
    ports = {
        "port": Port.GCS,
        "dashboard-port": Port.DASHBOARD,
        "dashboard-agent-listen-port": Port.DASHBOARD_AGENT,
        "dashboard-agent-grpc-port": Port.DASHBOARD_AGENT_GRPC,
        "runtime-env-agent-port": Port.RUNTIME_ENV_AGENT,
        "node-manager-port": Port.NODE_MANAGER,
        "object-manager-port": Port.OBJECT_MANAGER,
        "ray-client-server-port": Port.RAY_CLIENT,
        "metrics-export-port": Port.METRICS,
        "min-worker-port": Port.FIRST_WORKER,
        "max-worker-port": Port.LAST_WORKER,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--{option}={site.port_base + port}" for option, port in ports.items()]
    command += [
        f"--node-ip-address={LOOPBACK}",
        f"--dashboard-host={LOOPBACK}",
        f"--temp-dir={temp_dir(site.home)}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        "--log-color=false",
    ]
    return command if num_cpus is None else [*command, f"--num-cpus={num_cpus}"]


def mlflow_command(site: Site) -> list[str]:
    """Return the command of the MLflow server, on the store that readers without it open too.

    Artifacts are never proxied: an experiment's location is a file:// URL, the same to everyone.
    """
    return [
        *(sys.executable, "-m", "mlflow", "server", "--workers=1"),
        f"--host={LOOPBACK}",
        f"--port={site.port_base + Port.MLFLOW}",
        f"--backend-store-uri=sqlite:///{site.home / 'mlflow.db'}",
        f"--default-artifact-root={(site.home / 'mlartifacts').as_uri()}",
        "--no-serve-artifacts",
        "--uvicorn-opts=--no-access-log",
    ]


def scheduler_command() -> list[str]:
    """Return the command that starts the scheduler's actor and looks after it."""
    return [sys.executable, "-m", "s2ft_ray.scheduler"]


def is_healthy(site: Site, service: ServiceName) -> bool:
    """Ask the service whether it can be used now."""
    if service == "mlflow":
        return _answers(f"{site.url('mlflow')}/health")
    if service == "scheduler":
        alive = alive_path(site.home)
        return alive.is_file() and time.time() - alive.stat().st_mtime < _SCHEDULER_SILENT_S
    # /api/version needs the token and comes from the Jobs API; the agent speaks for the raylet
    token = token_path(site.home)
    return (
        token.is_file()
        and _answers(f"{site.url('ray')}/api/version", bearer=token.read_text())
        and _answers(f"http://{site.address(Port.DASHBOARD_AGENT)}/api/local_raylet_healthz")
    )


def _answers(url: str, bearer: str | None = None) -> bool:
    headers = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(url, headers=headers), timeout=3) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False
