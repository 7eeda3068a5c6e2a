"""Is decoding this graph step by step the same as running the model? Every check is a reason for refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from autospec.capture import eager_logits
from autospec.capture_checks import check_logits, example_inputs, probe_token_mixing, token_local
from autospec.capture_facts import special_tokens, takes
from autospec.errors import CaptureError
from autospec.hollow import is_model_hollow
from autospec.ir.match import argument, aten, calls, is_call
from autospec.ir.passes import Refusal
from autospec.ir.sizes import Evaluator, ancestors, constants_of, meeting_data, why_not_sizes_only
from autospec.ir.slots import find_slot, slot_of
from autospec.ir.text import node_text
from autospec.kernels.attention import attention
from autospec.kernels.latent_attention import expand_latent, latent_attention
from autospec.kernels.select_keys import own_score, select_keys, top_keys


class _Run(fx.Interpreter):
    """Runs a captured graph eagerly, attention optionally replaced."""

    def __init__(self, module: fx.GraphModule, attention_as: Callable[..., Tensor] | None = None) -> None:
        super().__init__(module)
        self.attention_as = attention_as

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.attention_as is None:
            return super().call_function(target, args, kwargs)
        if target is select_keys.op:
            given = select_keys.bind(args, kwargs)
            return own_score(given["index_q"], given["index_weights"], given["index_k"], given["scale"])
        if target is attention.op:
            return self.attention_as(*args, **kwargs)
        if target is latent_attention.op:
            indices = latent_attention.bind(args, kwargs)["indices"]
            return self.attention_as(*expand_latent(*args[:6]), **({} if indices is None else {"own_score": indices}))
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


def check_captured(
    model: Any, graph: fx.GraphModule, weights: dict[str, Tensor], unrecognised: Sequence[Refusal] = (),
    unselected: Sequence[Refusal] = (),
) -> None:  # fmt: skip
    """Raise CaptureError unless the graph may be decoded step by step.

    Args:
        model: the Hugging Face module, in the state the user gave it.
        graph, weights: what was exported from it, with its attention recognised.
        unrecognised: what looked like attention and was left alone, with the reasons.
        unselected: reasons why attention or an indexer was left alone, of whichever is sparse.
    """
    name = type(model).__name__
    if unrecognised:
        first = unrecognised[0]
        raise CaptureError(
            f"attention was not recognised: {first.reason}", at=first.line, where=f"{name} {first.module}".strip(),
            help="only causal, windowed and chunked self-attention can be decoded by pages",
        )  # fmt: skip
    if next(calls(graph, (attention, latent_attention)), None) is None:
        raise CaptureError("no attention was found in the model's graph", where=name,
                           help="recurrent and state-space models need state roll-back, which is not supported yet")  # fmt: skip
    check_selections(name, graph, unselected)
    check_sizes(name, graph)
    check_counts_nothing(name, graph)
    if is_model_hollow(model):  # no numbers to compare
        return
    for shape in ((3, 7), (1, 13)):
        ids, positions = example_inputs(model, shape, seed=shape[1])

        def both(_: Tensor | None, ids: Tensor = ids, positions: Tensor = positions) -> tuple[Tensor, Tensor]:
            try:
                return run_captured(graph, weights, ids, positions), eager_logits(model, ids, positions)
            except Exception as error:
                raise CaptureError(
                    f"model or graph does not run at batch {ids.shape[0]}, length {ids.shape[1]}: {type(error).__name__}: "
                    f"{error}"[:250], where=name,
                    help="the model's Python code loops over its tokens, or fixes a size that export did not notice",
                ) from error  # fmt: skip

        check_logits(name, both, f"the captured graph differs from the model at batch {shape[0]}, length {shape[1]}",
                     "the model does something with its shapes that export did not keep")  # fmt: skip
    probe_token_mixing(
        name, lambda ids, positions: run_captured(graph, weights, ids, positions, token_local),
        example_inputs(model, (2, 11), seed=11), special_tokens(model),
    )  # fmt: skip
    probe_split_invariance(name, model, graph, weights)
    check_cached(model)


def check_selections(name: str, graph: fx.GraphModule, refusals: Sequence[Refusal]) -> None:
    """Refuse selected keys that cannot be selected from pages, with the reason why a pass left them alone."""
    attending = [node for node in calls(graph, attention) if argument(node, "indices") is not None]
    for node in (*calls(graph, top_keys), *attending):
        reasons = [refusal.reason for refusal in refusals if refusal.line.split(" = ")[0] == f"%{node.name}"]
        raise CaptureError(f"attention to selected keys was not recognised: {', '.join(reasons)}", at=node_text(node),
                           where=f"{name} {node.meta.get('module', '')}".strip(),
                           help="sparse attention over latents (MLA) with DeepSeek's indexer can be decoded by pages")  # fmt: skip


def check_sizes(name: str, graph: fx.GraphModule) -> None:
    """Refuse tensors whose size depends on numbers in other tensors: a static graph has no room for them."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and free_unbacked_symbols(value):
            raise CaptureError("the size of a tensor depends on the data in another", at=node_text(node),
                               where=f"{name} {node.meta.get('module', '')}".strip(),
                               help="a step has static shapes: select with torch.where instead of a boolean index")  # fmt: skip


