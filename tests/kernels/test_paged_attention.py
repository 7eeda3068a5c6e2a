"""Paged attention against float64 loops over the slots that a walk up the tree names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness.attention import check_attention, make_case, slots_of
from hypothesis import given, settings
from hypothesis import strategies as st

from autospec.kernels.attention import attention
from autospec.kernels.paged_attention import Tile, attend_pages, paged_attention, why_not_cpu

FILE = "autospec.kernels.paged_attention"
WHOLE, SPLIT = Tile(16, 16, 1, 4, 2), Tile(32, 16, 4, 4, 2)


features = st.fixed_dictionaries({
    "window": st.sampled_from([0, 0, 1, 5, 17]),
    "chunk": st.sampled_from([0, 0, 4, 12]),
    "softcap": st.sampled_from([0.0, 0.0, 2.0]),
    "has_sinks": st.booleans(),
    "has_slopes": st.booleans(),
    "group": st.sampled_from([1, 2, 3]),
    "dims": st.sampled_from([(8, 8), (24, 24), (20, 12), (12, 20)]),
})


def case_with(features, seed, parents):
    options = dict(features)
    generator = torch.Generator().manual_seed(seed)
    if options.pop("has_sinks"):
        options["sinks"] = torch.randn(2 * options["group"], generator=generator, dtype=torch.float64)
    if options.pop("has_slopes"):
        options["alibi_slopes"] = torch.rand(2 * options["group"], generator=generator, dtype=torch.float64)
    return make_case(seed, parents, **options)


@settings(max_examples=25, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 40), is_tree=st.booleans(), features=features)
def test_reference_equals_loops(random_parents, seed, q_len, is_tree, features):
    parents = random_parents(torch.Generator().manual_seed(seed), 2, q_len) if is_tree else (2, q_len)
    case = case_with(features, seed, parents)
    check_attention(case, paged_attention(*case.arguments()), 0.0)


@settings(max_examples=12, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 40), is_tree=st.booleans(), features=features,
       tile=st.sampled_from([WHOLE, SPLIT]))
def test_triton_equals_loops(random_parents, interpreted, seed, q_len, is_tree, features, tile):
    parents = random_parents(torch.Generator().manual_seed(seed), 2, q_len) if is_tree else (2, q_len)
    case = case_with(features, seed, parents).to(torch.float32)
    check_attention(case, interpreted(FILE, "attend_pages", *case.arguments(), tile), 0.0)


def on_cpu(*arguments):
    """The C++ implementation; it must have been compiled."""
    assert why_not_cpu(paged_attention.bind(arguments, {})) is None
    return torch.ops.autospec_cpu.paged_attention(*arguments)


@settings(max_examples=60, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(1, 70), is_tree=st.booleans(), features=features,
       page=st.sampled_from([1, 4, 16, 48]), max_len=st.sampled_from([0, 40, 200]),
       dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_cpu_equals_loops(random_parents, seed, q_len, is_tree, features, page, max_len, dtype):
    parents = random_parents(torch.Generator().manual_seed(seed), 2, q_len) if is_tree else (2, q_len)
    case = case_with({**features, "page": page, "max_len": max_len}, seed, parents).to(dtype)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    check_attention(case, on_cpu(*case.arguments()), unit)


@pytest.mark.parametrize("threads", [1, 3])
def test_cpu_rows_depend_on_what_they_see_only(random_parents, threads):
    """To the bit: N tokens in one call equal N calls of one, and the last nodes alone equal those of the whole tree."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wide = make_case(16, (2, 30), max_len=300, window=90).to(torch.float32)
        out = on_cpu(*wide.arguments())
        for n in range(30):
            narrow = replace(wide, q=wide.q[:, n : n + 1], kv_lens=wide.kv_lens + n)
            assert torch.equal(out[:, n : n + 1], on_cpu(*narrow.arguments()))
        tree = make_case(17, random_parents(torch.Generator().manual_seed(1), 2, 40), max_len=200, chunk=50)
        arguments = tree.to(torch.float32).arguments()
        out = on_cpu(*arguments)
        for last in (1, 7, 40):
            assert torch.equal(out[:, -last:], on_cpu(arguments[0][:, -last:], *arguments[1:]))
    finally:
        torch.set_num_threads(before)


def test_cpu_takes_any_stride():
    """q as a slice of a fused projection, pages between others, a column of a wider table."""
    case = make_case(18, (2, 5)).to(torch.float32)
    arguments = case.arguments()
    expected = on_cpu(*arguments)
    for i in range(4):
        wide = torch.stack([arguments[i], arguments[i]], -1 if i in (0, 3) else 1)
        arguments[i] = wide.select(-1 if i in (0, 3) else 1, 1)
        assert not arguments[i].is_contiguous()
    assert torch.equal(on_cpu(*arguments), expected)


