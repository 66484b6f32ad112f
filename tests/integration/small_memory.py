"""Encode a file and go through it once, in a process that may take little more than it has.

python small_memory.py FILE SMALL_FILE FOLDER MIB    SMALL_FILE first, so that all is imported
"""

import resource
import sys
from pathlib import Path

from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import DataConfig, ModelConfig
from s2ft_ray.data import PreparedData, TrainLoader, prepare_data

MIB = 2**20


def go_through(path: str, folder: Path) -> tuple[int, int]:
    """Return the rows and the steps of one epoch, through a small shuffle buffer."""
    tokenizer = load_tokenizer(ModelConfig())
    config = DataConfig(train=path, shuffle_buffer=200)
    prepare_data(config, tokenizer, 0, folder / "cache").save(folder / "data")
    data = PreparedData.load(folder / "data")
    loader = TrainLoader(
        data.train,
        global_batch_size=8,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        seed=0,
        pad_id=0,
        packing=None,
        groups=data.groups,
        shuffle_buffer=config.shuffle_buffer,
    )
    steps = 0
    for _ in range(len(data.train) // 8):
        loader.next_step()
        steps += 1
    return len(data.train) + len(data.eval), steps


def main() -> None:
    """Do both, and print what came of the file."""
    path, small, folder, room = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    go_through(small, folder / "small")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            limit = int(line.split()[1]) * 1024 + room * MIB
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(*go_through(path, folder / "large"))


if __name__ == "__main__":
    main()
