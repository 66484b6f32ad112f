"""Packed rows: none lost, no sequence too long, and a model that can't see across samples."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from s2ft_ray.data import IGNORE_INDEX, pack_rows, packing_efficiency
from s2ft_ray.data.batches import MicroBatch, Sample, build_micro_batch


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200),
    room=st.integers(50, 120),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_row_is_in_one_sequence_that_holds_it(lengths, room, seed):
    sequences = pack_rows(lengths, room, seed)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in sequence) <= room for sequence in sequences)
    assert sequences == pack_rows(lengths, room, seed)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_at_most_one_sequence_is_half_empty(lengths):
    sequences = pack_rows(lengths, 60, seed=0)
    filled = [sum(lengths[row] for row in sequence) for sequence in sequences]
    assert sum(tokens <= 30 for tokens in filled) <= 1


def test_the_sequences_of_instruction_data_are_full():
    lengths = np.random.default_rng(0).lognormal(4.6, 0.5, 20_000).astype(int).clip(8, 512)
    sequences = pack_rows(lengths, 512, seed=0)
    assert packing_efficiency(lengths, sequences, 512) > 0.99


def test_another_seed_packs_rows_of_one_length_otherwise():
    assert pack_rows([10] * 100, 50, seed=0) != pack_rows([10] * 100, 50, seed=1)


def test_a_row_longer_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="row 1 has 9 tokens; a sequence holds 8"):
        pack_rows([8, 9], 8, seed=0)


def samples(*lengths: int) -> list[Sample]:
    generator = np.random.default_rng(len(lengths))
    return [
        Sample(generator.integers(3, 64, length).tolist(), [True] * length, line)
        for line, length in enumerate(lengths)
    ]


def test_packed_samples_keep_their_positions_and_their_first_tokens_are_no_targets():
    first, second, third = samples(3, 2, 4)
    batch = build_micro_batch([[first, second], [third]], pad_id=0)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert batch.input_ids.tolist() == [
        [*first.input_ids, *second.input_ids],
        [*third.input_ids, 0],
    ]
    assert (batch.labels == IGNORE_INDEX).tolist() == [
        [True, False, False, True, False],
        [True, False, False, False, True],
    ]
    assert (batch.num_targets, batch.num_tokens) == (6, 9)


def tiny_llama(attn_implementation: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attn_implementation,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).double()


def loss_sum(model: LlamaForCausalLM, batch: MicroBatch) -> torch.Tensor:
    logits = model(**batch.model_inputs()).logits
    return cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


# eager attention has its softmax in float32 whatever the model's dtype.
ATTENTION = pytest.mark.parametrize(
    ("attn_implementation", "rtol"), [("sdpa", 1e-12), ("eager", 1e-7)]
)


@ATTENTION
@pytest.mark.parametrize(
    "sequences", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[5], [3, 0], [4, 1, 2]]]
)
def test_the_loss_of_packed_rows_is_that_of_the_same_rows_alone(
    attn_implementation, rtol, sequences
):
    model = tiny_llama(attn_implementation)
    rows = samples(5, 9, 2, 7, 12, 4)
    packed = build_micro_batch([[rows[i] for i in sequence] for sequence in sequences], pad_id=0)
    alone = [build_micro_batch([[row]], pad_id=0) for row in rows]
    together = loss_sum(model, packed)
    together.backward()
    gradient = model.model.layers[0].mlp.down_proj.weight.grad.clone()
    model.zero_grad()
    separate = sum(loss_sum(model, batch) for batch in alone)
    separate.backward()
    assert packed.num_targets == sum(batch.num_targets for batch in alone) == 33
    torch.testing.assert_close(together, separate, rtol=rtol, atol=0)
    expected = model.model.layers[0].mlp.down_proj.weight.grad
    assert (gradient - expected).norm() < 10 * rtol * expected.norm()


def test_the_cache_would_let_packed_samples_see_each_other():
    """Why ``model_inputs`` switches it off."""
    model = tiny_llama("sdpa")
    batch = build_micro_batch([samples(5, 9)], pad_id=0)
    inputs = batch.model_inputs()
    apart = model(**inputs).logits
    joined = model(**inputs | {"use_cache": True}).logits
    assert (apart - joined)[0, 5:].abs().max() > 1e-3


@ATTENTION
def test_padding_on_the_right_changes_no_loss_without_a_mask(attn_implementation, rtol):
    model = tiny_llama(attn_implementation)
    rows = samples(5, 12, 3)
    padded = build_micro_batch([[row] for row in rows], pad_id=0)
    alone = sum(loss_sum(model, build_micro_batch([[row]], pad_id=0)) for row in rows)
    torch.testing.assert_close(loss_sum(model, padded), alone, rtol=rtol, atol=0)
