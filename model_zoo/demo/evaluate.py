"""Measure the saved models on held-out packages.

Agreement: the share of positions where the draft's greedy token is the target's. On text the target wrote greedily
itself this decides speed exactly: after an accepted prefix the draft has seen the same tokens as here, so a chain of
drafts is accepted up to the first disagreement.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from autospec.heads.eagle3 import Eagle3Head
from autospec.heads.medusa import MedusaHeads
from autospec.training.features import Target, default_taps

from .drafting import TREE, Tree, Walk, accepted_lengths, medusa_accepted_lengths, walk

CHAIN = 4  # drafts per step in the simulated chain
LOOP = 16  # tokens that must recur for a continuation to count as looping from there on


def windows(stream: Tensor, length: int) -> Tensor:
    """[count, length] int64: the stream in pieces that overlap by one token, so that each token is predicted once."""
    return stream.unfold(0, length, length - 1).long()


@torch.no_grad()
def text_loss_and_agreement(
    model: LlamaForCausalLM, rows: Tensor, target: LlamaForCausalLM | None = None, batch: int = 32
) -> tuple[float, float | None]:
    """Mean cross-entropy on the rows, and the share of positions where `model` and `target` are of one mind."""
    loss, agreed, count = 0.0, 0, rows[:, 1:].numel()
    for piece in rows.split(batch):
        logits = model(piece[:, :-1], use_cache=False).logits.float()
        loss += functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum").item()
        if target is not None:
            choice = target(piece[:, :-1], use_cache=False).logits.argmax(-1)
            agreed += int((logits.argmax(-1) == choice).sum())
    return loss / count, None if target is None else agreed / count


def loop_start(tokens: list[int]) -> int:
    """Index from which the tokens repeat themselves: where LOOP of them, seen before, begin again."""
    seen = set()
    for i in range(len(tokens) - LOOP + 1):
        piece = tuple(tokens[i : i + LOOP])
        if piece in seen:
            return i
        seen.add(piece)
    return len(tokens)


def chain_steps(agrees: list[bool]) -> int:
    """Verify steps a chain of CHAIN drafts takes to emit the tokens, given which of them the draft would guess."""
    i = steps = 0
    while i < len(agrees):
        accepted = 0
        while accepted < CHAIN and i + accepted < len(agrees) and agrees[i + accepted]:
            accepted += 1
        i += accepted + 1
        steps += 1
    return steps


@torch.no_grad()
def generate(model: LlamaForCausalLM, prompts: Tensor, new_tokens: int, **options: Any) -> Tensor:
    """[B, S + new] of [B, S] prompts without padding; greedy unless the options say otherwise."""
    options = {"do_sample": False, "max_new_tokens": new_tokens, **options}
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)  # type: ignore[misc]
    assert isinstance(out, Tensor), "generate returns a dict only when asked to"
    return out


@torch.no_grad()
def own_text_agreement(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, prompts: Tensor, new_tokens: int
) -> dict[str, float | int]:
    """Agreement and simulated chain on the target's greedy continuations, with and without its loops."""
    prompt_len = prompts.shape[1]
    rows = generate(target, prompts, new_tokens)
    guesses = torch.cat([draft(part[:, :-1], use_cache=False).logits.argmax(-1) for part in rows.split(32)])
    agrees = (guesses[:, prompt_len - 1 :] == rows[:, prompt_len:]).tolist()
    totals = {"all": [0, 0, 0], "outside_loops": [0, 0, 0]}
    for row, tokens in zip(agrees, rows[:, prompt_len:].tolist(), strict=True):
        end = tokens.index(0) + 1 if 0 in tokens else len(tokens)
        for name, stop in (("all", end), ("outside_loops", min(end, loop_start(tokens)))):
            for i, amount in enumerate((sum(row[:stop]), stop, chain_steps(row[:stop]))):
                totals[name][i] += amount
    report: dict[str, float | int] = {"prompts": len(rows), "prompt_tokens": prompt_len}
    for name, (agreed, count, steps) in totals.items():
        report[f"{name}_tokens"] = count
        report[f"{name}_agreement"] = round(agreed / max(1, count), 4)
        report[f"{name}_chain_{CHAIN}_acceptance_length"] = round(count / max(1, steps), 3)
    return report


