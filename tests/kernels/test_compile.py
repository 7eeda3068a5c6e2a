"""Every kernel compiles for an H100 on a machine without one: the interpreter accepts what the compiler does not."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from autospec.kernels import filters, splits
from autospec.kernels.launch import triton

pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
            torch.int32: "*i32", torch.bool: "*i1", torch.float8_e4m3fn: "*fp8e4nv", torch.uint8: "*u8"}
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on an H100


class Compiler:
    """Stands in for wrap_triton: launching a kernel compiles it for sm_90 instead."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, int]] = []  # kernel, its wgmma instructions

    def __call__(self, kernel: Any, waits: bool = False) -> Any:
        assert waits == ("WAITS" in kernel.arg_names), f"{kernel.__name__} waits, or is launched as if it did"
        self.kernel = kernel
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert binary.metadata.shared <= SHARED_MEMORY, f"{self.kernel.__name__} needs {binary.metadata.shared} bytes"
        self.compiled.append((self.kernel.__name__, binary.asm["ptx"].count("wgmma.mma_async")))


def compile_call(monkeypatch: pytest.MonkeyPatch, file: str, function: str, *args: Any) -> list[str]:
    """Names of the kernels that a launcher would launch, all compiled."""
    return [name for name, _ in compiled(monkeypatch, file, function, *args)]


def compiled(monkeypatch: pytest.MonkeyPatch, file: str, function: str, *args: Any) -> list[tuple[str, int]]:
    """The same with the number of products on tensor cores, each as wide as the compiler made it."""
    module = importlib.import_module(f"autospec.kernels.{file}")
    if not isinstance(getattr(module, "wrap_triton", None), type(lambda: 0)):
        pytest.skip("kernels are interpreted in this process")
    compiler = Compiler()
    for one in (module, splits, filters):
        monkeypatch.setattr(one, "wrap_triton", compiler)
        if hasattr(one, "can_wait"):
            monkeypatch.setattr(one, "can_wait", lambda tensor: True)
    getattr(module, function)(*args)
    return compiler.compiled


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


