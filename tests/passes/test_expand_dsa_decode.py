"""expand-dsa-decode: one request per token scores the same to the bit; widths, measurements and a word decide."""

from __future__ import annotations

import pytest
import torch
from harness.graphs import after, apply, check_golden, evaluate
from harness.indexers import BATCH, PAGE, PAGES_PER_ROW, SIZES, captured, paged, state_of, static
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import argument, calls, operand
from autospec.ir.slots import find_slot, slots
from autospec.ir.text import graph_text
from autospec.kernels import dsa_indexer_logits as logits_file
from autospec.kernels.choice import Times
from autospec.kernels.commit import commit_prompt
from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits
from autospec.kernels.dsa_topk import dsa_topk
from autospec.kernels.expand_requests import expand_requests
from autospec.kernels.registry import Implementation, of_widths
from autospec.passes import expand_dsa_decode
from autospec.passes.expand_dsa_decode import ExpandDsaDecode
from autospec.passes.mask_tree import MaskTree
from autospec.passes.page_index_cache import PageIndexCache
from autospec.passes.page_latent_cache import PageLatentCache
from autospec.passes.widen_decode import FeedPrompt, WidenDecode

ALWAYS = ExpandDsaDecode(route="expanded")
WIDEST = 9


def step(next_n: int, is_tree: bool = False, quantization: str | None = None) -> fx.GraphModule:
    widened = WidenDecode(batch_size=BATCH, next_n=next_n, max_nodes=WIDEST, max_position=PAGE * PAGES_PER_ROW)
    masked = [MaskTree(batch_size=BATCH, num_nodes=next_n)] if is_tree else []
    index_cache = PageIndexCache(**SIZES, quantization=quantization)
    return after(static(next_n, True, True), index_cache, PageLatentCache(**SIZES), widened, *masked)


def strict(q, weights, pages, page_table, kv_lens, q_lens=None, scale=1.0, index_topk=0, index_scales=None):
    """The op, with the worst in every slot that it leaves unspecified."""
    scores = dsa_indexer_logits(q, weights, pages, page_table, kv_lens, q_lens, scale, index_topk, index_scales)
    slots = torch.arange(scores.shape[2])
    scores = torch.where((slots < (kv_lens + q.shape[1])[:, None])[:, None], scores, 1e9)
    return torch.where((kv_lens + q.shape[1] <= index_topk)[:, None, None], -slots.float(), scores)


def selected(module: fx.GraphModule, state: dict[str, torch.Tensor], **instead) -> list[torch.Tensor]:
    """What a graph selects, layer by layer, and its logits; `instead`: functions for ops, by name."""
    chosen = after(module)
    results = chosen.graph.output_node().args[0]
    chosen.graph.output_node().args = ((*calls(chosen, dsa_topk), *results),)
    for node in chosen.graph.nodes:
        node.target = instead.get(getattr(node.target, "_opname", ""), node.target)
    chosen.recompile()
    values = {**captured(True, True)[1], **{name: tensor.clone() for name, tensor in state.items()}}
    return [one.clone() for one in evaluate(chosen, values)]


def case(
    next_n: int, is_tree: bool, seed: int, lens: list[int], quantization: str | None = None
) -> tuple[fx.GraphModule, fx.GraphModule, dict[str, torch.Tensor]]:
    """The step in both forms, and a state."""
    generator = torch.Generator().manual_seed(seed)
    native = step(next_n, is_tree, quantization)
    expanded = after(native, ALWAYS)
    state = state_of(expanded, generator)
    for name in state:
        if name.startswith("index_scale_pages."):
            state[name].abs_()
    state["kv_lens"].copy_(torch.tensor(lens))
    state["draft_tokens"].copy_(torch.randint(0, 16, (BATCH, WIDEST), generator=generator))
    state["expanded_lens.0"].fill_(1)  # of an earlier step
    if is_tree:
        links = [[-1] + [int(torch.randint(0, node, (), generator=generator)) for node in range(1, next_n)] for _ in range(BATCH)]
        state["tree_parents"].copy_(torch.tensor(links))
    return native, expanded, state


@settings(max_examples=15, deadline=None)
@given(next_n=st.sampled_from([2, 3, 4, 8]), is_tree=st.booleans(), seed=st.integers(0, 999),
       lens=st.lists(st.integers(0, 23), min_size=2, max_size=2), quantization=st.sampled_from([None, "fp8"]))
