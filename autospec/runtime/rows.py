"""The state of a row: what a request writes into it before it begins. Nothing of the request before may be left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autospec.program import SCRATCH_PAGES, Shape
from autospec.runtime.request import Request

_ROW_STATE = (
    "prompt_lens", "limits", "finished", "row_keys", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
)  # fmt: skip


def row_values(request: Request | None) -> dict[str, float]:
    """The scalars of a row; None: an idle one, as fresh state is."""
    if request is None:
        idle: dict[str, float] = dict.fromkeys(_ROW_STATE, 0)
        return idle | {"finished": True, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    sampling = request.sampling
    return {
        "prompt_lens": len(request.prompt), "limits": len(request.prompt) + request.max_new_tokens, "finished": False,
        "row_keys": request.row_key, "temperature": sampling.temperature, "top_k": sampling.top_k,
        "top_p": sampling.top_p, "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty,
    }  # fmt: skip


def row_state(rows: Mapping[int, Request | None], shape: Shape, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of rows whose requests have not begun, [len(rows), ...] on the host.

    rows: of a batch of this shape; None: finished, without a page. state: of whichever program reads the prompts; what it
    lacks is left out.
    """
    new: dict[str, Tensor] = {
        "tokens": torch.zeros(len(rows), shape.token_room, dtype=torch.int64),
        "page_table": torch.zeros(len(rows), shape.pages_per_row, dtype=torch.int32),
        "kv_lens": torch.zeros(len(rows)),
        "draft_tokens": torch.zeros(len(rows), shape.tree.num_nodes),
        "tree_parents": torch.full((len(rows), shape.tree.num_nodes), -1),
    }
    for place, (row, request) in enumerate(rows.items()):
        if request is not None:
            new["tokens"][place, : len(request.prompt)] = torch.tensor(request.prompt)
            first = SCRATCH_PAGES + row * shape.pages_per_row
            new["page_table"][place] = torch.arange(first, first + shape.pages_per_row, dtype=torch.int32)
    values = [row_values(request) for request in rows.values()]
    for name in _ROW_STATE:
        if name in state:
            new[name] = torch.tensor([value[name] for value in values], dtype=state[name].dtype)
    if "seen" in state:
        new["seen"] = torch.stack([seen(request, state["seen"].shape[1]) for request in rows.values()])
    return new


def write_rows(state: Mapping[str, Tensor], rows: Sequence[int], new: Mapping[str, Tensor]) -> None:
    """Copy rows into the state, once per tensor; state keeps its addresses."""
    index = torch.tensor(rows, device=state["tokens"].device)
    for name, tensor in new.items():
        state[name].index_copy_(0, index, tensor.to(state[name]))


def seen(request: Request | None, vocab_size: int) -> Tensor:
    """The history that processors look at: bool [V]."""
    seen = torch.zeros(vocab_size, dtype=torch.bool)
    if request is not None:
        seen[request.prompt + request.output] = True
    return seen