# Ops that turn the place of a token in this call into a value.
_COUNTING = (aten.arange, aten.cumsum, aten.cumprod, aten.linspace, aten.tril, aten.triu)
# Arguments that may be a size: dimensions, and the ends of ranges.
_SIZE_TYPES = ("SymInt", "int")


def check_counts_nothing(name: str, graph: fx.GraphModule) -> None:
    """Raise CaptureError where tokens meet a count of tokens: probes are short, and a threshold may lie far away."""
    tokens = find_slot(graph, "input_ids")
    length = str(tokens.meta["val"].shape[1]) if tokens is not None else ""
    for node in meeting_data(graph):
        for source in ancestors(node):
            value = source.meta.get("val")
            if not isinstance(value, torch.Tensor) or length not in [str(size) for size in value.shape]:
                continue
            is_table = is_call(source, aten.slice) and not _is_uniform(graph, source.args[0])
            if is_call(source, _COUNTING) or is_table:
                _refuse_counting(name, source, "the model counts positions itself")
    for node in graph.graph.nodes:
        if node.op == "call_function" and not is_call(node, _COUNTING) and _computes_with_size(node):
            _refuse_counting(name, node, "the model computes with the number of tokens")


def _refuse_counting(name: str, node: fx.Node, rule: str) -> None:
    raise CaptureError(
        rule, at=node_text(node), where=f"{name} {node.meta.get('module', '')}".strip(),
        help="positions must come from position_ids: a call that decodes a few tokens has other sizes than the whole text",
    )  # fmt: skip


def _is_uniform(graph: fx.GraphModule, table: Any) -> bool:
    """Whether a buffer holds one value only; other tensors are judged by what they are made of."""
    if not isinstance(table, fx.Node) or table.op != "placeholder":
        return True
    values = constants_of(graph)[slot_of(table).name]
    return bool((values == values.flatten()[0]).all())


def _computes_with_size(node: fx.Node) -> bool:
    """Whether a size is used as a number among tensors."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    for spec in schema.arguments:
        value = given.get(spec.name)
        is_size = isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.SymInt | torch.SymFloat)
        if is_size and not any(kind in str(spec.type) for kind in _SIZE_TYPES):
            return True
    return False


def check_cached(model: Any) -> None:
    """Raise CaptureError if transformers' own cached decoding differs from its uncached forward: one of them is wrong."""
    ids, positions = example_inputs(model, (1, 9), seed=9)  # a single token of a single row may be a path of its own
    cached = cached_logits(model, ids, positions)
    if cached is None:
        return

    def both(cached: Tensor | None) -> tuple[Tensor, Tensor]:
        again = cached_logits(model, ids, positions) if cached is None else cached
        assert again is not None, "a model decoded with its cache once, and not again"
        return eager_logits(model, ids, positions), again

    check_logits(
        type(model).__name__, both, "transformers' cached decoding differs from its uncached forward",
        "a bug in the model's cache: generate(use_cache=False) and generate() give different texts",
        cached,
    )  # fmt: skip


