"""FlashInfer behind paged_attention: refusals as facts, what is handed over, and on a GPU the result itself."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from harness.attention import Case, check_attention, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec.kernels import flashinfer
from autospec.kernels.paged_attention import paged_attention
from autospec.kernels.tree_tables import tree_tables

XQA, TRTLLM, FA2 = flashinfer.why_not_xqa, flashinfer.why_not_trtllm, flashinfer.why_not_fa2


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with an H100 and FlashInfer, as far as why_not asks; its architecture can be changed."""
    facts: dict[str, Any] = {"capability": (9, 0), "missing": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flashinfer, "capability", lambda device: facts["capability"])
    monkeypatch.setattr(flashinfer, "why_not_installed", lambda: facts["missing"])
    return facts


def spec(**changes: Any) -> dict[str, Any]:
    """Arguments of Llama's shape with a tree of 8 nodes, as FakeTensors on a GPU; sizes and options can be changed."""
    sizes = {"batch": 2, "nodes": 8, "tree": 8, "heads": 32, "kv_heads": 8, "dim": 128, "v_dim": 128, "page": 16,
             "dtype": torch.bfloat16, "device": "cuda", "lens_device": "cuda"}
    options = {key: value for key, value in changes.items() if key not in sizes}
    sizes |= {key: value for key, value in changes.items() if key in sizes}
    batch, device, dtype, tree = sizes["batch"], sizes["device"], sizes["dtype"], sizes["tree"]
    with FakeTensorMode():
        arguments = {
            "q": torch.empty(batch, sizes["nodes"], sizes["heads"], sizes["dim"], dtype=dtype, device=device),
            "k_pages": torch.empty(99, sizes["page"], sizes["kv_heads"], sizes["dim"], dtype=dtype, device=device),
            "v_pages": torch.empty(99, sizes["page"], sizes["kv_heads"], sizes["v_dim"], dtype=dtype, device=device),
            "page_table": torch.empty(batch, 40, dtype=torch.int32, device=device),
            "kv_lens": torch.empty(batch, dtype=torch.int32, device=sizes["lens_device"]),
            "tree_mask": torch.empty(batch, tree, (tree + 31) // 32, dtype=torch.int32, device=device) if tree else None,
        }
    return paged_attention.bind((), {**arguments, **options})


REFUSALS = [
    (XQA, {}, None), (XQA, {"tree": 0}, None), (XQA, {"tree": 0, "window": 7}, None), (XQA, {"nodes": 1, "tree": 1}, None),
    (XQA, {"sinks": torch.zeros(32), "page": 128, "dtype": torch.float16}, None),
    (XQA, {"device": "cpu"}, "the tensors are on cpu, not on a CUDA device"),
    (XQA, {"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
    (XQA, {"alibi_slopes": torch.zeros(32)}, "it takes no ALiBi slopes"),
    (XQA, {"v_dim": 64}, "head dims 128 and 64 differ"), (XQA, {"chunk": 8}, "it has no chunked attention"),
    (XQA, {"softcap": 30.0}, "it has no softcap"),
    (XQA, {"nodes": 512, "tree": 0}, "512 query tokens are prefill: it reads K and V again for every 32 rows"),
    (XQA, {"page": 8}, "page size 8 is not 16, 32, 64 or 128"),
    (XQA, {"dim": 72, "v_dim": 72}, "head dim 72 is not a multiple of 16 up to 256"),
    (XQA, {"dim": 512, "v_dim": 512}, "head dim 512 is not a multiple of 16 up to 256"),
    (XQA, {"nodes": 1, "tree": 0, "heads": 71, "kv_heads": 1},
     "71 query heads to a K/V head of 128 do not fit its 16 KB of queries"),
    (XQA, {"tree": 30}, "q holds the last 8 of 30 tree nodes; its mask is of q's nodes only"),
    (XQA, {"window": 7}, "its window counts slots, which are no positions in a tree"),
    (XQA, {"batch": 3000, "nodes": 64, "tree": 64}, "3000 x 64 nodes need more than 65536 semaphores"),
    (TRTLLM, {"tree": 0}, "TensorRT-LLM's kernels are built for SM100 and SM103, this is SM90"),
    (FA2, {}, "its plan needs kv_lens on the host; a captured step has none"),
    (FA2, {"lens_device": "cpu"}, None), (FA2, {"lens_device": "cpu", "window": 3, "chunk": 2, "softcap": 5.0}, None),
    (FA2, {"lens_device": "cpu", "sinks": torch.zeros(32)}, "it takes no sinks"),
    (FA2, {"lens_device": "cpu", "dim": 80, "v_dim": 80}, "head dims 80 and 80 are not 64, 128, 256 or 192 and 128"),
]  # fmt: skip


@pytest.mark.parametrize(("why_not", "changes", "reason"), REFUSALS)
def test_refusals(hopper: dict[str, Any], why_not: Any, changes: dict[str, Any], reason: str | None) -> None:
    assert why_not(spec(**changes)) == reason


def test_refusals_of_the_machine(hopper: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hopper["capability"] = (8, 9)
    assert XQA(spec()) == "XQA runs on SM90, SM100 and SM120, this is SM89"
    hopper["capability"] = (10, 3)
    assert XQA(spec()) is None
    assert TRTLLM(spec()) == "it masks causally and takes no tree mask"
    assert TRTLLM(spec(tree=0, window=100)) is None
    assert TRTLLM(spec(tree=0, page=128)) == "page size 128 is not 16, 32 or 64"
    assert TRTLLM(spec(tree=0, dim=96, v_dim=96)) == "head dim 96 is not 64, 128 or 256"
    with FakeTensorMode():
        pages = torch.empty(99, 16, 128, 8, dtype=torch.bfloat16, device="cuda").transpose(2, 3)
        assert XQA({**spec(), "k_pages": pages}) == "the pages are not contiguous"
    hopper["missing"] = "flashinfer is not installed"
    assert {why_not(spec()) for why_not in (XQA, TRTLLM, FA2)} == {"flashinfer is not installed"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert XQA(spec()) == "there is no GPU here to compile for"


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is its inner interface that is called."""
    ask = flashinfer.why_not_installed.__wrapped__
    monkeypatch.setattr(importlib.metadata, "version", {"flashinfer-python": "0.7.3"}.__getitem__)
    assert ask() is None
    monkeypatch.setattr(importlib.metadata, "version", {"flashinfer-python": "0.8.0"}.__getitem__)
    assert ask() == "flashinfer 0.8.0 is not 0.7.x, which this backend was written for"

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert ask() == "flashinfer is not installed"


@pytest.mark.parametrize("q_len", [2, 31, 32, 33, 63, 64, 65, 100])
def test_the_mask_of_a_chain(q_len: int) -> None:
    chain = torch.arange(-1, q_len - 1, dtype=torch.int32).expand(2, -1)
    assert torch.equal(flashinfer.causal_mask(torch.device("cpu"), 2, q_len), tree_tables(chain)[0])


def attend_row(q: Tensor, k: Tensor, v: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    """q [D], k [T, D], v [T, D] -> [D]."""
    scores = k @ q * scale
    if sink is not None:
        scores = torch.cat([scores, sink.reshape(1).to(scores.dtype)])
    return torch.softmax(scores, 0)[: len(k)] @ v


class FakeXqa:
    """What XQA documents, in loops: `lengths` count the new rows, the last q_seq_len columns obey 16-bit mask words."""

    def __init__(self) -> None:
        self.built: list[tuple[Any, ...]] = []

    def get_xqa_module(self, *build: Any) -> FakeXqa:
        self.built.append(build)
        return self

    def xqa(self, is_fp8, processors, kv_heads, window, q_scale, out, out_scale, q, sinks, k_pages, v_pages, k_scales,
            v_scales, page_table, capacity, lengths, batch, kv_scale, semaphores, scratch, is_early, q_len, offsets, mask):
        assert (is_fp8, out_scale, kv_scale, k_scales, v_scales, offsets) == (False, 1.0, 1.0, None, None, None)
        assert capacity == page_table.shape[1] * k_pages.shape[1]
        assert all(x.is_contiguous() for x in (q, out, page_table, k_pages, v_pages))
        assert (mask is None) == (q_len == 1)
        page_size, head_dim = k_pages.shape[1], q.shape[3]
        words = None if mask is None else mask.contiguous().view(torch.int16)
        assert words is None or words.shape == (batch, q_len, (q_len + 31) // 32 * 2)
        for b in range(batch):
            length = int(lengths[b])
            assert length <= capacity, "the kernel would read past the page table"
            rows = [(int(page_table[b, s // page_size]), s % page_size) for s in range(length)]
            for n in range(q_len):
                here = length - q_len + n
                seen = [s for s in range(length) if not window or s > here - window]
                if words is not None:
                    seen = [s for s in seen if s < length - q_len
                            or int(words[b, n, (s - length + q_len) // 16]) >> (s - length + q_len) % 16 & 1]
                for h in range(q.shape[2]):
                    i_h, i_g = divmod(h, q.shape[2] // kv_heads)
                    k, v = (torch.stack([p[rows[s]][i_h] for s in seen]) for p in (k_pages, v_pages))
                    sink = None if sinks is None else sinks[i_h, i_g]
                    out[b, n, h] = attend_row(q[b, n, h], k, v, q_scale / head_dim**0.5, sink)


@pytest.fixture
def fake_xqa(hopper: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeXqa]:
    fake = FakeXqa()
    for name in ("flashinfer", "flashinfer.xqa"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules["flashinfer.xqa"], "get_xqa_module", fake.get_xqa_module, raising=False)
    flashinfer.xqa_module.cache_clear()
    yield fake
    flashinfer.xqa_module.cache_clear()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.sampled_from([1, 2, 5, 33, 40]), kind=st.sampled_from(["tree", "chain", "window"]),
       has_sinks=st.booleans(), words=st.integers(0, 1))
def test_what_xqa_is_handed(random_parents, seed, q_len, kind, has_sinks, words):
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeXqa()
        patch.setattr(flashinfer, "xqa_module", lambda *build: fake.get_xqa_module(*build))
        patch.setattr(flashinfer, "capability", lambda device: (9, 0))
        parents = random_parents(torch.Generator().manual_seed(seed), 2, q_len) if kind == "tree" else (2, q_len)
        sinks = torch.linspace(-1, 1, 4, dtype=torch.float64) if has_sinks else None
        case = make_case(seed, parents, page=16, dims=(16, 16), sinks=sinks, window=6 if kind == "window" else 0)
        case = case.to(torch.float32)
        arguments = case.arguments()
        if arguments[6] is not None:
            arguments[6] = torch.nn.functional.pad(arguments[6], (0, words))  # words may be left over
        check_attention(case, flashinfer.paged_attention_xqa(*arguments), 0.0)
        assert fake.built == [(torch.float32, 16, 16, 2, kind == "window", q_len > 1)]


def test_a_finished_row_past_its_table_stays_inside_it(fake_xqa: FakeXqa) -> None:
    case = make_case(1, (2, 4), page=16, dims=(16, 16)).to(torch.float32)
    full = case.page_table.shape[1] * 16
    case = replace(case, kv_lens=torch.tensor([full - 2, 5]).int())
    out = flashinfer.paged_attention_xqa(*case.arguments())
    assert out.isfinite().all()
    alone = Case(**{**vars(case), "q": case.q[1:], "page_table": case.page_table[1:], "kv_lens": case.kv_lens[1:]})
    check_attention(alone, out[1:], 0.0)


def test_one_build_serves_every_width(fake_xqa: FakeXqa) -> None:
    """nvcc takes seconds for each; only the width past which fp8's special case ends decides."""
    for q_len in (1, 2, 8, 40):
        case = make_case(2, (1, q_len), page=16, dims=(16, 16), group=4).to(torch.float32)
        flashinfer.paged_attention_xqa(*case.arguments())
    assert [build[7] for build in fake_xqa.built] == [1, 9]


PLANTED = {
    "the new rows are not counted": ("lengths_of", lambda kv_lens, q_len, page_table, page_size: kv_lens + q_len - 1),
    "a chain sees what follows": ("causal_mask", lambda device, batch, q_len: torch.full((batch, q_len, 1), -1).int()),
    "the new rows are counted twice": ("lengths_of", lambda kv_lens, q_len, page_table, page_size: kv_lens + 2 * q_len),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(fake_xqa: FakeXqa, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    case = make_case(7, (2, 4), page=16, dims=(16, 16)).to(torch.float32)
    check_attention(case, flashinfer.paged_attention_xqa(*case.arguments()), 0.0)
    name, wrong = PLANTED[bug]
    monkeypatch.setattr(flashinfer, name, wrong)
    with pytest.raises(AssertionError):
        check_attention(case, flashinfer.paged_attention_xqa(*case.arguments()), 0.0)


class FakeWrapper:
    """The documented meaning of FlashInfer's page format, as a loop over requests."""

    planned: Any = None

    def plan(self, rows, ends, pages, last, q_heads, kv_heads, dim, page_size, v_dim, mask, packed, is_causal, *, sm_scale,
             window_left, logits_soft_cap, q_data_type, kv_data_type):
        assert all(x.device.type == "cpu" and x.dtype == torch.int32 for x in (rows, ends, last))
        assert packed is None
        assert (mask is None) == is_causal
        self.planned = (rows.tolist(), ends.tolist(), pages.long(), last.tolist(), page_size, mask, sm_scale, window_left,
                        logits_soft_cap)

    def run(self, q, pages):
        rows, ends, indices, last, page_size, mask, scale, left, softcap = self.planned
        out, start = torch.zeros(*q.shape[:2], pages[1].shape[3], dtype=q.dtype), 0
        for b in range(len(rows) - 1):
            mine = indices[ends[b] : ends[b + 1]]
            length = (len(mine) - 1) * page_size + last[b]
            k, v = (p[mine].flatten(0, 1)[:length] for p in pages)
            count = rows[b + 1] - rows[b]
            here = torch.arange(length - count, length)[:, None]
            slot = torch.arange(length)[None, :]
            seen = slot <= here if mask is None else mask[start : start + count * length].reshape(count, length)
            start += count * length
            seen = seen & (slot >= here - left) if left >= 0 else seen
            group = q.shape[1] // k.shape[1]
            scores = torch.einsum("nhd,thd->hnt", q[rows[b] : rows[b + 1]], k.repeat_interleave(group, 1)) * scale
            scores = torch.tanh(scores / softcap) * softcap if softcap else scores
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            out[rows[b] : rows[b + 1]] = torch.einsum("hnt,thd->nhd", weights, v.repeat_interleave(group, 1))
        assert mask is None or start == len(mask)
        return out


FA2_CASES = {
    "chain": ((2, 5), {}), "window": ((2, 5), {"window": 6}), "chunk": ((2, 5), {"chunk": 8}),
    "softcap": ((2, 3), {"softcap": 2.0}), "tree": (9, {}), "tree and window": (9, {"window": 4}),
    "one node": ((3, 1), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FA2_CASES)
def test_what_fa2_is_handed(random_parents, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    parents, options = FA2_CASES[name]
    if isinstance(parents, int):
        parents = random_parents(torch.Generator().manual_seed(1), 2, parents)
    wrappers = {True: FakeWrapper(), False: FakeWrapper()}
    monkeypatch.setattr(flashinfer, "fa2_wrapper", lambda device, is_masked: wrappers[is_masked])
    case = make_case(3, parents, page=16, dims=(16, 16), **options).to(torch.float32)
    check_attention(case, flashinfer.paged_attention_fa2(*case.arguments()), 0.0)
    is_masked = name not in ("chain", "window", "softcap", "one node")
    assert wrappers[is_masked].planned is not None, "FA3 takes causal ones only"
    assert wrappers[not is_masked].planned is None


def test_what_trtllm_is_handed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented meaning: the lengths include the new rows, window_left counts what is left of a token."""
    calls: list[dict[str, Any]] = []

    def decode(q, pages, workspace, page_table, lengths, capacity, scale, v_scale, window_left, **options):
        calls.append({"q": q, "lengths": lengths, "capacity": capacity, "scale": scale, "left": window_left, **options})
        return q * 2

    module = ModuleType("flashinfer.decode")
    monkeypatch.setattr(module, "trtllm_batch_decode_with_kv_cache", decode, raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module)
    case = make_case(4, (2, 3), page=16, dims=(64, 64), window=9, sinks=torch.zeros(4, dtype=torch.float64)).to(torch.float32)
    out = flashinfer.paged_attention_trtllm(*case.arguments())
    assert torch.equal(out, case.q * 2)
    (call,) = calls
    assert call["q"].shape == (6, 4, 64)
    assert torch.equal(call["lengths"], case.kv_lens + 3)
    assert (call["left"], call["kv_layout"], call["backend"], call["q_len_per_req"]) == (8, "NHD", "trtllm-gen", 3)
    assert call["sinks"].shape == (4,)


GPU_CASES = {
    "decode": {"parents": (3, 1), "max_len": 700, "kv_heads": 8, "group": 4, "dims": (128, 128), "page": 16},
    "chain": {"parents": (3, 8), "max_len": 700, "kv_heads": 8, "group": 4, "dims": (128, 128), "page": 16},
    "tree": {"parents": 64, "max_len": 300, "kv_heads": 2, "group": 4, "dims": (128, 128), "page": 16},
    "wide tree": {"parents": 150, "max_len": 70, "kv_heads": 1, "group": 2, "dims": (64, 64), "page": 64},
    "short": {"parents": 9, "max_len": 3, "kv_heads": 2, "group": 4, "dims": (128, 128), "page": 16},
    "window and sinks": {"parents": (2, 5), "max_len": 300, "kv_heads": 2, "group": 8, "dims": (64, 64), "page": 32,
                         "window": 128, "sinks": torch.linspace(-2, 2, 16, dtype=torch.float64)},
    "head dim 256": {"parents": 7, "max_len": 150, "kv_heads": 2, "group": 5, "dims": (256, 256), "page": 128},
    "head dim 32": {"parents": (1, 7), "max_len": 700, "kv_heads": 2, "group": 4, "dims": (32, 32), "page": 16},
    "head dim 80": {"parents": 12, "max_len": 150, "kv_heads": 3, "group": 1, "dims": (80, 80), "page": 16},
}  # fmt: skip
ON_GPU = [("xqa", name) for name in GPU_CASES] + [("fa2", name) for name in ("decode", "chain", "tree")]


@pytest.mark.cuda
@pytest.mark.parametrize(("backend", "name"), ON_GPU)
def test_on_the_gpu(random_parents, cuda: torch.device, backend: str, name: str) -> None:
    pytest.importorskip("flashinfer")
    options = dict(GPU_CASES[name])
    parents = options.pop("parents")
    if isinstance(parents, int):
        parents = random_parents(torch.Generator().manual_seed(parents), 2, parents)
    case = make_case(15, parents, **options, scale=options["dims"][0] ** -0.5)
    for dtype, unit in {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.items():
        if dtype == torch.float16 and (backend, name) != ("xqa", "tree"):
            continue  # each dtype and shape costs nvcc 10 s and more
        half = case.to(dtype)
        arguments = half.to(cuda).arguments()
        if backend == "fa2":
            arguments[4] = half.kv_lens
        (one,) = [one for one in paged_attention.implementations if one.backend == f"flashinfer_{backend}"]
        assert one.why_not(paged_attention.bind(arguments, {})) is None
        for _ in range(2):  # the second call finds the semaphores as the first left them
            check_attention(half, one.op(*arguments), unit)


@pytest.mark.cuda
def test_xqa_in_a_captured_graph(random_parents, cuda: torch.device) -> None:
    """Inductor sees what prepares its arguments; a replay reads the lengths as they are then."""
    pytest.importorskip("flashinfer")
    parents = random_parents(torch.Generator().manual_seed(5), 2, 8)
    case = make_case(16, parents, max_len=600, kv_heads=8, group=4, dims=(128, 128), page=16, scale=128**-0.5)
    case = case.to(torch.bfloat16)
    arguments = case.to(cuda).arguments()
    attend = torch.compile(lambda *tensors: torch.ops.autospec_flashinfer_xqa.paged_attention(*tensors), fullgraph=True)
    for _ in range(2):
        attend(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(*arguments)
    for lens in ([3, 599], [77, 0]):
        moved = replace(case, kv_lens=torch.tensor(lens).int())
        arguments[4].copy_(moved.kv_lens)
        graph.replay()
        check_attention(moved, out, 2.0**-8)
