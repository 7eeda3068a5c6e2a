"""Every token a request of its own: tables and lengths of any width, and index logits that are the same bits either way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.dsa_indexer_logits import dsa_indexer_logits, expand
from autospec.kernels.dsa_topk import dsa_topk
from autospec.kernels.expand_requests import expand_requests
from autospec.kernels.tree_tables import tree_tables

FILE = "autospec.kernels.expand_requests"
LOGITS = "autospec.kernels.dsa_indexer_logits"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), q_len=st.integers(1, 9), max_pages=st.integers(1, 300),
       spare=st.integers(0, 4))
def test_rows_are_request_major(interpreted, seed, batch, q_len, max_pages, spare):
    g = torch.Generator().manual_seed(seed)
    page_table = torch.randint(0, 99, (batch, max_pages), generator=g).int()
    kv_lens = torch.randint(0, 1000, (batch,), generator=g).int()
    rows = batch * q_len + spare
    for run in (expand_requests, lambda *args: interpreted(FILE, "expand_requests_triton", *args)):
        table, lens = torch.full((rows, max_pages), -7, dtype=torch.int32), torch.full((rows,), -7, dtype=torch.int32)
        run(page_table, kv_lens, q_len, table, lens)
        for row in range(batch * q_len):
            assert torch.equal(table[row], page_table[row // q_len])
            assert int(lens[row]) == int(kv_lens[row // q_len]) + row % q_len
        assert bool((table[batch * q_len :] == -7).all())
        assert bool((lens[batch * q_len :] == -7).all())


@pytest.mark.parametrize("index_topk", [0, 5, 60])
@pytest.mark.parametrize("q_len", [2, 3, 4, 8])
@pytest.mark.parametrize("is_tree", [False, True])
def test_both_routes_select_the_same_slots(random_parents, interpreted, index_topk, q_len, is_tree):
    """To the bit, by the reference and by Triton; short and long texts."""
    g = torch.Generator().manual_seed(q_len)
    page_table = (1 + torch.randperm(3 * 14, generator=g)).reshape(3, 14).int()
    case = dsa_indexer_logits.bind((
        torch.randn(3, q_len, 5, 8, generator=g), torch.randn(3, q_len, 5, generator=g), torch.randn(43, 4, 8, generator=g),
        page_table, torch.tensor([0, 3, 41], dtype=torch.int32), None, 0.3, index_topk,
    ), {})  # fmt: skip
    tree_mask = tree_tables(random_parents(g, 3, q_len))[0] if is_tree else None
    wide, flat = list(case.values()), list(expand(case).values())
    for run in (dsa_indexer_logits, lambda *args: interpreted(LOGITS, "dsa_indexer_logits_triton", *args)):
        native, expanded = run(*wide), run(*flat).reshape(3, q_len, -1)
        both = [dsa_topk(scores, case["kv_lens"], max(index_topk, 1), None, tree_mask) for scores in (native, expanded)]
        assert torch.equal(*both)
