"""FlashInfer as further backends of paged_mla (extra `cuda`): chains only, its kernels mask causally.

    flashinfer_trtllm   TensorRT-LLM's decoding kernels on SM100 and SM103: plans nothing
    flashinfer_fa3      FA3 on Hopper: `plan` cuts the work on the host and wants the lengths there
    flashinfer_fa2      FA2 on SM80 and newer: as FA3

The pages go in as they are: what it calls ckv and kpe are strided views of a latent row. nvcc takes 20 s for one of them
(an H100's host, November 2026).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from autospec.kernels import flashinfer
from autospec.kernels.flashinfer import lengths_of, used_pages
from autospec.kernels.paged_mla import bench_cases, exact_result, paged_mla, paged_mla_triton
from autospec.kernels.timing import Measurement, deviation, time_graph

WORKSPACE = 128 << 20  # bytes; what FlashInfer's examples give it


def _not_for_flashinfer(args: Mapping[str, Any]) -> str | None:
    """What no MLA kernel of FlashInfer takes."""
    q_latent, q_rope, pages = args["q_latent"], args["q_rope"], args["latent_pages"]
    if (reason := flashinfer.why_not_here(q_latent, q_rope, pages)) is not None:
        return reason
    if not q_latent.dtype == q_rope.dtype == pages.dtype:
        return f"queries are {q_latent.dtype} and {q_rope.dtype}, pages {pages.dtype}"
    if q_latent.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q_latent.dtype} is not float16 or bfloat16"
    if not pages.is_contiguous():
        return "the pages are not contiguous"
    if args["tree_mask"] is not None:
        return "it masks causally and takes no tree mask"
    if args["sinks"] is not None:
        return "sinks are not handed to it"
    return None


def _not_planned(args: Mapping[str, Any]) -> str | None:
    """What neither FA2 nor FA3 takes: limits of _fa_common.py in FlashInfer 0.7.2."""
    if (reason := _not_for_flashinfer(args)) is not None:
        return reason
    if args["kv_lens"].device.type != "cpu":
        return "its plan needs kv_lens on the host; a captured step has none"
    _, q_len, heads, kv_lora_rank = args["q_latent"].shape
    if kv_lora_rank % 128 or args["q_rope"].shape[3] % 64:
        return f"a latent of {kv_lora_rank} and a rope part of {args['q_rope'].shape[3]} are no multiples of 128 and 64"
    tile = 64 if q_len * heads <= 64 else 128
    if q_len > 1 and tile % heads:
        return f"{heads} heads do not divide its tile of {tile} rows: where one ends inside a node, the node may lose its last slot"
    return None


def why_not_fa3(args: Mapping[str, Any]) -> str | None:
    """Hopper only, and three sizes of latents."""
    if (reason := _not_planned(args)) is not None:
        return reason
    major, minor = flashinfer.capability(args["q_latent"].device)
    if (major, minor) != (9, 0):
        return f"FA3 runs on SM90, this is SM{major}{minor}"
    if args["q_latent"].shape[3] not in (128, 256, 512):
        return f"a latent of {args['q_latent'].shape[3]} is not 128, 256 or 512"
    return None


def why_not_fa2(args: Mapping[str, Any]) -> str | None:
    """From Ampere on."""
    if (reason := _not_planned(args)) is not None:
        return reason
    major, minor = flashinfer.capability(args["q_latent"].device)
    return None if major >= 8 else f"FA2 runs on SM80 and newer, this is SM{major}{minor}"


def why_not_trtllm(args: Mapping[str, Any]) -> str | None:
    """What FlashInfer's documentation says of its precompiled kernels; we had no such GPU to run them on."""
    if (reason := _not_for_flashinfer(args)) is not None:
        return reason
    major, minor = flashinfer.capability(args["q_latent"].device)
    if (major, minor) not in ((10, 0), (10, 3)):
        return f"TensorRT-LLM's kernels are built for SM100 and SM103, this is SM{major}{minor}"
    sizes, page_size = (args["q_latent"].shape[3], args["q_rope"].shape[3]), args["latent_pages"].shape[1]
    if sizes not in ((512, 64), (256, 64)):
        return f"a latent of {sizes[0]} and a rope part of {sizes[1]} are not 512 or 256 and 64"
    if page_size not in (32, 64):
        return f"page size {page_size} is not 32 or 64"
    return None


