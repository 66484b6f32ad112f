"""The run as a person sees it in the job's log: one line for each step, evaluation and sample."""

import threading
from pathlib import Path
from typing import Any

from s2ft_ray.training.metrics_reader import MetricsReader

POLL_S = 0.5
# At most so many step lines a second; evaluations and the last step are always shown.
MIN_INTERVAL_S = 1.0


class ProgressPrinter:
    """Follows a run's ``metrics.jsonl`` from a thread and prints what is new in it."""

    def __init__(self, metrics: Path) -> None:
        self._reader = MetricsReader(metrics)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._total = 0
        self._shown_at = 0.0

    def __enter__(self) -> "ProgressPrinter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._print_new()
        self._print_new()

    def _print_new(self) -> None:
        for line in self._reader.read():
            self._print(line)

    def _print(self, line: dict[str, Any]) -> None:
        if line["kind"] == "start":
            self._total = line["total_steps"]
            text = describe_start(line)
        elif line["kind"] == "train":
            if line["time"] - self._shown_at < MIN_INTERVAL_S and line["step"] != self._total:
                return
            self._shown_at = line["time"]
            text = describe_step(line, self._total)
        elif line["kind"] == "eval":
            text = describe_evaluation(line, self._total)
        elif line["kind"] == "stop":
            text = f"stopped after step {line['step']}; the checkpoint is saved"
        elif line["kind"] == "end":
            early = f", early, after step {line['step']}" if line["step"] < self._total else ""
            text = f"trained in {line['train_seconds']:.1f} s{early}{describe_speed(line)}"
        else:  # where the workers are: for the queue
            return
        print(text, flush=True)


def describe_start(line: dict[str, Any]) -> str:
    """Say where the run begins."""
    begin = f"resumed after step {line['step']}" if line["step"] else "started"
    return f"{begin}: {line['world_size']} worker(s), base in {line['sharding']}"


def describe_speed(line: dict[str, Any]) -> str:
    """Say how fast the steps were, and the phases that took at least a hundredth of them.

    Communication lies within other phases.
    """
    if "mean_tokens_per_s" not in line:
        return ""
    shares = {k.removesuffix("_share"): v for k, v in line.items() if k.endswith("_share")}
    largest = sorted(shares.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {share:.0%}" for name, share in largest if share >= 0.01)
    return (
        f": {line['mean_tokens_per_s']:,.0f} tokens/s,"
        f" {line['mean_model_flop_utilisation']:.1%} of a large matmul's FLOP/s; {parts};"
        f" {line['communication']:.0%} of it in communication"
    )


def describe_step(line: dict[str, Any], total: int) -> str:
    """Say what a step did, and how long the rest takes."""
    minutes, seconds = divmod(round(line["time_left_s"]), 60)
    return (
        f"step {line['step']:>{len(str(total))}}/{total}  loss {line['loss']:.4f}"
        f"  lr {line['lr']:.2e}  {line['tokens_per_s']:,.0f} tokens/s  {minutes}:{seconds:02d} left"
    )


def describe_evaluation(line: dict[str, Any], total: int) -> str:
    """Say how the held-out rows went, with the sample answers below."""
    figures = (
        f"perplexity {line['perplexity']:.2f}  token accuracy {line['token_accuracy']:.1%}"
        if line["perplexity"]
        else f"preference accuracy {line['token_accuracy']:.1%}"
    )
    head = (
        f"step {line['step']:>{len(str(total))}}/{total}  held out: loss {line['loss']:.4f}"
        f"  {figures}"
    )
    samples = [
        f"    {_one_line(sample['prompt'])} -> {_one_line(sample['answer'])}"
        f"  (expected {_one_line(sample['expected'])})"
        for sample in line["samples"]
    ]
    return "\n".join([head, *samples])


def _one_line(text: str, limit: int = 60) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else f"...{joined[-limit:]}"
