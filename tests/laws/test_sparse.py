"""Models that select their keys (DeepSeek sparse attention) decode as transformers does; planted bugs are caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import laws, models, tree_laws
from harness.laws import GREEDY, WARM
from harness.programs import Plant, Workshop, prompts_of
from torch import Tensor

from autospec.api import Limits, OptimizedModel
from autospec.assemble import capture_model
from autospec.config import DraftTargetConfig, NGramConfig
from autospec.errors import CaptureError
from autospec.ir.match import calls
from autospec.kernels.expand_requests import expand_requests
from autospec.program import CapturedModel
from autospec.tiny_models import lively_model, tiny_model
from autospec.zoo import reference_tokens

PROMPT_LENS, NEW_TOKENS = (19, 12, 5), 24
TYPES: dict[str, dict[str, Any]] = {"deepseek_v32": {}, "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
                                   "hy_v4": {"indexer_types": ["full", "shared"]}}  # fmt: skip
BOTH = pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
ONE_WORKER = pytest.mark.xdist_group("sparse")  # so that each model is captured once


def target(family: str, index_topk: int) -> tuple[Any, list[list[int]], CapturedModel]:
    pytest.importorskip(f"transformers.models.{family}")
    model, prompts, distinct = lively_model(
        family, PROMPT_LENS, NEW_TOKENS, index_topk=index_topk, num_hidden_layers=2, **TYPES[family]
    )
    assert distinct >= 8, "the greedy text collapsed, so comparing it says little"
    return model, prompts, capture_model(model)


@pytest.mark.parametrize("family", TYPES)
@pytest.mark.parametrize("index_topk", [4, 64])  # of 43 tokens 4 are selected, or all
def test_text_is_that_of_transformers(family: str, index_topk: int) -> None:
    """Greedy: generate's own tokens, whoever drafts. Seeded: those of plain decoding."""
    model, prompts, captured = target(family, index_topk)
    itself = DraftTargetConfig(captured, eagle_choices=[[0], [1], [0, 0], [1, 0]])
    draft, speculation = (captured, itself) if index_topk == 4 else (None, NGramConfig(max_draft_len=3))
    options, limits = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}, Limits(None, None, None)
    fast = OptimizedModel(captured, draft, speculation, "eager", limits, {})
    expected, _ = reference_tokens(model, prompts, NEW_TOKENS)
    assert torch.equal(fast.generate(prompts, do_sample=False, **options)[:, max(PROMPT_LENS) :], expected)
    if draft is not None:
        assert fast.metrics.mean_acceptance_length > 2.7
    elif family == "glm_moe_dsa":
        warm = {**options, "do_sample": True, "temperature": 0.8, "seed": 11}
        plain = OptimizedModel(captured, None, None, "eager", limits, {})
        assert torch.equal(fast.generate(prompts, **warm), plain.generate(prompts, **warm))


@ONE_WORKER
def test_selecting_changes_what_the_model_says() -> None:
    """Otherwise the comparisons say nothing about the selection."""
    sparse = models.model("shared")
    ids = torch.tensor([prompts_of(2, (40,))[0]])
    indexers = [layer.self_attn.indexer for layer in sparse.model.layers if layer.self_attn.indexer is not None]
    with torch.no_grad():
        selected = sparse(ids).logits
        for indexer in indexers:
            indexer.index_topk = 64
        everything = sparse(ids).logits
        for indexer in indexers:
            indexer.index_topk = sparse.config.index_topk
    assert len(indexers) == 2
    changed = (selected - everything).abs().amax((0, 2)) > 1e-3
    assert changed.tolist() == [False] * sparse.config.index_topk + [True] * (40 - sparse.config.index_topk)


@ONE_WORKER
def test_a_token_takes_latents_and_the_keys_of_its_own_indexers() -> None:
    config, captured = models.model("shared").config, models.captured("shared")
    assert captured.facts.num_kv_layers == 3
    assert captured.facts.bytes_per_token == (3 * (config.kv_lora_rank + config.qk_rope_head_dim) + 2 * config.index_head_dim) * 4


def test_an_indexer_whose_keys_mix_tokens_is_refused() -> None:
    """A selection hides behind attention, so the probe looks into it."""
    model = tiny_model("deepseek_v32", num_hidden_layers=1)
    indexer = model.model.layers[0].self_attn.indexer
    plain = indexer.wk.forward
    indexer.wk.forward = lambda x: plain(x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
    with pytest.raises(CaptureError, match="reaches other tokens past attention"):
        capture_model(model)


@ONE_WORKER
@pytest.mark.parametrize(("name", "sampling"), [("sparse", GREEDY), ("shared", WARM)], ids=["greedy", "sampled"])
def test_lossless_for_any_draft(workshop: Workshop, sampling: Any, name: str) -> None:
    laws.lossless_for_any_draft(workshop, sampling=sampling, target=name)


@ONE_WORKER
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 8])
def test_lossless_for_any_width(workshop: Workshop, next_n: int) -> None:
    """Drafts right for 0 to next_n - 1 tokens, in turn."""
    laws.lossless_for_any_draft(workshop, range(next_n), (next_n - 1,), target="sparse", new_tokens=20, draft_len=next_n - 1)


@ONE_WORKER
@BOTH
def test_lossless_for_any_tree(workshop: Workshop, sampling: Any) -> None:
    tree_laws.lossless_for_any_tree(workshop, 2, sampling, "sparse", truth=0.7)


