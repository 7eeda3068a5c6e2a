"""Let a prefill call write into the pages of those rows only that read a prompt in it.

    autospec.append_kv(..., %page_table, ...)   ->   %pages = autospec.prompt_pages(%page_table, %q_lens)
    autospec.paged_attention(..., %page_table, ...)  autospec.append_kv(..., %pages, ...)
                                                     autospec.paged_attention(..., %pages, ...)

Legal: nothing that is kept is computed from the other rows, whose q_lens are 0. They need it: a prefill runs the whole
batch, rows that decode meanwhile among them, and the cache of an external draft holds rows past kv_lens that a chain
accepted later is not run again for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from autospec.ir.build import Builder
from autospec.ir.match import calls
from autospec.ir.passes import Notes, Pass
from autospec.ir.roles import the
from autospec.ir.slots import find_slot
from autospec.kernels.commit import prompt_pages


@dataclass(frozen=True, kw_only=True)
class SpareDecodingRows(Pass):
    """Hide the pages of rows that read no prompt in this call."""

    name = "spare-decoding-rows"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        table = find_slot(module, "page_table")
        if table is None or any(calls(module, prompt_pages)):
            return 0
        q_lens = the(module, "q_lens")
        builder = Builder(module, q_lens.next)
        hidden = builder.call(prompt_pages, table, q_lens)
        return len(table.replace_all_uses_with(hidden, delete_user_cb=lambda user: user is not hidden))

    def ensures(self, module: fx.GraphModule) -> Iterable[str]:
        table = find_slot(module, "page_table")
        for user in table.users if table is not None else ():
            if user not in set(calls(module, prompt_pages)):
                yield f"%{user.name} reaches the pages of rows that decode"
