"""FlashInfer behind paged_mla: refusals as facts, what is handed over, and on a GPU the result itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec.kernels import flashinfer, flashinfer_mla
from autospec.kernels.paged_mla import exact_result, paged_mla, random_case

FA3, FA2, TRTLLM = flashinfer_mla.why_not_fa3, flashinfer_mla.why_not_fa2, flashinfer_mla.why_not_trtllm
WHY_NOT = {"fa3": FA3, "fa2": FA2, "trtllm": TRTLLM}


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with an H100 and FlashInfer, as far as why_not asks; its architecture can be changed."""
    facts: dict[str, Any] = {"capability": (9, 0), "missing": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flashinfer, "capability", lambda device: facts["capability"])
    monkeypatch.setattr(flashinfer, "why_not_installed", lambda: facts["missing"])
    return facts


def spec(**changes: Any) -> dict[str, Any]:
    """Arguments of DeepSeek-V3's shape with a chain of 4, as FakeTensors on a GPU; sizes can be changed."""
    sizes = {"nodes": 4, "heads": 128, "rank": 512, "rope": 64, "page": 64, "dtype": torch.bfloat16, "device": "cuda",
             "lens_device": "cpu", "tree": False, "sinks": False} | changes
    nodes, device, dtype, heads = sizes["nodes"], sizes["device"], sizes["dtype"], sizes["heads"]
    with FakeTensorMode():
        return paged_mla.bind((), {
            "q_latent": torch.empty(2, nodes, heads, sizes["rank"], dtype=dtype, device=device),
            "q_rope": torch.empty(2, nodes, heads, sizes["rope"], dtype=dtype, device=device),
            "latent_pages": torch.empty(9, sizes["page"], sizes["rank"] + sizes["rope"], dtype=dtype, device=device),
            "page_table": torch.empty(2, 4, dtype=torch.int32, device=device),
            "kv_lens": torch.empty(2, dtype=torch.int32, device=sizes["lens_device"]),
            "tree_mask": torch.empty(2, nodes, 1, dtype=torch.int32, device=device) if sizes["tree"] else None,
            "sinks": torch.empty(heads, device=device) if sizes["sinks"] else None,
        })  # fmt: skip


NO_PLAN = "its plan needs kv_lens on the host; a captured step has none"
UNEVEN = "20 heads do not divide its tile of 128 rows: where one ends inside a node, the node may lose its last slot"
REFUSALS = [
    ((9, 0), {}, None, None, "TensorRT-LLM's kernels are built for SM100 and SM103, this is SM90"),
    ((9, 0), {"lens_device": "cuda"}, NO_PLAN, NO_PLAN, "TensorRT-LLM's kernels are built for SM100 and SM103, this is SM90"),
    ((10, 0), {"sinks": True}, *["sinks are not handed to it"] * 3),
    ((9, 0), {"tree": True}, *["it masks causally and takes no tree mask"] * 3),
    ((9, 0), {"dtype": torch.float32}, *["dtype torch.float32 is not float16 or bfloat16"] * 3),
    ((9, 0), {"device": "cpu"}, *["the tensors are on cpu, not on a CUDA device"] * 3),
    ((10, 0), {"nodes": 1, "heads": 20, "lens_device": "cuda"}, NO_PLAN, NO_PLAN, None),
    ((10, 3), {"heads": 20}, UNEVEN, UNEVEN, None),
    ((10, 3), {}, "FA3 runs on SM90, this is SM103", None, None),
    ((10, 0), {"page": 16}, "FA3 runs on SM90, this is SM100", None, "page size 16 is not 32 or 64"),
    ((10, 0), {"rank": 384}, "FA3 runs on SM90, this is SM100", None,
     "a latent of 384 and a rope part of 64 are not 512 or 256 and 64"),
    ((9, 0), {"rank": 384}, "a latent of 384 is not 128, 256 or 512", None,
     "TensorRT-LLM's kernels are built for SM100 and SM103, this is SM90"),
    ((7, 5), {"rope": 32}, *["a latent of 512 and a rope part of 32 are no multiples of 128 and 64"] * 2,
     "TensorRT-LLM's kernels are built for SM100 and SM103, this is SM75"),
    ((7, 5), {}, "FA3 runs on SM90, this is SM75", "FA2 runs on SM80 and newer, this is SM75",
     "TensorRT-LLM's kernels are built for SM100 and SM103, this is SM75"),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "changes", "fa3", "fa2", "trtllm"), REFUSALS)
def test_refusals(hopper, capability, changes, fa3, fa2, trtllm) -> None:
    hopper["capability"] = capability
    assert {name: why_not(spec(**changes)) for name, why_not in WHY_NOT.items()} == {"fa3": fa3, "fa2": fa2, "trtllm": trtllm}


