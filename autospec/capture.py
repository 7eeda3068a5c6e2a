"""Hugging Face module -> captured graph, or a reason why not.

The module is exported once with symbolic batch and length. Attention arrives as `autospec.attention` through
transformers' AttentionInterface, masks as MaskSpec values through the AttentionMaskInterface, experts through the
ExpertsInterface. What does not arrive that way is left in the graph for recognize-attention. The module itself is left
as it was found.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autospec import capture_experts
from autospec.decompose import functional
from autospec.errors import CaptureError
from autospec.hollow import is_hollow, is_model_hollow, without_numbers
from autospec.in_float32 import HALF, InFloat32
from autospec.ir.match import argument, aten, calls, is_call
from autospec.ir.sizes import constants_of, why_not_sizes_only
from autospec.ir.slots import Slot, assign_slot, find_slot
from autospec.ir.text import node_text
from autospec.kernels.attention import attention
from autospec.kernels.grouped_mm import grouped_mm
from autospec.masks import MaskSpec, UnknownMask, mask_row, spec_of_rows

INTERFACE = "autospec"
EXAMPLE_SHAPE = (2, 11)

# Keywords that an attention function receives and that do not change its result here: the mask already carries the
# window, positions are applied to q and k before the call, and the rest only asks for extra outputs.
_HARMLESS = {
    "sliding_window", "position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "cache_position", "is_causal", "deterministic", "logits_to_keep", "layer_idx",
    "hidden_states", "token_type_ids", "inputs_embeds", "labels", "target_dtype", "past_key_values", "head_mask",
}  # fmt: skip


@dataclass
class _Recorder:
    """Mask specs in the order in which the model asked for masks, and the number of attention calls."""

    max_positions: int
    specs: list[MaskSpec | UnknownMask] = field(default_factory=list)
    attention_calls: int = 0
    masks_asked: int = 0
    replaying: bool = False
    is_token_local: bool = False
    padding_masks: list[Tensor] = field(default_factory=list)  # seen under export


_recorder: _Recorder | None = None


def _mask(*args: Any, mask_function: Any = None, attention_mask: Tensor | None = None, **kwargs: Any) -> MaskSpec | UnknownMask:
    """The mask function of the interface: evaluated in the recording run, replayed under export."""
    assert _recorder is not None, "the autospec mask interface was called outside capture"
    if _recorder.replaying:
        if _recorder.masks_asked >= len(_recorder.specs):
            raise CaptureError("the model asks for more masks under export than in an eager run", where="the attention mask",
                               help="its Python code takes another path under export than in an eager run")  # fmt: skip
        spec = _recorder.specs[_recorder.masks_asked]
        _recorder.masks_asked += 1
        if attention_mask is not None:
            _recorder.padding_masks.append(attention_mask)
        return spec
    found: MaskSpec | str
    if attention_mask is not None and not bool(attention_mask.all()):
        found = "it is made of data"
    else:
        try:
            found = spec_of_rows(mask_row(mask_function), _recorder.max_positions)
        except Exception as error:
            found = f"it cannot be evaluated ({type(error).__name__}: {error})"
    _recorder.specs.append(UnknownMask(found) if isinstance(found, str) else found)
    return _recorder.specs[-1]


def _attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None,
    sinks: Tensor | None = None, indices: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function of the interface: one canonical op per call; fails on what it does not know."""
    assert _recorder is not None, "the autospec attention interface was called outside capture"
    where = type(module).__name__
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown:
        raise CaptureError(f"attention was called with '{unknown[0]}', which autospec does not know", where=where)
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and is_causal:
        attention_mask = MaskSpec()
    if isinstance(attention_mask, UnknownMask):
        raise attention_mask.error(where)
    if not isinstance(attention_mask, MaskSpec):
        what = "no mask and is not causal" if attention_mask is None else "a mask made of data"
        raise CaptureError(f"attention has {what}", where=where, help="only causal, windowed and chunked masks are known")
    if dropout:
        raise CaptureError("attention has dropout: the model is in training mode", where=where, help="call model.eval()")
    _recorder.attention_calls += 1
    extra = s_aux if s_aux is not None else sinks
    if query.shape[1] % key.shape[1]:
        raise CaptureError(f"{query.shape[1]} query heads do not group over {key.shape[1]} K/V heads", where=where)
    if _recorder.is_token_local:
        return token_local(query, key, value), None
    out = attention(
        query, key, value, None if extra is None else extra.reshape(-1),
        float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        attention_mask.window, attention_mask.chunk, float(softcap or 0.0), None, indices,
    )  # fmt: skip
    return out, None


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, _mask)
    capture_experts.register()


