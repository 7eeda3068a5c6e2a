"""Index scores over pages against a loop in float64, and the selection that follows against transformers' own indexer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels.append_index_keys import dequantize_keys, quantize_keys
from autospec.kernels.append_latent import append_latent
from autospec.kernels.dsa_indexer_logits import (
    dsa_indexer_logits,
    dsa_indexer_logits_triton,
    random_case,
    same_selection,
    why_not_triton,
)
from autospec.kernels.dsa_topk import dsa_topk

FILE = "autospec.kernels.dsa_indexer_logits"
PAGE = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op."""

    index_q: Tensor
    index_weights: Tensor
    index_pages: Tensor
    page_table: Tensor
    kv_lens: Tensor
    q_lens: Tensor | None = None
    scale: float = 0.3
    index_topk: int = 0
    index_scales: Tensor | None = None

    def in_float8(self) -> Case:
        """The same with keys quantised."""
        index_pages, index_scales = quantize_keys(self.index_pages)
        return replace(self, index_pages=index_pages, index_scales=index_scales)

    def keys(self) -> Tensor:
        """What the pages stand for."""
        return self.index_pages if self.index_scales is None else dequantize_keys(self.index_pages, self.index_scales)

    def arguments(self) -> list:
        return list(vars(self).values())


def make_case(seed, batch=2, q_len=3, *, heads=3, dim=8, max_len=40, **options) -> Case:
    """Ragged lengths, pages in a random order; pages behind a request's length hold NaN."""
    g = torch.Generator().manual_seed(seed)
    max_pages = (max_len + q_len + PAGE - 1) // PAGE + 1
    case = Case(
        index_q=torch.randn(batch, q_len, heads, dim, generator=g), index_weights=torch.randn(batch, q_len, heads, generator=g),
        index_pages=torch.randn(1 + batch * max_pages, PAGE, dim, generator=g),
        page_table=(1 + torch.randperm(batch * max_pages, generator=g)).reshape(batch, max_pages).int(),
        kv_lens=torch.randint(0, max_len + 1, (batch,), generator=g).int(), **options,
    )
    for b in range(batch):
        for slot in range(int(case.kv_lens[b]) + q_len, max_pages * PAGE):
            case.index_pages[case.page_table[b, slot // PAGE], slot % PAGE] = float("nan")
    case.index_pages[0] = float("nan")
    return case


def check(case: Case, out: Tensor, tolerance: float = 4e-6) -> None:
    """Against one score at a time, where the op promises one."""
    batch, q_len, heads, _ = case.index_q.shape
    assert out.shape == (batch, q_len, case.page_table.shape[1] * PAGE)
    assert out.dtype == torch.float32
    for b in range(batch):
        length = int(case.kv_lens[b]) + q_len
        slots = torch.arange(length)
        keys = case.keys()[case.page_table[b].long()[slots // PAGE], slots % PAGE].double()
        if length <= case.index_topk:
            continue
        for n in range(q_len if case.q_lens is None else int(case.q_lens[b])):
            expected = torch.zeros(length).double()
            for h in range(heads):
                score = keys @ case.index_q[b, n, h].double() * case.scale
                expected += case.index_weights[b, n, h].double() * score.clamp(min=0)
            torch.testing.assert_close(out[b, n, :length].double(), expected, rtol=tolerance, atol=tolerance)


sizes = st.fixed_dictionaries({
    "heads": st.sampled_from([1, 3, 16, 20]), "dim": st.sampled_from([4, 12, 16]), "max_len": st.sampled_from([0, 40, 150]),
})  # fmt: skip


@settings(max_examples=12, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 19), sizes=sizes, index_topk=st.sampled_from([0, 30]),
       is_float8=st.booleans())  # fmt: skip
def test_equals_a_loop(interpreted, seed, q_len, sizes, index_topk, is_float8):
    case = make_case(seed, 2, q_len, **sizes, index_topk=index_topk)
    case = case.in_float8() if is_float8 else case
    check(case, dsa_indexer_logits(*case.arguments()))
    check(case, interpreted(FILE, "dsa_indexer_logits_triton", *case.arguments()))
    check(ragged := replace(case, q_lens=torch.tensor([q_len // 2, q_len]).int()), dsa_indexer_logits(*ragged.arguments()))
    check(ragged, interpreted(FILE, "dsa_indexer_logits_triton", *ragged.arguments()))


def test_half_precision_is_summed_in_float32(interpreted):
    case = make_case(2, heads=16, dim=16)
    half = replace(case, index_q=case.index_q.half(), index_pages=case.index_pages.half())
    check(half, dsa_indexer_logits(*half.arguments()))
    check(half, interpreted(FILE, "dsa_indexer_logits_triton", *half.arguments()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float8_keys_beside_queries_of_16_bits(interpreted, dtype):
    """Widened to what the queries are, which holds every float8: nothing more is rounded."""
    case = make_case(2, heads=16, dim=16)
    case = replace(case, index_q=case.index_q.to(dtype), index_pages=case.index_pages * 1e-3).in_float8()
    check(case, dsa_indexer_logits(*case.arguments()))
    if dtype == torch.float16:  # the interpreter's products know no bfloat16
        check(case, interpreted(FILE, "dsa_indexer_logits_triton", *case.arguments()))


def test_a_float8_key_that_is_no_number_leaves_the_others_alone():
    case = replace(make_case(3, 1, 1), kv_lens=torch.tensor([20]).int())
    case.index_pages[case.page_table[0, 2], 1] = float("nan")
    out = dsa_indexer_logits(*case.in_float8().arguments())[0, 0, :21]
    assert out.isnan().nonzero().flatten().tolist() == [2 * PAGE + 1]


def test_float8_keys_leave_most_of_a_selection_as_it_was():
    """Of random rows; the share is counted, so scales of other rows are seen in it."""
    torch.manual_seed(0)
    floats, rest = random_case(torch.device("cpu"), 1, 2, 900)
    floats = floats[0], floats[1], floats[2] * torch.rand(*floats[2].shape[:2], 1)
    rest = *rest[:4], 60
    same = same_selection(floats, rest)
    assert same.shape == (1, 2)
    assert 0.9 < float(same.min()) < 1
    shifted = lambda k: (quantize_keys(k)[0], quantize_keys(k)[1].roll(1, 1))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autospec.kernels.dsa_indexer_logits.quantize_keys", shifted)
        assert float(same_selection(floats, rest).max()) < 0.9


@pytest.mark.parametrize("is_float8", [False, True])
def test_a_node_does_not_depend_on_its_neighbours(interpreted, is_float8):
    """To the bit: N nodes in one call equal N calls of one."""
    wide = make_case(3, 2, 11)
    wide = wide.in_float8() if is_float8 else wide
    out = interpreted(FILE, "dsa_indexer_logits_triton", *wide.arguments())
    for n in range(11):
        parts = {name: getattr(wide, name)[:, n : n + 1] for name in ("index_q", "index_weights")}
        narrow = interpreted(FILE, "dsa_indexer_logits_triton", *replace(wide, kv_lens=wide.kv_lens + n, **parts).arguments())
        for b in range(2):
            seen = slice(0, int(wide.kv_lens[b]) + n + 1)
            assert torch.equal(out[b, n, seen], narrow[b, 0, seen])


PLANTED = {
    "no relu": lambda c: replace(c, index_q=torch.cat([c.index_q, -c.index_q], 2),
                                 index_weights=torch.cat([c.index_weights, -c.index_weights], 2)),
    "no scale": lambda c: replace(c, scale=1.0),
    "weights of another node": lambda c: replace(c, index_weights=c.index_weights.roll(1, 1)),
    "weights without their sign": lambda c: replace(c, index_weights=c.index_weights.abs()),
    "pages of another request": lambda c: replace(c, page_table=c.page_table.flip(0)),
    "skipped a request that is longer": lambda c: replace(c, index_topk=10**6),
    "scales of the next row": lambda c: replace(c.in_float8(), index_scales=c.in_float8().index_scales.roll(1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(interpreted, bug):
    case = replace(make_case(4), kv_lens=torch.tensor([30, 37]).int())
    case.index_pages.nan_to_num_(1.0)
    run = lambda c: interpreted(FILE, "dsa_indexer_logits_triton", *c.arguments())  # noqa: E731
    check(case, run(case))
    with pytest.raises(AssertionError):
        check(case, run(PLANTED[bug](case)))


class Indexed:
    """Stands in for transformers' cache: keeps the index keys."""

    def update_indexer(self, keys: Tensor, _layer: int) -> Tensor:
        self.keys = keys
        return keys


@pytest.mark.parametrize("model_type", ["deepseek_v32", "glm_moe_dsa"])
def test_selects_what_transformers_selects(model_type):
    """Their indexer over a whole sequence; ours over pages in two calls, chains of 9 and 4. With 16 heads no score is 0: a
    tie, which they leave to chance."""
    module = pytest.importorskip(f"transformers.models.{model_type}.modeling_{model_type}")
    prefix = {"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}[model_type]
    configs = pytest.importorskip(f"transformers.models.{model_type}.configuration_{model_type}")
    config = getattr(configs, f"{prefix}Config")(hidden_size=24, index_n_heads=16, index_head_dim=16, qk_rope_head_dim=8,
                                                 q_lora_rank=12, index_topk=5, num_hidden_layers=2)
    torch.manual_seed(6)
    indexer = getattr(module, f"{prefix}Indexer")(config, 0).float()
    length, dim = 13, 16
    hidden, q_resid, angles = torch.randn(2, length, 24), torch.randn(2, length, 12), torch.randn(2, length, 8)
    causal = torch.ones(length, length).tril().bool().expand(2, -1, -1)
    cache = Indexed()
    theirs = indexer(hidden, q_resid, (angles.cos(), angles.sin()), causal, None, past_key_values=cache)
    q = indexer.wq_b(q_resid).view(2, length, 16, dim)
    rotate = module.apply_rotary_pos_emb if model_type == "deepseek_v32" else module.apply_rotary_pos_emb_interleave
    turned, _ = rotate(q[..., :8], q[..., :8], angles.cos(), angles.sin(), unsqueeze_dim=2)
    q = torch.cat([turned, q[..., 8:]], -1).detach()
    weights = (indexer.weights_proj(hidden) * 16**-0.5).detach()
    pages, table = torch.zeros(9, PAGE, dim), torch.tensor([[4, 2, 7, 5], [1, 8, 3, 6]], dtype=torch.int32)
    for part in (slice(0, 9), slice(9, length)):
        kv_lens = torch.full((2,), part.start, dtype=torch.int32)
        append_latent(cache.keys[:, part, :8].detach(), cache.keys[:, part, 8:].detach(), pages, table, kv_lens)
        logits = dsa_indexer_logits(q[:, part], weights[:, part], pages, table, kv_lens, None, dim**-0.5, 5)
        ours = dsa_topk(logits, kv_lens, 5)
        for b in range(2):
            for n in range(part.stop - part.start):
                position = part.start + n
                expected = {int(slot) for slot in theirs[b, position] if slot <= position}
                assert {int(slot) for slot in ours[b, n]} - {-1} == expected


def test_why_not_triton():
    arguments = dsa_indexer_logits.bind(make_case(1).arguments(), {})
    assert "cpu" in why_not_triton(arguments)
    assert "float32" in why_not_triton({**arguments, "index_q": arguments["index_q"].bfloat16()})
    assert "float64" in why_not_triton({**arguments, "index_q": torch.zeros(1, 1, 2, 8).double(),
                                        "index_pages": arguments["index_pages"].double()})  # fmt: skip
    assert "80 index heads" in why_not_triton({**arguments, "index_q": torch.zeros(1, 1, 80, 8)})
    assert "contiguous" in why_not_triton({**arguments, "index_pages": arguments["index_pages"][:, ::2]})
    scaled = dsa_indexer_logits.bind(make_case(1).in_float8().arguments(), {})
    assert "cpu" in why_not_triton(scaled)
    assert "scaled keys are float8_e4m3fn" in why_not_triton({**scaled, "index_pages": arguments["index_pages"]})
    assert "pages torch.float8_e4m3fn" in why_not_triton({**scaled, "index_scales": None})
    assert "contiguous" in why_not_triton({**scaled, "index_scales": scaled["index_scales"].T})


@pytest.mark.cuda
@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_float8_keys_on_a_gpu(cuda, q_len):
    floats, rest = random_case(cuda, 3, q_len, 2100)
    index_pages, index_scales = quantize_keys(floats[2] * torch.rand(*floats[2].shape[:2], 1, device=cuda))
    keys = dequantize_keys(index_pages, index_scales)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        index_q = floats[0].to(dtype)
        expected = dsa_indexer_logits.reference(index_q.double(), floats[1].double(), keys.double(), *rest)[..., : 2100 + q_len]
        arguments = index_q, floats[1], index_pages, *rest, index_scales
        assert why_not_triton(dsa_indexer_logits.bind(arguments, {})) is None
        out = dsa_indexer_logits_triton(*arguments)[..., : 2100 + q_len]
        assert float((out - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_on_a_gpu(cuda, q_len):
    floats, rest = random_case(cuda, 3, q_len, 2100)
    expected = dsa_indexer_logits.reference(*(one.double() for one in floats), *rest)[..., : 2100 + q_len]
    out = dsa_indexer_logits_triton(*floats, *rest)[..., : 2100 + q_len]
    assert float((out - expected).abs().max() / expected.abs().max()) < 1e-5
