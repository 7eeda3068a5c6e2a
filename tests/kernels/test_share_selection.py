"""One selection for all passes of a draft: every node adds its ancestors and itself to what the last committed row chose."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.share_selection import share_selection
from autospec.kernels.tree_tables import tree_tables


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), first=st.integers(0, 40), q_len=st.integers(1, 5), is_tree=st.booleans())
def test_a_node_sees_the_selection_and_its_path(random_parents, seed, first, q_len, is_tree):
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, 30, (2, 1, 6), generator=g).int()
    kv_lens = torch.tensor([31, 50], dtype=torch.int32)
    parents = torch.arange(-1, first + q_len - 1).int().expand(2, -1).contiguous()
    tree_mask = None
    if is_tree:
        parents = random_parents(g, 2, first + q_len, absent=0.0)
        tree_mask = tree_tables(parents)[0]
    out = share_selection(indices, kv_lens, first, q_len, tree_mask)
    assert out.dtype == torch.int32
    for b in range(2):
        for row in range(q_len):
            node, path = first + row, []
            while node >= 0:
                path.append(int(kv_lens[b]) + node)
                node = int(parents[b, node])
            assert out[b, row, :6].tolist() == indices[b, 0].tolist()
            assert sorted(slot for slot in out[b, row, 6:].tolist() if slot >= 0) == sorted(path)
