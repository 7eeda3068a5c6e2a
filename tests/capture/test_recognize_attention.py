"""recognize-attention: attention written in many ways becomes one op of the same meaning; the rest stays, with reasons."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from harness.graphs import check_golden
from torch import Tensor, fx, nn

from autospec.capture_slots import with_slots
from autospec.ir.match import argument, calls
from autospec.ir.runner import run_pass
from autospec.ir.sizes import constants_of
from autospec.ir.text import graph_text
from autospec.kernels.attention import attention
from autospec.legality import run_captured
from autospec.passes.recognize_attention import RecognizeAttention

VOCAB, WIDTH, HEADS, HEAD_DIM, PLACES = 16, 8, 2, 4, 64
LOWEST = torch.finfo(torch.float32).min
Core = Callable[["Toy", Tensor, Tensor, Tensor, Tensor], Tensor]


class Toy(nn.Module):
    """Embed, attend as `core` says, read out. q, k, v [B, H, S, D]; core returns [B, H, S, D]."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)
        self.learned = nn.Parameter(torch.randn(1, 1, PLACES, PLACES))
        self.register_buffer("lower", torch.ones(PLACES, PLACES, dtype=torch.bool).tril()[None, None])
        self.core = core

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor]:
        batch, length = input_ids.shape
        parts = self.qkv(self.embed(input_ids)).view(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        out = self.core(self, *parts.unbind(0), input_ids)
        return (self.head(out.transpose(1, 2).reshape(batch, length, WIDTH)),)


def export(core: Core) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        toy = Toy(core).eval().requires_grad_(False)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(toy, (ids, ids.clone()), dynamic_shapes=(dims, dims), strict=False).run_decompositions({})
    return with_slots(exported, "toy")


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


def slopes() -> Tensor:
    return 2.0 ** -torch.arange(1, HEADS + 1, dtype=torch.float32)


def positions(q: Tensor) -> tuple[Tensor, Tensor]:
    place = torch.arange(q.shape[2])
    return place[:, None], place[None, :]


def sdpa_causal(toy, q, k, v, ids):
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_bool_mask(toy, q, k, v, ids):
    query, key = positions(q)
    shown = ((key <= query) & (key > query - 3)).expand(q.shape[0], 1, -1, -1)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown, scale=0.3)


def added_mask(toy, q, k, v, ids):
    query, key = positions(q)
    mask = torch.where(key <= query, 0.0, LOWEST)
    return torch.softmax(scores(q, k) / math.sqrt(HEAD_DIM) + mask, -1) @ v


def where_buffer(toy, q, k, v, ids):
    length = q.shape[2]
    shown = toy.lower[:, :, :length, :length]
    return torch.softmax(torch.where(shown, scores(q, k) * 0.5, LOWEST), -1, dtype=torch.float32).to(v.dtype) @ v


def zeros_and_ones(toy, q, k, v, ids):
    length = q.shape[2]
    shown = toy.lower[:, :, :length, :length].float()
    return torch.softmax(scores(q, k) * shown - 1e4 * (1 - shown), -1) @ v