@contextlib.contextmanager
def through_interfaces(model: Any, experts: str = capture_experts.INTERFACE) -> Iterator[bool]:
    """Route attention, masks and experts of `model` through autospec; yields whether attention goes there.

    On exit every configuration is as it was.
    """
    _register()
    attributes = ("_attn_implementation_internal", "_experts_implementation_internal")
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    saved = [(config, name, getattr(config, name, None)) for config in configs.values() for name in attributes]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        routed = bool(model._can_set_attn_implementation())
        if routed:
            model.set_attn_implementation(INTERFACE)
        if model._can_set_experts_implementation():
            model.set_experts_implementation(experts)
        with capture_experts.loops_as_ops(model):
            yield routed
    finally:
        for config, name, value in saved:
            if hasattr(config, name):
                setattr(config, name, value)
        logger.setLevel(level)


@contextlib.contextmanager
def layers_through_interfaces(model: Any) -> Iterator[None]:
    """Route layers of this model's classes that are exported by themselves; their attention is causal.

    Raises:
        CaptureError: the model does not support the attention interface.
    """
    global _recorder
    with through_interfaces(model) as routed, rotary_within(model) as switch:
        if not routed:
            raise CaptureError("the model's layers do not call attention through transformers' interface", at="draft head",
                               where=type(model).__name__, help="draft with something else than MTP modules")  # fmt: skip
        _recorder = _Recorder(switch or max_positions_of(model))
        try:
            yield
        finally:
            _recorder = None


@contextlib.contextmanager
def rotary_within(model: Any) -> Iterator[int | None]:
    """Keep rotary embeddings that change with the longest position (longrope, dynamic) as they are for short texts.

    Yields how many positions that holds for; None: for all. On exit every module is as it was.
    """
    limit: int | None = None
    saved: list[tuple[Any, Any, dict[str, Tensor]]] = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer: dict[str, Any] = kinds if isinstance(kinds, dict) else {"": kinds}
        switching = [layer for layer, kind in by_layer.items() if kind == "longrope" or "dynamic" in str(kind)]
        if not switching:
            continue
        buffers = dict(module.named_buffers(recurse=False))
        saved.append((module, kinds, buffers))
        for layer in switching:
            limit = min(limit or _MOST_POSITIONS, _switches_at(module, layer, by_layer[layer]))
            prefix = f"{layer}_" if layer else ""
            original = getattr(module, f"{prefix}original_inv_freq")
            setattr(module, f"{prefix}inv_freq", original.clone())
        frozen = {layer: "default" if layer in switching else kind for layer, kind in by_layer.items()}
        module.rope_type = frozen if isinstance(kinds, dict) else "default"
    try:
        yield limit
    finally:
        for module, kinds, buffers in saved:
            module.rope_type = kinds
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


def _switches_at(module: Any, layer: str, kind: str) -> int:
    """The number of positions after which a rotary embedding changes its frequencies."""
    if kind == "longrope":
        parameters = module.config.rope_parameters
        return int((parameters[layer] if layer else parameters)["original_max_position_embeddings"])
    return int(module.original_max_seq_len)


class _Logits(torch.nn.Module):
    """input_ids [B, S], position_ids [B, S] -> logits [B, S, V] of the wrapped model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_position_ids(model)
        self.options: dict[str, Any] = {"use_cache": False} if _takes(model, "use_cache") else {}

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        options = dict(self.options)
        if self.takes_positions:
            options["position_ids"] = position_ids
        logits = self.model(input_ids=input_ids, **options).logits
        if _recorder is not None and _recorder.padding_masks:
            return logits, *_recorder.padding_masks  # outputs, so that the graph says what they are made of
        return logits


def takes_position_ids(model: Any) -> bool:
    """Whether the model's forward takes position_ids; generate then passes them, too."""
    return _takes(model, "position_ids")


def _takes(model: Any, name: str) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


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


