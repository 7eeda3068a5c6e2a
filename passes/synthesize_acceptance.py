"""Make a step accept what a profile says, whatever the weights: for benchmarks, which say so.

    %target = autospec.choose_greedy(%logits)          %target = autospec.choose_greedy(%logits)
    %n, ... = autospec.accept_tree(%target, ...)  ->   %synthetic = autospec.synthesize_tokens(%target, ..., %rates, V)
                                                       %n, ... = autospec.accept_tree(%synthetic, ...)

Legal: it is not, and on purpose: what is emitted is no longer the target's choice. Everything else of a step stays and
costs what it cost, so that random weights decode at the speed of a trained draft. Only `autospec bench` asks for it; no
option of `autospec.optimize` leads here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from autospec.ir.build import Builder, device_of
from autospec.ir.match import argument, calls
from autospec.ir.passes import Notes, Pass
from autospec.ir.sizes import constants_of
from autospec.ir.slots import Slot, find_slot
from autospec.kernels.accept_tree import accept_tree
from autospec.kernels.synthesize_tokens import synthesize_tokens
from autospec.state import StateShape

RATES = "synthetic.rates"


@dataclass(frozen=True, kw_only=True)
class SynthesizeAcceptance(Pass):
    """Replace the target's tokens so that drafts are accepted by a profile (bench only)."""

    name = "synthesize-acceptance"
    sizes: StateShape
    rates: tuple[float, ...]  # P_1 >= P_2 >= ...: share of steps that accept at least so many drafts

    def requires(self, module: fx.GraphModule) -> Iterable[str]:
        if not any(calls(module, accept_tree)):
            yield "acceptance is synthesised where a draft is verified: run verify-draft first"

    def run(self, module: fx.GraphModule, notes: Notes) -> int:
        if any(calls(module, synthesize_tokens)):
            return 0
        (accept,) = calls(module, accept_tree)
        builder = Builder(module, accept)
        constants_of(module)[RATES] = torch.tensor(self.rates, dtype=torch.float32, device=device_of(module))
        rates = builder.slot(Slot("weight", RATES, (len(self.rates),), torch.float32))
        row_keys = builder.state("row_keys", (self.sizes.batch_size,), torch.int64)
        target, draft_tokens, tree_parents = (
            argument(accept, name) for name in ("target_tokens", "draft_tokens", "tree_parents")
        )
        kv_lens = find_slot(module, "kv_lens")
        synthetic = builder.call(
            synthesize_tokens, target, draft_tokens, tree_parents, kv_lens, row_keys, rates, self.sizes.vocab_size
        )
        accept.update_arg(0, synthetic)
        notes.say("acceptance by depth, synthetic: " + " ".join(f"{rate:.3f}" for rate in self.rates))
        return 1