def cached_logits(model: Any, ids: Tensor, positions: Tensor) -> Tensor | None:
    """Logits of 9 tokens decoded as 6, 1, 1 and 1 with the model's own cache; None: it has none, and generate goes without."""
    takes_positions = takes(model, "position_ids")
    got: list[Tensor] = []
    cache = None
    try:
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            options: dict[str, Any] = {"position_ids": positions[:, start:end]} if takes_positions else {}
            with torch.no_grad():
                out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True, **options)
            cache = out.past_key_values
            got.append(out.logits)
    except Exception:
        return None
    is_stepwise = all(part.shape[1] == width for part, width in zip(got, (6, 1, 1, 1), strict=True))
    return torch.cat(got, dim=1) if is_stepwise else None


def rows_of_tables(graph: fx.GraphModule) -> int | None:
    """Positions for which every table that is read by position has a row; None: there is no such table."""
    evaluators = [Evaluator(graph, 1, length) for length in (24, 48)]
    found: list[int] = []
    for node in calls(graph, (aten.embedding, aten.index_select, aten.gather, aten.index.Tensor)):
        table, *where = node.args
        if is_call(node, aten.index):
            listed: Any = where[0]
            pairs = [(dim, index) for dim, index in enumerate(listed) if index is not None]
        else:
            pairs = [(0, where[0])] if is_call(node, aten.embedding) else [(where[0], where[1])]  # type: ignore[list-item]
        for dim, index in pairs:
            if not isinstance(index, fx.Node) or why_not_sizes_only(graph, index) is not None:
                continue
            if not any(n.op == "placeholder" and slot_of(n).name == "position_ids" for n in ancestors(index)):
                continue
            short, long = (int(evaluator.value(index).max()) - evaluator.length + 1 for evaluator in evaluators)
            rows = table.meta["val"].shape[dim]  # type: ignore[union-attr]
            if short == long and isinstance(rows, int):  # the row is the position plus a constant
                found.append(rows - short)
    return min(found, default=None)


def kept_by_cache(model: Any, graph: fx.GraphModule) -> int | None:
    """Positions up to which transformers' own cache holds every key that the model's masks show; None: all.

    A few models configure a window for the cache that their masks do not have: past it, their cached text differs from
    their uncached one.
    """
    from transformers import DynamicCache

    try:
        layers: list[Any] = DynamicCache(config=model.config).layers
    except Exception:  # no cache of the usual kind
        return None
    windows = [int(layer.sliding_window) if getattr(layer, "is_sliding", False) else 0 for layer in layers]
    shown = [
        max(argument(node, "window"), argument(node, "chunk")) if is_call(node, attention) else 0  # latents have none
        for node in calls(graph, (attention, latent_attention))
    ]
    if len(shown) != len(windows):  # shared or repeated layers: any window will do
        shown = [min((w for w in shown if w), default=0)] * len(windows)
    return min((kept for kept, seen in zip(windows, shown, strict=True) if kept and not 0 < seen <= kept), default=None)


def probe_split_invariance(name: str, model: Any, graph: fx.GraphModule, weights: dict[str, Tensor]) -> None:
    """With attention made token-local, the graph on a slice of tokens must equal the slice of the whole."""
    ids, positions = example_inputs(model, (2, 12), seed=12)
    whole = run_captured(graph, weights, ids, positions, token_local)
    for first, start, end in ((0, 0, 5), (0, 5, 12), (0, 7, 8), (1, 9, 10)):
        part = (slice(first, 2), slice(start, end))

        def both(whole: Tensor | None, part: tuple[slice, slice] = part) -> tuple[Tensor, Tensor]:
            whole = run_captured(graph, weights, ids, positions, token_local) if whole is None else whole
            try:
                got = run_captured(graph, weights, ids[part].contiguous(), positions[part].contiguous(), token_local)
            except Exception as error:
                raise CaptureError(
                    f"tokens {part[1].start} to {part[1].stop - 1} cannot be decoded alone: {type(error).__name__}: "
                    f"{error}"[:300], where=name, help="something outside attention needs the tokens before them",
                ) from error  # fmt: skip
            return got, whole[part]

        check_logits(
            name, both, f"tokens {start} to {end - 1} decoded alone differ from the same tokens in the whole sequence",
            "something outside attention counts positions itself or depends on how many tokens there are (an internal "
            "arange, an expert capacity); it cannot be decoded step by step", whole,
        )  # fmt: skip
