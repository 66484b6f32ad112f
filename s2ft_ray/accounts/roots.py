"""Where a tenant's data may lie: inside the folders and URLs that an operator set as its roots.

Invariant: a path is compared after every link and ``..`` in it was followed, so that no name leads
out of a root.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote


def is_inside(name: str, roots: Iterable[str]) -> bool:
    """Return whether a path or URL lies in one of `roots`. A data set's name lies in none."""
    return any(_is_inside(name, root) for root in roots)


def _is_inside(name: str, root: str) -> bool:
    if "://" in root:
        plain = unquote(name)
        return plain.startswith(root.rstrip("/") + "/") and ".." not in plain.split("/")
    if "://" in name or not os.path.isabs(name):
        return False
    return Path(os.path.realpath(name)).is_relative_to(os.path.realpath(root))
