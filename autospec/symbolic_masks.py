"""What stands for a mask while a model is traced: computing with it is a refusal, but for what an indexer does.

An indexer (DeepSeek sparse attention) hides the keys that come later in its scores and takes the best of each row:

    scores.masked_fill(~mask[:, 0], -inf).topk(index_topk).indices   ->   autospec.top_keys(scores, index_topk)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autospec.errors import CaptureError
from autospec.kernels.select_keys import top_keys


class Symbolic:
    """A mask that stands for a tensor while a model is traced."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise computes_with_mask(f".{name}")

    def __getitem__(self, index: Any) -> Any:
        raise computes_with_mask("[...]")

    def _operator(self, *others: Any) -> Any:
        raise computes_with_mask(" + ...")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _operator
    __invert__ = __lt__ = __le__ = __gt__ = __ge__ = _operator


def computes_with_mask(what: str) -> CaptureError:
    return CaptureError(
        f"the model computes with its attention mask ({what}), which autospec keeps symbolic",
        at=f"attention_mask{what}", where="the attention mask",
        help="masks made of data, and keys selected in another way than DeepSeek's indexer, cannot be decoded by pages yet",
    )  # fmt: skip


class CausalRows(Symbolic):
    """A causal mask without its head dimension, bool [B, S, S]: it may hide index scores, and nothing else.

    Args:
        is_hidden: True where a key must not be seen, as ~mask is.
    """

    dtype = torch.bool

    def __init__(self, is_hidden: bool = False) -> None:
        self.is_hidden = is_hidden

    def __invert__(self) -> CausalRows:
        return CausalRows(not self.is_hidden)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.masked_fill and not kwargs and len(args) == 3:
            scores, mask, value = args
            if isinstance(scores, Tensor) and scores.dim() == 3 and mask.is_hidden and value == float("-inf"):
                return _CausalScores(scores)
        raise computes_with_mask(f" in {getattr(function, '__name__', function)}")


class _CausalScores(Symbolic):
    """Index scores [B, S, S] with the later keys hidden; only their best can be asked for."""

    shape = (0, 0, 1 << 62)  # however short the text: where there are fewer keys than asked for, all are taken

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def topk(self, k: int, dim: int = -1, **options: Any) -> _Best:
        if dim not in (-1, 2) or options.get("largest", True) is not True:
            raise computes_with_mask(".topk")
        return _Best(top_keys(self.scores, k))


@dataclass(frozen=True)
class _Best:
    """What topk returns; the masked scores themselves are nobody's business."""

    indices: Tensor
