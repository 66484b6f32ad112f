"""The scheduler as a detached Ray actor on the head node, and the process that looks after it.

Invariant: one actor of this name in a cluster, and one holder of the database's lease. The actor
runs the installed package, started by a driver without a working_dir; Ray starts it again when
its process dies, and it goes on from the store.
"""

import logging
import os
import socket
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2ft_ray.errors import ConfigError, JobError

if TYPE_CHECKING:
    from s2ft_ray.scheduler.service import Scheduler

ACTOR_NAME, NAMESPACE = "s2ft-scheduler", "s2ft"
TICK_S = 1.0
_SWITCH_S = 0.001
# A scheduler that was killed leaves its lease behind for so long.
_LEASE_PATIENCE_S = 20.0
_LOOK_S = 5.0
logger = logging.getLogger(__name__)


class SchedulerActor:
    """Ticks in a thread; passes every question on to the ``Scheduler``."""

    def __init__(self, dashboard: str) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        from s2ft_ray.scheduler.lease import Lease

        self._scheduler, engine = _build_scheduler(dashboard)
        import ray

        holder = f"actor {ray.get_runtime_context().get_actor_id()} on {socket.gethostname()}"
        self._lease = Lease(engine, holder, _cluster_name())
        self._wait_for_lease()
        ticking = partial(keep_ticking, self._scheduler, threading.Event())
        for name, run in (("lease", self._keep_lease), ("tick", ticking)):
            threading.Thread(target=run, name=name, daemon=True).start()

    def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a public method of the scheduler."""
        if method.startswith("_"):
            raise ConfigError(f"{method}: no method of the scheduler")
        return getattr(self._scheduler, method)(*args, **kwargs)

    def ping(self) -> int:
        """Return the actor's process id."""
        return os.getpid()

    def _wait_for_lease(self) -> None:
        """Whoever has held it and doesn't renew it for so long is gone, whatever its clock says."""
        deadline, seen = time.monotonic() + _LEASE_PATIENCE_S, self._lease.expiry()
        while True:
            watched = time.monotonic() > deadline
            try:
                return self._lease.acquire(time.time(), watched_expiry=seen if watched else None)
            except JobError:
                if watched:
                    raise
                time.sleep(1.0)

    def _keep_lease(self) -> None:
        """Renew the lease in time, however long a tick takes; end this process where it is lost."""
        while True:
            time.sleep(self._lease.duration_s / 3)
            try:
                self._lease.renew(time.time())
            except JobError:
                logger.exception("this scheduler ends")
                os._exit(1)
            except Exception:  # the database is away; whoever took the lease meanwhile has it
                logger.exception("the lease can't be renewed now")


def keep_ticking(scheduler: "Scheduler", ended: threading.Event) -> None:
    """Tick every second, and when there is something to decide, until `ended` is set.

    What people and drivers ask is answered meanwhile: another process computes the policy, the rest
    of a tick takes turns with them, and after a tick they have as long as it took.
    """
    sys.setswitchinterval(_SWITCH_S)
    while not ended.is_set():
        began = time.monotonic()
        try:
            scheduler.tick()
        except Exception:  # the tick's edge: the next one goes on from the store
            logger.exception("a tick failed; the next one goes on from the database")
            scheduler.forget()
        time.sleep(time.monotonic() - began)
        scheduler.wake.wait(TICK_S)
        scheduler.wake.clear()


def _build_scheduler(dashboard: str) -> "tuple[Scheduler, Any]":
    from s2ft_ray.accounts import Accounts
    from s2ft_ray.scheduler.cluster import RayCluster
    from s2ft_ray.scheduler.launcher import RayJobs
    from s2ft_ray.scheduler.lease import last_cluster
    from s2ft_ray.scheduler.policy_process import PolicyProcess
    from s2ft_ray.scheduler.service import Scheduler
    from s2ft_ray.scheduler.settings import load_settings
    from s2ft_ray.scheduler.store import Store

    store = Store()
    before = last_cluster(store.engine)
    if store.engine.dialect.name == "sqlite" and before not in (None, _cluster_name()):
        raise ConfigError(
            f"{store.engine.url.database}: holds the jobs of {before}, this is"
            f" {_cluster_name()}; SQLite is for one machine, set S2FT_DATABASE_URL to a PostgreSQL"
            " URL where the head node can move"
        )
    jobs, settings = RayJobs(dashboard), load_settings()
    cluster, policy = RayCluster(settings.autoscaler), PolicyProcess()
    scheduler = Scheduler(store, Accounts(), cluster, jobs, settings=settings, policy=policy)
    return scheduler, store.engine


def _cluster_name() -> str:
    return f"the cluster headed by {socket.gethostname()}"


def start_scheduler(dashboard: str) -> Any:
    """Return the handle of this cluster's scheduler, which is started where there is none.

    `dashboard` is the URL that serves Ray's Jobs API. The process must be connected to Ray.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    (head,) = (
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and "node:__internal_head__" in node["Resources"]
    )
    environment = {key: value for key, value in os.environ.items() if key.startswith("S2FT_")}
    options: dict[str, Any] = {
        "name": ACTOR_NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_concurrency": 64,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(head, soft=False),
        "runtime_env": {"env_vars": environment},
    }
    return ray.remote(SchedulerActor).options(**options).remote(dashboard)


def look_after_scheduler() -> None:
    """Start the scheduler and, until this process is ended, start it again where it is gone.

    Writes S2FT_HOME/scheduler.alive each time that it has answered.
    """
    import ray
    from ray.exceptions import RayError

    from s2ft_ray.config import s2ft_home

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    alive = s2ft_home() / "scheduler.alive"
    dashboard, told = "", ""
    while True:
        try:
            if not ray.is_initialized():
                ray.init(namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
                dashboard = os.environ.get("RAY_API_SERVER_ADDRESS") or _dashboard_url()
            pid = ray.get(start_scheduler(dashboard).ping.remote(), timeout=60)
            _note(alive, pid)
            time.sleep(_LOOK_S)
        except (RayError, ConnectionError, ValueError, RuntimeError) as error:
            # Ray isn't up yet or was started again, or the scheduler refused: its log says why
            message = " ".join(str(error).split())[-400:]
            if message != told:
                logger.warning("no scheduler yet: %s", message)
            told = message
            ray.shutdown()
            time.sleep(1.0)


def _note(alive: Path, pid: int) -> None:
    try:
        alive.write_text(f"{pid}\n", encoding="utf-8")
    except OSError as error:  # a full disk is no reason to leave the scheduler alone
        logger.warning("%s: %s", alive, error.strerror)


def _dashboard_url() -> str:
    import ray
    from ray.dashboard.utils import get_address_for_submission_client

    return str(get_address_for_submission_client(ray.get_runtime_context().gcs_address))
