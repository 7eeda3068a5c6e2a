"""Reads one prompt at a time into the cache of a batch, beside the rows that decode.

A batch's own prefill computes all its rows for the sake of the one that reads: with 64 rows, a refilled row would cost as
much as the first 64 prompts together. A reader is a prefill of one row with a row's state of its own, whose pages are the
batch's. When its prompt has ended, the state moves into the batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from autospec.program import Program
from autospec.runtime.replay import bind_graphs

READ_ALONE_FROM = 4  # rows of a batch that pay for compiling a reader: a guess


class Reader:
    """A prefill of one row.

    Args:
        program: of the shape `batch.shape.reader()`.
        batch: the program whose cache it writes.
        state: of the batch; what both declare alike, the cache above all, is shared.
    """

    def __init__(self, program: Program, batch: Program, state: Mapping[str, Tensor]) -> None:
        assert program.shape == batch.shape.reader(), f"{program.shape} does not read for {batch.shape}"
        slots = batch.state_slots()
        shared = {name for name, slot in program.state_slots().items() if slots[name] == slot}
        self.row_state = program.new_state(without=shared)
        self.batch_state = state
        self.prefill = bind_graphs(program, {**self.row_state, **{name: state[name] for name in shared}})["prefill"]

    def move_to(self, row: int) -> None:
        """Make what was read a row of the batch."""
        for name, tensor in self.row_state.items():
            self.batch_state[name][row].copy_(tensor[0])
