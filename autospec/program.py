"""What capture produces and what the runtime runs: graphs over one set of weights and one state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, fx

from autospec.ir.passes import PassRecord
from autospec.ir.slots import Slot
from autospec.kernels.fused_linear import quantize_rows
from autospec.kernels.packed_linear import pack
from autospec.trees import DraftTree

SCRATCH_PAGES = 1  # physical page 0 takes the rows that belong nowhere


@dataclass(frozen=True)
class ModelFacts:
    """What the rest of the compiler needs to know of a model.

    Args:
        name: the class name, for messages.
        vocab_size: width of the logits.
        max_positions: number of positions the model was built for.
        dtype, device: of the weights.
        num_kv_layers: attention calls with K/V of their own.
        bytes_per_token: size of one token's K/V rows in all layers.
        num_indexers: indexers with keys of their own, of layers that select what they attend to.
        spared_in_float8: of bytes_per_token, what these keys in float8 would not take.
    """

    name: str
    vocab_size: int
    max_positions: int
    dtype: torch.dtype
    device: torch.device
    num_kv_layers: int
    bytes_per_token: int
    num_indexers: int = 0
    spared_in_float8: int = 0

    def bytes_kept(self, index_quantization: str | None) -> int:
        """Size of one token's rows in all caches of a program."""
        return self.bytes_per_token - (self.spared_in_float8 if index_quantization else 0)


