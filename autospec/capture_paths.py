"""The path through a model's Python code that was exported: the sizes for which the code takes it, by the export's guards."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from autospec.capture_facts import MOST_POSITIONS
from autospec.errors import CaptureError
from autospec.ir.slots import find_slot

_MANY = (256, 4096)  # rows and tokens of a row: how many are read at once must not change the path through the model's code
_FEW = 64  # tokens, up to which a condition on a remainder is tried


def longest_of_this_path(graph: fx.GraphModule) -> int | None:
    """The largest length for which the exported path through the model's code holds; None: any."""
    tokens = find_slot(graph, "input_ids")
    size = tokens.meta["val"].shape[1] if tokens is not None else 0
    if not isinstance(size, torch.SymInt):
        return None
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer and int(upper) < MOST_POSITIONS else None


def check_paths(graph: fx.GraphModule, name: str) -> None:
    """Raise CaptureError where Python code branches on how many rows are read, or on a remainder of their length."""
    tokens = find_slot(graph, "input_ids")
    sizes: Any = tokens.meta["val"].shape if tokens is not None else ()
    if len(sizes) != 2 or not all(isinstance(size, torch.SymInt) for size in sizes):
        return
    rows, length = symbols = [size.node.expr for size in sizes]
    for guard in (guard.expr for guard in sizes[0].node.shape_env.guards):
        if not (guard.is_Relational and guard.free_symbols <= {*symbols}):
            continue
        if guard.rel_op in ("==", "!="):
            tried = [{rows: 2, length: count} for count in range(2, _FEW + 1)]
        else:  # of the length alone, it limits the positions
            tried = [dict(zip(symbols, _MANY, strict=True))] if rows in guard.free_symbols else []
        if not all(guard.subs(counts) for counts in tried):
            named = guard.subs(dict(zip(symbols, ("batch", "length"), strict=True)))
            raise CaptureError(
                f"the model's Python code takes this path only while {named}", where=name,
                help="how many rows and tokens are read at once must not change the tokens of any",
            )  # fmt: skip