LONG = torch.int64
LAUNCHES = {
    "append_rows": ("append_kv", "append_kv_triton", lambda: (
        torch.zeros(2, 8, 3, 80).bfloat16(), torch.zeros(2, 8, 3, 64).bfloat16(), torch.zeros(9, 16, 3, 80).bfloat16(),
        torch.zeros(9, 16, 3, 64).bfloat16(), ints(2, 4), ints(2))),
    "append_latent_rows": ("append_latent", "append_latent_triton", lambda: (
        torch.zeros(2, 8, 48).bfloat16(), torch.zeros(2, 8, 16).bfloat16(), torch.zeros(9, 16, 64).bfloat16(), ints(2, 4),
        ints(2))),
    "move_rows": ("compact_kv", "compact_kv_triton", lambda: (
        [torch.zeros(9, 16, 2, 64) for _ in range(11)], ints(2, 4), ints(2), ints(2, 9), ints(2))),
    "multiply_experts": ("experts", "experts_triton", lambda: (
        torch.zeros(8, 7168).bfloat16(), ints(8, 8, dtype=LONG), torch.zeros(8, 8), torch.zeros(1, 4096, 7168).bfloat16(),
        torch.zeros(1, 7168, 2048).bfloat16(), "silu")),
    "walk_to_root": ("tree_tables", "tree_tables_triton", lambda: (ints(2, 70),)),
    "follow_target": ("accept_tree", "accept_tree_triton", lambda: (
        ints(2, 60, dtype=LONG), ints(2, 60, dtype=LONG), ints(2, 60), 7)),
    "synthesize": ("synthesize_tokens", "synthesize_tokens_triton", lambda: (
        ints(2, 60, dtype=LONG), ints(2, 60, dtype=LONG), ints(2, 60), ints(2), ints(2, dtype=LONG), torch.zeros(7), 5000)),
    "find_suffix": ("ngram_propose", "ngram_propose_triton", lambda: (
        ints(2, 900, dtype=LONG), ints(2), ints(2), 7, 4, False)),
    "best_in_blocks": ("choose_tokens", "choose_greedy_triton", lambda: (torch.zeros(2, 3, 5000).bfloat16(),)),
    "pick_in_blocks": ("choose_tokens", "choose_tokens_triton", lambda: (
        torch.zeros(2, 3, 5000).bfloat16(), ints(2, 8, dtype=LONG), ints(2, 8), ints(2), ints(2, dtype=LONG),
        torch.ones(2), ints(2), torch.ones(2), torch.zeros(2), torch.ones(2), torch.zeros(2, 5000).bool(), 1)),
    "rank_candidates": ("grow_frontier", "grow_frontier_triton", lambda: (
        ints(2, 10, 10, dtype=LONG), torch.zeros(2, 10, 10), torch.zeros(2, 10), ints(2, 10), ints(2, 30, 3), ints(2), ints(2),
        3, 10)),
    "select_best": ("build_dynamic_tree", "build_dynamic_tree_triton", lambda: (
        ints(2, dtype=LONG), ints(2, 710, dtype=LONG), torch.zeros(2, 710), ints(2, 710), 60)),
    "multiply_rows": ("skinny_linear", "skinny_linear_triton", lambda: (
        torch.zeros(2, 7, 256), torch.zeros(384, 256), torch.zeros(384))),
    "stream_weight": ("fused_linear", "fused_linear_triton", lambda: (
        torch.zeros(1, 8, 4096).bfloat16(), torch.zeros(28672, 4096, dtype=torch.float8_e4m3fn), torch.zeros(28672).bfloat16(),
        torch.zeros(28672), torch.zeros(4096).bfloat16(), None, torch.zeros(1, 8, 14336).bfloat16(), 1e-5, "silu")),
    "stream_weight, the next norm prepared": ("fused_linear", "fused_linear_normed_triton", lambda: (
        torch.zeros(1, 60, 4096).bfloat16(), torch.zeros(4096, 4096).bfloat16(), torch.zeros(4096).bfloat16(), None, None, None,
        torch.zeros(1, 60, 128), torch.zeros(1, 60, 4096).bfloat16(), 1e-5, "")),
    "append_rotated_rows": ("append_rotated", "append_rotated_triton", lambda: (
        *(torch.zeros(1, 8, n, 128).bfloat16() for n in (32, 8, 8)), *(torch.zeros(1, 8, 128).bfloat16() for _ in range(2)),
        *(torch.zeros(9, 16, 8, 128).bfloat16() for _ in range(2)), ints(1, 8), ints(1))),
    "pick_greedy": ("rank_children", "rank_greedy_triton", lambda: (
        torch.zeros(2, 10, 5000).bfloat16(), 10, 1.0, ints(5000, dtype=LONG))),
    "pick_sampled": ("rank_children", "rank_sampled_triton", lambda: (
        torch.zeros(2, 10, 5000).bfloat16(), ints(2, dtype=LONG), ints(2, dtype=LONG), torch.ones(2), ints(2), torch.ones(2),
        torch.zeros(2), torch.ones(2), torch.zeros(2, 9000).bool(), ints(2, 10, 4, dtype=LONG), 10, 1.0,
        ints(5000, dtype=LONG))),
}


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_kernels_compile(monkeypatch, kernel):
    file, function, arguments = LAUNCHES[kernel]
    assert kernel.split(",")[0] in compile_call(monkeypatch, file, function, *arguments())