def sparse_draft(workshop: Workshop) -> None:
    laws.lossless_for_any_draft(workshop, target="sparse")


def sparse_nodes(workshop: Workshop) -> None:
    tree_laws.lossless_for_any_tree(workshop, 2, GREEDY, "sparse", truth=0.7)


def shared_draft(workshop: Workshop) -> None:
    laws.lossless_for_any_draft(workshop, target="shared")


def sparse_tree(workshop: Workshop) -> None:
    """Target and draft select; the draft's index keys stand behind the target's."""
    tree_laws.draft_caches_stay_fresh(workshop, "sparse twin static", 9, "sparse")


def _sinks_forgotten(op: Any, *args: Any, sinks: Tensor, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


@ONE_WORKER
def test_lossless_with_sinks_and_not_without(workshop: Workshop) -> None:
    """Chains and trees, seeded; the same law catches a step that forgets what sinks take."""
    pytest.importorskip("transformers.models.hy_v4")
    laws.lossless_for_any_draft(workshop, sampling=WARM, target="sinks")
    tree_laws.lossless_for_any_tree(workshop, 2, WARM, "sinks", truth=0.7)
    plant = Plant("sinks forgotten", "paged_sparse_mla", _sinks_forgotten, ("step",))
    with pytest.raises(AssertionError):
        laws.lossless_for_any_draft(Workshop(plant), sampling=WARM, target="sinks")


@ONE_WORKER
def test_caches_of_target_and_draft_are_fresh(workshop: Workshop) -> None:
    sparse_tree(workshop)


WIDTH = 8  # of an index key; a latent row is 16 wide


def _keys_late(op: Any, latent: Tensor, k_rope: Tensor, pages: Tensor, page_table: Tensor, kv_lens: Tensor) -> None:
    op(latent, k_rope, pages, page_table, kv_lens + (pages.shape[2] == WIDTH))


def _end_one_late(op: Any, scores: Tensor, kv_lens: Tensor, *args: Any, **kwargs: Any) -> Any:
    return op(scores, kv_lens + 1, *args, **kwargs)


def _siblings_selected(op: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("tree_mask") is not None:
        kwargs["tree_mask"] = kwargs["tree_mask"] | torch.tensor([2, *[0] * (kwargs["tree_mask"].shape[2] - 1)]).int()
    return op(*args, **kwargs)


def _keys_not_moved(op: Any, pages: list[Tensor], *args: Any) -> None:
    op([one for one in pages if one.shape[2] != WIDTH], *args)


def _one_too_few(op: Any, scores: Tensor, kv_lens: Tensor, index_topk: int, *args: Any, **kwargs: Any) -> Any:
    return op(scores, kv_lens, index_topk - 1, *args, **kwargs)


def _weights_forgotten(op: Any, q: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Any:
    return op(q, torch.ones_like(weights), *args, **kwargs)


def _chunk_only(op: Any, scores: Tensor, kv_lens: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A later chunk of a prompt forgets what was committed before it."""
    slots = torch.arange(scores.shape[2])
    return op(scores.masked_fill((slots < kv_lens[:, None])[:, None], -1e9), kv_lens, *args, **kwargs)


PLANTS = [
    (Plant("index keys one slot late", "append_latent", _keys_late, ("step",)), sparse_draft),
    (Plant("causal end one late", "dsa_topk", _end_one_late, ("step",)), sparse_draft),
    (Plant("one key too few", "dsa_topk", _one_too_few), shared_draft),
    (Plant("head weights forgotten", "dsa_indexer_logits", _weights_forgotten), shared_draft),
    (Plant("chunks select among themselves", "dsa_topk", _chunk_only, ("prefill",)), sparse_draft),
    (Plant("siblings selected", "dsa_topk", _siblings_selected, ("step",)), sparse_nodes),
    (Plant("index keys not moved", "compact_kv", _keys_not_moved), sparse_nodes),
]


@ONE_WORKER
@pytest.mark.parametrize(("plant", "law"), PLANTS, ids=[plant.name for plant, _ in PLANTS])
def test_a_planted_bug_is_caught(plant: Plant, law: Callable[[Workshop], None]) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(plant))


def expanded_draft(workshop: Workshop) -> None:
    """Every token of a step is scored as a request of its own."""
    laws.lossless_for_any_draft(workshop, target="sparse")


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSPEC_KERNELS", "dsa_indexer_logits=expanded")


@ONE_WORKER
@pytest.mark.usefixtures("expanded")
def test_the_expanded_route_keeps_the_laws() -> None:
    workshop = Workshop()
    expanded_draft(workshop)
    sparse_tree(workshop)
    steps = [graph for session in workshop._sessions.values() for name, graph in session.program.graphs.items() if "step" in name]
    assert all(list(calls(step.module, expand_requests)) for step in steps)


def _not_request_major(op: Any, page_table: Tensor, kv_lens: Tensor, q_len: int, table: Tensor, lens: Tensor) -> None:
    op(page_table.roll(1, 0), kv_lens, q_len, table, lens)


@ONE_WORKER
@pytest.mark.usefixtures("expanded")
def test_a_planted_bug_of_the_expanded_route_is_caught() -> None:
    with pytest.raises(AssertionError):
        expanded_draft(Workshop(Plant("tokens of other requests", "expand_requests", _not_request_major, ("step",))))