def test_refusals_of_the_machine(hopper) -> None:
    hopper["missing"] = "flashinfer is not installed"
    assert {why_not(spec()) for why_not in WHY_NOT.values()} == {"flashinfer is not installed"}
    with FakeTensorMode():
        pages = torch.empty(9, 576, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        hopper["missing"] = None
        assert {why_not({**spec(), "latent_pages": pages}) for why_not in WHY_NOT.values()} == {"the pages are not contiguous"}


class FakeWrapper:
    """The documented meaning of FlashInfer's page format, as a loop over requests; the last queries end at the last slot."""

    def plan(self, *, metadata, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type,
             query_layout, kv_cache_layout):
        assert (query_layout, kv_cache_layout, q_data_type) == ("split", "packed", kv_data_type)
        starts, ends, _, lengths = metadata
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in metadata)
        assert all(x.device.type == "cpu" for x in (starts, ends, lengths))
        self.planned = (metadata, (num_heads, head_dim_ckv, head_dim_kpe), page_size, causal, sm_scale)

    def run(self, *, query, kv_cache):
        (starts, ends, used, lengths), sizes, page_size, causal, scale = self.planned
        assert (query[0].shape[1], query[0].shape[2], query[1].shape[2]) == sizes
        assert kv_cache.shape[1] == page_size
        outs = []
        for b in range(len(lengths)):
            length, count = int(lengths[b]), int(starts[b + 1] - starts[b])
            assert int(ends[b + 1] - ends[b]) == (length + page_size - 1) // page_size
            rows = kv_cache[used[ends[b] : ends[b + 1]].long()].flatten(0, 1)[:length]
            q = torch.cat([one[starts[b] : starts[b + 1]] for one in query], -1)
            scores = torch.einsum("nhd,td->hnt", q, rows) * scale
            here = torch.arange(length - count, length)[:, None]
            if causal:
                scores = scores.masked_fill(torch.arange(length)[None] > here, -torch.inf)
            outs.append(torch.einsum("hnt,td->nhd", scores.softmax(-1), rows[:, : sizes[1]]))
        return torch.cat(outs)


class Metadata:
    """Stands in for MLAPlanMetadata."""

    @staticmethod
    def csr(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


def stand_in(monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
    """A module flashinfer.mla that has these names."""
    module = ModuleType("flashinfer.mla")
    for name, value in names.items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)


def make_arguments(q_len: int, lens: list[int]) -> tuple[Any, ...]:
    """3 heads of 16 + 4, pages of 4 in a random order, float32; kv_lens on the host."""
    g = torch.Generator().manual_seed(q_len)
    q_latent, q_rope = (torch.randn(len(lens), q_len, 3, width, generator=g) for width in (16, 4))
    table = (1 + torch.randperm(len(lens) * 6, generator=g)).reshape(len(lens), 6).int()
    pages = torch.randn(1 + table.numel(), 4, 20, generator=g)
    return q_latent, q_rope, pages, table, torch.tensor(lens).int(), None, None, 0.3


@pytest.fixture
def run_fa3(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """The implementation on a CPU, with the stand-in for FlashInfer."""
    stand_in(monkeypatch, MLAPlanMetadata=Metadata)
    wrapper = FakeWrapper()
    monkeypatch.setattr(flashinfer_mla, "wrapper_of", lambda backend, device: wrapper)
    return flashinfer_mla.paged_mla_fa3


@pytest.mark.parametrize("q_len", [1, 5])
def test_what_fa3_is_handed(run_fa3, q_len) -> None:
    arguments = make_arguments(q_len, [0, 7, 16])
    torch.testing.assert_close(run_fa3(*arguments).double(), exact_result(arguments), rtol=4e-6, atol=4e-6)


def test_a_finished_row_past_its_table_stays_inside_it(run_fa3) -> None:
    arguments = make_arguments(4, [22, 5])
    out = run_fa3(*arguments)
    assert out.isfinite().all()
    torch.testing.assert_close(out[1].double(), exact_result(arguments)[1], rtol=4e-6, atol=4e-6)


PLANTED = {
    "the new rows are not counted": lambda kv_lens, q_len, page_table, page_size: (kv_lens + q_len - 1).clamp(min=1),
    "the new rows are counted twice": lambda kv_lens, q_len, page_table, page_size: kv_lens + 2 * q_len,
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(run_fa3, monkeypatch, bug) -> None:
    monkeypatch.setattr(flashinfer_mla, "lengths_of", PLANTED[bug])
    arguments = make_arguments(4, [3, 7])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run_fa3(*arguments).double(), exact_result(arguments), rtol=4e-6, atol=4e-6)


def test_what_trtllm_is_handed(monkeypatch) -> None:
    """The documented meaning: the lengths include the new rows, a page has one head."""
    calls: list[dict[str, Any]] = []

    def decode(query, kv_cache, workspace, nope, kv_lora_rank, rope, page_table, lengths, capacity, **options):
        calls.append({"query": query, "pages": kv_cache.shape, "page_table": page_table, "lengths": lengths, **options})
        assert (kv_lora_rank, rope, capacity) == (16, 4, 24)
        assert not workspace.any()
        return query[..., :kv_lora_rank] * 2

    stand_in(monkeypatch, trtllm_batch_decode_with_kv_cache_mla=decode)
    arguments = make_arguments(3, [2, 9])
    out = flashinfer_mla.paged_mla_trtllm(*arguments)
    assert torch.equal(out, arguments[0] * 2)
    (call,) = calls
    assert torch.equal(call["query"], torch.cat(arguments[:2], -1))
    assert torch.equal(call["lengths"], arguments[4] + 3)
    assert call["pages"] == (13, 1, 4, 20)
    assert torch.equal(call["page_table"], arguments[3])
    assert (call["bmm1_scale"], call["bmm2_scale"], call["backend"]) == (0.3, 1.0, "trtllm-gen")


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["fa3", "fa2"])
@pytest.mark.parametrize(("batch", "q_len"), [(1, 1), (3, 4)])
def test_on_the_gpu(cuda: torch.device, backend, batch, q_len) -> None:
    pytest.importorskip("flashinfer")
    floats, (table, kv_lens, *rest) = random_case(cuda, batch, q_len, 700, False)
    arguments = (*floats, table, kv_lens.cpu() - torch.arange(batch, dtype=torch.int32) * 69, *rest)
    (one,) = [one for one in paged_mla.implementations if one.backend == f"flashinfer_{backend}"]
    assert one.why_not(paged_mla.bind(arguments, {})) is None
    expected = exact_result((*arguments[:4], arguments[4].to(cuda), *arguments[5:]))
    out = one.op(*arguments)
    assert float((out.double() - expected).abs().max() / expected.abs().max()) < 2.0**-7
