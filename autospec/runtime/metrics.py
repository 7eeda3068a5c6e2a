"""What a run measured. Acceptance is counted on the device; times are wall clock."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Metrics:
    """One call of generate.

    Args:
        prompt_tokens, new_tokens: of all rows together.
        steps: graph launches after prefill in which any row was live, by draft length.
        row_steps: (row, step) pairs that verified a draft of any length; plain steps are not counted.
        reached: reached[d] = row_steps in which at least d + 1 draft tokens were accepted, before any cut.
        nodes_verified: draft nodes of trees that were verified in counted rows, absent ones excluded.
        rank_counts: accepted nodes of trees by their rank among their siblings; the last one takes all beyond.
        seconds: wall time of the whole call; first_token_seconds: until the first token of any row.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: dict[int, int] = field(default_factory=dict)
    row_steps: int = 0
    reached: list[int] = field(default_factory=list)
    nodes_verified: int = 0
    rank_counts: list[int] = field(default_factory=list)
    seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def acceptance_per_depth(self) -> list[float]:
        """P_1, P_2, ...: share of counted rows that accepted at least that many draft tokens."""
        return [count / self.row_steps if self.row_steps else 0.0 for count in self.reached]

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per counted (row, step), the bonus token included: 1 + the sum of acceptance_per_depth."""
        return 1.0 + sum(self.acceptance_per_depth)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over the wall time of the call, prefill included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance_per_rank(self) -> list[float]:
        """Share of the accepted tree nodes that were the first, second, ... of their siblings; empty for chains."""
        total = sum(self.rank_counts)
        return [count / total for count in self.rank_counts] if total else []

    def count_ranks(self, counts: list[int]) -> None:
        """Add a step's counts of trees: nodes verified, then accepted nodes by rank."""
        self.nodes_verified += counts[0]
        self.rank_counts += [0] * (len(counts) - 1 - len(self.rank_counts))
        for rank, count in enumerate(counts[1:]):
            self.rank_counts[rank] += count

    def count(self, draft_len: int, deltas: list[int]) -> None:
        """Add one step: deltas[0] live rows, deltas[d] rows that accepted at least d."""
        self.steps[draft_len] = self.steps.get(draft_len, 0) + 1
        if draft_len == 0:
            return
        self.row_steps += deltas[0]
        self.reached += [0] * (draft_len - len(self.reached))
        for depth in range(draft_len):
            self.reached[depth] += deltas[depth + 1]

    def __str__(self) -> str:
        depths = " ".join(f"{rate:.2f}" for rate in self.acceptance_per_depth) or "none"
        steps = ", ".join(f"{count} of draft length {length}" for length, count in sorted(self.steps.items()))
        ranks = self.acceptance_per_rank
        shown = " ".join(f"{rate:.2f}" for rate in ranks[: max((i for i, rate in enumerate(ranks) if rate), default=0) + 1])
        tree = f"{self.nodes_verified / max(1, self.row_steps):.1f} nodes a step, accepted by rank {shown}\n" if ranks else ""
        return (
            f"{self.new_tokens} tokens in {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s, "
            f"first token after {self.first_token_seconds * 1000:.0f} ms\n"
            f"mean acceptance length {self.mean_acceptance_length:.2f}, acceptance per depth {depths}\n"
            f"{tree}"
            f"steps: {steps or 'none'}"
        )
