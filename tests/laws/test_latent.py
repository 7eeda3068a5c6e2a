"""Models with latent caches decode as transformers does, and their pages hold latents only; planted bugs are caught."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import laws, tree_laws
from harness.laws import GREEDY, WARM
from harness.programs import Plant, Workshop
from torch import Tensor

from autospec.api import Limits, OptimizedModel
from autospec.assemble import capture_model
from autospec.config import DraftTargetConfig, NGramConfig, Speculation
from autospec.ir.match import aten, calls, is_call
from autospec.program import CapturedModel, state_bytes
from autospec.tiny_models import lively_model
from autospec.zoo import reference_tokens

TYPES = ("deepseek_v2", "deepseek_v3", "minicpm3", "glm4_moe_lite", "youtu")
FAMILIES = [pytest.param(name, marks=pytest.mark.xdist_group(f"latent {name}")) for name in TYPES]  # captured once
PROMPT_LENS, NEW_TOKENS = (19, 12, 5), 24
BOTH = pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])


@functools.cache
def target(family: str) -> tuple[Any, list[list[int]], CapturedModel]:
    model, prompts, distinct = lively_model(family, PROMPT_LENS, NEW_TOKENS, num_hidden_layers=2)
    assert distinct >= 8, "the greedy text collapsed, so comparing it says little"
    return model, prompts, capture_model(model)


def optimized(family: str, drafter: str) -> OptimizedModel:
    captured = target(family)[2]
    plans: dict[str, tuple[CapturedModel | None, Speculation]] = {
        "plain": (None, None), "chain": (None, NGramConfig(max_draft_len=4)),
        "tree": (captured, DraftTargetConfig(captured, eagle_choices=[[0], [1], [0, 0], [1, 0]])),
    }  # fmt: skip
    draft, speculation = plans[drafter]
    return OptimizedModel(captured, draft, speculation, "eager", Limits(None, None, None), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_takes_a_latent_and_a_rope_part(family: str) -> None:
    model, _, captured = target(family)
    config = model.config
    row = (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers * 4
    assert captured.facts.bytes_per_token == row
    assert captured.facts.num_kv_layers == config.num_hidden_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_that_of_transformers(family: str) -> None:
    """Greedy: generate's own tokens, drafted as a chain and as a tree. Seeded: the same text whoever drafts."""
    model, prompts, _ = target(family)
    expected, _ = reference_tokens(model, prompts, NEW_TOKENS)
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    for drafter in ("chain", "tree"):
        fast = optimized(family, drafter)
        assert torch.equal(fast.generate(prompts, do_sample=False, **options)[:, max(PROMPT_LENS) :], expected), drafter
    warm = {**options, "do_sample": True, "temperature": 0.8, "seed": 11}
    sampled = fast.generate(prompts, **warm)
    assert fast.metrics.mean_acceptance_length > 2.3, "a draft equal to the target is accepted along its first branch"
    assert torch.equal(sampled, optimized(family, "plain").generate(prompts, **warm))
    assert not torch.equal(sampled[:, max(PROMPT_LENS) :], expected)


@pytest.mark.xdist_group("latent deepseek_v3")
def test_pages_hold_latents_only_and_experts_are_spared() -> None:
    """All page buffers together take the captured bytes per token; every layer of experts is one op with spared rows."""
    captured, fast = target("deepseek_v3")[2], optimized("deepseek_v3", "chain")
    fast.generate([[5, 6, 7]], max_new_tokens=2, do_sample=False, pad_token_id=0)
    program = fast.program
    pages = {name: slot for name, slot in program.state_slots().items() if "pages." in name}
    size = program.shape.num_pages * program.shape.page_size * captured.facts.bytes_per_token
    assert {name.partition(".")[0] for name in pages} == {"latent_pages"}
    assert sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in pages.values()) == size
    assert state_bytes(captured, None, program.shape) == size + program.shape.batch_size * program.shape.token_room * 8
    for graph in program.graphs.values():
        found = list(calls(graph.module, torch.ops.autospec_cpu.experts.default))
        assert found, f"{graph.name} has no experts"
        assert all(is_call(node.args[1], aten.masked_fill) for node in found)