ATTENTION: dict[str, dict[str, Any]] = {
    "chain": {"q_len": 8}, "tree": {"q_len": 64, "has_tree": True}, "page 128": {"page": 128}, "page 8": {"page": 8},
    "many rows": {"q_len": 64, "has_tree": True, "batch": 16},
    "window, chunk, sinks, slopes": {"q_len": 40, "has_tree": True, "window": 100, "chunk": 64, "has_extras": True},
    "softcap, head dim 256": {"q_len": 9, "head_dim": 256, "softcap": 50.0},
    "head dim 512": {"q_len": 40, "head_dim": 512},
    "float32, head dim 512": {"q_len": 40, "head_dim": 512, "dtype": torch.float32},
}
DEFAULTS = {"batch": 1, "q_len": 8, "page": 16, "head_dim": 128, "dtype": torch.bfloat16, "window": 0, "chunk": 0,
            "softcap": 0.0, "has_tree": False, "has_extras": False}


@pytest.mark.parametrize("name", ATTENTION)
def test_paged_attention_compiles(monkeypatch, name):
    case = DEFAULTS | ATTENTION[name]
    batch, q_len, head_dim, dtype = case["batch"], case["q_len"], case["head_dim"], case["dtype"]
    pages = torch.zeros(3, case["page"], 8, head_dim, dtype=dtype)
    tree_mask = ints(batch, q_len, (q_len + 31) // 32) if case["has_tree"] else None
    extras = torch.zeros(32) if case["has_extras"] else None
    kernels = compile_call(
        monkeypatch, "paged_attention", "paged_attention_triton",
        torch.zeros(batch, q_len, 32, head_dim, dtype=dtype), pages, pages, ints(batch, 200), ints(batch),
        ints(batch) if case["has_extras"] else None, tree_mask, extras, 0.1, case["window"], case["chunk"],
        case["softcap"], extras,
    )
    assert kernels[0] == "attend_split"


LATENT: dict[str, dict[str, Any]] = {
    "chain": {}, "tree, sinks": {"q_len": 32, "has_tree": True}, "256 + 32, page 16": {"rank": 256, "rope": 32, "page": 16},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("name", LATENT)
def test_paged_mla_compiles(monkeypatch, name):
    """DeepSeek-V3's attention: 128 heads; 512 + 64 elements of 64 slots, twice, beside the queries."""
    case: dict[str, Any] = {"batch": 1, "q_len": 4, "rank": 512, "rope": 64, "page": 64, "dtype": torch.bfloat16, "has_tree": False}
    case |= LATENT[name]
    batch, q_len, rank, rope, dtype = (case[key] for key in ("batch", "q_len", "rank", "rope", "dtype"))
    kernels = compiled(
        monkeypatch, "paged_mla", "paged_mla_triton",
        torch.zeros(batch, q_len, 128, rank, dtype=dtype), torch.zeros(batch, q_len, 128, rope, dtype=dtype),
        torch.zeros(3, case["page"], rank + rope, dtype=dtype), ints(batch, 64), ints(batch), None,
        ints(batch, q_len, 1) if case["has_tree"] else None, 0.1, torch.zeros(128) if case["has_tree"] else None,
    )
    assert kernels[0][0] == "attend_latents"
    if (rank, dtype) == (512, torch.bfloat16):
        # 512 + 64 elements of 32 slots, 16 a product, and 64 slots of 256 elements; 72 where both groups of warps do all scores.
        assert kernels[0][1] == 36 + 4


@pytest.mark.parametrize(("dims", "page", "dtype"), [((128, 128), 64, torch.bfloat16), ((192, 256), 16, torch.float16),
                                                      ((128, 128), 64, torch.float32)])  # fmt: skip
def test_expand_latent_compiles(monkeypatch, dims, page, dtype):
    """DeepSeek-V3's and GLM-4.7-Flash's heads."""
    weight = torch.zeros(20, sum(dims), 512, dtype=dtype)
    pages = torch.zeros(9, page, 576, dtype=dtype)
    kernels = compile_call(monkeypatch, "expand_latent", "expand_latent_triton", pages, ints(2, 64), ints(2), weight[:, : dims[0]],
                           weight[:, dims[0] :], 512)  # fmt: skip
    assert kernels == ["expand_rows"]


DSA: dict[str, tuple[str, Any]] = {
    "index scores": ("score_slots", lambda: (
        "dsa_indexer_logits", torch.zeros(2, 4, 64, 128).bfloat16(), torch.zeros(2, 4, 64), torch.zeros(9, 64, 128).bfloat16(),
        ints(2, 64), ints(2), None, 0.1, 2048)),
    "index scores, float32, 16 heads, page 16": ("score_slots", lambda: (
        "dsa_indexer_logits", torch.zeros(2, 4, 16, 128), torch.zeros(2, 4, 16), torch.zeros(9, 16, 128), ints(2, 64), ints(2),
        ints(2), 0.1, 0)),
    "index scores, float8 keys": ("score_slots", lambda: (
        "dsa_indexer_logits", torch.zeros(2, 4, 64, 128).bfloat16(), torch.zeros(2, 4, 64),
        torch.zeros(9, 64, 128).to(torch.float8_e4m3fn), ints(2, 64), ints(2), None, 0.1, 2048, torch.zeros(9, 64))),
    "index scores, float32, float8 keys": ("score_slots", lambda: (
        "dsa_indexer_logits", torch.zeros(2, 4, 16, 128), torch.zeros(2, 4, 16), torch.zeros(9, 16, 128).to(torch.float8_e4m3fn),
        ints(2, 64), ints(2), ints(2), 0.1, 0, torch.zeros(9, 16))),
    "append index keys": ("append_key_rows", lambda: (
        "append_index_keys", torch.zeros(2, 4, 128).bfloat16(), torch.zeros(9, 64, 128).to(torch.float8_e4m3fn),
        torch.zeros(9, 64), ints(2, 64), ints(2))),
    "compacting float8 keys and scales": ("move_rows", lambda: (
        "compact_kv", [torch.zeros(9, 64), torch.zeros(9, 64, 128).to(torch.float8_e4m3fn)], ints(2, 4), ints(2), ints(2, 9),
        ints(2))),
    "selection": ("write_best", lambda: ("dsa_topk", torch.zeros(2, 4, 40960), ints(2), 2048, None, None)),
    "selection, short": ("select_row", lambda: ("dsa_topk", torch.zeros(2, 4, 8192), ints(2), 2048, None, None)),
    "selection, tree": ("write_best", lambda: ("dsa_topk", torch.zeros(2, 4, 40960), ints(2), 2048, ints(2), ints(2, 40, 2))),
    "sparse attention": ("combine_splits", lambda: (
        "paged_sparse_mla", torch.zeros(1, 1, 128, 512).bfloat16(), torch.zeros(1, 1, 128, 64).bfloat16(),
        torch.zeros(9, 64, 576).bfloat16(), ints(1, 64), ints(1, 1, 2048), 0.1, torch.zeros(128))),
    "sparse attention, float32": ("attend_selected", lambda: (
        "paged_sparse_mla", torch.zeros(2, 4, 128, 512), torch.zeros(2, 4, 128, 64), torch.zeros(9, 64, 576), ints(2, 64),
        ints(2, 4, 2048), 0.1)),
}


@pytest.mark.parametrize("name", DSA)
def test_sparse_attention_compiles(monkeypatch, name):
    """DeepSeek-V3.2's sizes."""
    kernel, arguments = DSA[name]
    op, *args = arguments()
    assert compile_call(monkeypatch, op, f"{op}_triton", *args)[-1] == kernel


def test_a_kernel_that_cannot_be_compiled_is_caught(monkeypatch):
    """A variable that is None before a loop and a tensor in it: the interpreter does not mind."""
    from autospec.kernels import launch

    @launch.jit
    def planted(p_x):
        b_x = None
        for i in range(2):
            b_x = launch.tl.load(p_x + i)
        launch.tl.store(p_x, b_x)

    with pytest.raises(Exception, match=r"not a triton value|planted"):
        Compiler()(planted)[(1,)](torch.zeros(2))
