"""This process as a client: of what its shell names, else of the node in its home."""

import os

from s2ft_ray.config import s2ft_home
from s2ft_ray.errors import NodeError


def become_client() -> None:
    """Take the addresses of this machine's node, where the shell names no cluster.

    Raises NodeError where nothing is up. Nothing may have imported Ray before: it reads its
    environment then.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    from s2ft_ray import node

    env = node.status(s2ft_home()).env
    if not env:
        raise NodeError(
            f"nothing is up in {s2ft_home()}; s2ft up starts it, RAY_ADDRESS names a cluster"
        )
    os.environ.update(env)


def become_registry_client() -> None:
    """Take them where the shell names no registry; without a node it is S2FT_HOME's SQLite file."""
    if "MLFLOW_TRACKING_URI" in os.environ:
        return
    from s2ft_ray import node

    os.environ.update(node.status(s2ft_home()).env)
