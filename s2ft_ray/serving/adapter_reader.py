"""An adapter's files, read for one base: from where its route says, else from the registry.

Invariant: what is read has the fingerprint that was named, and was trained on the base that serves.
"""

import logging
from pathlib import Path

from s2ft_ray.errors import AdapterError
from s2ft_ray.method import Adapter
from s2ft_ray.registry import forget_kept, resolve_adapter, trim_kept
from s2ft_ray.serving.requests import AdapterKey
from s2ft_ray.serving.routes import Route

log = logging.getLogger("ray.serve")


class AdapterReader:
    """Reads the adapters of one base. Called from threads, one adapter at a time in each."""

    def __init__(
        self, base_id: str, base_fingerprint: str, tracking_uri: str | None, disk_bytes: int
    ) -> None:
        """`disk_bytes` is what fetched copies may take on this node."""
        self._base_id = base_id
        self._base_fingerprint = base_fingerprint
        self._tracking_uri = tracking_uri
        self._disk_bytes = disk_bytes
        self._folders: dict[AdapterKey, str] = {}

    def remember(self, route: Route) -> None:
        """Keep in mind where the files of the route's adapter are."""
        if route.adapter is not None and route.folder is not None:
            self._folders[route.adapter] = route.folder

    def forget(self, key: AdapterKey) -> None:
        """Forget where an adapter's files are."""
        self._folders.pop(key, None)

    def read(self, key: AdapterKey) -> Adapter:
        """Return an adapter. Raises AdapterError where its files aren't those that were named."""
        folder = self._folders.get(key)
        if folder is None or not Path(folder, "adapter_config.json").is_file():
            folder = self._fetch(key)
        try:
            adapter = self._check(key, folder)
        except AdapterError:
            if not forget_kept(Path(folder)):
                raise
            log.warning("%s: its copy in %s is damaged; it is fetched again", key, folder)
            adapter = self._check(key, self._fetch(key))
        trim_kept(self._disk_bytes)
        return adapter

    def _fetch(self, key: AdapterKey) -> str:
        return str(resolve_adapter(str(key), self._tracking_uri).folder)

    def _check(self, key: AdapterKey, folder: str) -> Adapter:
        adapter = Adapter.load(folder)
        if adapter.fingerprint != key.fingerprint:
            raise AdapterError(
                f"{key}: its files have fingerprint {adapter.fingerprint[:16]}, the registry says"
                f" {key.fingerprint[:16]}"
            )
        if adapter.base.fingerprint != self._base_fingerprint:
            raise AdapterError(
                f"{key}: was trained on a base with fingerprint {adapter.base.fingerprint[:16]},"
                f" {self._base_id} has {self._base_fingerprint[:16]}"
            )
        return adapter
