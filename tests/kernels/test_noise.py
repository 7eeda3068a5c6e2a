"""The noise: Philox's published vectors, the Gumbel distribution, and the same integers inside a Triton kernel."""

from __future__ import annotations

import math

import pytest
import torch

from autospec.kernels.launch import jit, tl, wrap_triton
from autospec.kernels.noise import block_gumbel, gumbel, philox, row_key

# Random123, kat_vectors, philox4x32 10: counter, key, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


@jit
def write_noise(p_key, p_index, p_out, GROUPS: tl.constexpr):
    i_r = tl.program_id(0)
    b_noise = block_gumbel(tl.load(p_key + i_r), tl.load(p_index + i_r), tl.program_id(1) * GROUPS, GROUPS)
    o_v = tl.program_id(1) * 4 * GROUPS + tl.arange(0, 4 * GROUPS)
    tl.store(p_out + i_r * tl.num_programs(1) * 4 * GROUPS + o_v, b_noise)


def triton_noise(row_keys, index, vocab_size):
    """Noise of one index per row as the kernels compute it: [B, vocab_size]."""
    blocks = (vocab_size + 1023) // 1024
    out = torch.empty(row_keys.shape[0], blocks * 1024, device=row_keys.device)
    wrap_triton(write_noise)[(row_keys.shape[0], blocks)](row_keys, index, out, GROUPS=256)
    return out[:, :vocab_size]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_known_answers(counter, key, result):
    low, high = words(key)
    counter_words = [torch.tensor(word) for word in words(counter)]
    assert [int(word) for word in philox(torch.tensor(signed(high << 32 | low)), *counter_words)] == words(result)


@pytest.mark.parametrize("planted", ["9 rounds", "key words swapped", "counter words swapped"])
def test_known_answers_catch_planted_bugs(planted):
    counter, key, result = VECTORS[2]
    (low, high), c, rounds = words(key), words(counter), 10
    if planted == "9 rounds":
        rounds = 9
    elif planted == "key words swapped":
        low, high = high, low
    else:
        c = [c[1], c[0], c[2], c[3]]
    out = philox(torch.tensor(signed(high << 32 | low)), *map(torch.tensor, c), rounds=rounds)
    assert [int(word) for word in out] != words(result)


def row_cases():
    keys = torch.tensor([0, -1, 2**62 + 12345, row_key(7, 0, 0), row_key(7, 1, 0)])
    return keys, torch.tensor([1, 2**31 - 1, 32767, 5, 5], dtype=torch.int32)


def check_same_noise(mine: torch.Tensor, reference: torch.Tensor) -> None:
    """Another integer would be another number altogether; logarithms may differ in the last bits."""
    assert torch.isfinite(mine).all()
    torch.testing.assert_close(mine, reference, rtol=2e-6, atol=2e-6)


def test_triton_draws_the_same_integers(interpreted):
    keys, index = row_cases()
    mine = interpreted(__file__, "triton_noise", keys, index, 3000)
    check_same_noise(mine, gumbel(keys, index.long()[:, None], 3000)[:, 0])


def test_another_counter_is_caught():
    keys, index = row_cases()
    one, other = (gumbel(keys, index.long()[:, None] + i, 100) for i in (0, 1))
    with pytest.raises(AssertionError):
        check_same_noise(one, other)


def test_gumbel_distribution():
    """Kolmogorov-Smirnov distance of 400k values from exp(-exp(-x)); mean and variance."""
    sample = gumbel(torch.tensor([123]), torch.arange(4)[None], 100_000).flatten().double().sort().values
    theory = torch.exp(-torch.exp(-sample))
    empirical = torch.arange(1, sample.numel() + 1) / sample.numel()
    assert (theory - empirical).abs().max() < 1.95 / math.sqrt(sample.numel())  # p = 0.001
    assert abs(sample.mean() - 0.5772) < 0.01
    assert abs(sample.var() - math.pi**2 / 6) < 0.02


def test_no_wrap_at_a_vocabulary_of_128k_and_index_32k():
    """index * vocab_size exceeds 2^32 here: a single 32-bit counter would repeat itself."""
    vocab_size = 131072
    keys, index = torch.tensor([1]), torch.tensor([[32767, 32768, 65535, 0]])
    noise = gumbel(keys, index, vocab_size)[0]
    assert torch.isfinite(noise).all()
    for i in range(4):
        for j in range(i):
            assert (noise[i] == noise[j]).float().mean() < 1e-3, f"index {index[0, i]} repeats index {index[0, j]}"


def test_noise_depends_on_key_index_and_id_only():
    keys, index = torch.tensor([11, 22, 33]), torch.tensor([[4, 9], [4, 9], [7, 4]])
    noise = gumbel(keys, index, 50)
    assert torch.equal(noise[[2, 0]], gumbel(keys[[2, 0]], index[[2, 0]], 50))
    assert torch.equal(noise[..., :17], gumbel(keys, index, 17))
    assert torch.equal(noise[:, 1:], gumbel(keys, index[:, 1:], 50))


def test_row_keys_are_distinct_and_signed_64_bit():
    keys = [row_key(seed, prompt, sequence) for seed in range(10) for prompt in range(10) for sequence in range(10)]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


@pytest.mark.cuda
def test_triton_on_the_gpu_draws_the_same_integers(cuda):
    keys, index = row_cases()
    mine = triton_noise(keys.to(cuda), index.to(cuda), 131072)
    check_same_noise(mine.cpu(), gumbel(keys, index.long()[:, None], 131072)[:, 0])
