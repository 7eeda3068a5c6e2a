"""Hugging Face module -> captured graph, or a reason why not.

The module is exported once with symbolic batch and length, routed through transformers' interfaces (capture_interfaces).
What does not arrive that way is left in the graph for recognize-attention. The module itself is left as it was found.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autospec.capture_checks import EXAMPLE_SHAPE, example_inputs, probe_token_mixing, reserved_tokens
from autospec.capture_facts import max_positions_of, special_tokens, takes
from autospec.capture_interfaces import Recorder, padding_masks, recorded_in, through_interfaces
from autospec.capture_paths import check_paths, longest_of_this_path
from autospec.capture_rotary import rotary_within
from autospec.capture_slots import drop_padding_masks, with_slots
from autospec.capture_trace import traced_plainly
from autospec.decompose import functional
from autospec.errors import CaptureError
from autospec.hollow import is_model_hollow, without_numbers
from autospec.ir.match import aten, calls
from autospec.kernels.attention import attention


class _Logits(torch.nn.Module):
    """input_ids [B, S], position_ids [B, S] -> logits [B, S, V] of the wrapped model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes(model, "position_ids")
        self.options: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        options = dict(self.options)
        if self.takes_positions:
            options["position_ids"] = position_ids
        with traced_plainly():
            logits = self.model(input_ids=input_ids, **options).logits
        if masks := padding_masks():
            return logits, *masks  # outputs, so that the graph says what they are made of
        return logits


def eager_logits(model: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Logits [B, S, V] of the model as it is."""
    with torch.no_grad():
        return _Logits(model)(input_ids, position_ids)


@dataclass(frozen=True)
class Exported:
    """The symbolic graph with slots, its weights, and what was counted while exporting."""

    graph: fx.GraphModule
    weights: dict[str, Tensor]
    attention_calls: int
    through_interface: bool
    limits: tuple[tuple[int, str], ...]  # numbers of positions and why not more; the first is the model's own

    @property
    def max_positions(self) -> int:
        return min(positions for positions, _ in self.limits)


def export_model(model: Any) -> Exported:
    """Export with symbolic batch and length; raises CaptureError with the reason where that is not possible."""
    wrapped = _Logits(model)
    wrapped.training = False  # the model's own flags were checked and are left alone
    inputs = example_inputs(model, EXAMPLE_SHAPE, seed=1)
    name = type(model).__name__
    try:
        with through_interfaces(model) as routed, rotary_within(model) as switch, torch.no_grad():
            limits = [(max_positions_of(model), "")]
            if switch is not None:
                limits.append((switch, "the rotary frequencies change past them, which would rewrite the cache"))
            limit = min(positions for positions, _ in limits)
            with without_numbers(model):
                with recorded_in(Recorder(limit)) as recorded:
                    wrapped(*inputs)
                with recorded_in(Recorder(limit)) as again:
                    is_read = _reads(wrapped, reserved_tokens(model, EXAMPLE_SHAPE), inputs[1])
            if is_read and (recorded.specs, recorded.attention_calls) != (again.specs, again.attention_calls):
                raise CaptureError("the attention masks depend on which tokens are read", where=name,
                                   help="a mask made of data cannot be decoded step by step")  # fmt: skip
            count = recorded.attention_calls
            if count and not is_model_hollow(model):
                with recorded_in(Recorder(limit, is_token_local=True)):
                    probe_token_mixing(name, wrapped, inputs, special_tokens(model))
            recorded.replaying = True
            dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
            with recorded_in(recorded):
                exported = torch.export.export(wrapped, inputs, dynamic_shapes=(dims, dims), strict=False)
                exported = functional(exported)
    except CaptureError:
        raise
    except Exception as error:
        nested = _capture_error_in(error)
        if nested is not None:
            raise nested from error
        reason = str(error).strip().splitlines()
        raise CaptureError(
            f"{name} cannot be exported: {type(error).__name__}: {reason[0] if reason else ''}"[:300],
            at=_model_line(error),
            where=name,
            help="a model whose Python code branches on tensor data cannot be captured",
        ) from error
    if recorded.masks_asked != len(recorded.specs):
        raise CaptureError(
            f"the model asks for {len(recorded.specs)} masks in an eager run, and for {recorded.masks_asked} under export",
            where=name, help="its Python code takes another path under export than in an eager run",
        )  # fmt: skip
    graph, weights = with_slots(exported, name)
    drop_padding_masks(graph, name)
    found = len(list(calls(graph, attention)))
    if found != count:
        raise CaptureError(
            f"the model calls attention {count} times, but its graph has {found} calls", where=name,
            help="its Python code takes another path under export than in an eager run",
        )  # fmt: skip
    if count or any(calls(graph, (aten.softmax, aten._softmax))):  # what has no attention is refused for that
        check_paths(graph, name)
    if (longest := longest_of_this_path(graph)) is not None:
        limits.append((longest, "the model's Python code takes another path for a longer text"))
    return Exported(graph, weights, count, routed, tuple(limits))


def _reads(wrapped: torch.nn.Module, input_ids: Tensor, position_ids: Tensor) -> bool:
    """Whether the model accepts these tokens alone; those that stand for pictures it may not."""
    try:
        wrapped(input_ids, position_ids)
    except CaptureError:
        raise
    except Exception:
        return False
    return True


def _model_line(error: BaseException) -> str | None:
    """The innermost line of a modeling file that an error passed through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "modeling_" in f.filename.rsplit("/", 1)[-1]]
    return f"{frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}: {frames[-1].line}" if frames else None


def _capture_error_in(error: BaseException) -> CaptureError | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CaptureError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None
