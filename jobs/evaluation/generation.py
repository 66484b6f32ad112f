"""Prompts answered in batches of like length."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    num_beams: int = 1,
) -> Iterator[list[tuple[int, str]]]:
    """Answer each prompt (token ids); yield each batch's (index of the prompt, answer).

    No sampling. Prompts of like length share a batch, padded on the left; the longest come first,
    so that a batch that doesn't fit into memory fails at once.
    """
    pad = tokenizer.pad_token_id
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(prompts[batch[0]])
        gaps = [longest - len(prompts[index]) for index in batch]
        ids = [[pad] * gap + list(prompts[i]) for gap, i in zip(gaps, batch, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        with torch.inference_mode():
            output = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                pad_token_id=pad,
            )
        texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        yield list(zip(batch, texts, strict=True))
