"""The layer of experts against float64 loops: every routing, absent tokens, and how often weights are read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.experts import ACTIVATIONS, Tile, experts, experts_cpu, run_experts, why_not_triton

FILE = "autospec.kernels.experts"
SMALL, WIDE = Tile(16, 16, 16, 4, 2), Tile(32, 32, 16, 4, 2)


def make_case(seed, tokens, num_experts, top_k, *, width=20, inner=12, absent=0.2, activation="silu", dtype=torch.float32):
    """Random tokens, distinct experts per token, some of them none (-1 or past the end)."""
    g = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, num_experts, generator=g).topk(top_k).indices
    gone = torch.rand(tokens, top_k, generator=g) < absent
    index = torch.where(gone, torch.randint(0, 2, index.shape, generator=g) * (num_experts + 1) - 1, index)
    return (
        torch.randn(tokens, width, generator=g).to(dtype), index, torch.rand(tokens, top_k, generator=g).to(dtype),
        torch.randn(num_experts, 2 * inner, width, generator=g).to(dtype) / 4,
        torch.randn(num_experts, width, inner, generator=g).to(dtype) / 4, activation,
    )


def naive(x, index, weights, gate_up, down, activation) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, (chosen, shares) in enumerate(zip(index.tolist(), weights.double(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            if 0 <= expert < gate_up.shape[0]:
                gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
                out[token] += share * (down[expert].double() @ (ACTIVATIONS[activation](gate) * up))
    return out


cases = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "tokens": st.integers(1, 40), "num_experts": st.integers(1, 9),
    "top_k": st.integers(1, 4), "absent": st.sampled_from([0.0, 0.2, 1.0]), "activation": st.sampled_from([*ACTIVATIONS]),
})  # fmt: skip


@settings(max_examples=25, deadline=None, print_blob=True)
@given(case=cases)
def test_reference_and_cpu_equal_loops(case):
    case["top_k"] = min(case["top_k"], case["num_experts"])
    args = make_case(**case)
    for run in (experts, experts_cpu):
        torch.testing.assert_close(run(*args).double(), naive(*args), rtol=2e-5, atol=2e-5)


@settings(max_examples=10, deadline=None, print_blob=True)
@given(case=cases, tile=st.sampled_from([SMALL, WIDE, None]))
def test_triton_equals_loops(interpreted, case, tile):
    case["top_k"] = min(case["top_k"], case["num_experts"])
    if case["activation"] == "gelu":
        case["activation"] = "gelu_pytorch_tanh"
    args = make_case(**case)
    out = interpreted(FILE, "experts_triton", *args) if tile is None else interpreted(FILE, "run_experts", *args, tile)
    torch.testing.assert_close(out.double(), naive(*args), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("run", ["cpu", "triton"])
def test_a_token_does_not_see_who_is_beside_it(interpreted, run):
    """Alone, among others, and with the others routed to no one: to the bit in Triton; torch's products of fewer rows round
    in another order, so on a CPU to float64's rounding."""
    args = make_case(4, 24, 5, 2, absent=0.0)
    if run == "cpu":
        args = tuple(value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in args)
    call = experts_cpu if run == "cpu" else lambda *given: interpreted(FILE, "run_experts", *given, SMALL)
    whole = call(*args)
    for row in (0, 11, 23):
        only = torch.full_like(args[1], -1)
        only[row] = args[1][row]
        out = call(args[0], only, *args[2:])
        if run == "triton":
            assert torch.equal(out[row], whole[row])
        torch.testing.assert_close(out[row], whole[row], rtol=1e-12, atol=1e-12)
        assert not out[[i for i in range(24) if i != row]].any()


def test_what_no_one_is_routed_to_may_hold_anything(interpreted):
    """NaN weights of an expert without tokens, NaN in a token without experts."""
    x, index, weights, gate_up, down, activation = make_case(5, 6, 4, 2, absent=0.0)
    index[index == 3] = -1
    index[2] = -1
    gate_up[3], down[3], x[2] = float("nan"), float("nan"), float("nan")
    args = x, index, weights, gate_up, down, activation
    for out in (experts_cpu(*args), interpreted(FILE, "run_experts", *args, SMALL)):
        assert out.isfinite().all()
        assert not out[2].any()


def test_one_expert_takes_all_and_more_tiles_than_one(interpreted):
    args = list(make_case(6, 40, 6, 1, absent=0.0))
    args[1] = torch.full_like(args[1], 2)
    out = interpreted(FILE, "run_experts", *args, SMALL)
    torch.testing.assert_close(out.double(), naive(*args), rtol=2e-5, atol=2e-5)


def test_why_not_triton():
    arguments = experts.bind(make_case(1, 2, 3, 2), {})
    assert "cpu" in why_not_triton(arguments)
    assert "bfloat16" in why_not_triton({**arguments, "x": arguments["x"].bfloat16()})
    assert "float64" in why_not_triton({**arguments, **{name: arguments[name].double() for name in ("x", "gate_up", "down")}})
    assert "contiguous" in why_not_triton({**arguments, "down": arguments["down"].transpose(1, 2)})
    assert "gelu" in why_not_triton({**arguments, "activation": "gelu"})


@pytest.mark.cuda
@pytest.mark.parametrize(("tokens", "dtype"), [(1, torch.bfloat16), (33, torch.bfloat16), (300, torch.float32)])
def test_on_a_gpu(cuda, tokens, dtype):
    args = make_case(7, tokens, 16, 4, width=512, inner=256, dtype=dtype)
    moved = [one.to(cuda) if isinstance(one, Tensor) else one for one in args]
    expected = naive(*args)
    outs = [torch.ops.autospec_triton.experts(*moved), run_experts(*moved, Tile(16, 64, 64, 4, 3))]
    for out in outs:
        assert float((out.cpu().double() - expected).abs().max() / expected.abs().max()) < (2e-2 if dtype.itemsize == 2 else 1e-5)
    assert torch.equal(outs[0], torch.ops.autospec_triton.experts(*moved)), "two runs differ"
