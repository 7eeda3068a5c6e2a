"""Trying out a model or its graph: tokens to run it on, logits compared, and whether tokens meet in attention only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autospec.capture_facts import special_tokens, text_config
from autospec.errors import CaptureError
from autospec.in_float32 import HALF, InFloat32

EXAMPLE_SHAPE = (2, 11)

# Relative to the largest logit. The same arithmetic in another order: measured 1e-6 at most for tiny float32 models;
# half precision rounds at 2^-8 (bf16) per layer. A guess for both, kept far below what a wrong position changes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def example_inputs(model: Any, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Random token ids and positions 0 ... S-1, both [B, S] int64, on the model's device."""
    vocab_size = int(text_config(model).vocab_size)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    reserved = {getattr(text_config(model), "pad_token_id", None)}
    for token in (token for token in reserved if token is not None):
        ids = torch.where(ids.eq(token), (ids + 1) % vocab_size, ids)
    device = next(model.parameters()).device
    return ids.to(device), torch.arange(shape[1]).expand(shape).contiguous().to(device)


def reserved_tokens(model: Any, shape: tuple[int, int]) -> Tensor:
    """Token ids that models may treat apart: padding everywhere, among the first and last ids of the vocabulary."""
    vocab_size = int(text_config(model).vocab_size)
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % vocab_size
    ids[:, 1::2] = vocab_size - 1 - ids[:, 1::2]
    for column, token in enumerate(special_tokens(model), start=2):
        ids[:, column::5] = token
    return ids.to(next(model.parameters()).device)


def compare_logits(name: str, got: Tensor, expected: Tensor, rule: str, help_text: str) -> None:
    """Raise CaptureError with `rule` unless two tensors of logits are equal up to rounding."""
    scale = float(expected.float().abs().max().clamp(min=1e-6))
    error = float((got.float() - expected.float()).abs().max()) / scale
    limit = _TOLERANCE.get(expected.dtype, 1e-2)
    if not error <= limit:
        raise CaptureError(f"{rule}: relative error {error:.1e}, allowed {limit:.0e}", where=name, help=help_text)


def check_logits(
    name: str, run: Callable[..., tuple[Tensor, Tensor]], rule: str, help_text: str, expected: Tensor | None = None
) -> None:
    """Compare the two tensors of logits that `run(expected)` returns, the second being `expected` where that is known.

    Where they differ and a half-precision model chooses by score, experts for one, or computes its logits from rounded
    numbers in float32, both are made again in float32: that decides, by float32's tolerance.
    """
    got, expected = run(expected)
    try:
        return compare_logits(name, got, expected, rule, help_text)
    except CaptureError as error:
        is_half, refused = expected.dtype in HALF, error
    try:
        with InFloat32() as mode:
            got, expected = run(None)
    except CaptureError:
        raise
    except Exception as error:  # an attention kernel without float32, say
        raise refused from error
    if not (mode.chooses if is_half else mode.widens):
        raise refused
    compare_logits(name, got, expected, f"{rule}, in float32 too", help_text)


def token_local(q: Tensor, k: Tensor, v: Tensor, *args: Any, own_score: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Stands in for attention: every token mixes its own q, k and v and nobody else's. -> [B, S, Hq, Dv].

    own_score [B, S, 1]: what its indexer, if it has one, makes of the token itself.
    """
    group = q.shape[1] // k.shape[1]
    own = torch.tanh((q * k.repeat_interleave(group, dim=1)).float().mean(-1, keepdim=True)).to(v.dtype)
    if own_score is not None:
        own = own + torch.tanh(own_score).to(v.dtype)[:, None]
    return (v.repeat_interleave(group, dim=1) * (1 + own)).transpose(1, 2).contiguous()


def probe_token_mixing(
    name: str, run: Callable[[Tensor, Tensor], Tensor], inputs: tuple[Tensor, Tensor], others: Sequence[int] = ()
) -> None:
    """With attention made token-local, changing one token must leave the logits of all others as they were.

    Args:
        run: logits of (input_ids, position_ids) with every attention token-local.
        others: token ids that the model may treat apart, tried as well.
    """
    ids, positions = inputs
    unchanged = run(ids, positions)
    for column, token in ((0, int(ids[0, 1])), (4, int(ids[1, 0])), *((2, token) for token in others)):
        changed = ids.clone()
        changed[0, column] = token

        def both(whole: Tensor | None, column: int = column, changed: Tensor = changed) -> tuple[Tensor, Tensor]:
            whole = run(ids, positions) if whole is None else whole
            got = run(changed, positions)
            got[0, column] = whole[0, column]
            return got, whole

        check_logits(
            name, both, f"a change of token {column} reaches other tokens past attention",
            "a convolution, a recurrent state, a batch statistic or an expert capacity mixes tokens; state other than K/V "
            "cannot be rolled back yet", unchanged,
        )  # fmt: skip