def test_both_routes_select_the_same_slots(next_n, is_tree, seed, lens, quantization):
    native, expanded, state = case(next_n, is_tree, seed, lens, quantization)
    plain = selected(native, state)
    for logits in (dsa_indexer_logits.op, strict):
        for mine, theirs in zip(selected(expanded, state, dsa_indexer_logits=logits), plain, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bug", ["stale", "two too few", "of the first token"])
def test_lengths_of_another_step_are_noticed(bug):
    def planted(page_table, kv_lens, q_len, table, lens):
        if bug == "stale":
            return
        expand_requests(page_table, kv_lens - 2 if bug == "two too few" else kv_lens, q_len, table, lens)
        if bug == "of the first token":
            lens[: BATCH * q_len].copy_(kv_lens.repeat_interleave(q_len))

    native, expanded, state = case(4, False, 5, [9, 17])
    state["expanded_table.0"].copy_(state["page_table"].repeat_interleave(4, 0).repeat(3, 1)[: BATCH * WIDEST])
    mine = selected(expanded, state, dsa_indexer_logits=strict, expand_requests=planted)
    assert not all(torch.equal(*pair) for pair in zip(mine, selected(native, state), strict=True))


def test_text():
    check_golden("expand_dsa_decode", graph_text(after(step(3), ALWAYS)))


def test_layers_share_what_is_expanded_and_buffers_hold_the_widest_step():
    module = after(step(3), ALWAYS)
    (written,) = calls(module, expand_requests)
    assert argument(written, "q_len") == 3
    assert [operand(node).meta["val"].shape[:2] for node in calls(module, dsa_indexer_logits)] == [(BATCH * 3, 1)] * 2
    shapes = {slot.name: slot.shape for slot in slots(module) if slot.name.startswith("expanded")}
    assert shapes == {"expanded_table.0": (BATCH * WIDEST, PAGES_PER_ROW), "expanded_lens.0": (BATCH * WIDEST,)}
    assert apply(module, ALWAYS)[0].count == 0


def test_lengths_that_move_are_expanded_again():
    """A draft goes on behind the commit; what was expanded in front of it is stale."""
    module = step(3)
    _, second = calls(module, dsa_indexer_logits)
    builder = Builder(module, operand(second))
    kv_lens = find_slot(module, "kv_lens")
    wide = builder.state("tokens", (BATCH, 40), torch.int64)
    marks = builder.state("finished", (BATCH,), torch.bool)
    lens = [builder.state(name, (BATCH,), torch.int32) for name in ("prompt_lens", "limits", "count")]
    eos, target = builder.state("eos_ids", (2,), torch.int64), builder.state("targets", (BATCH, 1), torch.int64)
    builder.call(commit_prompt, wide, kv_lens, marks, lens[0], lens[1], eos, lens[2], target)
    apply(module, ALWAYS)
    assert len(list(calls(module, expand_requests))) == 2
    assert len({operand(node, 3) for node in calls(module, dsa_indexer_logits)}) == 2


def test_prompts_and_single_tokens_are_left_alone():
    prompt = after(paged(5), FeedPrompt(batch_size=BATCH, q_len=5, token_room=32, max_position=32))
    assert apply(prompt, ALWAYS)[0].count == 0
    assert apply(step(1), ALWAYS)[0].count == 0


def takes(monkeypatch, *backends):
    """Let these be the implementations: pairs of a name and the widths that it takes (None: any)."""
    made = [
        Implementation(name, (lambda args: None) if widths is None else of_widths(widths, lambda args: None), None, None, widths)
        for name, widths in backends
    ]
    monkeypatch.setattr(dsa_indexer_logits, "implementations", made)


HOPPER, BLACKWELL = frozenset({1, 2}), frozenset({1, 2, 4})


@pytest.mark.parametrize(("widths", "expanded"), [(HOPPER, {3, 4, 8}), (BLACKWELL, {3, 8}), (None, set())])
def test_widths_that_a_kernel_does_not_take_are_expanded(monkeypatch, widths, expanded):
    takes(monkeypatch, ("paged", widths))
    found = {}
    for next_n in (1, 2, 3, 4, 8):
        found[next_n] = apply(step(next_n), ExpandDsaDecode())[0]
    assert {next_n for next_n, record in found.items() if record.count} == expanded
    if widths is not None:
        allowed = " or ".join(map(str, sorted(widths)))
        assert found[3].details[0] == f"3 tokens per request: paged: it takes {allowed} tokens per request, not 3"


@pytest.mark.parametrize(("native", "expanded"), [(9.0, 7.0), (7.0, 9.0)])
def test_where_both_run_the_faster_one_is_taken(monkeypatch, native, expanded):
    takes(monkeypatch, ("any", None))
    times = {3: native, 1: expanded}
    monkeypatch.setattr(expand_dsa_decode, "can_measure", lambda arguments: True)
    monkeypatch.setattr(
        expand_dsa_decode, "times_of", lambda kernel, able, arguments: Times({"any": times[arguments["index_q"].shape[1]]})
    )
    record = apply(step(3), ExpandDsaDecode())[0]
    assert record.count == (2 if expanded < native else 0)
    told = [*record.details, *(refusal.reason for refusal in record.refusals)]
    assert any(f"native {native} us, expanded {expanded} us" in line for line in told)


def test_nothing_is_expanded_without_a_reason():
    record = apply(step(3), ExpandDsaDecode())[0]
    assert record.count == 0
    assert apply(step(3), ExpandDsaDecode(route="native"))[0].count == 0


def test_the_declared_expansion_is_the_one_that_the_pass_makes():
    generator = torch.Generator().manual_seed(3)
    module = after(step(4), ALWAYS)
    state = state_of(module, generator)
    state["kv_lens"].copy_(torch.tensor([3, 17]))
    evaluate(module, {**captured(True, True)[1], **state})
    given_case = {
        "index_q": torch.zeros(BATCH, 4, 5, 6), "index_weights": torch.zeros(BATCH, 4, 5), "page_table": state["page_table"],
        "kv_lens": torch.tensor([3, 17], dtype=torch.int32),
    }  # fmt: skip
    flat = logits_file.expand(given_case)
    rows = BATCH * 4
    assert torch.equal(state["expanded_table.0"][:rows], flat["page_table"])
    assert torch.equal(state["expanded_lens.0"][:rows], flat["kv_lens"])
    assert flat["index_q"].shape == (rows, 1, 5, 6)
