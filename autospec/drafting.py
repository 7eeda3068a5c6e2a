"""Growing a draft level by level: from the drafter's logits after the root to the draft that the next step verifies.

Every drafter that ranks tokens is grown here, as a chain, a static or a dynamic tree. It only says how one level of
nodes is run. Levels follow the shape of the tree, so the graph is static; which node is where is data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autospec.ir.build import Builder, device_of
from autospec.ir.match import aten, returned
from autospec.ir.roles import the, with_role
from autospec.ir.sizes import constants_of
from autospec.ir.slots import Slot
from autospec.kernels.build_dynamic_tree import build_dynamic_tree
from autospec.kernels.commit import chain_draft, gather_rows, static_draft, tokens_at
from autospec.kernels.grow_frontier import grow_frontier
from autospec.kernels.rank_children import rank_greedy, rank_sampled
from autospec.kernels.tree_tables import node_positions
from autospec.state import Chooser, StateShape, history, store
from autospec.trees import Path


@dataclass(frozen=True)
class Frontier:
    """The nodes that the drafter runs next, one row each.

    Args:
        level: their level; the root's children are level 0.
        first: rows of earlier levels in the drafter's cache.
        tokens: [B, R] int64.
        parents: [B, R] int64, each row's parent among the rows of the level before (level 0: all 0).
        tree_mask: [B, first + R, words] int32, of all rows grown so far; None: a chain.
    """

    level: int
    first: int
    tokens: fx.Node
    parents: fx.Node
    tree_mask: fx.Node | None

    @property
    def count(self) -> int:
        """R."""
        return int(self.tokens.meta["val"].shape[1])

    def inputs(self, builder: Builder, kv_lens: fx.Node, max_position: int) -> dict[str, fx.Node]:
        """What a drafter's graph reads to run these nodes behind kv_lens [B] committed rows of its cache and all earlier levels."""
        append = builder.call(aten.add.Tensor, kv_lens, self.first)
        place = builder.call(aten.add.Tensor, kv_lens, self.level)
        if self.tree_mask is None:
            positions = builder.call(node_positions, place, self.count, max_position)
            return {"input_ids": self.tokens, "position_ids": positions, "kv_lens": append}
        siblings = builder.call(aten.zeros_like.default, self.tokens)  # they share a position
        positions = builder.call(node_positions, place, self.count, max_position, siblings)
        return {
            "input_ids": self.tokens, "position_ids": positions, "kv_lens": kv_lens, "append_lens": append,
            "tree_mask": self.tree_mask,
        }  # fmt: skip


def nothing_committed(module: fx.GraphModule) -> Iterable[str]:
    """A sentence if the graph commits no tokens yet, which a head's features come from."""
    if not with_role(module, "commit"):
        yield "a draft follows what was committed: run verify-draft or commit-prompt first"


@dataclass(frozen=True)
class Features:
    """What the target computed of the tokens that this graph committed.

    Args:
        taps: [B, C, H], row i of the token at slot start + i.
        start: [B] int32, kv_lens before the commit.
        count: [B] int32, how many rows are valid.
        is_new: [B] bool, rows that moved; None: all that are not finished.
    """

    taps: fx.Node
    start: fx.Node
    count: fx.Node
    is_new: fx.Node | None


def committed_features(builder: Builder) -> Features:
    """The taps of a graph in the order of the committed tokens: a step's along the accepted path, a chunk's as they are."""
    module = builder.module
    taps, kv_lens = the(module, "taps"), history(module)[1]
    paths = with_role(module, "accept_path")
    if paths:
        emitted = builder.call(aten.ge.Scalar, returned(module), 0)
        count = builder.call(aten.sum.dim_IntList, emitted, [1], dtype=torch.int32)
        taps, is_new = builder.call(gather_rows, taps, paths[0]), None
    else:
        count = the(module, "q_lens")
        # A row whose prompt ended in an earlier chunk has its draft already.
        is_new = builder.call(aten.gt.Scalar, count, 0)
    return Features(taps, builder.call(aten.sub.Tensor, kv_lens, count), count, is_new)


Run = Callable[[Frontier], fx.Node]  # -> logits [B, R, V], or [B, 1, V] if every node has the same


