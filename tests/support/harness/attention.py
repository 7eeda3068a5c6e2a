"""Paged attention by definition: random cases, and float64 loops over the slots that a walk up the tree names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autospec.kernels.tree_tables import tree_tables


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of the op, and the tree they were made from (None: a chain)."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    kv_lens: Tensor
    q_lens: Tensor | None = None
    parents: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 0.3
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None

    def arguments(self) -> list:
        """In the op's order."""
        tree_mask = None if self.parents is None else tree_tables(self.parents)[0]
        return [self.q, self.k_pages, self.v_pages, self.page_table, self.kv_lens, self.q_lens, tree_mask, self.sinks,
                self.scale, self.window, self.chunk, self.softcap, self.alibi_slopes]

    def to(self, to) -> Case:
        """The same case with every tensor converted, integers only moved."""
        def convert(x):
            if not isinstance(x, Tensor):
                return x
            return x.to(to) if x.is_floating_point() or isinstance(to, torch.device) else x

        return Case(**{name: convert(value) for name, value in vars(self).items()})


def make_case(seed, parents, *, group=2, kv_heads=2, dims=(8, 8), page=4, max_len=40, q_lens=None, **options) -> Case:
    """Random float64 tensors, ragged lengths, pages in a random order; scratch page 0 and unused slots are poisoned.

    parents is tree_parents [B, N], or (B, N) for chains.
    """
    g = torch.Generator().manual_seed(seed)
    batch, q_len = parents.shape if isinstance(parents, Tensor) else parents
    max_pages = (max_len + q_len + page - 1) // page + 1
    k_pages, v_pages = (
        torch.randn(1 + batch * max_pages, page, kv_heads, d, generator=g, dtype=torch.float64) for d in dims
    )
    page_table = (1 + torch.randperm(batch * max_pages, generator=g)).reshape(batch, max_pages).int()
    return Case(
        q=torch.randn(batch, q_len, kv_heads * group, dims[0], generator=g, dtype=torch.float64),
        k_pages=k_pages, v_pages=v_pages, page_table=page_table,
        kv_lens=torch.randint(0, max_len + 1, (batch,), generator=g).int(),
        q_lens=q_lens, parents=parents if isinstance(parents, Tensor) else None, **options,
    )


def seen_rows(case: Case, b: int, node: int) -> list[tuple[int, int]]:
    """(slot, position) of what a node sees, by definition: committed rows, ancestors and itself, which is last."""
    start = int(case.kv_lens[b])
    if case.parents is None:
        path = list(range(node + 1))
    else:
        parents = case.parents[b].tolist()
        path = [node]
        while path[-1] > 0 and parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        path = path[::-1] if path[-1] == 0 else [node]
    places = [(slot, slot) for slot in range(start)] + [(start + j, start + d) for d, j in enumerate(path)]
    here = places[-1][1]
    return [(slot, position) for slot, position in places
            if (not case.window or position > here - case.window)
            and (not case.chunk or position // case.chunk == here // case.chunk)]


def slots_of(case: Case, b: int, node: int) -> list[int]:
    return [slot for slot, _ in seen_rows(case, b, node)]


def naive_attention(case: Case) -> tuple[Tensor, Tensor]:
    """The result in float64, and sum p |v|, which scales the error of rounding p."""
    q = case.q.double()
    batch, q_len, q_heads, _ = q.shape
    group = q_heads // case.k_pages.shape[2]
    out = torch.zeros(batch, q_len, q_heads, case.v_pages.shape[3], dtype=torch.float64)
    size = torch.zeros_like(out)
    for b in range(batch):
        table = case.page_table[b].long()
        k, v = (pages[table].double().flatten(0, 1) for pages in (case.k_pages, case.v_pages))
        for n in range(q_len if case.q_lens is None else int(case.q_lens[b])):
            slots, positions = map(list, zip(*seen_rows(case, b, n), strict=True))
            scores = torch.einsum("thd,hgd->hgt", k[slots], q[b, n].unflatten(0, (-1, group))) * case.scale
            if case.softcap:
                scores = torch.tanh(scores / case.softcap) * case.softcap
            if case.alibi_slopes is not None:
                distance = torch.tensor(positions, dtype=torch.float64) - positions[-1]
                scores = scores + case.alibi_slopes.double().reshape(-1, group, 1) * distance
            extra = torch.zeros(q_heads, 0) if case.sinks is None else case.sinks[:, None]
            scores = torch.cat([scores.flatten(0, 1), extra.double()], 1)
            weights = torch.softmax(scores, 1)[:, : len(slots)].unflatten(0, (-1, group))
            out[b, n] = torch.einsum("hgt,thd->hgd", weights, v[slots]).flatten(0, 1)
            size[b, n] = torch.einsum("hgt,thd->hgd", weights, v[slots].abs()).flatten(0, 1)
    return out, size


def check_attention(case: Case, out: Tensor, unit: float) -> None:
    """|out - exact| <= unit (|exact| + sum p |v|) + float32 noise; unit: half a step of the dtype at 1.

    The first term is the rounding of the output, the second that of the probabilities before they meet V.
    """
    exact, size = naive_attention(case)
    valid = torch.ones(exact.shape[:2], dtype=torch.bool)
    if case.q_lens is not None:
        valid = torch.arange(exact.shape[1])[None] < case.q_lens[:, None]
    excess = (out.cpu().double() - exact).abs() - unit * (exact.abs() + size) - 4e-6 * (1 + size)
    assert out.shape == exact.shape
    assert excess[valid].max() <= 0, f"off by {excess[valid].max():.2e} more than rounding explains"
