"""FlashInfer as further backends of paged_attention (extra `cuda`): what of it needs no plan, and the rest with the reason.

    flashinfer_xqa      XQA with packed tree masks: plans nothing, so a captured step can hold it
    flashinfer_trtllm   TensorRT-LLM's decoding kernels on SM100 and SM103: plans nothing, masks causally only
    flashinfer_fa2      FA2/FA3 over pages: `plan` cuts the work on the host and wants the lengths there

Its Python functions are wrapped in ops of ours: its own registrations are identity functions. XQA and FA2 are compiled by
nvcc at first use, into FlashInfer's own cache: 6 s and 30 s, FA3 64 s (16 cores beside an H100, 2026-11-21).
XQA rounds the splits' results to the tensors' dtype before it merges them: with a peaked softmax it was 2.7 times as far
from float64 as our Triton kernel. Its kernels add 0 times the V rows past a request's length in its last page, so pages
must be finite; ours start as zeros. Calls on one device run one after another: they share semaphores.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from autospec.kernels.launch import multiprocessors
from autospec.kernels.paged_attention import bench_cases, paged_attention, paged_attention_triton
from autospec.kernels.timing import Measurement, measure
from autospec.kernels.visible_slots import visible_slots

SERIES = "0.7."  # releases whose inner interface (get_xqa_module) this file was written against: 0.7.2
TILE_ROWS, TILE_SLOTS = 32, 256  # XQA's tile with N > 1: rows (node, head), and slots; mha.cu
MOST_NODES = 256  # a guess: past it XQA's passes over K and V, one for every 32 rows, are no longer decoding
SEMAPHORES = 1 << 16  # of 4 bytes; one for every tile of rows


@cache
def why_not_installed() -> str | None:
    """Why FlashInfer cannot be used in this process. It is not imported to find out, which takes 2 s: a broken one fails
    when it is measured."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return "flashinfer is not installed"
    return None if version.startswith(SERIES) else f"flashinfer {version} is not {SERIES}x, which this backend was written for"


def capability(device: torch.device) -> tuple[int, int]:
    """Major and minor number of a GPU's architecture."""
    return torch.cuda.get_device_capability(device)


def why_not_here(*tensors: Tensor) -> str | None:
    """Why no kernel of FlashInfer can run on these tensors, whatever they hold."""
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"the tensors are on {tensor.device}, not on a CUDA device"
    if not torch.cuda.is_available():
        return "there is no GPU here to compile for"
    return why_not_installed()


def _not_for_flashinfer(args: Mapping[str, Any]) -> str | None:
    """What no attention kernel of FlashInfer takes."""
    q, k_pages, v_pages = args["q"], args["k_pages"], args["v_pages"]
    if (reason := why_not_here(q, k_pages, v_pages)) is not None:
        return reason
    if not q.dtype == k_pages.dtype == v_pages.dtype:
        return f"queries are {q.dtype}, pages {k_pages.dtype} and {v_pages.dtype}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype} is not float16 or bfloat16"
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        return "the pages are not contiguous"
    if args["alibi_slopes"] is not None:
        return "it takes no ALiBi slopes"
    return None


def _not_for_decoding(args: Mapping[str, Any]) -> str | None:
    """What neither XQA nor TensorRT-LLM's kernels take; both have one head dim, and windows by slot."""
    q, head_dim = args["q"], args["k_pages"].shape[3]
    if (reason := _not_for_flashinfer(args)) is not None:
        return reason
    if args["v_pages"].shape[3] != head_dim:
        return f"head dims {head_dim} and {args['v_pages'].shape[3]} differ"
    if args["chunk"]:
        return "it has no chunked attention"
    if args["softcap"]:
        return "it has no softcap"
    if q.shape[1] > MOST_NODES:
        return f"{q.shape[1]} query tokens are prefill: it reads K and V again for every {TILE_ROWS} rows"
    return None