def test_why_not_cpu():
    arguments = paged_attention.bind(make_case(19, (1, 2)).arguments(), {})
    assert "float64" in why_not_cpu(arguments)
    arguments |= {name: arguments[name].float() for name in ("q", "k_pages", "v_pages")}
    assert "bfloat16" in why_not_cpu({**arguments, "q": arguments["q"].bfloat16()})
    assert "stride" in why_not_cpu({**arguments, "k_pages": arguments["k_pages"].transpose(2, 3)})
    assert "meta" in why_not_cpu({**arguments, "q": arguments["q"].to("meta")})


def all_of(interpreted, case):
    """The reference, C++ for the CPU, and Triton with and without splits."""
    arguments = case.to(torch.float32).arguments()
    yield paged_attention(*arguments)
    yield on_cpu(*arguments)
    for tile in (WHOLE, SPLIT):
        yield interpreted(FILE, "attend_pages", *arguments, tile)


@pytest.mark.parametrize(("q_len", "kv_len"), [(33, 0), (65, 9), (40, 24), (70, 1), (50, 31)])
def test_masks_of_more_than_one_word(random_parents, interpreted, q_len, kv_len):
    """Blocks of 16 slots start anywhere in a word and cross its end; deep trees reach back across it."""
    parents = random_parents(torch.Generator().manual_seed(q_len), 1, q_len)
    parents[0, 25:] = torch.arange(24, q_len - 1)
    case = replace(make_case(1, parents, kv_heads=1), kv_lens=torch.tensor([kv_len]).int())
    for out in all_of(interpreted, case):
        check_attention(case.to(torch.float32), out, 0.0)


@pytest.mark.parametrize("kv_len", [0, 1, 15, 16, 17, 39])
def test_every_alignment_of_the_committed_rows(random_parents, interpreted, kv_len):
    case = make_case(2, random_parents(torch.Generator().manual_seed(kv_len), 1, 9))
    case = replace(case, kv_lens=torch.tensor([kv_len]).int())
    for out in all_of(interpreted, case):
        check_attention(case.to(torch.float32), out, 0.0)


def test_a_window_counts_positions_not_slots(interpreted):
    """Seven siblings sit in slots 10 ... 16, all at position 10: a window of 4 shows each 7, 8, 9 and itself."""
    parents = torch.tensor([[-1, *[0] * 7]], dtype=torch.int32)
    case = replace(make_case(3, parents, window=4), kv_lens=torch.tensor([9]).int())
    assert slots_of(case, 0, 7) == [7, 8, 9, 16]
    for out in all_of(interpreted, case):
        check_attention(case.to(torch.float32), out, 0.0)


def test_a_chunk_boundary_inside_a_tree(interpreted):
    """Positions 10, 11 | 12, 13: the deeper nodes see only their own chunk, though their slots say otherwise."""
    parents = torch.tensor([[-1, 0, 0, 1, 2, 3]], dtype=torch.int32)
    case = replace(make_case(4, parents, chunk=4), kv_lens=torch.tensor([10]).int())
    assert slots_of(case, 0, 4) == [14]
    assert slots_of(case, 0, 5) == [13, 15]
    for out in all_of(interpreted, case):
        check_attention(case.to(torch.float32), out, 0.0)


def test_an_absent_node_sees_itself_and_is_not_nan(interpreted):
    parents = torch.tensor([[-1, -1, 1, 0]], dtype=torch.int32)
    for kv_len in (0, 5):
        case = replace(make_case(5, parents, window=2), kv_lens=torch.tensor([kv_len]).int())
        assert slots_of(case, 0, 2)[-1] == kv_len + 2
        for out in all_of(interpreted, case):
            check_attention(case.to(torch.float32), out, 0.0)


def test_a_chain_is_a_tree(interpreted):
    chain = make_case(6, (2, 12), window=7)
    tree = replace(chain, parents=torch.arange(-1, 11, dtype=torch.int32).expand(2, -1))
    for one, other in zip(all_of(interpreted, chain), all_of(interpreted, tree), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@settings(max_examples=12, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**32 - 1), q_len=st.integers(2, 40), features=features, data=st.data())
