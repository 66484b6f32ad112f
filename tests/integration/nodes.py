"""A home with a node in it, as a shell without a virtual environment on its PATH sees it."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BIN = Path(sys.executable).parent
_CLEAN = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith(("RAY_", "MLFLOW_", "S2FT_"))
}


@dataclass(frozen=True)
class Node:
    """One home, and the command that is asked about it."""

    home: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    """More of the environment in which `s2ft` is called."""

    def s2ft(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run `s2ft` on this home."""
        return subprocess.run(
            [str(BIN / "s2ft"), *args],
            env={**_CLEAN, "PATH": os.defpath, "S2FT_HOME": str(self.home), **self.variables},
            capture_output=True,
            text=True,
            timeout=500,
        )

    def status(self) -> dict:
        """Return `s2ft status --json`."""
        return json.loads(self.s2ft("status", "--json").stdout)

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client: this one, with what `s2ft status --env` prints."""
        lines = self.s2ft("status", "--env").stdout.splitlines()
        client = dict(line.split("=", 1) for line in lines)
        return {**_CLEAN, **client, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