@cache
def wrapper_of(backend: str, device: torch.device) -> Any:
    """A wrapper keeps its last plan; a plan is made before every run."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    return BatchMLAPagedAttentionWrapper(workspace, backend=backend)


def plan(wrapper: Any, arguments: Mapping[str, Any]) -> Any:
    """Plan paged_mla's arguments, kv_lens [B] on the host, and return what runs them: a function without arguments."""
    from flashinfer.mla import MLAPlanMetadata

    q_latent, q_rope, pages = arguments["q_latent"], arguments["q_rope"], arguments["latent_pages"]
    batch, q_len, heads, kv_lora_rank = q_latent.shape
    page_size, page_table = pages.shape[1], arguments["page_table"]
    lengths = lengths_of(arguments["kv_lens"], q_len, page_table, page_size)
    ends, used = used_pages(lengths, page_table, page_size)
    starts = torch.arange(batch + 1, dtype=torch.int32) * q_len
    wrapper.plan(
        metadata=MLAPlanMetadata.csr(starts, ends, used, lengths), num_heads=heads, head_dim_ckv=kv_lora_rank,
        head_dim_kpe=q_rope.shape[3], page_size=page_size, causal=q_len > 1, sm_scale=arguments["scale"],
        q_data_type=q_latent.dtype, kv_data_type=pages.dtype, query_layout="split", kv_cache_layout="packed",
    )
    q = q_latent.contiguous().flatten(0, 1), q_rope.contiguous().flatten(0, 1)
    return lambda: wrapper.run(query=q, kv_cache=pages).unflatten(0, (batch, q_len))


def attend_planned(backend: str, *args: Any) -> Tensor:
    """Plan and run, each time anew."""
    arguments = paged_mla.bind(args, {})
    out: Tensor = plan(wrapper_of(backend, arguments["q_latent"].device), arguments)()
    return out


@paged_mla.implementation("flashinfer_fa3", why_not=why_not_fa3)
def paged_mla_fa3(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, tree_mask: Tensor | None = None, scale: float = 1.0, sinks: Tensor | None = None,
) -> Tensor:
    """kv_lens [B] is on the host."""
    return attend_planned("fa3", q_latent, q_rope, latent_pages, page_table, kv_lens, q_lens, tree_mask, scale)


@paged_mla.implementation("flashinfer_fa2", why_not=why_not_fa2)
def paged_mla_fa2(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, tree_mask: Tensor | None = None, scale: float = 1.0, sinks: Tensor | None = None,
) -> Tensor:
    """kv_lens [B] is on the host."""
    return attend_planned("fa2", q_latent, q_rope, latent_pages, page_table, kv_lens, q_lens, tree_mask, scale)


@cache
def trtllm_workspace(device: torch.device) -> Tensor:
    """Its semaphores start at 0, and a kernel leaves them so."""
    flashinfer.hold_no_capture(device)
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


@torch.library.custom_op("autospec_flashinfer::trtllm_mla", mutates_args=())
def trtllm_mla(q: Tensor, latent_pages: Tensor, page_table: Tensor, lengths: Tensor, kv_lora_rank: int, scale: float) -> Tensor:
    """q [B, N, H, kv_lora_rank + rope], contiguous; lengths [B] int32, rows with the N new ones -> [B, N, H, kv_lora_rank]."""
    from flashinfer.mla import trtllm_batch_decode_with_kv_cache_mla

    out: Tensor = trtllm_batch_decode_with_kv_cache_mla(
        q, latent_pages.unsqueeze(1), trtllm_workspace(q.device), 128, kv_lora_rank, q.shape[3] - kv_lora_rank, page_table,
        lengths, page_table.shape[1] * latent_pages.shape[1], bmm1_scale=scale, bmm2_scale=1.0, backend="trtllm-gen",
    )
    return out.reshape(*q.shape[:3], kv_lora_rank)


@trtllm_mla.register_fake
def _(q, latent_pages, page_table, lengths, kv_lora_rank, scale):
    return q.new_empty(*q.shape[:3], kv_lora_rank)


@paged_mla.implementation("flashinfer_trtllm", why_not=why_not_trtllm)
def paged_mla_trtllm(
    q_latent: Tensor, q_rope: Tensor, latent_pages: Tensor, page_table: Tensor, kv_lens: Tensor,
    q_lens: Tensor | None = None, tree_mask: Tensor | None = None, scale: float = 1.0, sinks: Tensor | None = None,
) -> Tensor:
    """The precompiled kernels of TensorRT-LLM."""
    out: Tensor = torch.ops.autospec_flashinfer.trtllm_mla(
        torch.cat([q_latent, q_rope], -1), latent_pages, page_table.contiguous(),
        lengths_of(kv_lens, q_latent.shape[1], page_table, latent_pages.shape[1]), q_latent.shape[3], scale,
    )
    return out


def bench(device: torch.device) -> Iterator[Measurement]:
    """FA3 and FA2 on the chains of paged_mla, planned beforehand; the column of the reference is ours in Triton."""
    for case, moved, arguments in bench_cases(device):
        on_host = paged_mla.bind(arguments, {})
        on_host["kv_lens"] = on_host["kv_lens"].cpu()
        for backend, why_not in (("fa3", why_not_fa3), ("fa2", why_not_fa2)):
            if why_not(on_host) is None:
                run = plan(wrapper_of(backend, on_host["q_latent"].device), on_host)
                error = deviation(run(), exact_result(arguments))
                ours = time_graph(partial(paged_mla_triton, *arguments))
                yield Measurement(f"paged_mla, {backend.upper()}", case, time_graph(run), ours, moved, error)
