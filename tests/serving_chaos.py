"""A service that streams to many clients while its parts die: nothing that it answers is wrong.

    python tests/serving_chaos.py --rounds 60

Clients of two tenants ask three adapters all the time, half of them streaming. A round does some of
the faults at random moments and goes on until every client has new answers. Every whole answer must
be the merged model's of the version that it names. What broke off must be the beginning of a right
answer, and nothing may break off but what a killed replica had begun and what hung on a killed
proxy or ingress.
"""

import argparse
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "integration"))
from chaos import ASKED, FAULTS, Chaos
from nodes import Node
from served_node import Load, Service, start_service

NUM_CLIENTS = 8


def main() -> int:
    """Do the rounds; the exit code is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--faults-a-round", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # and its node with it
    rng = random.Random(args.seed)
    wrong: list[str] = []
    with _service() as service, Load(service, ASKED, NUM_CLIENTS) as load:
        chaos = Chaos(service, load, rng)
        for number in range(1, args.rounds + 1):
            faults = rng.sample(args.faults, min(args.faults_a_round, len(args.faults)))
            wrong += chaos.round(number, faults)
    # what came in after the last round, when nothing was done any more
    wrong += chaos.check()
    for fault, count in sorted(chaos.done.items()):
        print(f"{fault}: {count} times, longest pause of its rounds {chaos.pauses[fault]:.1f} s")
    print(f"{len(load.answers)} answers, {len(load.broken)} broke off")
    print("\n".join(wrong) if wrong else f"{args.rounds} rounds, all right")
    return 1 if wrong else 0


@contextmanager
def _service() -> Iterator[Service]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s2ft-chaos-")))
        node = Node(folder / "home")
        started = node.s2ft("up", "--num-cpus", "2")
        assert started.returncode == 0, started.stderr
        stack.callback(node.s2ft, "down")
        yield start_service(node, folder, stack)


if __name__ == "__main__":
    sys.exit(main())
