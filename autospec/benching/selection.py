"""What float8 index keys cost in agreement: of the keys that a model selects, the share that it still selects; and of its tokens.

The selection is compared on the model's own text and numbers: in one forward pass, every indexer selects by its keys as they are,
which the pass goes on with, and by the same keys quantised. So it is the rounding of these keys that is seen, not what follows
from another selection in an earlier layer; the tokens show both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autospec.api import OptimizedModel
from autospec.benching.differences import Differences, compare
from autospec.ir.slots import slot_of
from autospec.kernels.append_index_keys import dequantize_keys, quantize_keys
from autospec.kernels.dsa_topk import dsa_topk, shared_slots
from autospec.kernels.select_keys import index_scores, select_keys
from autospec.program import CapturedModel

_ROWS = 64  # tokens whose scores are held at once
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Agreement:
    """Of selections by quantised keys with those by keys as they are.

    Args:
        rows: selections, of tokens with more keys before them than are selected; all others select everything.
        mean, worst: share of such a selection that stays; None: there was none.
        by_indexer: means.
    """

    rows: int
    mean: float | None
    worst: float | None
    by_indexer: list[float]


@dataclass(frozen=True)
class Selection:
    """Everything that a bench says of quantised index keys.

    Args:
        outputs, tokens: decoded plainly with keys as they are.
        differences: of plain decoding with quantised keys from these; None: none.
    """

    agreement: Agreement
    outputs: int
    tokens: int
    differences: Differences | None

    def text(self) -> str:
        """Two lines, and one a fork that can be explained."""
        found = self.agreement
        lines = ["float8 index keys: no text is long enough for a selection"]
        if found.mean is not None and found.worst is not None:
            lines = [f"float8 index keys: {100 * found.mean:.2f}% of the selected keys stay (worst of {found.rows} selections "
                     f"{100 * found.worst:.1f}%)"]  # fmt: skip
        if self.differences is None:
            return "\n".join([*lines, f"all {self.tokens} tokens are those of keys as they are"])
        return "\n".join([*lines, self.differences.text("those of keys as they are")])


def agreement(captured: CapturedModel, texts: Sequence[Sequence[int]], quantize: Quantize = quantize_keys) -> Agreement:
    """Of a target's indexers on texts of token ids."""
    run = _Run(captured.graph, quantize)
    for text in texts:
        ids = torch.tensor([list(text)], device=captured.facts.device)
        given = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None], **captured.weights}
        with torch.no_grad():
            run.run(*[given[slot_of(node).name] for node in captured.graph.graph.find_nodes(op="placeholder")])
    shares = [torch.cat(found) for found in run.shares.values()]
    every = torch.cat(shares) if shares else torch.empty(0)
    if not every.numel():
        return Agreement(0, None, None, [])
    return Agreement(every.numel(), float(every.mean()), float(every.min()), [float(one.mean()) for one in shares])


class _Run(fx.Interpreter):
    """Runs a captured graph eagerly and compares what its indexers select."""

    def __init__(self, module: fx.GraphModule, quantize: Quantize) -> None:
        super().__init__(module)
        self.quantize = quantize
        self.shares: dict[fx.Node, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not select_keys.op:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = select_keys.bind(args, kwargs)
        coarse = dequantize_keys(*self.quantize(given["index_k"]))
        theirs, mine = _selected(**given), _selected(**{**given, "index_k": coarse})
        count = given["index_topk"]
        self.shares.setdefault(n, []).append(shared_slots(mine, theirs)[:, count:].flatten().cpu())
        return theirs


def _selected(index_q: Tensor, index_weights: Tensor, index_k: Tensor, index_topk: int, scale: float) -> Tensor:
    """select_keys, for some rows after the other: the scores of a long text's heads take the square of its length each."""
    found = []
    for start in range(0, index_q.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        scores = index_scores(index_q[:, rows], index_weights[:, rows], index_k, scale)
        before = torch.full((index_q.shape[0],), start, dtype=torch.int32, device=index_q.device)
        found.append(dsa_topk.reference(scores, before, index_topk))
    best = torch.cat(found, 1)
    return torch.nn.functional.pad(best, (0, index_topk - best.shape[-1]), value=-1)


def measure(quantized: OptimizedModel, exact: OptimizedModel, prompts: Sequence[list[int]], options: Any, module: Any) -> Selection:
    """Decode plainly in both forms, nothing timed, and compare.

    Args:
        quantized, exact: the same target with and without quantised keys, no drafts.
        module: the model, to explain greedy decoding's forks; None where tokens were drawn.
    """
    mine, theirs = (
        [one.generate([prompt], **options)[0, len(prompt) :].tolist() for prompt in prompts] for one in (quantized, exact)
    )
    found = agreement(exact.target, [prompt + output for prompt, output in zip(prompts, theirs, strict=True)])
    differences = compare("their tokens", mine, theirs, prompts, module)
    return Selection(found, len(theirs), sum(map(len, theirs)), differences)