def chunk_filled(toy, q, k, v, ids):
    query, key = positions(q)
    hidden = (key > query) | (key // 4 != query // 4)
    return torch.softmax(scores(q, k).masked_fill(hidden, LOWEST), -1) @ v


def softcap(toy, q, k, v, ids):
    query, key = positions(q)
    capped = 5.0 * torch.tanh(scores(q, k) * 0.5 / 5.0)
    return torch.softmax(capped.masked_fill(key > query, float("-inf")), -1) @ v


def alibi(toy, q, k, v, ids):
    query, key = positions(q)
    bias = slopes()[:, None, None] * key
    return torch.softmax(scores(q, k) * 0.5 + bias + torch.where(key <= query, 0.0, LOWEST), -1) @ v


def alibi_bmm(toy, q, k, v, ids):
    batch, heads, length, dim = q.shape
    flat = [x.reshape(batch * heads, length, dim) for x in (q, k, v)]
    query, key = positions(q)
    bias = (slopes()[None, :, None, None] * key).expand(batch, -1, -1, -1).reshape(batch * heads, 1, length)
    found = bias.baddbmm(flat[0], flat[1].transpose(1, 2), beta=1.0, alpha=0.5).view(batch, heads, length, length)
    weights = torch.softmax(found + torch.where(key <= query, 0.0, LOWEST), -1)
    return torch.bmm(weights.view(batch * heads, length, length), flat[2]).view(batch, heads, length, dim)


def one_kv_head(toy, q, k, v, ids):
    return nn.functional.scaled_dot_product_attention(
        q, k[:, :1].expand(-1, HEADS, -1, -1), v[:, :1].expand(-1, HEADS, -1, -1), is_causal=True
    )


LEGAL = {
    sdpa_causal: {"scale": 0.5},
    sdpa_bool_mask: {"scale": 0.3, "window": 3},
    added_mask: {"scale": 0.5},
    where_buffer: {"scale": 0.5},
    zeros_and_ones: {"scale": 1.0},
    chunk_filled: {"scale": 1.0, "chunk": 4},
    softcap: {"scale": 0.5, "softcap": 5.0},
    alibi: {"scale": 0.5},
    alibi_bmm: {"scale": 0.5},
    one_kv_head: {"scale": 0.5},
}


@pytest.mark.parametrize("core", LEGAL, ids=lambda core: core.__name__)
def test_meaning(core):
    module, weights = export(core)
    inputs = [torch.randint(0, VOCAB, shape) for shape in ((1, 1), (1, 2), (3, 7), (2, 19))]
    before = [run_captured(module, weights, ids, ids) for ids in inputs]
    record = run_pass(module, RecognizeAttention(max_positions=PLACES))
    assert (record.count, record.refusals) == (1, ())
    (node,) = calls(module, attention)
    found = {name: argument(node, name) for name in ("scale", "window", "chunk", "softcap")}
    assert found == pytest.approx({"scale": 1.0, "window": 0, "chunk": 0, "softcap": 0.0} | LEGAL[core])
    weights = weights | constants_of(module)
    if "alibi" in core.__name__:
        assert torch.equal(weights["alibi_slopes.0"], slopes())
    for ids, expected in zip(inputs, before, strict=True):
        torch.testing.assert_close(run_captured(module, weights, ids, ids), expected, rtol=1e-5, atol=1e-5)
    assert run_pass(module, RecognizeAttention(max_positions=PLACES)).count == 0


@pytest.mark.parametrize("core", [sdpa_bool_mask, where_buffer, alibi_bmm], ids=lambda core: core.__name__)
def test_text(core):
    module, _ = export(core)
    run_pass(module, RecognizeAttention(max_positions=PLACES))
    names = iter("BSCT")
    symbols: dict[str, str] = {}  # numbered by the torch version
    text = re.sub(r"\bs\d+\b", lambda found: symbols.get(found[0]) or symbols.setdefault(found[0], next(names)), graph_text(module))
    check_golden(f"recognize_attention.{core.__name__}", text)


def bidirectional(toy, q, k, v, ids):
    return nn.functional.scaled_dot_product_attention(q, k, v)


def mask_of_tokens(toy, q, k, v, ids):
    query, key = positions(q)
    shown = (key <= query) & (ids != 3)[:, None, None, :]
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)


def learned_bias(toy, q, k, v, ids):
    query, key = positions(q)
    length = q.shape[2]
    return torch.softmax(scores(q, k) + toy.learned[:, :, :length, :length] + torch.where(key <= query, 0.0, LOWEST), -1) @ v


def scaled_by_length(toy, q, k, v, ids):
    query, key = positions(q)
    return torch.softmax(scores(q, k) / q.shape[2] + torch.where(key <= query, 0.0, LOWEST), -1) @ v


def prefix(toy, q, k, v, ids):
    query, key = positions(q)
    shown = (key <= query) | ((key < 6) & (query < 6))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)


def window_beyond_the_example(toy, q, k, v, ids):
    """Causal at every length that an example is likely to have."""
    query, key = positions(q)
    shown = (key <= query) & ((key > query - 40) | (key % 2 == 0))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=shown)


def quadratic_bias(toy, q, k, v, ids):
    query, key = positions(q)
    return torch.softmax(scores(q, k) - 0.01 * (query - key) ** 2 + torch.where(key <= query, 0.0, LOWEST), -1) @ v


def probabilities_read_twice(toy, q, k, v, ids):
    query, key = positions(q)
    weights = torch.softmax(scores(q, k) + torch.where(key <= query, 0.0, LOWEST), -1)
    return weights @ v + weights.sum(-1, keepdim=True)


def sharpened(toy, q, k, v, ids):
    query, key = positions(q)
    return torch.softmax(scores(q, k).square() + torch.where(key <= query, 0.0, LOWEST), -1) @ v


def cross(toy, q, k, v, ids):
    return nn.functional.scaled_dot_product_attention(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1))


def over_queries(toy, q, k, v, ids):
    query, key = positions(q)
    return torch.softmax(scores(q, k) + torch.where(key <= query, 0.0, LOWEST), -2) @ v


ILLEGAL = {
    bidirectional: "position 0 does not see",
    mask_of_tokens: "it depends on input_ids",
    learned_bias: "it depends on the parameter learned",
    scaled_by_length: "differently at different lengths",
    prefix: "position 0 does not see",
    window_beyond_the_example: "does not see what",
    quadratic_bias: "not linear in the distance",
    probabilities_read_twice: "read more than once",
    sharpened: "stands between q k\\^T and softmax",
    cross: "not self-attention",
    over_queries: "softmax is taken over dimension -2",
}


@pytest.mark.parametrize("core", ILLEGAL, ids=lambda core: core.__name__)
def test_what_is_no_causal_attention_stays(core):
    module, _ = export(core)
    record = run_pass(module, RecognizeAttention(max_positions=PLACES))
    assert record.count == 0
    assert len(record.refusals) == 1
    with pytest.raises(AssertionError, match=ILLEGAL[core]):
        raise AssertionError(record.refusals[0].reason)