def text_config(model: Any) -> Any:
    """The configuration of the language model inside a (possibly composite) model."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


_MOST_POSITIONS = 1 << 20
_LIMITS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length",
    "max_target_positions",
)  # fmt: skip


def max_positions_of(model: Any) -> int:
    """Positions that the model was built for; models that name no limit get 2^20."""
    config = text_config(model)
    for name in _LIMITS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return _MOST_POSITIONS


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


# Relative to the largest logit. The same arithmetic in another order: measured 1e-6 at most for tiny float32 models;
# half precision rounds at 2^-8 (bf16) per layer. A guess for both, kept far below what a wrong position changes.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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


def reserved_tokens(model: Any, shape: tuple[int, int]) -> Tensor:
    """Token ids that models may treat apart: padding everywhere, among the first and last ids of the vocabulary."""
    vocab_size = int(text_config(model).vocab_size)
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % vocab_size
    ids[:, 1::2] = vocab_size - 1 - ids[:, 1::2]
    for column, token in enumerate(special_tokens(model), start=2):
        ids[:, column::5] = token
    return ids.to(next(model.parameters()).device)


def _reads(wrapped: torch.nn.Module, input_ids: Tensor, position_ids: Tensor) -> bool:
    """Whether the model accepts these tokens alone; those that stand for pictures it may not."""
    try:
        wrapped(input_ids, position_ids)
    except CaptureError:
        raise
    except Exception:
        return False
    return True


def special_tokens(model: Any) -> list[int]:
    """Padding, first and last token, where the configuration names them."""
    config = text_config(model)
    named = [getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    tokens = [token[0] if isinstance(token, (list, tuple)) and token else token for token in named]
    return [token for token in tokens if isinstance(token, int) and 0 <= token < int(config.vocab_size)]


def export_model(model: Any) -> Exported:
    """Export with symbolic batch and length; raises CaptureError with the reason where that is not possible."""
    global _recorder
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
                _recorder = recorded = _Recorder(limit)
                wrapped(*inputs)
                _recorder = again = _Recorder(limit)
                is_read = _reads(wrapped, reserved_tokens(model, EXAMPLE_SHAPE), inputs[1])
            if is_read and (recorded.specs, recorded.attention_calls) != (again.specs, again.attention_calls):
                raise CaptureError("the attention masks depend on which tokens are read", where=name,
                                   help="a mask made of data cannot be decoded step by step")  # fmt: skip
            count = recorded.attention_calls
            if count and not is_model_hollow(model):
                _recorder = _Recorder(limit, is_token_local=True)
                probe_token_mixing(name, wrapped, inputs, special_tokens(model))
            _recorder = recorded
            _recorder.replaying = True
            dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
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
    finally:
        _recorder = None
    if recorded.masks_asked != len(recorded.specs):
        raise CaptureError(
            f"the model asks for {len(recorded.specs)} masks in an eager run, and for {recorded.masks_asked} under export",
            where=name, help="its Python code takes another path under export than in an eager run",
        )  # fmt: skip
    graph, weights = with_slots(exported, name)
    _drop_padding_masks(graph, name)
    found = len(list(calls(graph, attention)))
    if found != count:
        raise CaptureError(
            f"the model calls attention {count} times, but its graph has {found} calls", where=name,
            help="its Python code takes another path under export than in an eager run",
        )  # fmt: skip
    if count or any(calls(graph, (aten.softmax, aten._softmax))):  # what has no attention is refused for that
        _check_paths(graph, name)
    if (longest := _longest_of_this_path(graph)) is not None:
        limits.append((longest, "the model's Python code takes another path for a longer text"))
    return Exported(graph, weights, count, routed, tuple(limits))


def _longest_of_this_path(graph: fx.GraphModule) -> int | None:
    """The largest length for which the exported path through the model's code holds; None: any."""
    tokens = find_slot(graph, "input_ids")
    size = tokens.meta["val"].shape[1] if tokens is not None else 0
    if not isinstance(size, torch.SymInt):
        return None
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer and int(upper) < _MOST_POSITIONS else None


_MANY = (256, 4096)  # rows and tokens of a row: how many are read at once must not change the path through the model's code
_FEW = 64  # tokens, up to which a condition on a remainder is tried


def _check_paths(graph: fx.GraphModule, name: str) -> None:
    """Raise CaptureError where Python code branches on how many rows are read, or on a remainder of their length."""
    tokens = find_slot(graph, "input_ids")
    sizes: Any = tokens.meta["val"].shape if tokens is not None else ()
    if len(sizes) != 2 or not all(isinstance(size, torch.SymInt) for size in sizes):
        return
    rows, length = symbols = [size.node.expr for size in sizes]
    for guard in (guard.expr for guard in sizes[0].node.shape_env.guards):
        if not (guard.is_Relational and guard.free_symbols <= {*symbols}):
            continue
        if guard.rel_op in ("==", "!="):
            tried = [{rows: 2, length: count} for count in range(2, _FEW + 1)]
        else:  # of the length alone, it limits the positions
            tried = [dict(zip(symbols, _MANY, strict=True))] if rows in guard.free_symbols else []
        if not all(guard.subs(counts) for counts in tried):
            named = guard.subs(dict(zip(symbols, ("batch", "length"), strict=True)))
            raise CaptureError(
                f"the model's Python code takes this path only while {named}", where=name,
                help="how many rows and tokens are read at once must not change the tokens of any",
            )  # fmt: skip


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


