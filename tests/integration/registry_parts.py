"""What the registry's tests stand on: a real MLflow server, a tiny base, a trained adapter."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from s2ft_ray.bases import load_base_model
from s2ft_ray.config import ModelConfig, RunConfig, S2FTConfig, parse_config
from s2ft_ray.method import Adapter, convert, extract_adapter
from s2ft_ray.registry import register_adapter

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}$"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_database(folder: Path) -> Path:
    """Make an empty MLflow database: its migrations take seconds, a copy of it none."""
    path = folder / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def make_home(folder: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the S2FT_HOME of this test, with an empty MLflow database."""
    monkeypatch.setenv("S2FT_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(database, folder / "mlflow.db")
    return folder


class Server:
    """An MLflow server process on a loopback port of its own, over a SQLite file."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = f"sqlite:///{folder / 'mlflow.db'}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", "--workers=1"]
        command += [f"--port={self.port}", f"--backend-store-uri={self.database}"]
        command += [f"--artifacts-destination={self.folder / 'proxied'}"]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the MLflow server doesn't come up"
            time.sleep(0.2)

    def kill(self) -> None:
        """End the server and its worker at once, as a crash would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=1) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


def save_base(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Save a Llama of random weights, with a tokenizer of single characters."""
    letters = {chr(code): code - 30 for code in range(32, 127)}
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **letters}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="$"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        eos_token_id=vocabulary["$"],
        pad_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_adapter(base: Path, folder: Path, *, seed: int = 0, row_format: str = "chat") -> Adapter:
    """Train an adapter for a few steps on noise, and save it as a run does."""
    model = load_base_model(ModelConfig(name_or_path=str(base)))
    convert(model, S2FTConfig(budgets={"o": 0.25, "down": 0.1}, seed=seed))
    slices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(slices, lr=0.1)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(3):
        ids = torch.randint(2, 97, (2, 12), generator=draw)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = extract_adapter(model)
    training = {"data": {"format": row_format, "chat_template": None}}
    adapter = Adapter(plain.slices, plain.base, plain.config, training)
    adapter.save(folder)
    return adapter


def run_config(base: Path, **sections: Any) -> RunConfig:
    """Return a run of acme's support-bot on `base`."""
    document = {"tenant": "acme", "name": "support-bot", "data": {"train": "train.jsonl"}}
    return parse_config({**document, "model": {"name_or_path": str(base)}, **sections})


def write_points(run_folder: Path, steps: range, kind: str = "train", **values: float) -> None:
    """Append one line for each step, as rank 0 does; the loss tells the step."""
    with (run_folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        for step in steps:
            line = {"kind": kind, "step": step, "time": time.time(), "loss": 100.0 - step, **values}
            file.write(json.dumps(line) + "\n")


def register_and_die(home: Path, job: tuple[Path, RunConfig, str], step: str, moment: str) -> None:
    """Register in a process that kills itself before or after the client's `step`."""
    os.environ["S2FT_HOME"] = str(home)
    folder, config, run_id = job
    working = getattr(MlflowClient, step)

    def die(*args: Any, **kwargs: Any) -> None:
        if moment == "after":
            working(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(MlflowClient, step, die)
    register_adapter(folder, config, mlflow_run_id=run_id)
