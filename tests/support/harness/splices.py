"""A tiny target into which a drafter was spliced: its prefill and step graphs, run from the prompts on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autospec.ir.match import returned
from autospec.ir.passes import Pass
from autospec.ir.sizes import constants_of
from autospec.ir.slots import slots
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.gather_logits import GatherLogits
from autospec.passes.mask_tree import MaskTree
from autospec.passes.page_kv_cache import PageKvCache
from autospec.passes.specialize_shapes import SpecializeShapes
from autospec.passes.tap_hidden_states import TapHiddenStates, layer_outputs
from autospec.passes.verify_draft import CommitPrompt, VerifyDraft
from autospec.passes.widen_decode import FeedPrompt, WidenDecode
from autospec.state import StateShape
from autospec.trees import DraftTree
from harness.graphs import VOCAB, after, evaluate, new_state, tiny_graph
from harness.tree_laws import Path, drafted, grown

BATCH, PAGE, PAGES_PER_ROW, CHUNK, POSITIONS, LIMIT = 2, 4, 8, 3, 256, 22
LAYERS = 2
TARGET, WEIGHTS = tiny_graph(num_layers=LAYERS)


def sizes_of(tree: DraftTree) -> StateShape:
    return StateShape(batch_size=BATCH, token_room=PAGE * PAGES_PER_ROW, vocab_size=VOCAB, tree=tree, sampling=False)


def specialised(captured: fx.GraphModule, q_len: int, *passes: Pass, is_length_given: bool = False) -> fx.GraphModule:
    """A copy at [BATCH, q_len], its cache in pages, after more passes."""
    paging = PageKvCache(
        page_size=PAGE, num_pages=1 + BATCH * PAGES_PER_ROW, pages_per_row=PAGES_PER_ROW, is_length_given=is_length_given
    )
    return after(captured, SpecializeShapes(batch_size=BATCH, q_len=q_len), FoldNoops(), paging, *passes)


def target_prefill(sizes: StateShape, taps: TapHiddenStates) -> fx.GraphModule:
    """A chunk of every prompt, up to the place where a drafter is spliced in."""
    feed = FeedPrompt(batch_size=BATCH, q_len=CHUNK, token_room=sizes.token_room, max_position=POSITIONS)
    return specialised(TARGET, CHUNK, taps, feed, GatherLogits(), CommitPrompt(sizes=sizes))


def target_step(sizes: StateShape, taps: TapHiddenStates) -> fx.GraphModule:
    """A step of the whole draft, up to the place where a drafter is spliced in."""
    nodes = sizes.tree.num_nodes
    widen = WidenDecode(batch_size=BATCH, next_n=nodes, max_nodes=nodes, max_position=POSITIONS)
    masked = [] if sizes.tree.is_chain else [MaskTree(batch_size=BATCH, num_nodes=nodes)]
    verify = VerifyDraft(sizes=sizes, draft_len=sizes.tree.max_draft_len)
    return specialised(TARGET, nodes, taps, widen, *masked, verify)


def _with_layers() -> fx.GraphModule:
    module = after(TARGET)
    module.graph.output_node().args = ((returned(module), *layer_outputs(module).values()),)
    module.recompile()
    return module


_FEATURES = _with_layers()


def features(ids: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The target's logits [1, S, V] and the outputs of its layers [1, S, H], from its captured graph."""
    values = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None], **WEIGHTS}
    logits, *outputs = evaluate(_FEATURES, values)
    return logits, outputs


@dataclass
class Spliced:
    """Prefill and step of one program.

    Args:
        draft_weights: what the drafter added, by slot name.
        scores: (committed tokens and root, path of draft tokens) -> the drafter's logits over the target's vocabulary.
    """

    tree: DraftTree
    prefill: fx.GraphModule
    step: fx.GraphModule
    draft_weights: dict[str, Tensor]
    scores: Callable[[list[int], Path], Tensor]

    def check(self, seed: int, lengths: Sequence[int], steps: int) -> None:
        """After prefill in chunks and some steps, every draft is what growing it from scratch gives."""
        graphs = [self.prefill] * -(-max(lengths) // CHUNK) + [self.step] * steps
        weights = {**WEIGHTS, **self.draft_weights, **constants_of(self.prefill), **constants_of(self.step)}
        used = {slot.name for graph in graphs for slot in slots(graph) if slot.kind == "weight"}
        assert used <= set(weights), f"nobody knows {used - set(weights)}"
        state = self._start(seed, lengths)
        rng = random.Random(seed)
        for graph in graphs:
            if graph is self.step:
                _draft_truth(state, rng)
            evaluate(graph, {**weights, **state})
        for row in range(BATCH):
            ids = _committed(state, row)
            assert len(ids) >= min(lengths[row] + 1 + steps, LIMIT), "a step emitted nothing"
            if not bool(state["finished"][row]):
                deepest = LIMIT - len(ids)
                paths = grown(lambda path, ids=ids: self.scores(ids, path), self.tree, deepest)
                expected = {path for path in paths if len(path) <= deepest}
                got = drafted(state, row)
                assert got == expected, f"row {row} drafts {sorted(got)}, growing it gives {sorted(expected)}"

    def fails(self) -> bool:
        """Whether a check of a few runs finds a planted bug."""
        for seed in range(6):
            try:
                self.check(seed, (4, 7), 3)
            except AssertionError:
                return True
        return False

    def _start(self, seed: int, lengths: Sequence[int]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        state = {**new_state(self.prefill), **new_state(self.step)}
        state["finished"].zero_()
        state["tokens"].copy_(torch.randint(0, VOCAB, state["tokens"].shape, generator=generator))
        state["prompt_lens"].copy_(torch.tensor(lengths))
        state["limits"].fill_(LIMIT)
        state["page_table"].copy_(torch.randperm(BATCH * PAGES_PER_ROW, generator=generator).reshape(BATCH, -1) + 1)
        return state


def _committed(state: dict[str, Tensor], row: int) -> list[int]:
    """The committed tokens of a row and the root of its next draft."""
    return state["tokens"][row, : int(state["kv_lens"][row]) + 1].tolist()


def _draft_truth(state: dict[str, Tensor], rng: random.Random) -> None:
    """Write the target's own continuation along one branch of every draft, down to some depth: paths are accepted."""
    for row in range(BATCH):
        parents = state["tree_parents"][row].tolist()
        ids, node = _committed(state, row), 0
        while rng.random() < 0.8:
            children = [child for child, parent in enumerate(parents) if parent == node]
            if not children:
                break
            node = rng.choice(children)
            ids.append(int(features(ids)[0][0, -1].argmax()))
            state["draft_tokens"][row, node] = ids[-1]
