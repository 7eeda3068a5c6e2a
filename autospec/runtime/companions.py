"""Programs beside a batch: one that reads single prompts into its cache, and narrower ones that go on with its last rows.

A batch's own prefill computes all its rows for the sake of the one that reads: with 64 rows, a refilled row would cost as
much as the first 64 prompts together. A reader is a prefill of one row. When its prompt has ended, the row moves into the batch.
At the end of a queue the batch's step computes all its rows for the sake of those that are not done: a narrower step
costs less. Both have a state of their own for their rows, whose pages are the batch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autospec.program import Program
from autospec.runtime.replay import bind_graphs

READ_ALONE_FROM = 4  # rows of a batch that pay for compiling a reader: a guess


class Companion:
    """A program over the cache of another one.

    Args:
        program: of a shape whose `cache_rows` are the batch's rows.
        batch: the program whose cache it writes.
        state: of the batch; what both declare alike, the cache above all, is shared.
    """

    def __init__(self, program: Program, batch: Program, state: Mapping[str, Tensor]) -> None:
        assert program.shape.cache_rows == batch.shape.batch_size, f"{program.shape} has not the cache of {batch.shape}"
        slots = batch.state_slots()
        shared = {name for name, slot in program.state_slots().items() if slots[name] == slot}
        self.program = program
        self.row_state = program.new_state(without=shared)
        self.batch_state = state
        self.state = {**self.row_state, **{name: state[name] for name in shared}}
        self.graphs = bind_graphs(program, self.state)


class Reader(Companion):
    """A prefill of one row."""

    def __init__(self, program: Program, batch: Program, state: Mapping[str, Tensor]) -> None:
        super().__init__(program, batch, state)
        self.prefill = self.graphs["prefill"]

    def move_to(self, row: int) -> None:
        """Make what was read a row of the batch."""
        for name, tensor in self.row_state.items():
            self.batch_state[name][row].copy_(tensor[0])


class Narrow(Companion):
    """Steps of fewer rows than the batch has."""

    def __init__(self, program: Program, batch: Program, state: Mapping[str, Tensor]) -> None:
        super().__init__(program, batch, state)
        self.steps = {length: self.graphs[f"step_{length}"] for length in program.draft_lens()}
        self.rows: list[int] = []
        self._index = torch.empty(0, dtype=torch.int64)  # rows, on the device, once they are taken
        self._at_rest = {name: slot.fill for name, slot in program.state_slots().items()}

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch, in this order; the others of this program are idle.

        The host does not wait: a launch before may be under way, and these copies stand behind it in the same stream.
        """
        assert len(rows) <= self.program.shape.batch_size, f"{len(rows)} rows do not fit {self.program.shape.batch_size}"
        self.rows = list(rows)
        device = self.batch_state["tokens"].device
        self._index = torch.tensor(self.rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
        for name, tensor in self.row_state.items():
            torch.index_select(self.batch_state[name], 0, self._index, out=tensor[: len(rows)])
            tensor[len(rows) :].fill_(self._at_rest[name])

    def give_back(self) -> None:
        """Write what became of the rows into the batch."""
        for name, tensor in self.row_state.items():
            self.batch_state[name].index_copy_(0, self._index, tensor[: len(self.rows)])
