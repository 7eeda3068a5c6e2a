"""How many draft tokens the next step verifies: the length that maximises expected tokens per second.

The choice uses step times, measured once at warm-up, and acceptance counted on the device, seen at a fixed lag. Within
a process a run is reproducible; another process may measure other times and choose other lengths, which never changes
the tokens in exact arithmetic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

LAG = 2  # steps between counting and using a count
MEMORY = 0.9  # weight of the past per counted step: about ten steps are remembered
MARGIN = 1.05  # a new length must promise this much more than the current one


class DraftLengthPolicy:
    """Chooses among the draft lengths that a program has steps for.

    Args:
        seconds: measured time of one step by draft length.
        lag: counts that are seen but not used yet; less than LAG where they are seen later than at once.
    """

    def __init__(self, seconds: dict[int, float], lag: int = LAG) -> None:
        self.seconds, self.lag = dict(sorted(seconds.items())), lag
        longest = max(self.seconds)
        # Optimism at the start: half of the drafts of each depth, so that speculation gets its first chance.
        self.trials = [1.0] * longest
        self.hits = [0.5 ** (depth + 1) for depth in range(longest)]
        self.pending: deque[tuple[int, list[int]]] = deque()
        self.current = self._best(list(self.seconds))

    def rates(self) -> list[float]:
        """Estimated P_1, P_2, ...: never rising with depth."""
        estimates: list[float] = []
        for hits, trials in zip(self.hits, self.trials, strict=True):
            rate = hits / trials
            estimates.append(min(rate, estimates[-1]) if estimates else rate)
        return estimates

    def observe(self, draft_len: int, deltas: Sequence[int]) -> None:
        """Count one step: deltas[0] live rows, deltas[d] rows whose first d drafts the target agreed with.

        A step of length n also tells about depth n + 1: its bonus token is compared with the next draft token.
        """
        self.pending.append((draft_len, list(deltas)))
        if len(self.pending) <= self.lag:
            return
        length, counts = self.pending.popleft()
        rows = counts[0]
        if rows == 0:
            return
        for depth in range(len(self.hits)):
            self.hits[depth] *= MEMORY
            self.trials[depth] *= MEMORY
            if depth <= length and depth + 1 < len(counts):
                self.hits[depth] += counts[depth + 1]
                self.trials[depth] += rows
            else:  # not tried: what the deepest tried depth says, compounded
                tried = min(length, depth - 1)
                ratio = self.hits[0] / self.trials[0]
                self.hits[depth] += rows * self.hits[tried] / self.trials[tried] * ratio if tried >= 0 else 0.0
                self.trials[depth] += rows

    def next_draft_len(self) -> int:
        """The length of the next step."""
        best = self._best(list(self.seconds))
        if self._speed(best) > MARGIN * self._speed(self.current):
            self.current = best
        return self.current

    def _speed(self, draft_len: int) -> float:
        return (1.0 + sum(self.rates()[:draft_len])) / self.seconds[draft_len]

    def _best(self, lengths: list[int]) -> int:
        return max(lengths, key=self._speed)
