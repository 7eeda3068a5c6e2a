"""What Triton kernels read in blocks of slots: their pages, their rows, and the words of a tree's mask.

Slot s of a request is row s % PAGE of the page that entry s // PAGE of its page table names; a block is T slots from i_t T on.
tree_mask rows are WORDS int32 for each node, bit j of a row says that the node sees node j.
"""

from __future__ import annotations

from autospec.kernels.launch import jit, tl


@jit
def bits_set(b_word):
    """Bits set in each int32."""
    b = b_word.to(tl.uint32, bitcast=True)
    b = b - ((b >> 1) & 0x55555555)
    b = (b & 0x33333333) + ((b >> 2) & 0x33333333)
    b = (b + (b >> 4)) & 0x0F0F0F0F
    b = b + (b >> 8)
    return ((b + (b >> 16)) & 0x3F).to(tl.int32)


@jit
def depth_of(p_mask, o_node, m_node, WORDS: tl.constexpr):
    """Depth of nodes: bits set in their mask rows, less one; p_mask points at the request."""
    b_depth = o_node * 0 - 1
    for i_w in range(WORDS):
        b_depth += bits_set(tl.load(p_mask + o_node * WORDS + i_w, mask=m_node, other=0))
    return b_depth


@jit
def block_pages(p_table, i_t, capacity, T: tl.constexpr, PAGE: tl.constexpr):
    """Physical pages of the slots of block i_t: up to four scalars, or else one number per slot and three unused."""
    if PAGE % T == 0:
        page = tl.load(p_table + i_t * T // PAGE, mask=i_t * T < capacity, other=0)
        return page, page, page, page
    elif T % PAGE == 0 and T // PAGE <= 4:
        COUNT: tl.constexpr = T // PAGE
        first = i_t * COUNT
        page_0 = tl.load(p_table + first, mask=first * PAGE < capacity, other=0)
        page_1 = tl.load(p_table + first + 1, mask=(first + 1) * PAGE < capacity, other=0)
        page_2, page_3 = page_1, page_1
        if COUNT == 4:
            page_2 = tl.load(p_table + first + 2, mask=(first + 2) * PAGE < capacity, other=0)
            page_3 = tl.load(p_table + first + 3, mask=(first + 3) * PAGE < capacity, other=0)
        return page_0, page_1, page_2, page_3
    else:
        o_t = i_t * T + tl.arange(0, T)
        b_page = tl.load(p_table + o_t // PAGE, mask=o_t < capacity, other=0)
        return b_page, b_page, b_page, b_page


@jit
def row_numbers(pages, i_t, T: tl.constexpr, PAGE: tl.constexpr, IS_WIDE: tl.constexpr):
    """Rows of the page buffers that hold the slots of block i_t. Selecting among scalars moves no data between threads,
    as a load of T page numbers would."""
    o_t = tl.arange(0, T)
    page = pages[0]
    if T % PAGE == 0 and T // PAGE <= 4:
        page = tl.where(o_t < PAGE, pages[0], pages[1])
        if T // PAGE == 4:
            page = tl.where(o_t < 2 * PAGE, page, tl.where(o_t < 3 * PAGE, pages[2], pages[3]))
    if IS_WIDE:
        page = page.to(tl.int64)
    return page * PAGE + (o_t % PAGE if T % PAGE == 0 else (i_t * T + o_t) % PAGE)


@jit
def load_rows(p_pages, b_row, m_t, o_d, STRIDE: tl.constexpr, D: tl.constexpr):
    """Rows of the pages, [T, BLOCK_D]; masked past D, and by m_t unless that is None."""
    p_rows = p_pages + (b_row * STRIDE)[:, None] + o_d[None, :]
    if m_t is None:
        return tl.load(p_rows) if o_d.shape[0] == D else tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_rows, mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)


@jit
def linked_nodes(p_mask, i_t, kv_len, o_node, m_m, WORDS: tl.constexpr, T: tl.constexpr):
    """Which slots of block i_t hold an ancestor or the row's own node: [M, T]; p_mask points at the request.

    The block's nodes lie in at most (T + 30) // 32 + 1 words of a mask row: a row loads those and no bit is gathered.
    """
    o_slot_node = i_t * T - kv_len + tl.arange(0, T)
    o_word = o_slot_node >> 5
    i_first = (i_t * T - kv_len) >> 5
    o_first = o_node * 0 + i_first
    m_word = m_m & (o_first >= 0) & (o_first < WORDS)
    b_word = tl.load(p_mask + o_node * WORDS + o_first, mask=m_word, other=0)[:, None]
    for i in tl.static_range(1, (T + 30) // 32 + 1):
        m_word = m_m & (o_first >= -i) & (o_first < WORDS - i)
        b_more = tl.load(p_mask + o_node * WORDS + o_first + i, mask=m_word, other=0)
        b_word = tl.where((o_word == i_first + i)[None, :], b_more[:, None], b_word)
    return ((b_word >> (o_slot_node & 31)[None, :]) & 1) != 0