# Ops whose results have sizes or Python values that only the data tells.
_DATA_DEPENDENT = (aten._local_scalar_dense, aten.item, aten.nonzero, aten.masked_select, aten.unique_consecutive)


def with_slots(
    exported: torch.export.ExportedProgram, name: str, inputs: Sequence[str] = ("input_ids", "position_ids")
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """A plain GraphModule whose placeholders carry slots; equal storage becomes one weight, unused ones go.

    Args:
        inputs: names of the user's inputs, in order; each is [batch, length, ...].
    """
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        changed = next(iter(signature.buffers_to_mutate.values()))
        raise CaptureError(f"the model writes to its own buffer {changed} while it runs", where=name)
    fixed = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    named = {**signature.inputs_to_parameters, **fixed}
    module = fx.GraphModule(torch.nn.Module(), exported.graph)
    weights: dict[str, Tensor] = {}
    by_storage: dict[tuple[Any, ...], fx.Node] = {}
    user_inputs = iter(inputs)
    for node in list(module.graph.nodes):
        node.meta["module"] = _module_path(node)
        if node.op != "placeholder":
            continue
        full_name = named.get(node.name)
        if full_name is None:
            slot_name = next(user_inputs)
            node.meta["slot"] = Slot("input", slot_name, (), node.meta["val"].dtype)
            for axis, size in enumerate(node.meta["val"].shape[:2]):
                if not isinstance(size, torch.SymInt):
                    what = "batch" if axis == 0 else "length"
                    raise CaptureError(
                        f"export turned the {what} of {slot_name} into the constant {size}",
                        where=name,
                        help="the model's code fixes this dimension, so it cannot be decoded at other sizes",
                    )
            continue
        if not node.users:
            module.graph.erase_node(node)
            continue
        tensor = exported.state_dict.get(full_name)
        if tensor is None:
            tensor = exported.constants[full_name]
        tensor = tensor.detach()
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key in by_storage and tensor.numel() > 0:
            node.replace_all_uses_with(by_storage[key])
            module.graph.erase_node(node)
            continue
        by_storage[key] = node
        short = full_name.removeprefix("model.")
        if node.name in fixed:
            # Models write to their buffers (rotary frequencies); parameters are shared with the model, buffers are not.
            tensor = constants_of(module)[short] = tensor.clone()
        weights[short] = tensor
        assign_slot(node, Slot("weight", short, tuple(tensor.shape), tensor.dtype))
        if is_hollow(tensor):
            with node.meta["val"].fake_mode:
                node.meta["val"] = torch.empty(tensor.shape, dtype=tensor.dtype)
    _drop_checks(module)
    _own_ops(module)
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if is_call(node, _DATA_DEPENDENT):
            raise CaptureError(
                "the shapes inside the model depend on its data, so it has no static graph", at=node_text(node),
                where=f"{name} {node.meta['module']}".strip(),
                help="experts that split tokens by counting them are the usual reason; transformers' experts interface helps",
            )  # fmt: skip
    module.meta["device"] = next(iter(weights.values())).device
    module.graph.lint()
    module.recompile()
    return module, weights


def _drop_padding_masks(module: fx.GraphModule, name: str) -> None:
    """Masks that were exported beside the logits must say nothing that the data tells; then they go."""
    output = module.graph.output_node()
    returned: Any = output.args[0]
    logits, *padding_masks = returned
    for mask in padding_masks:
        reason = why_not_sizes_only(module, mask)
        if reason is not None:
            raise CaptureError(f"the model makes its own attention mask: {reason}", at=node_text(mask), where=name,
                               help="a mask that depends on tokens cannot be decoded step by step")  # fmt: skip
    output.args = ((logits,),)
    module.graph.eliminate_dead_code()
    module.recompile()


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.removeprefix("model").removeprefix(".")


# Ops of transformers and the canonical ones of the same arguments and meaning.
_SAME_AS = {"transformers::grouped_mm_fallback": grouped_mm}


def _own_ops(module: fx.GraphModule) -> None:
    """Replace ops that transformers registers by our own: a saved graph is read where that library is not imported."""
    for node in module.graph.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if node.op == "call_function" and name in _SAME_AS:
            kernel = _SAME_AS[name]
            given = tuple(argument(node, one.name) for one in node.target._schema.arguments)
            node.target, node.args, node.kwargs = kernel.op, given, {}


def _drop_checks(module: fx.GraphModule) -> None:
    """Assertions about metadata and symbolic sizes: shapes become static, so they say nothing any more."""
    checks = {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_function" and node.target in checks and not node.users:
            module.graph.erase_node(node)
