"""Is decoding this graph step by step the same as running the model? Every check is a reason for refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from autospec.capture import eager_logits, example_inputs
from autospec.errors import CaptureError
from autospec.ir.match import calls
from autospec.ir.passes import Refusal
from autospec.ir.slots import slot_of
from autospec.kernels.attention import attention

# Relative to the largest logit. The same arithmetic in another order: measured 1e-6 at most for tiny float32 models;
# half precision rounds at 2^-8 (bf16) per layer. A guess for both, kept far below what a wrong position changes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class _Run(fx.Interpreter):
    """Runs a captured graph eagerly, attention optionally replaced."""

    def __init__(self, module: fx.GraphModule, attention_as: Callable[..., Tensor] | None = None) -> None:
        super().__init__(module)
        self.attention_as = attention_as

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.attention_as is not None and target is attention.op:
            return self.attention_as(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def run_captured(
    graph: fx.GraphModule, weights: dict[str, Tensor], input_ids: Tensor, position_ids: Tensor,
    attention_as: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Logits [B, S, V] of a captured graph on any shape, eagerly."""
    given = {"input_ids": input_ids, "position_ids": position_ids, **weights}
    arguments = [given[slot_of(node).name] for node in graph.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        return _Run(graph, attention_as).run(*arguments)[0]


def _token_local(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands in for attention: every token mixes its own q, k and v and nobody else's. -> [B, S, Hq, Dv]."""
    group = q.shape[1] // k.shape[1]
    own = torch.tanh((q * k.repeat_interleave(group, dim=1)).float().mean(-1, keepdim=True)).to(v.dtype)
    return (v.repeat_interleave(group, dim=1) * (1 + own)).transpose(1, 2).contiguous()


def check_captured(
    model: Any, graph: fx.GraphModule, weights: dict[str, Tensor], unrecognised: Sequence[Refusal] = ()
) -> None:
    """Raise CaptureError unless the graph may be decoded step by step.

    Args:
        model: the Hugging Face module, in the state the user gave it.
        graph, weights: what was exported from it, with its attention recognised.
        unrecognised: what looked like attention and was left alone, with the reasons.
    """
    name = type(model).__name__
    if unrecognised:
        first = unrecognised[0]
        raise CaptureError(
            f"attention was not recognised: {first.reason}", at=first.line, where=f"{name} {first.module}".strip(),
            help="only causal, windowed and chunked self-attention can be decoded by pages",
        )  # fmt: skip
    if next(calls(graph, attention), None) is None:
        raise CaptureError("no attention was found in the model's graph", where=name,
                           help="recurrent and state-space models need state roll-back, which is not supported yet")  # fmt: skip
    for shape in ((3, 7), (1, 13)):
        ids, positions = example_inputs(model, shape, seed=shape[1])
        expected = eager_logits(model, ids, positions)
        got = run_captured(graph, weights, ids, positions)
        _compare(name, got, expected, f"the captured graph differs from the model at batch {shape[0]}, length {shape[1]}",
                 "the model does something with its shapes that export did not keep")  # fmt: skip
    probe_split_invariance(name, model, graph, weights)


def probe_split_invariance(name: str, model: Any, graph: fx.GraphModule, weights: dict[str, Tensor]) -> None:
    """With attention made token-local, the graph on a slice of tokens must equal the slice of the whole."""
    ids, positions = example_inputs(model, (2, 12), seed=12)
    whole = run_captured(graph, weights, ids, positions, _token_local)
    for start, end in ((0, 5), (5, 12), (7, 8)):
        part = slice(start, end)
        got = run_captured(graph, weights, ids[:, part].contiguous(), positions[:, part].contiguous(), _token_local)
        _compare(
            name, got, whole[:, part],
            f"tokens {start} to {end - 1} decoded alone differ from the same tokens in the whole sequence",
            "something outside attention mixes tokens or counts positions itself (a convolution, an internal arange, "
            "an expert capacity); it cannot be decoded step by step",
        )  # fmt: skip


def _compare(name: str, got: Tensor, expected: Tensor, rule: str, help_text: str) -> None:
    scale = float(expected.float().abs().max().clamp(min=1e-6))
    error = float((got.float() - expected.float()).abs().max()) / scale
    limit = _TOLERANCE.get(expected.dtype, 1e-2)
    if not error <= limit:
        raise CaptureError(f"{rule}: relative error {error:.1e}, allowed {limit:.0e}", where=name, help=help_text)