def why_not_xqa(args: Mapping[str, Any]) -> str | None:
    """Limits of jit/xqa.py and mha.cu in FlashInfer 0.7.2."""
    if (reason := _not_for_decoding(args)) is not None:
        return reason
    q, k_pages, tree_mask = args["q"], args["k_pages"], args["tree_mask"]
    batch, q_len, q_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = q_heads // kv_heads
    major, minor = capability(q.device)
    if major not in (9, 10, 12):
        return f"XQA runs on SM90, SM100 and SM120, this is SM{major}{minor}"
    if page_size not in (16, 32, 64, 128):
        return f"page size {page_size} is not 16, 32, 64 or 128"
    if head_dim % 16 or head_dim > 256:
        return f"head dim {head_dim} is not a multiple of 16 up to 256"
    if q_len == 1 and (group + 15) // 16 * 16 * padded_head(head_dim) > 8192:
        return f"{group} query heads to a K/V head of {head_dim} do not fit its 16 KB of queries"
    if tree_mask is not None and tree_mask.shape[1] != q_len:
        return f"q holds the last {q_len} of {tree_mask.shape[1]} tree nodes; its mask is of q's nodes only"
    if tree_mask is not None and args["window"]:
        return "its window counts slots, which are no positions in a tree"
    if batch * kv_heads * tiles_of(q_len, group) > SEMAPHORES:
        return f"{batch} x {q_len} nodes need more than {SEMAPHORES} semaphores"
    return None


def padded_head(head_dim: int) -> int:
    """Elements that a head takes in shared memory: 64, 128 or 256."""
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256


def tiles_of(q_len: int, group: int) -> int:
    """Tiles of rows (node, head) that one K/V head's queries make."""
    return 1 if q_len == 1 else (q_len * group + TILE_ROWS - 1) // TILE_ROWS


