"""The process that renders chat templates for `templates`: one request a line in, one answer out.

Invariant: a rendering ends in time, or this process does; the kernel sees to it, so that no single
expression (``10 ** (10 ** 9)``) can hold it up. It ends with its parent, whose pipe it reads.
"""

import json
import resource
import signal
import sys
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def main() -> None:
    """Answer until there are no more requests: ``{text}``, or ``{error}``."""
    render_s, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    _tell({})
    for line in sys.stdin:
        asked = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, render_s)
        told = _render(asked)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _tell(told)


def _render(asked: dict[str, Any]) -> dict[str, str]:
    try:
        (text,), _ = render_jinja_template(
            [asked["turns"]],
            chat_template=asked["template"],
            add_generation_prompt=True,
            **asked["special_tokens"],
        )
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # noqa: BLE001 - whatever a tenant's program raises
        return {"error": str(error)[:1000] or type(error).__name__}
    if len(text) > asked["max_chars"]:
        return {"error": f"it makes {len(text)} characters of them, {asked['max_chars']} can fit"}
    return {"text": text}


def _tell(told: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
