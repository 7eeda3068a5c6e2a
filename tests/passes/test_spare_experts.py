"""spare-experts: rows that hold no token reach no expert, and the rows that do are what they were."""

from __future__ import annotations

import functools

import torch
from harness.graphs import VOCAB, after, apply, captured_graph, check_golden, evaluate, new_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from autospec.ir.build import Builder
from autospec.ir.match import aten, calls, operand
from autospec.ir.roles import tag
from autospec.ir.slots import Slot
from autospec.ir.text import graph_text
from autospec.kernels.experts import experts
from autospec.kernels.tree_tables import ancestors
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.spare_experts import SpareExperts
from autospec.passes.specialize_shapes import SpecializeShapes

BATCH, NODES, WIDTH, EXPERTS = 2, 5, 8, 6
SPARE = SpareExperts(batch_size=BATCH, q_len=NODES, max_nodes=NODES + 2)


class Mixture(nn.Module):
    """Two experts of six per token, behind a router; no attention, so that rows stand for themselves."""

    def __init__(self, is_pooled: bool = False) -> None:
        super().__init__()
        self.embed, self.router = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 6, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, 3))
        self.is_pooled = is_pooled

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor]:
        x = self.embed(input_ids) + position_ids[..., None]
        rows = x.mean(1) if self.is_pooled else x.view(-1, WIDTH)
        weights, index = torch.softmax(self.router(rows), -1).topk(2)
        out = experts(rows, index, weights, self.gate_up, self.down, "silu")
        return (x + (out[:, None] if self.is_pooled else out.view(x.shape)),)


@functools.cache
def mixture(is_pooled: bool = False) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Mixture(is_pooled)
    ids = torch.zeros(2, 5, dtype=torch.int64)
    return captured_graph(model, {"input_ids": ids, "position_ids": ids.clone()})


def static(is_pooled: bool = False) -> fx.GraphModule:
    return after(mixture(is_pooled)[0], SpecializeShapes(batch_size=BATCH, q_len=NODES), FoldNoops())


@functools.cache
def spared() -> fx.GraphModule:
    return after(static(), SPARE)


def with_lengths() -> fx.GraphModule:
    module = static()
    tag(Builder(module).slot(Slot("input", "q_lens", (BATCH,), torch.int32)), "q_lens")
    return after(module, SPARE)


def routed(module: fx.GraphModule, values: dict[str, Tensor]) -> Tensor:
    """Which rows reach an expert: [B, N] bool."""
    seen: list[Tensor] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            out = super().run_node(n)
            if n in indices:
                seen.append(out)
            return out

    indices = {operand(node, 1) for node in calls(module, experts)}
    arguments = [values[node.meta["slot"].name] for node in module.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        Watch(module).run(*arguments)
    return (seen[0] >= 0).all(1).reshape(BATCH, NODES)


def test_text() -> None:
    check_golden("spare_experts", graph_text(spared()))


def test_again_finds_nothing() -> None:
    assert apply(spared(), SPARE)[0].count == 0


def test_rows_that_are_not_tokens_are_refused() -> None:
    record = apply(static(is_pooled=True), SPARE)[0]
    assert record.count == 0
    assert record.refusals[0].reason == "it has 2 rows for 2 requests of 5 tokens"


@settings(max_examples=25)
@given(
    links=st.lists(st.lists(st.integers(-1, 4), min_size=NODES, max_size=NODES), min_size=BATCH, max_size=BATCH),
    finished=st.lists(st.booleans(), min_size=BATCH, max_size=BATCH), seed=st.integers(0, 99),
)  # fmt: skip
def test_present_nodes_are_what_they_were(links: list[list[int]], finished: list[bool], seed: int) -> None:
    parents = torch.full((BATCH, NODES + 2), -1, dtype=torch.int32)
    for row, link in enumerate(links):
        parents[row, :NODES] = torch.tensor([-1, *(min(parent, node) for node, parent in enumerate(link[1:]))])
    ids = torch.randint(0, VOCAB, (BATCH, NODES), generator=torch.Generator().manual_seed(seed))
    state = {"tree_parents": parents, "finished": torch.tensor(finished)}
    values = {"input_ids": ids, "position_ids": ids, **mixture()[1], **state}
    there = ancestors(parents[:, :NODES])[:, :, 0] & ~state["finished"][:, None]
    assert torch.equal(routed(spared(), values), there)
    got, plain = (evaluate(module, values)[0] for module in (spared(), static()))
    assert torch.equal(got[there], plain[there])
    assert not torch.equal(got[~there], plain[~there]) or bool(there.all())


def test_valid_rows_of_a_prompt_are_what_they_were() -> None:
    module = with_lengths()
    assert not new_state(module), "lengths say it all"
    ids = torch.arange(BATCH * NODES).reshape(BATCH, NODES) % VOCAB
    values = {"input_ids": ids, "position_ids": ids, "q_lens": torch.tensor([3, 0], dtype=torch.int32), **mixture()[1]}
    there = torch.tensor([[True] * 3 + [False] * 2, [False] * 5])
    assert torch.equal(routed(module, values), there)
    assert torch.equal(evaluate(module, values)[0][there], evaluate(static(), values)[0][there])
    assert len(list(calls(module, aten.masked_fill))) == 1