def test_the_last_nodes_of_a_tree_equal_its_last_rows(random_parents, interpreted, seed, q_len, features, data):
    """A drafter appends its tree level by level: earlier nodes are rows of the cache already, the mask holds them all."""
    whole = case_with(features, seed, random_parents(torch.Generator().manual_seed(seed), 2, q_len)).to(torch.float32)
    first = data.draw(st.integers(1, q_len - 1))
    arguments = [whole.q[:, first:], *whole.arguments()[1:]]
    arguments[6] = torch.nn.functional.pad(arguments[6], (0, data.draw(st.integers(0, 1))))  # words may be left over
    rows = [paged_attention(*arguments), on_cpu(*arguments)]
    rows += [interpreted(FILE, "attend_pages", *arguments, tile) for tile in (WHOLE, SPLIT)]
    for out, late in zip(all_of(interpreted, whole), rows, strict=True):
        torch.testing.assert_close(late, out[:, first:], rtol=2e-6, atol=2e-6)


def test_wide_equals_narrow(interpreted):
    """N tokens in one call equal N calls of one: the rows are in the cache already, only the lengths differ."""
    wide = make_case(7, (2, 5), chunk=12)
    for i, out in enumerate(all_of(interpreted, wide)):
        for n in range(5):
            narrow = replace(wide, q=wide.q[:, n : n + 1], kv_lens=wide.kv_lens + n)
            one = list(all_of(interpreted, narrow))[i] if i else paged_attention(*narrow.to(torch.float32).arguments())
            torch.testing.assert_close(out[:, n : n + 1], one, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("window", [0, 6])
def test_padding_is_invisible(interpreted, window):
    """Rows past q_lens and pages past the length change nothing, whatever they hold: NaN."""
    case = make_case(8, (3, 9), q_lens=torch.tensor([9, 4, 0]).int(), window=window).to(torch.float32)
    for tile in (WHOLE, SPLIT, None):
        poisoned = replace(case, k_pages=case.k_pages.clone(), v_pages=case.v_pages.clone(), q=case.q.clone())
        for b in range(3):
            for slot in range(int(case.kv_lens[b] + case.q_lens[b]), case.page_table.shape[1] * 4):
                poisoned.k_pages[case.page_table[b, slot // 4], slot % 4] = float("nan")
                poisoned.v_pages[case.page_table[b, slot // 4], slot % 4] = float("nan")
            poisoned.q[b, int(case.q_lens[b]) :] = float("nan")
        poisoned.k_pages[0] = float("nan")
        out = on_cpu(*poisoned.arguments()) if tile is None else interpreted(FILE, "attend_pages", *poisoned.arguments(), tile)
        check_attention(case, out, 0.0)
        assert torch.equal(out[2], torch.zeros_like(out[2])), "rows past q_lens are 0"
    valid = [paged_attention(*one.arguments())[1, :4] for one in (case, poisoned)]
    torch.testing.assert_close(valid[1], valid[0], rtol=0.0, atol=0.0)


def test_pages_are_a_permutation(interpreted):
    case = make_case(9, (2, 6))
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(case.k_pages.shape[0] - 1)])
    moved = replace(case, k_pages=case.k_pages[order], v_pages=case.v_pages[order],
                    page_table=order.argsort()[case.page_table.long()].int())
    for one, other in zip(all_of(interpreted, case), all_of(interpreted, moved), strict=True):
        assert torch.equal(one, other)


def test_a_finished_row_past_its_table_is_finite(interpreted):
    """It keeps running in a static graph; its rows went to the scratch page."""
    case = make_case(10, (1, 4))
    case = replace(case, kv_lens=torch.tensor([case.page_table.shape[1] * 4 - 2]).int())
    for out in all_of(interpreted, case):
        assert torch.isfinite(out).all()


def test_one_group_of_many_heads_and_uneven_tiles(interpreted):
    """7 heads to a K/V head: a node's rows straddle two tiles."""
    case = make_case(11, (1, 6), group=7, kv_heads=1)
    for out in all_of(interpreted, case):
        check_attention(case.to(torch.float32), out, 0.0)


def test_half_precision_under_the_interpreter(interpreted):
    """float16: the interpreter's dot takes bfloat16 for integers (triton 3.9); the GPU tests have both."""
    case = make_case(12, torch.tensor([[-1, 0, 0, 1]], dtype=torch.int32)).to(torch.float16)
    out = interpreted(FILE, "attend_pages", *case.arguments(), SPLIT)
    assert out.dtype == torch.float16
    check_attention(case, out, 2.0**-11)


PLANTED = {
    "siblings see each other": lambda a: [*a[:6], a[6] | 0b110, *a[7:]],
    "the newest row is missing": lambda a: [*a[:6], a[6] & ~0b10000, *a[7:]],
    "one committed row too few": lambda a: [*a[:4], a[4] - 1, *a[5:]],
    "the window is one wider": lambda a: [*a[:9], a[9] + 1, *a[10:]],
    "the chunk is ignored": lambda a: [*a[:10], 0, *a[11:]],
    "sinks are ignored": lambda a: [*a[:7], None, *a[8:]],
    "the softcap is ignored": lambda a: [*a[:11], 0.0, a[12]],
    "slopes are ignored": lambda a: [*a[:12], None],
    "K/V heads are interleaved": lambda a: [a[0].unflatten(2, (2, 2)).transpose(2, 3).flatten(2, 3), *a[1:]],
}


@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_planted_bugs_are_caught(interpreted, bug, backend):
    parents = torch.tensor([[-1, 0, 0, 1, 3]], dtype=torch.int32)
    case = make_case(13, parents, window=6, chunk=8, softcap=1.0)
    case = replace(case, sinks=torch.zeros(4).double(), alibi_slopes=torch.linspace(0.1, 0.4, 4).double())
    case = replace(case, kv_lens=torch.tensor([14]).int()).to(torch.float32)
    triton = lambda *a: interpreted(FILE, "attend_pages", *a, WHOLE)  # noqa: E731
    run = {"reference": paged_attention, "cpu": on_cpu, "triton": triton}[backend]
    check_attention(case, run(*case.arguments()), 0.0)
    with pytest.raises(AssertionError):
        check_attention(case, run(*PLANTED[bug](case.arguments())), 0.0)


def test_attention_as_captured_equals_the_paged_one():
    case = make_case(14, (2, 11), window=5, sinks=torch.randn(4, dtype=torch.float64), max_len=0)
    table = case.page_table.long()
    k, v = (pages[table].flatten(1, 2)[:, :11].transpose(1, 2) for pages in (case.k_pages, case.v_pages))
    out = attention(case.q.transpose(1, 2), k, v, case.sinks, scale=case.scale, window=5)
    check_attention(case, out, 0.0)


GPU_CASES = {
    "decode": {"parents": (3, 1), "max_len": 700, "kv_heads": 8, "group": 4, "dims": (128, 128), "page": 16},
    "tree": {"parents": 64, "max_len": 300, "kv_heads": 2, "group": 4, "dims": (128, 128), "page": 16},
    "wide tree": {"parents": 150, "max_len": 70, "kv_heads": 1, "group": 2, "dims": (64, 64), "page": 64},
    "window and sinks": {"parents": 20, "max_len": 300, "kv_heads": 2, "group": 8, "dims": (64, 64), "page": 16,
                         "window": 128, "sinks": torch.linspace(-2, 2, 16, dtype=torch.float64)},
    "chunk": {"parents": 30, "max_len": 300, "kv_heads": 2, "group": 5, "dims": (128, 128), "page": 32, "chunk": 64},
    "softcap, head dim 256": {"parents": (2, 9), "max_len": 150, "kv_heads": 2, "group": 2, "dims": (256, 256),
                              "page": 16, "softcap": 50.0},
    "slopes": {"parents": 30, "max_len": 200, "kv_heads": 4, "group": 1, "dims": (64, 64), "page": 128,
               "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)},
    "head dims 80 and 96": {"parents": 12, "max_len": 150, "kv_heads": 2, "group": 1, "dims": (80, 96), "page": 8},
    "head dim 192 and 128": {"parents": (2, 40), "max_len": 100, "kv_heads": 2, "group": 3, "dims": (192, 128),
                             "page": 64},
    "head dim 512": {"parents": (1, 3), "max_len": 100, "kv_heads": 1, "group": 4, "dims": (512, 512), "page": 16},
    "prefill": {"parents": (2, 200), "max_len": 50, "kv_heads": 1, "group": 2, "dims": (128, 128), "page": 16,
                "q_lens": torch.tensor([200, 77]).int()},
    "large": {"parents": (16, 33), "max_len": 40, "kv_heads": 8, "group": 4, "dims": (128, 128), "page": 16},
}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", GPU_CASES)
def test_triton_on_the_gpu(random_parents, cuda, name, dtype):
    options = dict(GPU_CASES[name])
    parents = options.pop("parents")
    if isinstance(parents, int):
        parents = random_parents(torch.Generator().manual_seed(parents), 2, parents)
    case = make_case(15, parents, **options, scale=options["dims"][0] ** -0.5).to(dtype)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}[dtype]
    arguments = case.to(cuda).arguments()
    out = torch.ops.autospec_triton.paged_attention(*arguments)
    check_attention(case, out, unit)
    if case.parents is not None:
        late = torch.ops.autospec_triton.paged_attention(arguments[0][:, 5:], *arguments[1:])
        torch.testing.assert_close(late, out[:, 5:], rtol=2 * unit + 1e-5, atol=2 * unit + 1e-5)
    for splits in (1, 8) if options["dims"][0] <= 256 else ():  # triton 3.6 compiles wider ones in float32 for a minute
        check_attention(case, attend_pages(*arguments, Tile(32, 32, splits, 4, 2)), unit)