@cache
def xqa_module(dtype: torch.dtype, page_size: int, head_dim: int, group: int, is_windowed: bool, is_wide: bool) -> Any:
    """The compiled kernel. FlashInfer would compile one for every N; but N is a run-time argument of mha.cu, and only the
    kernel for fp8 pages is built for one N, where N heads fill no tile. So one width past that serves every N > 1."""
    from flashinfer.xqa import get_xqa_module

    width = max(TILE_ROWS // group + 1, 2) if is_wide else 1
    return get_xqa_module(dtype, dtype, page_size, head_dim, group, is_windowed, dtype, width)


def hold_no_capture(device: torch.device) -> None:
    """What stays for later calls must not belong to a CUDA graph's memory."""
    is_capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    assert not is_capturing, "a FlashInfer kernel runs once before it is captured: it compiles and makes its semaphores"


@cache
def semaphores(device: torch.device) -> Tensor:
    """Counters that a kernel leaves as it found them: 0."""
    hold_no_capture(device)
    return torch.zeros(SEMAPHORES, dtype=torch.int32, device=device)


@cache
def causal_mask(device: torch.device, batch: int, q_len: int) -> Tensor:
    """tree_mask [B, N, ceil(N/32)] int32 of a chain."""
    hold_no_capture(device)
    visible = torch.arange(1, q_len + 1, device=device)[:, None] - 32 * torch.arange((q_len + 31) // 32, device=device)
    words = (1 << visible.clamp(0, 32)) - 1
    return torch.where(words >= 2**31, words - 2**32, words).int().expand(batch, -1, -1).contiguous()


@torch.library.custom_op("autospec_flashinfer::xqa", mutates_args=())
def xqa(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, tree_mask: Tensor | None,
    sinks: Tensor | None, scale: float, window: int,
) -> Tensor:
    """q [B, N, Hq, D], contiguous; lengths [B] int32, rows with the N new ones; tree_mask [B, N, ceil(N/32)] (None: a
    chain); sinks [Hkv, G] float32 -> [B, N, Hq, D]. Bit j of word j // 32 is node j in its mask as in ours."""
    batch, q_len, q_heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group, capacity = q_heads // kv_heads, page_table.shape[1] * page_size
    if q_len > 1 and tree_mask is None:
        tree_mask = causal_mask(q.device, batch, q_len)
    processors = multiprocessors(q)
    splits = min(max(processors // (batch * kv_heads), 1), (capacity + TILE_SLOTS - 1) // TILE_SLOTS)
    rows = TILE_ROWS if q_len > 1 else group
    part = rows * padded_head(head_dim) * q.element_size() + 2 * 4 * max(rows, 64)  # a split's output, maxima and sums
    count = batch * kv_heads * tiles_of(q_len, group) * splits
    scratch = q.new_empty(count * part + 4096, dtype=torch.uint8)
    out = torch.empty_like(q)
    xqa_module(q.dtype, page_size, head_dim, group, window > 0, q_len > 1).xqa(
        False, processors, kv_heads, window, scale * head_dim**0.5, out, 1.0, q, sinks, k_pages, v_pages, None, None,
        page_table, capacity, lengths, batch, 1.0, semaphores(q.device), scratch, capability(q.device)[0] >= 9, q_len, None,
        tree_mask if q_len > 1 else None,
    )
    return out


@xqa.register_fake
def _(q, k_pages, v_pages, page_table, lengths, tree_mask, sinks, scale, window):
    return torch.empty_like(q)


def lengths_of(kv_lens: Tensor, q_len: int, page_table: Tensor, page_size: int) -> Tensor:
    """Rows with the N new ones; a finished row that has run past its table stays inside it."""
    return (kv_lens + q_len).clamp(max=page_table.shape[1] * page_size)


@paged_attention.implementation("flashinfer_xqa", why_not=why_not_xqa)
def paged_attention_xqa(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    tree_mask: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None,
) -> Tensor:
    """XQA; traced, so that Inductor fuses what prepares its arguments. A tree of one node sees all that is committed."""
    q_len = q.shape[1]
    if tree_mask is not None:
        tree_mask = tree_mask[:, :, : (q_len + 31) // 32].contiguous()
    if sinks is not None:
        sinks = sinks.float().reshape(k_pages.shape[2], -1)
    lengths = lengths_of(kv_lens, q_len, page_table, k_pages.shape[1])
    return torch.ops.autospec_flashinfer.xqa(
        q.contiguous(), k_pages, v_pages, page_table.contiguous(), lengths, tree_mask, sinks, scale, window
    )


def why_not_trtllm(args: Mapping[str, Any]) -> str | None:
    """What FlashInfer's documentation says of its precompiled kernels; we had no such GPU to run them on."""
    if (reason := _not_for_decoding(args)) is not None:
        return reason
    major, minor = capability(args["q"].device)
    if (major, minor) not in ((10, 0), (10, 3)):
        return f"TensorRT-LLM's kernels are built for SM100 and SM103, this is SM{major}{minor}"
    if args["k_pages"].shape[1] not in (16, 32, 64):
        return f"page size {args['k_pages'].shape[1]} is not 16, 32 or 64"
    if args["q"].shape[3] not in (64, 128, 256):
        return f"head dim {args['q'].shape[3]} is not 64, 128 or 256"
    if args["tree_mask"] is not None:
        return "it masks causally and takes no tree mask"
    return None


@torch.library.custom_op("autospec_flashinfer::trtllm", mutates_args=())
def trtllm(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, sinks: Tensor | None, scale: float,
    window: int,
) -> Tensor:
    """As xqa above, chains only; sinks [Hq] float32."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache

    workspace = q.new_empty(128 << 20, dtype=torch.uint8)  # what FlashInfer's examples give it
    capacity = page_table.shape[1] * k_pages.shape[1]
    out = trtllm_batch_decode_with_kv_cache(
        q.flatten(0, 1), (k_pages, v_pages), workspace, page_table, lengths, capacity, scale, 1.0, window - 1 if window else -1,
        sinks=sinks, kv_layout="NHD", backend="trtllm-gen", q_len_per_req=q.shape[1],
    )
    return out.reshape(q.shape)


@trtllm.register_fake
def _(q, k_pages, v_pages, page_table, lengths, sinks, scale, window):
    return torch.empty_like(q)


@paged_attention.implementation("flashinfer_trtllm", why_not=why_not_trtllm)
def paged_attention_trtllm(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    tree_mask: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The precompiled kernels of TensorRT-LLM."""
    return torch.ops.autospec_flashinfer.trtllm(
        q.contiguous(), k_pages, v_pages, page_table.contiguous(), lengths_of(kv_lens, q.shape[1], page_table, k_pages.shape[1]),
        None if sinks is None else sinks.float(), scale, window,
    )


def why_not_fa2(args: Mapping[str, Any]) -> str | None:
    """A graph's lengths are on its device: there the plan would wait for them, which a captured step cannot."""
    if (reason := _not_for_flashinfer(args)) is not None:
        return reason
    if args["kv_lens"].device.type != "cpu":
        return "its plan needs kv_lens on the host; a captured step has none"
    if args["sinks"] is not None:
        return "it takes no sinks"
    head_dims = args["k_pages"].shape[3], args["v_pages"].shape[3]
    if head_dims not in ((64, 64), (128, 128), (256, 256), (192, 128)):
        return f"head dims {head_dims[0]} and {head_dims[1]} are not 64, 128, 256 or 192 and 128"
    return None


def used_pages(lengths: Tensor, page_table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """lengths [B] on the host -> where each request's pages end among all that are used [B + 1] int32, and these pages."""
    pages = (lengths + page_size - 1) // page_size
    used = torch.arange(page_table.shape[1])[None, :] < pages[:, None]
    return torch.nn.functional.pad(pages.cumsum(0), (1, 0)).int(), page_table[used.to(page_table.device)]


@cache
def fa2_wrapper(device: torch.device, is_masked: bool) -> Any:
    """One for each kind: the first plan of a wrapper decides whether it is FA2's or FA3's, and FA3 takes no mask."""
    from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)  # what FlashInfer's examples give it
    return BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")


@paged_attention.implementation("flashinfer_fa2", why_not=why_not_fa2)
def paged_attention_fa2(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Tensor | None = None,
    tree_mask: Tensor | None = None, sinks: Tensor | None = None, scale: float = 1.0, window: int = 0, chunk: int = 0,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None,
) -> Tensor:
    """kv_lens [B] is on the host. What is not causal goes in as a mask of every slot; then FlashInfer takes FA2, not FA3."""
    batch, q_len, q_heads, head_dim = q.shape
    page_size, kv_heads, max_pages = k_pages.shape[1], k_pages.shape[2], page_table.shape[1]
    lengths = lengths_of(kv_lens, q_len, page_table, page_size)
    ends, used = used_pages(lengths, page_table, page_size)
    mask = None
    if tree_mask is not None or chunk:
        visible = visible_slots(kv_lens.to(q.device), q_len, max_pages * page_size, window, chunk, tree_mask)
        mask = torch.cat([visible[b, :, :length].flatten() for b, length in enumerate(lengths.tolist())])
    wrapper = fa2_wrapper(q.device, mask is not None)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32) * q_len, ends, used, (lengths - 1) % page_size + 1,
        q_heads, kv_heads, head_dim, page_size, v_pages.shape[3], mask, None, mask is None,
        sm_scale=scale, window_left=window - 1 if window and mask is None else -1, logits_soft_cap=softcap or None,
        q_data_type=q.dtype, kv_data_type=k_pages.dtype,
    )
    out = wrapper.run(q.contiguous().flatten(0, 1), (k_pages, v_pages))
    return out.unflatten(0, (batch, q_len))


def bench(device: torch.device) -> Iterator[Measurement]:
    """XQA on the cases of paged_attention; the column of the reference is ours in Triton."""
    for case, moved, exact, arguments in bench_cases(device):
        if why_not_xqa(paged_attention.bind(arguments, {})) is not None:
            continue

        def mine(arguments=arguments) -> Tensor:
            return paged_attention_xqa(*arguments)

        def ours(arguments=arguments) -> Tensor:
            return paged_attention_triton(*arguments)

        yield measure("paged_attention, XQA", case, mine, ours, moved, exact)
