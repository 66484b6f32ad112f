"""Tenants' chat templates, rendered in a process of their own: a template is a tenant's program.

Invariant: a template costs a replica a bounded time of a thread that waits, and none of its memory.
One that was too expensive is refused for a while without a try, since it costs a new process.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from s2ft_ray.errors import ConfigError, ServingError

_RENDER_S = 1.0
"""Of the processor's time. Real templates take some milliseconds."""
_MEMORY_BYTES = 2**29
"""Of the process; its imports take a fifth of it."""
_REFUSED_S = 60.0


class TemplateRenderer:
    """Renders one template after the other, in a process that starts when needed. Thread-safe."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._refused: dict[str, float] = {}

    def render(
        self,
        template: str,
        turns: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, Any],
        max_chars: int,
    ) -> str:
        """Return the text of a conversation, up to where the answer begins.

        Raises ConfigError where the template fails on it, is too expensive, or makes more than
        `max_chars` of it; ServingError where no process can be had.
        """
        asked = {
            "template": template,
            "turns": turns,
            "special_tokens": special_tokens,
            "max_chars": max_chars,
        }
        with self._turn:
            if time.monotonic() < self._refused.get(template, 0.0):
                raise _too_expensive()
            answer = self._ask(json.dumps(asked, default=str))
            if answer is None:
                now = time.monotonic()
                self._refused = {it: until for it, until in self._refused.items() if until > now}
                self._refused[template] = now + _REFUSED_S
                raise _too_expensive()
        if "error" in answer:
            raise ConfigError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        """End the process."""
        with self._turn:
            self._end()

    def _ask(self, line: str) -> dict[str, str] | None:
        """Return the process's answer; None where it ended instead."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer.endswith("\n"):
            self._end()
            return None
        told: dict[str, str] = json.loads(answer)
        return told

    def _start(self) -> subprocess.Popen[str]:
        child = [sys.executable, "-m", "s2ft_ray.serving.template_child"]
        self._process = process = subprocess.Popen(
            [*child, str(_RENDER_S), str(_MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdout is not None
        if not process.stdout.readline():
            self._end()
            raise ServingError("the process that renders chat templates can't be started")
        return process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _too_expensive() -> ConfigError:
    return ConfigError(
        f"rendering takes more than the {_RENDER_S:g} s of a processor that a template may have"
    )
