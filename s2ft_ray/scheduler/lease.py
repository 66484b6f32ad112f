"""One scheduler at a time: a row that its holder renews, and the cluster that the store is of."""

from dataclasses import dataclass

from sqlalchemy import Connection, Engine, Row, insert, select, update

from s2ft_ray.database import reading, writing
from s2ft_ray.errors import JobError
from s2ft_ray.scheduler.tables import LEASE

_THE_ROW = 1


@dataclass(frozen=True)
class Lease:
    """The scheduler's right to write, as `holder`, for the jobs of one Ray cluster."""

    engine: Engine
    holder: str
    cluster: str
    duration_s: float = 15.0

    def expiry(self) -> float:
        """Return when the lease ends that somebody holds, by that scheduler's clock."""
        row = _row(self.engine)
        return 0.0 if row is None else row.expires_at

    def acquire(self, now: float, watched_expiry: float | None = None) -> None:
        """Take the lease. Raises JobError where another scheduler holds it, saying who.

        One that still ends at `watched_expiry` is taken although it hasn't ended: its holder was
        watched and didn't renew it (the clock went backwards, or theirs is ahead). Another
        cluster's is taken so alone: its end was written by another machine's clock.
        """
        with writing(self.engine) as connection:
            row = connection.execute(select(LEASE).where(LEASE.c.id == _THE_ROW)).first()
            if row is None:
                _make_row(connection)
            elif row.holder not in (None, self.holder) and row.expires_at != watched_expiry:
                left_s = row.expires_at - now
                if row.cluster != self.cluster:
                    left_s = max(left_s, self.duration_s)
                if left_s > 0:
                    raise JobError(
                        f"a scheduler writes to this database already: {row.holder}, of cluster"
                        f" {row.cluster}; end it, or wait {left_s:.0f} s"
                    )
            connection.execute(
                update(LEASE)
                .where(LEASE.c.id == _THE_ROW)
                .values(
                    holder=self.holder,
                    cluster=self.cluster,
                    expires_at=now + self.duration_s,
                )
            )

    def renew(self, now: float) -> None:
        """Hold it for longer. Raises JobError where somebody else has taken it."""
        mine = (LEASE.c.id == _THE_ROW) & (LEASE.c.holder == self.holder)
        with writing(self.engine) as connection:
            done = connection.execute(
                update(LEASE).where(mine).values(expires_at=now + self.duration_s)
            )
            if done.rowcount != 1:
                raise JobError("another scheduler took over this database; this one stops")

    def release(self) -> None:
        """Let the next scheduler in at once."""
        mine = (LEASE.c.id == _THE_ROW) & (LEASE.c.holder == self.holder)
        with writing(self.engine) as connection:
            connection.execute(update(LEASE).where(mine).values(holder=None, expires_at=0.0))


def last_cluster(engine: Engine) -> str | None:
    """Return the Ray cluster whose scheduler wrote last, None where none ever did."""
    row = _row(engine)
    return None if row is None else row.cluster


def is_draining(engine: Engine) -> bool:
    """Return whether nothing is to be admitted."""
    row = _row(engine)
    return row is not None and bool(row.draining)


def set_draining(engine: Engine, draining: bool) -> None:
    """Stop admitting, or admit again."""
    with writing(engine) as connection:
        this = LEASE.c.id == _THE_ROW
        if connection.execute(update(LEASE).where(this).values(draining=draining)).rowcount == 0:
            _make_row(connection, draining)


def _make_row(connection: Connection, draining: bool = False) -> None:
    values = {"id": _THE_ROW, "expires_at": 0.0, "draining": draining}
    connection.execute(insert(LEASE).values(**values))


def _row(engine: Engine) -> Row[tuple[object, ...]] | None:
    with reading(engine) as connection:
        return connection.execute(select(LEASE).where(LEASE.c.id == _THE_ROW)).first()
