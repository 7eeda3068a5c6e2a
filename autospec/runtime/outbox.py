"""Results on their way from the device to the host, read a fixed number of launches late.

Waiting for a step's tokens before the next step is launched would leave a GPU idle in between. So a launch's results are
copied behind it into pinned memory, and read when `lag` younger launches are under way. A replayed CUDA graph writes its
results to the same addresses again; the copy stands before the next replay in the same stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

What = TypeVar("What")


class Outbox(Generic[What]):
    """A ring of results under way, each with a note of what they are results of.

    Args:
        device: where the results are made.
        lag: how many launches stay unread; 0: everything is read at once, as on a CPU.
    """

    def __init__(self, device: torch.device, lag: int) -> None:
        self.device, self.lag = device, lag
        self._under_way: deque[tuple[What, list[Tensor], torch.cuda.Event | None]] = deque()
        self._pinned: list[dict[tuple[int, torch.Size], Tensor]] = [{} for _ in range(lag + 1)]
        self._sent = 0

    def __len__(self) -> int:
        return len(self._under_way)

    def send(self, what: What, results: Sequence[Tensor]) -> None:
        """Start copying what a launch left on the device."""
        if self.device.type != "cuda":
            # State among the results changes with the next launch; what is read before that needs no copy.
            self._under_way.append((what, [result.clone() if self.lag else result for result in results], None))
            return
        # The buffers of the launch before the last `lag` ones: it was read.
        buffers = self._pinned[self._sent % len(self._pinned)]
        self._sent += 1
        copies = []
        for place, result in enumerate(results):
            key = place, result.shape
            if key not in buffers:
                buffers[key] = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            copies.append(buffers[key].copy_(result, non_blocking=True))
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._under_way.append((what, copies, event))

    def receive(self, keep: int) -> Iterator[tuple[What, list[Tensor]]]:
        """Results of the oldest launches, on the host, until `keep` are left; read them before the next `send`."""
        assert keep <= self.lag, f"{keep} results under way need as many buffers, there are {self.lag}"
        while len(self._under_way) > keep:
            what, copies, event = self._under_way.popleft()
            if event is not None:
                event.synchronize()
            yield what, copies