@dataclass
class Grower:
    """Emits the growth of one draft.

    Args:
        builder: where nodes appear, behind the commit.
        sizes: the state, and the tree to grow.
        draft_temperature: tau, divides the draft's logits.
        d2t: weight slot of the draft vocabulary's offsets, [draft_vocab] int64; None: it is the target's.
        is_new: [B] bool, rows whose draft is stored; the others keep theirs (None: all are).
    """

    builder: Builder
    sizes: StateShape
    draft_temperature: float = 1.0
    d2t: fx.Node | None = None
    is_new: fx.Node | None = None

    def __post_init__(self) -> None:
        self.tokens, self.kv_lens, self.limits = history(self.builder.module)
        self.chooser = Chooser(self.builder, self.sizes)

    def grow(self, logits: fx.Node, run: Run) -> None:
        """Grow from the logits after the root, [B, 1, V], and store the draft of the next step."""
        tree = self.sizes.tree
        grown = self._chain if tree.is_chain else self._static if tree.choices else self._dynamic
        ids, parents = grown(logits, run)
        store(self.builder, self.sizes.batch_size, tree.num_nodes, ids, parents, self.is_new)

    def _chain(self, logits: fx.Node, run: Run) -> Sequence[fx.Node]:
        batch, length = self.sizes.batch_size, self.sizes.tree.max_draft_len
        drafts, path = [], self._no_path()
        for level in range(length):
            children, _ = self._rank(logits, level, 1, path)
            chosen = self.builder.call(aten.select.int, children, 2, 0)
            drafts.append(chosen)
            if level + 1 < length:
                path = self.builder.call(aten.cat.default, [path, children], 2)
                parents = self.builder.call(aten.new_zeros.default, chosen, [batch, 1])
                logits = run(Frontier(level, level, chosen, parents, None))
        whole = self.builder.call(aten.cat.default, drafts, 1)
        return self.builder.calls(chain_draft, self.tokens, self.kv_lens, self.limits, whole)

    def _dynamic(self, logits: fx.Node, run: Run) -> Sequence[fx.Node]:
        call, tree, batch = self.builder.call, self.sizes.tree, self.sizes.batch_size
        count = tree.dynamic_tree_max_topk
        words = (max(1, tree.draft_rows) + 31) // 32
        scores = call(aten.new_zeros.default, self.tokens, [batch, 1], dtype=torch.float32)
        ids = call(aten.new_full.default, self.tokens, [batch, 1], -1, dtype=torch.int32)
        mask = call(aten.new_zeros.default, self.tokens, [batch, 0, words], dtype=torch.int32)
        path, rows = self._no_path(), 1
        pieces: list[list[fx.Node]] = [[], [], []]
        for level in range(tree.max_draft_len):
            ranked = self._rank(logits, level, count, path)
            if logits.meta["val"].shape[1] < rows:
                ranked = [call(aten.expand.default, one, [batch, rows, count]) for one in ranked]
            *new, tokens, scores, ids, parents, mask = self.builder.calls(
                grow_frontier, *ranked, scores, ids, mask, self.kv_lens, self.limits, level, count
            )
            for piece, one in zip(pieces, new, strict=True):
                piece.append(one)
            if level + 1 < tree.max_draft_len:
                parents = call(aten._to_copy.default, parents, dtype=torch.int64)
                path = self._extend(path, parents, tokens)
                logits = run(Frontier(level, level * count, tokens, parents, mask))
            rows = count
        root = call(aten.select.int, call(tokens_at, self.tokens, self.kv_lens, 1), 1, 0)
        whole_history = [call(aten.cat.default, piece, 1) for piece in pieces]
        return self.builder.calls(build_dynamic_tree, root, *whole_history, tree.max_total_draft_tokens)

    def _static(self, logits: fx.Node, run: Run) -> Sequence[fx.Node]:
        call, tree, batch = self.builder.call, self.sizes.tree, self.sizes.batch_size
        words = (max(1, tree.draft_rows) + 31) // 32
        above: tuple[Path, ...] = ((),)  # the nodes whose children are ranked
        bits: dict[Path, int] = {(): 0}
        path, first = self._no_path(), 0
        drafts, scores = [], []
        for level in range(tree.max_draft_len):
            count, nodes, inner = tree.children_at(level), tree.level(level), tree.inner(level)
            ranked = self._rank(logits, level, count, path)
            if logits.meta["val"].shape[1] < len(above):
                ranked = [call(aten.expand.default, one, [batch, len(above), count]) for one in ranked]
            flat = [call(aten.reshape.default, one, [batch, len(above) * count]) for one in ranked]

            def pick(flat: fx.Node, wanted: tuple[Path, ...], name: str, above: tuple[Path, ...] = above,
                     count: int = count) -> fx.Node:  # fmt: skip
                index = [above.index(node[:-1]) * count + node[-1] for node in wanted]
                return call(aten.index_select.default, flat, 1, self._constant(name, torch.tensor(index)))

            drafts.append(pick(flat[0], nodes, f"nodes.{level}"))
            scores.append(pick(flat[1], nodes, f"nodes.{level}"))
            if level + 1 < tree.max_draft_len:
                tokens = pick(flat[0], inner, f"inner.{level}")
                row = [above.index(node[:-1]) for node in inner]
                parents = call(aten.expand.default, self._constant(f"parents.{level}", torch.tensor([row])), [batch, -1])
                bits |= {node: bits[node[:-1]] | 1 << (first + place) for place, node in enumerate(inner)}
                grown = [bits[node] for below in range(level + 1) for node in tree.inner(below)]
                mask = self._constant(f"mask.{level}", _packed(grown, words)[None])
                mask = call(aten.expand.default, mask, [batch, -1, -1])
                path = self._extend(path, parents, tokens)
                logits = run(Frontier(level, first, tokens, parents, mask))
                above, first = inner, first + len(inner)
        whole = [call(aten.cat.default, one, 1) for one in (drafts, scores)]
        links = self._constant("links", torch.tensor(tree.parents(), dtype=torch.int32))
        depth = self._constant("depth", torch.tensor([0, *map(len, tree.choices)], dtype=torch.int32))
        return self.builder.calls(static_draft, self.tokens, self.kv_lens, self.limits, *whole, links, depth)

    def _rank(self, logits: fx.Node, level: int, count: int, path: fx.Node) -> Sequence[fx.Node]:
        """The best children of every row: tokens and log-probabilities, [B, R, count]."""
        if not self.sizes.sampling:
            return self.builder.calls(rank_greedy, logits, count, self.draft_temperature, self.d2t)
        index = self.builder.call(aten._to_copy.default, self.kv_lens, dtype=torch.int64)
        index = self.builder.call(aten.add.Tensor, index, level + 1)
        if logits.meta["val"].shape[1] < path.meta["val"].shape[1]:
            path = self._no_path()  # rows of one level that share their candidates have no path in common
        keys, *processors = self.chooser.processing()
        return self.builder.calls(
            rank_sampled, logits, index, keys, *processors, path, count, self.draft_temperature, self.d2t
        )

    def _no_path(self) -> fx.Node:
        return self.builder.call(aten.new_full.default, self.tokens, [self.sizes.batch_size, 1, 1], -1)

    def _extend(self, path: fx.Node, parents: fx.Node, tokens: fx.Node) -> fx.Node:
        """The drafted tokens above and at every node of a level; only the processors of sampling read them."""
        if not self.sizes.sampling:
            return path
        own = self.builder.call(aten.unsqueeze.default, tokens, 2)
        return self.builder.call(aten.cat.default, [self.builder.call(gather_rows, path, parents), own], 2)

    def _constant(self, name: str, value: Tensor) -> fx.Node:
        module, name = self.builder.module, f"draft_tree.{name}"
        constants_of(module)[name] = value.to(device_of(module))
        return self.builder.slot(Slot("weight", name, tuple(value.shape), value.dtype))


def _packed(rows: list[int], words: int) -> Tensor:
    """Bit sets as words: [len(rows), words] int32."""
    split = [[(bits >> (32 * word)) & 0xFFFFFFFF for word in range(words)] for bits in rows]
    return torch.tensor([[word - 2**32 if word >= 2**31 else word for word in row] for row in split], dtype=torch.int32)
