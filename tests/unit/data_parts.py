"""Small tokenizers, chat templates and files for the tests of the data room."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from s2ft_ray.config import DataConfig

SPECIALS = ["<bos>", "<eos>", "<pad>"]
TEXTS = [
    "### Instruction:\nAdd two and three.\n\n### Response:\nThe answer is five.",
    "### Instruction:\nWhat is the colour of the sky?\n\n### Input:\nNoon.\n\n### Response:\nBlue.",
    "user: hello there\nassistant: hello you, how are you?\nuser: well\nassistant: good\n",
]

# Writes an end token and a line break after each turn, as most published templates do.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BOS_TEMPLATE = "{{ bos_token }}" + PLAIN_TEMPLATE
MARKED_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ 'assistant\n' }}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.role + '\n' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
# Shows the reasoning of the last answer only, so that an answer's text changes with what follows.
FORGETFUL_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>' }}{% endif %}"
    "{{ m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@cache
def _bytelevel(bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return tokenizer.to_str()


def bytelevel_tokenizer(
    *, bos: bool = True, chat_template: str | None = None, **changes: Any
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE tokenizer (any text survives it) that puts <bos> first, or doesn't."""
    specials = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bytelevel(bos)), **specials | changes
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer that, like SentencePiece, puts a space before a text's first word."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, "<unk>"])}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for char in "▁abcdefghijklmnopqrstuvwxyz.:":
        vocab[char] = len(vocab)
    merges = [("▁", "a"), ("▁", "b")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def instruction_row(number: int, words: int = 5) -> dict[str, str]:
    """Return a valid row that is unlike those of other numbers."""
    return {"instruction": f"Say {number}.", "output": f"answer {number}" + " very" * words}


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write a JSONL file; a str or bytes row is written as it is."""
    texts = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    lines = [text.encode() if isinstance(text, str) else text for text in texts]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def data_config(path: str, **changes: Any) -> DataConfig:
    """Return the config of a file, its defaults apart from `changes`."""
    return DataConfig(train=path, **changes)


def dataset_of(num_rows: int) -> Dataset:
    """Rows of 2 to 6 tokens, each a row of its own first token, one to three of them targets."""
    lengths = [2 + i % 5 for i in range(num_rows)]
    return Dataset.from_dict(
        {
            "input_ids": [[100 + i] * length for i, length in enumerate(lengths)],
            "target_mask": [
                [False] * (length - n) + [True] * n
                for i, length in enumerate(lengths)
                for n in [1 + i % min(3, length - 1)]
            ],
            "line": list(range(1, num_rows + 1)),
        }
    )
