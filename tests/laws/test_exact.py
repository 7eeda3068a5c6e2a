"""exact=True: what a chain computes and what plain decoding computes are the same bits, logits' inputs and caches alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import head, model
from torch import Tensor

import autospec
from autospec.errors import LoweringError, OptionError
from autospec.kernels.attention import attend
from autospec.kernels.ordered_attention import ordered_attention
from autospec.kernels.paged_attention import paged_attention
from autospec.kernels.registry import Implementation
from autospec.kernels.visible_slots import visible_slots

NEW = 40


def sum_apart(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, kv_lens: Tensor, q_lens: Any = None, tree_mask: Any = None,
    sinks: Any = None, scale: float = 1.0, window: int = 0, chunk: int = 0, softcap: float = 0.0, alibi_slopes: Any = None,
) -> Tensor:  # fmt: skip
    """Correct attention that sums committed rows and this call's rows apart, as kernels do that cut by length."""
    count = page_table.shape[1] * k_pages.shape[1]
    k, v = (pages[page_table.long()].reshape(q.shape[0], count, *pages.shape[2:]) for pages in (k_pages, v_pages))
    visible = visible_slots(kv_lens, q.shape[1], count, window, chunk, tree_mask)
    committed = torch.arange(count)[None] < kv_lens[:, None]
    parts = [attend(q, k, v * mask[..., None, None], visible, sinks, scale, softcap) for mask in (committed, ~committed)]
    return parts[0] + parts[1]


@pytest.fixture
def apart() -> Iterator[None]:
    """paged_attention with that implementation."""
    saved = list(paged_attention.implementations)
    name = "autospec_planted::sum_apart"
    schema = str(paged_attention.op._schema).removeprefix("autospec::paged_attention")
    op = torch.library.custom_op(name, sum_apart, mutates_args=(), schema=schema)
    op.register_fake(paged_attention.reference)
    planted = Implementation("planted", lambda args: None, torch.ops.autospec_planted.sum_apart.default, sum_apart)
    paged_attention.implementations[:] = [planted]
    yield
    paged_attention.implementations[:] = saved


def decode(speculation: Any, exact: Any) -> tuple[Tensor, list[Tensor], Any]:
    """Tokens, the target's caches, and the optimised model."""
    target = model("target")
    prompt = torch.randint(1, 60, (1, 9), generator=torch.Generator().manual_seed(4))
    fast = autospec.optimize(target, speculation, compile="eager", exact=exact, max_length=64, max_batch_size=1)
    tokens = fast.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=[])
    rows = [part for layer in range(2) for part in fast.session.committed_kv(0, layer, 9 + NEW - 1)]
    return tokens, rows, fast


DRAFTERS: dict[str, Any] = {
    "a twin": lambda: autospec.DraftTargetConfig(model("target"), 7), "a head": lambda: autospec.Eagle3Config(head("eagle"), 7),
    "n-grams": lambda: autospec.NGramConfig(7),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_chain_has_the_bits_of_plain_decoding(apart: None, name: str) -> None:
    tokens, rows, plain = decode(None, True)
    drafted, drafted_rows, fast = decode(DRAFTERS[name](), True)
    assert torch.equal(drafted, tokens)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(drafted_rows, rows, strict=True))
    for one in (plain, fast):
        step = one.program.graphs["step_7"].module
        assert step is not None
        assert any(node.target == ordered_attention.op for node in step.graph.nodes), "another attention would do"
    assert plain.metrics.mean_acceptance_length == 1.0


def test_steps_run_op_by_op_and_are_not_packaged(tmp_path: Path) -> None:
    """Inductor fuses a graph that drafts in another way than one that does not, and each fusion rounds in its own places."""
    fast = autospec.optimize(model("target"), None, exact=True, max_length=64)
    fast.generate([[5, 9, 2]], max_new_tokens=3, do_sample=False, pad_token_id=0)
    for graph in fast.program.graphs.values():
        assert graph.call is graph.module
        assert graph.is_compiled, "a GPU replays it"
    with pytest.raises(LoweringError, match="fusions round differently"):
        fast.save(tmp_path / "made", batch_sizes=(1,), compile="aot")
    saved = autospec.load(fast.save(tmp_path / "made", batch_sizes=(1,)))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(saved.generate([[5, 9, 2]], **options), fast.generate([[5, 9, 2]], **options))
    assert saved.program.graphs.keys() == fast.program.graphs.keys(), "a saved model is as exact as it was"
    assert all(graph.call is graph.module for graph in saved.program.graphs.values())


def test_without_it_they_differ(apart: None) -> None:
    """Nothing above would be noticed if rounding did not depend on where a token stands."""
    tokens, rows, _ = decode(None, False)
    drafted, drafted_rows, _ = decode(DRAFTERS["a twin"](), False)
    assert torch.equal(drafted, tokens), "float32: the tokens are equal anyway"
    assert not all(torch.equal(mine, theirs) for mine, theirs in zip(drafted_rows, rows, strict=True))


@pytest.mark.parametrize(
    ("speculation", "exact", "reason"),
    [
        ("auto", True, "'auto' has steps of several widths"), (autospec.NGramConfig(4), True, "steps of 5 nodes, not of 8"),
        (None, 1, "from 2 to 1024, got 1"), (None, "yes", "got 'yes'"),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused(speculation: Any, exact: Any, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        autospec.optimize(model("target"), speculation, compile="eager", exact=exact)


def test_trees_and_experts_are_refused() -> None:
    tree = autospec.Eagle3Config(head("eagle"), eagle_choices=[[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]])
    with pytest.raises(OptionError, match="exact decoding takes chains"):
        autospec.optimize(model("target"), tree, compile="eager", exact=True)
    with pytest.raises(OptionError, match="dense models with ordinary attention"):
        autospec.optimize(model("latent"), None, compile="eager", exact=True)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", ["inductor", "eager"])
def test_bfloat16_on_the_gpu(cuda: torch.device, compile: str) -> None:
    """Wide enough for tensor cores and split sums; a twin drafts, so every accept length up to 7 occurs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    target = LlamaForCausalLM(config).bfloat16().to(cuda).eval()
    prompt = torch.randint(1, 500, (1, 70), device=cuda)
    results = []
    for speculation in (None, autospec.DraftTargetConfig(target, 7), autospec.NGramConfig(7)):
        fast = autospec.optimize(target, speculation, compile=compile, exact=True, max_length=512, max_batch_size=1)
        tokens = fast.generate(prompt, max_new_tokens=300, do_sample=False, pad_token_id=0, eos_token_id=[])
        results.append([tokens, *(part for layer in range(3) for part in fast.session.committed_kv(0, layer, 369))])
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, results[0], strict=True))
