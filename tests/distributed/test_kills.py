"""Workers killed at random steps and phases: the run ends with the same adapter.

``S2FT_KILLS=200`` for the long form. The three of the short form are at a commit, while tensors are
written, and while the adapter is saved.
"""

import os
import random
import signal
from pathlib import Path
from typing import Any

import kills
import runs

from s2ft_ray.method import Adapter
from s2ft_ray.training import checkpoint

NUM_KILLS = int(os.environ.get("S2FT_KILLS", "3"))
MAX_KILLS_OF_A_RUN = 4


def test_a_run_killed_at_random_moments_ends_with_the_same_adapter(tmp_path: Path) -> None:
    base = runs.save_base(tmp_path / "base")
    storage = str(tmp_path / "runs")
    sections: dict[str, Any] = {
        "optim": {"max_steps": 4},
        "checkpoint": {"every_steps": 1, "keep": 2, "storage_path": storage},
    }
    whole = runs.make_run(tmp_path / "whole", base, **sections)
    assert kills.start(whole.path, None) == [0, 0]
    wanted = Adapter.load(whole.adapter).fingerprint
    generator = random.Random(os.environ.get("S2FT_KILLS_SEED", "117"))
    done: list[kills.Kill] = []
    number = 0
    while len(done) < NUM_KILLS:
        number += 1
        run = runs.make_run(tmp_path / str(number), base, **sections)
        for _ in range(MAX_KILLS_OF_A_RUN):
            kill = kills.Kill.draw(generator)
            codes = kills.start(run.path, kill)
            if -signal.SIGKILL not in codes:
                break  # what was to be the moment never came: the run is done
            done.append(kill)
            for folder in run.checkpoints.glob("step-*"):
                checkpoint._verify_files(folder)
            if run.is_trained:
                assert Adapter.load(run.adapter).fingerprint == wanted, done
        if not run.is_trained:
            assert kills.start(run.path, None) == [0, 0], done
        assert Adapter.load(run.adapter).fingerprint == wanted, done
    moments = {kill.moment for kill in done}
    print(f"{len(done)} kills at {len(moments)} of {len(kills.MOMENTS)} moments, {number} runs")