class Described(Protocol):
    """What generating and explaining need of a model, captured just now or saved long ago."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def records(self) -> tuple[PassRecord, ...]: ...


@dataclass(frozen=True)
class CapturedModel:
    """A model as one symbolic graph: slots input_ids [B, S], position_ids [B, S] and weights -> logits [B, S, V].

    The graph is never edited after capture; programs work on specialised copies.
    """

    graph: fx.GraphModule
    weights: Mapping[str, Tensor]
    facts: ModelFacts
    records: tuple[PassRecord, ...] = ()


@dataclass(frozen=True)
class CapturedHead:
    """A draft head as symbolic graphs over one set of weights.

    Args:
        first: input_ids, taps, position_ids -> logits, hidden: the target's features come in. Medusa: taps -> logits
            [B, num_heads, V].
        following: input_ids, hidden, position_ids -> logits, hidden: its own output comes in. None: Medusa.
        tap_after: target layers whose output is read; (): what the target's lm_head reads.
        d2t: offsets of the draft vocabulary, [draft_vocab] int64; None: it is the target's.
        deeper: the inputs and outputs of `following`: module i has weights and KV layers of its own and guesses level
            i + 1 of the draft (beyond the last, `first` again); (): one network guesses all levels.
        max_draft_len: how deep it can guess; None: any.
    """

    first: fx.GraphModule
    following: fx.GraphModule | None
    weights: Mapping[str, Tensor]
    facts: ModelFacts
    tap_after: tuple[int, ...] = ()
    d2t: Tensor | None = None
    deeper: tuple[fx.GraphModule, ...] = ()
    max_draft_len: int | None = None
    records: tuple[PassRecord, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What a program is specialised for.

    Args:
        batch_size: rows.
        max_length: tokens a request may have, prompt and output together.
        page_size: cache rows per page.
        prefill_len: prompt tokens per request in one prefill call.
        tree: the draft of the widest step.
        sampling: graphs that sample and process logits, or greedy ones that only take the argmax.
        is_exact: a token's numbers do not depend on where in a step it stands.
        cache_rows: 0, or rows of the cache where another program owns it.
        part: of the graphs, if not all: "prefill" or "steps".
        index_quantization: "fp8", or None: index keys of sparse attention are kept as they are.
    """

    batch_size: int
    max_length: int
    page_size: int
    prefill_len: int
    tree: DraftTree
    sampling: bool
    cache_rows: int = 0
    is_exact: bool = False
    part: str = ""
    index_quantization: str | None = None

    def reader(self) -> Shape:
        """Of a program that reads one prompt at a time into the cache of this one."""
        return replace(self, batch_size=1, cache_rows=self.batch_size, part="prefill")

    def narrow(self, rows: int) -> Shape:
        """Of a program that goes on with the last rows of this one."""
        return replace(self, batch_size=rows, cache_rows=self.batch_size, part="steps")

    @property
    def reserve(self) -> int:
        """Slots past the longest request that the widest step and its drafter may write."""
        return max(self.tree.num_nodes, self.tree.draft_rows + 1) + 1

    @property
    def pages_per_row(self) -> int:
        return -(-(self.max_length + self.reserve) // self.page_size)

    @property
    def num_pages(self) -> int:
        return (self.cache_rows or self.batch_size) * self.pages_per_row + SCRATCH_PAGES

    @property
    def token_room(self) -> int:
        """Width of the token history: every slot that any step may write."""
        return self.max_length + self.reserve


@dataclass
class Graph:
    """One entry point of a program: a callable over its slots, in order."""

    name: str
    slots: tuple[Slot, ...]
    call: Callable[..., object]
    module: fx.GraphModule | None = None
    seconds_to_compile: float = 0.0
    is_compiled: bool = False


@dataclass
class Program:
    """A speculative program: `prefill` and one `step` per draft length, weights and the layout of the state.

    Args:
        shape: what it was specialised for.
        facts: of the target model.
        graphs: by name: "prefill", "step_0", "step_4", ...; the number is the step's draft length.
        weights: by slot name.
        records: what every pass did.
    """

    shape: Shape
    facts: ModelFacts
    graphs: dict[str, Graph]
    weights: dict[str, Tensor]
    records: list[PassRecord] = field(default_factory=list)

    def draft_lens(self) -> list[int]:
        """The draft lengths that have a step, ascending."""
        return sorted(int(name.removeprefix("step_")) for name in self.graphs if name.startswith("step_"))

    def state_slots(self) -> dict[str, Slot]:
        """Every state slot of every graph, by name."""
        found: dict[str, Slot] = {}
        for graph in self.graphs.values():
            for slot in graph.slots:
                if slot.kind == "state":
                    known = found.setdefault(slot.name, slot)
                    assert known == slot, f"graphs disagree about state {slot.name}: {known} and {slot}"
        return found

    def new_state(self, without: Collection[str] = ()) -> dict[str, Tensor]:
        """Freshly allocated state."""
        return {
            name: torch.full(slot.shape, slot.fill, dtype=slot.dtype, device=self.facts.device)
            for name, slot in self.state_slots().items() if name not in without
        }  # fmt: skip

    def bind(self, name: str, state: Mapping[str, Tensor]) -> Callable[[], object]:
        """A graph as a function of nothing: its weights and state are looked up once."""
        graph = self.graphs[name]
        arguments = [self.weights[slot.name] if slot.kind == "weight" else state[slot.name] for slot in graph.slots]

        def run() -> object:
            with torch.no_grad():
                return graph.call(*arguments)

        return run


def materialise(slot: Slot, weights: Mapping[str, Tensor]) -> Tensor:
    """The tensor of a weight slot: a captured one, several concatenated, or a copy in another form."""
    if not slot.parts:
        return weights[slot.name]
    whole = torch.cat([weights[name] for name in slot.parts]) if len(slot.parts) > 1 else weights[slot.parts[0]]
    if slot.form == "panels":
        return pack(whole)
    if slot.form:
        weight, scales = quantize_rows(whole)
        return weight if slot.form == "fp8" else scales
    return whole


def state_bytes(target: Described, draft: Described | None, shape: Shape) -> int:
    """Bytes of pages and history that a program of this shape allocates."""
    per_token = sum(one.facts.bytes_kept(shape.index_quantization) for one in (target, draft) if one is not None)
    return shape.num_pages * shape.page_size * per_token + shape.batch_size * shape.token_room * 8
