"""Every op of the registry: its schema tells the truth, its fake agrees with it, its implementations fit it."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import hopper
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from autospec.kernels.launch import preparing_launches
from autospec.kernels.registry import DIRECT, LAUNCHES, KernelOp, find, load_all

B, N, L, T, V = 2, 5, 2, 24, 40
HQ, HKV, D, DV, P, PAGES = 4, 2, 8, 6, 4, 5


def integers(high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, high, shape, dtype=dtype)


# One name per thing: an argument's name decides its shape and dtype, whatever the op.
ARGUMENTS = {
    "tokens": lambda: integers(V, B, T),
    "draft_tokens": lambda: integers(V, B, N), "target_tokens": lambda: integers(V, B, N),
    "new_tokens": lambda: integers(V, B, N - 1), "drafts": lambda: integers(V, B, L),
    "tree_parents": lambda: torch.tensor([[-1, 0, 0, 1, 3], [-1, 0, -1, 2, 1]], dtype=torch.int32),
    "new_parents": lambda: torch.tensor([[-1, 0, 1, 2], [-1, 0, 1, -1]], dtype=torch.int32),
    "tree_mask": lambda: torch.tensor([[[1], [3], [5], [11], [27]]] * B, dtype=torch.int32),
    "depth": lambda: torch.tensor([[0, 1, 1, 2, 3]] * B, dtype=torch.int32),
    "accept_length": lambda: torch.tensor([2, 0], dtype=torch.int32),
    "accept_path": lambda: torch.tensor([[0, 1, 3], [0, -1, -1]], dtype=torch.int32),
    "bonus_token": lambda: integers(V, B), "accept_counts": lambda: integers(9, B, L + 1),
    "emitted": lambda: torch.tensor([[3, 4, -1], [5, -1, -1]]), "eos_ids": lambda: torch.tensor([1, 2]),
    "kv_lens": lambda: torch.tensor([7, 3], dtype=torch.int32),
    "q_lens": lambda: torch.tensor([4, 1], dtype=torch.int32),
    "prompt_lens": lambda: torch.tensor([5, 3], dtype=torch.int32),
    "starts": lambda: torch.tensor([2, 0], dtype=torch.int32),
    "limits": lambda: torch.tensor([18, 9], dtype=torch.int32), "finished": lambda: torch.tensor([False, True]),
    "seen": lambda: torch.rand(B, V) < 0.5, "row_keys": lambda: torch.tensor([5, -(2**40)]),
    "temperature": lambda: torch.tensor([0.0, 0.8]), "top_k": lambda: torch.tensor([0, 9], dtype=torch.int32),
    "top_p": lambda: torch.tensor([1.0, 0.9]), "min_p": lambda: torch.tensor([0.0, 0.1]),
    "repetition_penalty": lambda: torch.tensor([1.0, 1.3]), "logits": lambda: torch.randn(B, N, V),
    "hidden": lambda: torch.randn(B, N, 3), "q": lambda: torch.randn(B, N, HQ, D),
    "k": lambda: torch.randn(B, N, HKV, D), "v": lambda: torch.randn(B, N, HKV, DV),
    "k_pages": lambda: torch.randn(1 + B * PAGES, P, HKV, D), "v_pages": lambda: torch.randn(1 + B * PAGES, P, HKV, DV),
    "pages": lambda: [torch.randn(1 + B * PAGES, P, HKV, D) for _ in range(3)],
    "page_table": lambda: (1 + torch.arange(B * PAGES, dtype=torch.int32)).reshape(B, PAGES),
    "latent": lambda: torch.randn(B, N, 8), "k_rope": lambda: torch.randn(B, N, 4),
    "latent_pages": lambda: torch.randn(1 + B * PAGES, P, 12), "q_latent": lambda: torch.randn(B, N, HQ, 8),
    "q_rope": lambda: torch.randn(B, N, HQ, 4), "q_nope": lambda: torch.randn(B, HQ, N, 5),
    "index_q": lambda: torch.randn(B, N, 3, 8), "index_weights": lambda: torch.randn(B, N, 3),
    "index_pages": lambda: torch.randn(1 + B * PAGES, P, 8), "index_topk": lambda: 6,
    "index_scales": lambda: torch.rand(1 + B * PAGES, P), "index_k": lambda: torch.randn(B, N, 8),
    "indices": lambda: torch.tensor([0, 2, 4, -1], dtype=torch.int32).expand(B, N, -1).contiguous(),
    "expanded_table": lambda: integers(9, B * N + 2, PAGES, dtype=torch.int32),
    "expanded_lens": lambda: integers(9, B * N + 2, dtype=torch.int32),
    "w_uk": lambda: torch.randn(HQ, 5, 8), "w_uv": lambda: torch.randn(HQ, 6, 8),
    "top_k_index": lambda: torch.tensor([[0, 2], [1, 3], [3, 4], [2, 1], [-1, 0], [2, 3]]),
    "top_k_weights": lambda: torch.rand(6, 2), "gate_up": lambda: torch.randn(4, 6, 7), "down": lambda: torch.randn(4, 7, 3),
    "sinks": lambda: torch.randn(HQ), "scale": lambda: 0.3, "window": lambda: 6, "chunk": lambda: 4,
    "softcap": lambda: 5.0,
    "alibi_slopes": lambda: torch.linspace(0.1, 0.5, HQ),
    "max_draft_len": lambda: L, "max_matching_ngram_size": lambda: 3, "is_use_oldest": lambda: False,
    "index": lambda: torch.tensor([7, 3]), "path_tokens": lambda: integers(V, B, N, 2), "draft_temperature": lambda: 0.9,
    "d2t": lambda: torch.arange(V).flip(0) - torch.arange(V), "child_tokens": lambda: integers(V, B, 3, 3),
    "child_log_probs": lambda: -torch.rand(B, 3, 3), "parent_scores": lambda: -torch.rand(B, 3),
    "parent_history": lambda: integers(3, B, 3, dtype=torch.int32),
    "grown_mask": lambda: torch.ones(B, 3, 1, dtype=torch.int32), "level": lambda: 1, "root_token": lambda: integers(V, B),
    "scores": lambda: -torch.rand(B, T), "max_total_draft_tokens": lambda: 6,
    "parents": lambda: torch.arange(-1, T - 1, dtype=torch.int32).expand(B, -1).contiguous(),
    "x": lambda: torch.randn(B, N, 7), "weight": lambda: torch.randn(6, 7), "bias": lambda: torch.randn(6),
    "nodes": lambda: integers(N, B, 3, dtype=torch.int32), "is_new": lambda: torch.tensor([True, False]),
    "log_probs": lambda: -torch.rand(B, L), "node_parents": lambda: torch.tensor([-1, 0, 0], dtype=torch.int32),
    "node_depth": lambda: torch.tensor([0, 1, 1], dtype=torch.int32), "rank_counts": lambda: integers(9, B, 4),
    "rows": lambda: torch.randn(N, 7), "ends": lambda: torch.tensor([2, 2, N], dtype=torch.int32),
    "cos": lambda: torch.randn(B, N, D), "sin": lambda: torch.randn(B, N, D), "scales": lambda: torch.rand(128) + 0.5,
    "norm_weight": lambda: torch.rand(96) + 0.5, "next_norm": lambda: torch.rand(64) + 0.5, "eps": lambda: 1e-5,
    "squares": lambda: torch.rand(B, N, 3), "residual": lambda: torch.randn(B, N, 64), "activation": lambda: "silu",
    "max_position": lambda: 30, "q_len": lambda: N, "count": lambda: 3, "first_node": lambda: 0,
    "rates": lambda: torch.tensor([0.9, 0.4]), "vocab_size": lambda: V,
}
# Where an op's layout is another: attention comes as captured, heads before tokens; a prefill chunk chooses one token.
SPECIAL = {
    "attention": {
        "q": lambda: torch.randn(B, HQ, N, D), "k": lambda: torch.randn(B, HKV, N, D),
        "v": lambda: torch.randn(B, HKV, N, DV),
    },
    **{
        name: {
            "x": lambda: torch.randn(B, N, 96), "weight": lambda: torch.randn(128, 96), "bias": lambda: torch.randn(128),
        }
        for name in ("fused_linear", "fused_linear_normed")
    },
    "grouped_mm": {"weight": lambda: torch.randn(3, 7, 6)},
    "experts": {"x": lambda: torch.randn(6, 7)},
    "expand_latent": {"q_len": lambda: N},
    "dsa_indexer_logits": {"index_scales": lambda: None},
    "append_index_keys": {"index_pages": lambda: integers(256, 1 + B * PAGES, P, 8, dtype=torch.uint8)},
    "share_selection": {"first": lambda: 2, "q_len": lambda: 3, "indices": lambda: torch.zeros(B, 1, 4, dtype=torch.int32)},
    "top_keys": {"scores": lambda: torch.randn(B, N, N)},
    "latent_attention": {"q_rope": lambda: torch.randn(B, HQ, N, 4)},
    "commit_prompt": {
        "target_tokens": lambda: integers(V, B, 1), "kv_lens": lambda: torch.tensor([1, 3], dtype=torch.int32)
    },
}
# Where the glossary's float32 is for the reference only.
NARROW: dict[str, Any] = {
    "x": lambda: torch.randn(B, N, 128).bfloat16(), "weight": lambda: torch.randn(128, 128).bfloat16(), "scales": lambda: None,
    "bias": lambda: torch.randn(128).bfloat16(), "norm_weight": lambda: torch.rand(128).bfloat16(), "squares": lambda: None,
    "next_norm": lambda: torch.rand(64).bfloat16(), "residual": lambda: torch.randn(B, N, 64).bfloat16(),
}
FULL = {"kv_lens": lambda: torch.full((B,), PAGES * P - N, dtype=torch.int32), "q_lens": lambda: None}  # nothing is unspecified
ON_A_GPU = {"fused_linear": NARROW, "fused_linear_normed": NARROW, "dsa_indexer_logits": FULL, "expand_latent": FULL}

OPS = load_all()


def sample(op: KernelOp, special: dict[str, dict[str, Any]] = SPECIAL) -> dict[str, Any]:
    """Arguments for an op, by name."""
    known = {**ARGUMENTS, **SPECIAL.get(op.name, {}), **special.get(op.name, {})}
    missing = [name for name in op.signature.parameters if name not in known]
    assert not missing, f"{op.name} has arguments {missing} that the glossary in this file lacks: add them"
    return {name: known[name]() for name in op.signature.parameters}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    torch.manual_seed(0)
    opcheck(OPS[name].op, (), sample(OPS[name]))


@pytest.mark.parametrize("name", OPS)
def test_the_schema_tells_the_truth_about_mutation(name):
    """What is declared is written, nothing else is; and a caller can pass what it likes for the rest."""
    torch.manual_seed(0)
    op = OPS[name]
    arguments = sample(op)
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
    op(**arguments)
    for key, value in arguments.items():
        if key not in op.mutates and isinstance(value, Tensor):
            assert torch.equal(value, before[key]), f"{name} writes {key} and does not say so"


def test_an_undeclared_mutation_is_caught():
    """opcheck must be able to fail: a reference that writes its argument without saying so."""
    library = torch.library.custom_op("autospec_planted::forgetful", forgetful, mutates_args=())
    library.register_fake(lambda x: torch.empty_like(x))
    with pytest.raises(Exception, match=r"mutat|alias"):
        opcheck(torch.ops.autospec_planted.forgetful.default, (torch.zeros(3),))


def forgetful(x: Tensor) -> Tensor:
    x.add_(1)
    return x.clone()


@pytest.mark.parametrize("name", OPS)
def test_implementations_have_the_reference_signature(name):
    reference = inspect.signature(OPS[name].reference)
    for implementation in OPS[name].implementations:
        assert inspect.signature(implementation.function) == reference, implementation.backend


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.implementations])
def test_why_not_states_a_fact_on_a_cpu(name):
    op = OPS[name]
    for implementation in op.implementations:
        if implementation.backend == "cpu":
            continue
        reason = implementation.why_not(sample(op))
        assert reason is not None
        assert "cpu" in reason or "not installed" in reason


CPU_OPS = [name for name, op in OPS.items() if any(one.backend == "cpu" for one in op.implementations)]


@pytest.mark.parametrize("name", CPU_OPS)
def test_opcheck_of_cpu(name):
    torch.manual_seed(0)
    (implementation,) = [one for one in OPS[name].implementations if one.backend == "cpu"]
    assert implementation.why_not(sample(OPS[name])) is None
    opcheck(implementation.op, (), sample(OPS[name]))


def test_a_missing_compiler_is_a_fact_and_the_reference_runs(monkeypatch):
    """The op is there whatever happens: until its library is loaded it is the reference."""
    from torch._inductor.codecache import CppCodeCache

    from autospec.kernels import native

    def fail(*_):
        raise FileNotFoundError("no g++")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    monkeypatch.setattr(native, "_paths", {})
    reason = native.why_not_built.__wrapped__("paged_attention")
    assert reason is not None
    assert "no g++" in reason
    code = ("import torch; from autospec.kernels.paged_attention import paged_attention as op; import pickle, sys; "
            "args = pickle.load(sys.stdin.buffer); torch.testing.assert_close("
            "torch.ops.autospec_cpu.paged_attention(**args), op.reference(**args))")
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(sample(OPS["paged_attention"])), check=True,
                   cwd=Path(__file__).parents[2])


def test_why_not_refuses_what_a_tile_cannot_hold():
    op = OPS["paged_attention"]
    why_not = op.implementations[0].why_not
    wide = {**sample(op), "q": torch.zeros(1, 1, 2, 1024)}
    assert "1024" in str(why_not(wide))
    double = {key: wide[key].double() for key in ("q", "k_pages", "v_pages")}
    assert "torch.float64" in str(why_not(wide | double))
    assert "bfloat16" in str(why_not({**wide, "q": wide["q"].bfloat16()}))


def test_find_knows_canonical_ops_only():
    assert find(torch.ops.autospec.accept_tree.default) is OPS["accept_tree"]
    assert find(torch.ops.aten.add.Tensor) is None
    assert find("accept_tree") is None


def test_a_kernel_file_under_another_name_is_refused():
    """Hugging Face's package `kernels` exists; importing ours as `kernels` would register every op twice."""
    path = Path(__file__).parents[2] / "kernels" / "registry.py"
    spec = importlib.util.spec_from_file_location("kernels.registry", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"autospec\.kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.cuda
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.implementations])
def test_opcheck_of_triton(cuda, name):
    torch.manual_seed(0)
    op = OPS[name]
    def move(x):
        return [y.to(cuda) for y in x] if isinstance(x, list) else x.to(cuda) if isinstance(x, Tensor) else x
    arguments = {key: move(value) for key, value in sample(op, ON_A_GPU).items()}
    for implementation in op.implementations:
        if implementation.backend == "triton":
            assert implementation.why_not(arguments) is None
            opcheck(implementation.op, (), arguments)


DIRECTLY = [(op, one) for op in OPS.values() for one in op.implementations if one.op in DIRECT]


@pytest.mark.parametrize(("op", "one"), DIRECTLY, ids=[f"{one.backend}-{op.name}" for op, one in DIRECTLY])
def test_what_is_launched_directly_can_be_prepared(monkeypatch, op, one):
    """Its launcher asks fake tensors for nothing that they do not have; otherwise its kernels compile at their first launch."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    hopper.pretend(monkeypatch)
    compiled = []

    def record(self, *args, **kwargs):
        compiled.append(self.__name__)
        return SimpleNamespace()

    monkeypatch.setattr(triton.runtime.JITFunction, "_do_compile", record)
    mode = FakeTensorMode()

    def fake(x):
        if isinstance(x, list):
            return [fake(y) for y in x]
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=hopper.DEVICE) if isinstance(x, Tensor) else x

    arguments = sample(op, ON_A_GPU)
    with mode, preparing_launches():
        LAUNCHES[DIRECT[one.op]](**{name: fake(value) for name, value in arguments.items()})
    assert compiled
