"""Values through a pipe: torch's own pickles know no float8."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor


class _Pickler(pickle.Pickler):
    """Sends float8 as its bits."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn:
            return _as_float8, (value.view(torch.uint8),)
        return NotImplemented


def _as_float8(bits: Tensor) -> Tensor:
    return bits.view(torch.float8_e4m3fn)


def dump(value: Any, file: Any) -> None:
    """As pickle.dump does; pickle.load reads it."""
    _Pickler(file).dump(value)
    file.flush()
