"""A file that is larger than the memory that there is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
ROOM_MIB = 64
PROGRAM = Path(__file__).parent / "small_memory.py"


def write_rows(path: Path, count: int) -> Path:
    """Write rows of 8 kB, most of it a note that no format reads."""
    with path.open("w") as file:
        for number in range(count):
            row = {
                "prompt": f"Number {number} is " + "red " * 100,
                "completion": " odd" if number % 2 else " even",
                "note": f"{number:08d}" * 1_000,
            }
            file.write(json.dumps(row) + "\n")
    return path


def run(file: Path, small: Path, folder: Path, room: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), str(file), str(small), str(folder), str(room)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.mark.long
def test_a_file_of_five_times_the_memory_is_encoded_and_gone_through(tmp_path: Path) -> None:
    small, large = write_rows(tmp_path / "small.jsonl", 2_000), tmp_path / "large.jsonl"
    write_rows(large, 42_000)
    assert large.stat().st_size > 5 * ROOM_MIB * MIB
    done = run(large, small, tmp_path / "enough", ROOM_MIB)
    assert done.returncode == 0, done.stderr
    rows, steps = map(int, done.stdout.split())
    assert rows == 42_000
    assert steps > 5_000
    # The limit is real: with a tenth of that room nothing goes.
    assert run(large, small, tmp_path / "too_little", 1).returncode != 0