@pytest.mark.xdist_group("latent deepseek_v3")
def test_prompts_are_expanded_and_it_matters_what_from() -> None:
    """The text is that of transformers, and no longer where prefill reads each request's rows from another page."""

    def other_pages(op: Any, latent_pages: Tensor, page_table: Tensor, *args: Any) -> Any:
        return op(latent_pages, page_table.roll(1, 1), *args)

    model, prompts, _ = target("deepseek_v3")
    expected, _ = reference_tokens(model, prompts, NEW_TOKENS)
    fast = optimized("deepseek_v3", "plain")
    for is_right in (True, False):
        tokens = fast.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[:, max(PROMPT_LENS) :]
        assert torch.equal(tokens, expected) == is_right
        if is_right:
            assert Plant("pages mixed up", "expand_latent", other_pages).apply(fast.program) == model.config.num_hidden_layers


@BOTH
def test_lossless_for_any_draft(workshop: Workshop, sampling: Any) -> None:
    laws.lossless_for_any_draft(workshop, sampling=sampling, target="latent")


@BOTH
def test_lossless_for_any_tree(workshop: Workshop, sampling: Any) -> None:
    tree_laws.lossless_for_any_tree(workshop, 2, sampling, "latent", truth=0.7)


def latent_tree(workshop: Workshop) -> None:
    """Target and draft keep latents; the draft's layers stand behind the target's."""
    tree_laws.draft_caches_stay_fresh(workshop, "latent twin static", 9, "latent")


def latent_draft(workshop: Workshop) -> None:
    laws.lossless_for_any_draft(workshop, target="latent")


def latent_nodes(workshop: Workshop) -> None:
    tree_laws.lossless_for_any_tree(workshop, 2, GREEDY, "latent", truth=0.7)


def test_caches_of_target_and_draft_are_fresh(workshop: Workshop) -> None:
    latent_tree(workshop)


def _shifted(index: int, by: int) -> Callable[..., Any]:
    def bug(op: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        given[index] = given[index] + by
        return op(*given, **kwargs)

    return bug


def _rope_forgotten(op: Any, q_latent: Tensor, q_rope: Tensor, *args: Any, **kwargs: Any) -> Any:
    return op(q_latent, torch.zeros_like(q_rope), *args, **kwargs)


def _parts_swapped(op: Any, latent: Tensor, k_rope: Tensor, *args: Any) -> None:
    """The rope part is written before the latent."""
    row = torch.cat([k_rope, latent], -1)
    op(row[..., : latent.shape[2]], row[..., latent.shape[2] :], *args)


def _siblings_visible(op: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("tree_mask") is not None:
        kwargs["tree_mask"] = kwargs["tree_mask"] | torch.tensor([2, *[0] * (kwargs["tree_mask"].shape[2] - 1)]).int()
    return op(*args, **kwargs)


def _not_moved(op: Any, *args: Any) -> None:
    return None


PLANTS = [
    (Plant("rows written one slot late", "append_latent", _shifted(4, 1), ("step",)), latent_draft),
    (Plant("rows read one slot short", "paged_mla", _shifted(4, -1), ("step",)), latent_draft),
    (Plant("rope forgotten", "paged_mla", _rope_forgotten), latent_draft),
    (Plant("parts swapped", "append_latent", _parts_swapped), latent_draft),
    (Plant("siblings visible", "paged_mla", _siblings_visible, ("step",)), latent_nodes),
    (Plant("latents not moved", "compact_kv", _not_moved), latent_tree),
    (Plant("draft's rows one slot late", "append_latent", _shifted(4, 1), ("step",), "draft"), latent_tree),
]


@pytest.mark.parametrize(("plant", "law"), PLANTS, ids=[plant.name for plant, _ in PLANTS])
def test_a_planted_bug_is_caught(plant: Plant, law: Callable[[Workshop], None]) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(plant))
