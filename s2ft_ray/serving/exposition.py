"""The service's metrics, read from Ray's own exporters: glue.

Invariant: only this service's and Serve's series are shown; the rest of the cluster's stays Ray's.
"""

import asyncio
import urllib.request

import ray

_SHOWN = ("ray_s2ft_", "ray_serve_")
_TIMEOUT_S = 5.0


async def read_metrics() -> bytes:
    """Return Prometheus' text over all nodes. What counts now is shown some seconds later."""
    nodes = await asyncio.to_thread(ray.nodes)
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if node["Alive"]
    ]
    pages = await asyncio.gather(*(asyncio.to_thread(_read, url) for url in urls))
    return b"".join(pages)


def _read(url: str) -> bytes:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=_TIMEOUT_S) as reply:
            lines = reply.read().splitlines(keepends=True)
    except OSError:
        return b""
    shown = tuple(name.encode() for name in _SHOWN)
    heads = tuple(f"# {kind} {name}".encode() for kind in ("HELP", "TYPE") for name in _SHOWN)
    return b"".join(line for line in lines if line.startswith(shown + heads))
