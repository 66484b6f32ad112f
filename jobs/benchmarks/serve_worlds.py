"""What the serving benchmark serves: a random base, its adapters, and requests to it all at once.

An S2FT adapter and a LoRA of q k v up down have the same number of parameters, about 1% of the
base. The weights are random, so the texts mean nothing; the work is that of a real model.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.stopwatch import Clock
from s2ft_ray.bases import load_tokenizer
from s2ft_ray.config import ModelConfig, S2FTConfig
from s2ft_ray.method import Adapter, AdapterSlice, BaseInfo, base_fingerprint
from s2ft_ray.serving.engine import Engine
from s2ft_ray.serving.requests import AdapterKey, GenerationRequest, SamplingParams

HEAD_DIM = 64
VOCABULARY = 8192


@dataclass(frozen=True)
class Shape:
    """A base and the size of its adapters."""

    width: int = 2048
    layers: int = 4
    dtype: torch.dtype = torch.bfloat16

    @property
    def intermediate(self) -> int:
        """Units of the feed-forward block: 2.75 times the width."""
        return self.width * 11 // 4

    @property
    def rank(self) -> int:
        """LoRA's rank, so that it has about 1% of the base's parameters."""
        return max(4, self.width // 102)

    @property
    def num_rows(self) -> int:
        """Rows of an S2FT adapter in each layer: as many parameters as LoRA's."""
        return round(
            self.rank * (3 * 2 * self.width + 2 * (self.width + self.intermediate)) / self.width
        )


def build_base(shape: Shape, vocab_size: int = VOCABULARY, device: str = "cpu") -> PreTrainedModel:
    """Build a Llama of random weights, which knows no token that ends a text."""
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // HEAD_DIM,
        num_key_value_heads=shape.width // HEAD_DIM,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=shape.dtype).eval()


def build_adapters(
    model: nn.Module, shape: Shape, count: int, scale: float = 0.002
) -> dict[AdapterKey, Adapter]:
    """Build adapters of o and down; each of the same size, with columns of its own."""
    base = BaseInfo("random", None, base_fingerprint(model))
    adapters = {}
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        slices = {}
        num_o = shape.num_rows // 2
        for layer in range(shape.layers):
            parts = {
                f"model.layers.{layer}.self_attn.o_proj": (shape.width, num_o),
                f"model.layers.{layer}.mlp.down_proj": (shape.intermediate, shape.num_rows - num_o),
            }
            for name, (whole, taken) in parts.items():
                indices = torch.randperm(whole, generator=draw)[:taken].sort().values.int()
                delta = scale * torch.randn(shape.width, taken, generator=draw)
                slices[name] = AdapterSlice("in", indices, delta, size=whole)
        adapter = Adapter(slices, base, S2FTConfig())
        adapters[AdapterKey(f"bench.a{seed}", "1", adapter.fingerprint)] = adapter
    return adapters


def build_engine(
    model: PreTrainedModel, load: Callable[[AdapterKey], Adapter], **options: int
) -> Engine:
    """Build and start an engine that takes 64 requests at a time."""
    tokenizer = load_tokenizer(ModelConfig(name_or_path="s2ft://tiny"))
    options = {"cache_tokens": 4096, "share_prefixes": False, **options}
    engine = Engine(model, tokenizer, load, **options)
    engine.start()
    return engine


@dataclass
class Record:
    """When a request was sent and its tokens came, in seconds."""

    sent_at: float
    arrivals: list[float] = field(default_factory=list)
    fault: str | None = None

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent_at


async def ask(
    engine: Engine,
    name: str,
    adapter: AdapterKey | None,
    prompt_tokens: int,
    new_tokens: int,
    clock: Clock = time.perf_counter,
) -> Record:
    """Send one request and take its tokens."""
    prompt = torch.randint(3, 700, (prompt_tokens,), generator=_seeded(name)).tolist()
    params = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
    record = Record(clock())
    async for _ in engine.generate(GenerationRequest(name, tuple(prompt), params, adapter)):
        record.arrivals.append(clock())
    return record


async def ask_all(
    engine: Engine,
    adapters: Sequence[AdapterKey | None],
    prompt_tokens: int,
    new_tokens: int,
    clock: Clock,
) -> list[Record]:
    """Send a request for each of `adapters` at once; return when all have ended."""
    return await asyncio.gather(
        *(
            ask(engine, f"r{i}", adapter, prompt_tokens, new_tokens, clock)
            for i, adapter in enumerate(adapters)
        )
    )


def _seeded(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**63)
