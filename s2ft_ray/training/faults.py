"""An error of one worker becomes the error of all, so that none waits for one that has gone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from s2ft_ray.errors import S2FTError


@contextmanager
def raised_everywhere() -> Iterator[None]:
    """Make an S2FTError of one worker the error of all. A collective: all enter and leave.

    Inside there may be no collective that a worker without an error would wait in.
    """
    mine: S2FTError | None = None
    try:
        yield
    except S2FTError as error:
        mine = error
    errors: list[S2FTError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, mine)
    for found in errors:
        if found is not None:
            raise found