@torch.no_grad()
def complete(target: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new_tokens: int) -> str:
    """The target's greedy continuation."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=target.device)
    out = generate(target, ids, new_tokens)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def evaluate(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, stream: Tensor, rows: int, context: int
) -> dict[str, Any]:
    """Losses and agreement on held-out text, and agreement on the target's own text after `rows` cuts of it."""
    text = windows(stream, context + 1)
    draft_loss, agreement = text_loss_and_agreement(draft, text, target)
    starts = torch.linspace(0, len(stream) - context // 8 - 1, rows).long().tolist()
    cuts = torch.stack([stream[i : i + context // 8] for i in starts]).long()
    return {
        "target_loss": round(text_loss_and_agreement(target, text)[0], 4),
        "draft_loss": round(draft_loss, 4),
        "held_out_agreement": round(agreement or 0.0, 4),
        "own_text": own_text_agreement(target, draft, cuts, context // 4),
    }


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Greedy continuations of held-out text, on which heads are judged by drafting them.

    Args:
        tokens: [R, S] prompts and what the target wrote after them.
        starts: [P] row t of each position: token t + 1 is a root, and a step emits what follows it.
        stops: per kind of count the position [R] from which on steps do not count.
    """

    target: LlamaForCausalLM
    tokens: Tensor
    taps: Tensor
    hidden: Tensor
    starts: Tensor
    stops: dict[str, Tensor]

    @staticmethod
    @torch.no_grad()
    def of(
        target: LlamaForCausalLM, stream: Tensor, requests: int, prompt_tokens: int, new_tokens: int, shift: float = 0.0
    ) -> "HeldOut":
        """Cuts at even distances of the stream; `shift` moves them by that share of the distance."""
        distance = (len(stream) - prompt_tokens) / requests
        cuts = [int((i + 0.5 * shift + 0.25) * distance) for i in range(requests)]
        prompts = torch.stack([stream[i : i + prompt_tokens] for i in cuts]).long().to(target.device)
        room = TREE.levels + 1  # a step may emit that many tokens past the last root
        tokens = generate(target, prompts, new_tokens + room)
        target_of = Target(target, default_taps(target.config.num_hidden_layers))
        features = [target_of(part) for part in tokens.split(32)]
        target_of.close()
        written = tokens[:, prompt_tokens:].tolist()
        ends = [row.index(0) if 0 in row else new_tokens for row in written]
        loops = [min(end, loop_start(row) - 1) for end, row in zip(ends, written, strict=True)]
        first = prompt_tokens - 1
        return HeldOut(
            target=target,
            tokens=tokens,
            taps=torch.cat([part.taps for part in features]),
            hidden=torch.cat([part.hidden for part in features]),
            starts=torch.arange(first, first + new_tokens, device=tokens.device),
            stops={"all": torch.tensor(ends), "outside_loops": torch.tensor(loops)},
        )

    def eagle3(self, head: Eagle3Head, tree: Tree, loops: str = "outside_loops", batch: int = 8) -> Walk:
        """Draft with an EAGLE-3 head."""
        parts = zip(self.tokens.split(batch), self.taps.split(batch), strict=True)
        lengths = torch.cat([accepted_lengths(head, tokens, taps, self.starts, tree) for tokens, taps in parts])
        return walk(lengths, self.stops[loops], tree.levels)

    def medusa(self, heads: MedusaHeads, loops: str = "outside_loops") -> Walk:
        """Draft a chain with Medusa heads."""
        parts = zip(self.tokens.split(64), self.hidden.split(64), strict=True)
        lengths = torch.cat([medusa_accepted_lengths(heads, tokens, hidden, self.starts) for tokens, hidden in parts])
        return walk(lengths, self.stops[loops], heads.num_heads)
