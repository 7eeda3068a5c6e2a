"""The maps between a draft vocabulary and the target's: d2t holds offsets, t2d says which target ids have a draft id."""

from __future__ import annotations

import torch
from torch import Tensor

from autospec.errors import CheckpointError


def t2d_of(ids: Tensor, target_vocab_size: int) -> Tensor:
    """Target ids of the draft vocabulary -> bool [V]."""
    t2d = torch.zeros(target_vocab_size, dtype=torch.bool, device=ids.device)
    t2d[ids] = True
    return t2d


def checked_d2t(
    d2t: Tensor | None, t2d: Tensor | None, draft_vocab_size: int, target_vocab_size: int, where: str
) -> Tensor | None:
    """d2t as int64 offsets, injective, in range and of one mind with t2d; None where the vocabularies are one."""

    def refuse(rule: str, help: str = "d2t holds offsets: the target id of draft token i is i + d2t[i]") -> CheckpointError:
        return CheckpointError(rule, at=where, where="draft head, d2t and t2d", help=help)

    if d2t is None:
        if draft_vocab_size != target_vocab_size:
            raise refuse(f"a draft vocabulary of {draft_vocab_size} under one of {target_vocab_size} needs d2t, and there is none")
        if t2d is not None and not bool(t2d.all()):
            raise refuse("t2d leaves target tokens out, but there is no d2t")
        return None
    if d2t.is_floating_point() or d2t.dtype == torch.bool or d2t.shape != (draft_vocab_size,):
        raise refuse(f"d2t is {d2t.dtype} {list(d2t.shape)} instead of integers [{draft_vocab_size}]")
    d2t = d2t.long()
    ids = torch.arange(draft_vocab_size) + d2t
    wrong = (ids < 0) | (ids >= target_vocab_size)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise refuse(f"d2t is out of range: draft token {first} is target token {int(ids[first])} of {target_vocab_size}")
    if len(ids.unique()) != draft_vocab_size:
        values, counts = ids.unique(return_counts=True)
        twice = int(values[counts > 1][0])
        raise refuse(f"d2t is not injective: several draft tokens are target token {twice}")
    if t2d is not None:
        if t2d.shape != (target_vocab_size,):
            raise refuse(f"t2d has shape {list(t2d.shape)} instead of [{target_vocab_size}]")
        if not torch.equal(t2d.bool(), t2d_of(ids, target_vocab_size)):
            raise refuse("t2d and d2t name different target tokens", "one of them is from another head, or d2t holds ids")
    return None if draft_vocab_size == target_vocab_size and not d2t.any() else d2t
