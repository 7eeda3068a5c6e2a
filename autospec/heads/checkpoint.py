"""Draft-head checkpoints as they are in the world: SafeAILab, SpecForge and speculators EAGLE-3, and Medusa.

    files --read--> config, tensors by their names --rename--> ours --fit--> Eagle3Head or MedusaHeads, with a report

A head is loaded whole or not at all: every tensor has a place and the right shape, and every number in the configuration
that could contradict the target is compared with it. What a file leaves open is assumed as `model_zoo.draft_heads` says,
and the report on the head names the assumption.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from autospec.errors import CheckpointError, OptionError, unknown_option
from autospec.heads.eagle3 import Eagle3Head, Eagle3Spec
from autospec.heads.files import HeadFiles, check_tensors, read_head, write_head
from autospec.heads.medusa import MedusaHeads
from autospec.heads.report import HeadReport
from autospec.heads.vocabulary import checked_d2t, t2d_of
from autospec.model_zoo.draft_heads import (
    DEFAULT_TAPS,
    EAGLE3_LAYOUTS,
    LAYER_MODEL_TYPES,
    MEDUSA,
    MIN_LAYERS_FOR_DEFAULT_TAPS,
    OTHER_HEADS,
    ROPE_TYPES,
    SAFEAILAB,
    SPECFORGE,
    SPECULATORS,
    TAP_NAMINGS,
    UNREAD,
    HeadLayout,
)

SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "vocab_size", "attention_bias", "mlp_bias",
)  # fmt: skip
MUST_SAY = ("hidden_size", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class _Target:
    """What a head is loaded for."""

    hidden_size: int
    vocab_size: int
    layers: int
    embed_tokens: Tensor
    lm_head: Tensor | None
    dtype: torch.dtype
    device: torch.device

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the file where and as the head computes."""
        return tensor.to(device=self.device, dtype=self.dtype)


def load_head(
    source: str | Path | nn.Module,
    *,
    target_hidden_size: int,
    target_vocab_size: int,
    target_layers: int,
    embed_tokens: Tensor,
    lm_head: Tensor | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Eagle3Head | MedusaHeads:
    """Load a draft head for a target, in eval mode; `head.report` says what was recognised, assumed and shared.

    Args:
        source: a folder, a weight file, a hub id, or a head that is loaded already.
        embed_tokens: the target's embeddings [V, H_target], which heads without their own share.
        lm_head: the target's lm_head weight [V, H_target], likewise; None: it has none that can be shared.
    """
    target = _Target(hidden_size=target_hidden_size, vocab_size=target_vocab_size, layers=target_layers,
                     embed_tokens=embed_tokens, lm_head=lm_head, dtype=dtype, device=torch.device(device))  # fmt: skip
    if isinstance(source, nn.Module):
        return _check_module(source, target)
    files = read_head(source)
    layout = recognise(files)
    return (_load_medusa if layout is MEDUSA else _load_eagle3)(files, layout, target).eval()


def recognise(files: HeadFiles) -> HeadLayout:
    """The layout of a file, by its configuration and then by its names."""
    config, names = files.config, [_plain(name) for name in files.tensors]
    if "medusa_num_heads" in config or any(re.fullmatch(r"(medusa_head\.)?0\.0\.linear\.weight", name) for name in names):
        return MEDUSA
    for pattern, why in OTHER_HEADS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            raise _refusal(files, f"this is no EAGLE-3 head that can be loaded: {why}")
    kind = config.get("speculators_model_type")
    if kind is not None and kind != "eagle3":
        raise _refusal(files, f"speculators_model_type is {kind!r}, only 'eagle3' is a head that can be loaded")
    if config.get("quantization_config"):
        raise _refusal(files, "the head is quantized, and its weights are read as they are")
    if _eagle_config(files).get("use_aux_hidden_state") is False:
        raise _refusal(files, "the head reads no hidden states inside the target (use_aux_hidden_state is false)")
    if not any(name.endswith(".hidden_norm.weight") for name in names) or "fc.weight" not in names:
        raise _refusal(files, "the file has no fc or no hidden_norm, which every EAGLE-3 head has")
    if kind is not None:
        return SPECULATORS
    return SPECFORGE if config.get("architectures") == ["LlamaForCausalLMEagle3"] else SAFEAILAB


def _refusal(files: HeadFiles, rule: str, help: str = "EAGLE-3 and Medusa heads are supported") -> CheckpointError:
    return CheckpointError(rule, at=files.where, where="draft head", help=help)


def _eagle_config(files: HeadFiles) -> dict[str, Any]:
    nested = files.config.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise _refusal(files, f"eagle_config is no object: {nested!r:.60}", "download config.json again")
    return nested


# Names


def _plain(name: str) -> str:
    """A name without the prefix that some trainers write before all but lm_head, d2t and t2d."""
    return name.removeprefix("model.")


def _ours(name: str) -> str:
    """A name of any EAGLE-3 layout as Eagle3Head spells it."""
    name = _plain(name)
    name = re.sub(r"^midlayer\.(?=\D)", "layers.0.", name)
    name = re.sub(r"^midlayer\.(?=\d)", "layers.", name)
    name = re.sub(r"^input_norm\.", "norm_before_fc.", name)
    return re.sub(r"^(layers\.[1-9]\d*)\.input_layernorm\.", r"\1.hidden_norm.", name)


def _theirs(name: str, layout: HeadLayout) -> str:
    """A name of Eagle3Head as a layout spells it."""
    if re.match(r"layers\.[1-9]", name):
        for ours, theirs in layout.deeper_keys.items():
            name = name.replace(f".{ours}", f".{theirs}")
    for ours, theirs in layout.keys.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _renamed(files: HeadFiles) -> dict[str, Tensor]:
    """The tensors by our names, without those that no drafting reads."""
    tensors: dict[str, Tensor] = {}
    for name, value in files.tensors.items():
        if any(re.fullmatch(pattern, _plain(name)) for pattern in UNREAD):
            continue
        ours = _ours(name)
        if ours in tensors and not torch.equal(tensors[ours], value):
            raise _refusal(files, f"two tensors claim the place of {ours}, and they differ", "keep the one that was trained")
        tensors[ours] = value
    return tensors


# EAGLE-3


def _load_eagle3(files: HeadFiles, layout: HeadLayout, target: _Target) -> Eagle3Head:
    tensors = _renamed(files)
    notes: list[str] = []
    layer = _layer_config(files, layout, tensors)
    for what, said, is_ in (
        ("vocabulary", layer.vocab_size, target.vocab_size),
        ("hidden size", files.config.get("target_hidden_size") or target.hidden_size, target.hidden_size),
    ):
        if said != is_:
            raise _refusal(files, f"the head is for a target with a {what} of {said}, this one has {is_}",
                           "load the head that was trained for this target")  # fmt: skip
    draft_vocab_size = _draft_vocab_size(files, tensors, target)
    d2t = checked_d2t(tensors.pop("d2t", None), files.tensors.get("t2d"), draft_vocab_size, target.vocab_size, files.where)
    if d2t is not None and "lm_head.weight" not in tensors and target.lm_head is not None:
        ids = torch.arange(len(d2t)) + d2t  # what the file leaves out is the target's, at the ids of the draft vocabulary
        tensors["lm_head.weight"] = target.lm_head[ids.to(target.lm_head.device)].clone()
    shared = _shared(tensors, layer, target, one_vocabulary=d2t is None)
    tap_after, convention = _taps(files, target.layers)
    spec = Eagle3Spec(
        layer=layer, draft_vocab_size=draft_vocab_size, tap_after=tap_after, target_hidden_size=target.hidden_size,
        **_flags(files, layout, tensors, notes),
        qk_norm=any(name.endswith(".q_norm.weight") for name in tensors), fc_bias="fc.bias" in tensors,
        own_embeddings="embed_tokens.weight" not in shared, own_lm_head="lm_head.weight" not in shared,
    )  # fmt: skip
    said_layers, depth = _layer_values(files, layout).get("num_hidden_layers"), layer.num_hidden_layers
    if said_layers not in (None, depth):
        if not layout.one_layer:
            raise _refusal(files, f"config.json says {said_layers} decoder layers, the file has {depth}",
                           "download both files again")  # fmt: skip
        notes.append(f"config.json says {said_layers} layers, the file has {depth}, and its readers build one")
    try:
        with torch.device("meta"):
            head = Eagle3Head(spec, None if spec.own_embeddings else target.embed_tokens,
                              None if spec.own_lm_head else target.lm_head)  # fmt: skip
        head.rotary_emb = LlamaRotaryEmbedding(spec.layer).to(target.device)
    except Exception as error:
        raise _refusal(files, f"config.json makes no head: {type(error).__name__}: {str(error)[:200]}",
                       "download config.json again") from error  # fmt: skip
    wanted = head.own_state()
    found = {name: value for name, value in tensors.items() if name not in shared}
    check_tensors(files.where, layout.name, found, wanted, {name: _theirs(name, layout) for name in (*wanted, *found)})
    head.load_state_dict({name: target.like(value) for name, value in found.items()}, strict=False, assign=True)
    head.d2t = None if d2t is None else d2t.to(target.device)
    head.report = HeadReport(source=files.where, layout=layout.name, tap_convention=convention, tap_after=tap_after,
                             shared=shared, notes=tuple(notes))  # fmt: skip
    return head


def _flags(files: HeadFiles, layout: HeadLayout, tensors: dict[str, Tensor], notes: list[str]) -> dict[str, bool]:
    """Switches of the network; some trainers write them into eagle_config."""
    nested = _eagle_config(files)
    said = {name: nested.get(name, files.config.get(name)) for name in layout.flags}
    for name, tensor in (("norm_before_fc", "norm_before_fc.weight"), ("fc_norm", "fc_norm.0.weight")):
        if said[name] is None and tensor in tensors:
            said[name] = True
            notes.append(f"{name} is not in config.json but its tensors are there: assumed true")
    if layout is SPECULATORS and said["norm_before_residual"] is None:
        notes.append("norm_before_residual is not in config.json: assumed false, as speculators does (vLLM assumes true)")
    if layout is SPECFORGE and said["norm_output"] is not None:
        notes.append("norm_output: SpecForge before its pull request 879 (September 2026) trained something else under this name")
    return {name: layout.flags[name] if value is None else bool(value) for name, value in said.items()}


def _layer_values(files: HeadFiles, layout: HeadLayout) -> dict[str, Any]:
    """The part of config.json that describes the decoder layer."""
    values = files.config if layout.layer_config is None else files.config.get(layout.layer_config)
    if not isinstance(values, dict):
        raise _refusal(files, f"config.json has no {layout.layer_config}", "download config.json again")
    return values


def _layer_config(files: HeadFiles, layout: HeadLayout, tensors: dict[str, Tensor]) -> LlamaConfig:
    """The decoder layer's configuration, with the defaults of the class that the file names."""
    values = _layer_values(files, layout)
    silent = [name for name in MUST_SAY if values.get(name) is None]
    model_type = values.get("model_type", LAYER_MODEL_TYPES[-1]) if layout.layer_config else "llama"
    if model_type not in LAYER_MODEL_TYPES:
        raise _refusal(files, f"the decoder layer is a {model_type!r}, only {' and '.join(LAYER_MODEL_TYPES)} are known")
    if silent and layout.layer_config is None:
        raise _refusal(files, f"config.json does not say {', '.join(silent)}", "download config.json again")
    if "sliding_attention" in str(values.get("layer_types")):
        raise _refusal(files, "the head's attention has a sliding window, which drafting would ignore")
    depth = max((int(name.split(".")[1]) for name in tensors if re.match(r"layers\.\d+\.", name)), default=0) + 1
    plain = {name: value for name, value in values.items() if name in (*SIZES, "rope_theta", "rope_scaling", "rope_parameters")}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(plain.get(name), dict):  # of three positions, which are one for text
            plain[name] = {key: value for key, value in plain[name].items() if key not in ("mrope_section", "mrope_interleaved")}
    try:
        full: Any = AutoConfig.for_model(model_type, **plain)
        sizes = {name: getattr(full, name, None) for name in SIZES}
        layer = LlamaConfig(
            **{name: value for name, value in sizes.items() if value is not None}, rope_parameters=full.rope_parameters,
            num_hidden_layers=depth, tie_word_embeddings=False,
        )  # fmt: skip
    except Exception as error:
        raise _refusal(files, f"config.json makes no decoder layer: {(str(error).strip().splitlines() or [''])[0][:200]}",
                       "download config.json again") from error  # fmt: skip
    rope: Any = layer.rope_parameters
    if rope.get("rope_type") not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(files, f"rotary embeddings of another kind: {rope}", f"known are {', '.join(ROPE_TYPES)}")
    if any(name.endswith(".q_proj.bias") for name in tensors):
        layer.attention_bias = True
        for index in range(depth):  # queries, keys and values alone have one: zeros are the same
            tensors.setdefault(f"layers.{index}.self_attn.o_proj.bias", torch.zeros(layer.hidden_size))
    return layer


def _taps(files: HeadFiles, layers: int) -> tuple[tuple[int, ...], str]:
    """`tap_after` and the convention by which it was read."""
    found: dict[str, tuple[int, ...]] = {}
    for naming in TAP_NAMINGS:
        value: Any = files.config
        for key in naming.path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            continue
        if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
            raise _refusal(files, f"{'.'.join(naming.path)} is no list of layer numbers: {value!r:.60}",
                           "download config.json again")  # fmt: skip
        found[naming.counts] = tuple(one + naming.shift for one in value)
        after = found[naming.counts]
        if min(after) < 0 or max(after) >= layers or list(after) != sorted(set(after)):
            raise _refusal(files, f"the taps {value} ({naming.counts}) are not ascending layers of a target with {layers}",
                           "load the head that was trained for this target")  # fmt: skip
    if len(set(found.values())) > 1:
        raise _refusal(files, f"config.json names taps twice, and they differ: {found}", "keep the ids that were trained")
    if found:
        return next((after, counts) for counts, after in found.items())
    if layers < MIN_LAYERS_FOR_DEFAULT_TAPS:
        raise _refusal(files, f"config.json names no taps, and a target with {layers} layers has no default ones",
                       "add eagle_config.eagle_aux_hidden_state_layer_ids: 0-based layers whose output is read")  # fmt: skip
    return (1, layers // 2 - 1, layers - 4), DEFAULT_TAPS


def _shared(tensors: dict[str, Tensor], layer: LlamaConfig, target: _Target, one_vocabulary: bool) -> tuple[str, ...]:
    """Names of tensors that are the target's: absent where it can lend them, or the same bytes."""
    lent = {"embed_tokens.weight": target.embed_tokens}
    if target.lm_head is not None and one_vocabulary:
        lent["lm_head.weight"] = target.lm_head
    shared = []
    for name, theirs in lent.items():
        own = tensors.get(name)
        fits = theirs.shape == (layer.vocab_size, layer.hidden_size)
        if fits and (own is None or (own.shape == theirs.shape and torch.equal(own.to(theirs), theirs))):
            shared.append(name)
    return tuple(shared)


def _draft_vocab_size(files: HeadFiles, tensors: dict[str, Tensor], target: _Target) -> int:
    """Rows of lm_head; the configuration may repeat it."""
    said = files.config.get("draft_vocab_size")
    rows = next((len(tensors[name]) for name in ("lm_head.weight", "d2t") if name in tensors), said or target.vocab_size)
    if said is not None and said != rows:
        raise _refusal(files, f"config.json says a draft vocabulary of {said}, the tensors have {rows}",
                       "download both files again")  # fmt: skip
    return int(rows)


def _check_module(head: nn.Module, target: _Target) -> Eagle3Head | MedusaHeads:
    """A head that is loaded already is returned as it is, if it fits."""
    if isinstance(head, Eagle3Head):
        spec = head.spec
        pairs = ((spec.target_hidden_size, target.hidden_size), (spec.layer.vocab_size, target.vocab_size))
        deep = max(spec.tap_after) < target.layers
    elif isinstance(head, MedusaHeads):
        pairs, deep = ((head.hidden_size, target.hidden_size), (head.vocab_size, target.vocab_size)), True
    else:
        raise CheckpointError(f"a {type(head).__name__} is no draft head", at=type(head).__name__, where="draft head",
                              help="pass an Eagle3Head, MedusaHeads, a folder or a hub id")  # fmt: skip
    if not deep or any(ours != theirs for ours, theirs in pairs):
        raise CheckpointError("the head was made for a target of other sizes", at=type(head).__name__, where="draft head",
                              help=f"this target has hidden size {target.hidden_size}, {target.vocab_size} tokens and "
                              f"{target.layers} layers")  # fmt: skip
    return head


# Medusa


def _load_medusa(files: HeadFiles, layout: HeadLayout, target: _Target) -> MedusaHeads:
    tensors = {name.removeprefix("medusa_head."): value for name, value in files.tensors.items()}
    blocks = {tuple(map(int, name.split(".")[:2])) for name in tensors if re.fullmatch(r"\d+\.\d+\.linear\.weight", name)}
    if not blocks:
        raise _refusal(files, "the file has no {head}.{block}.linear.weight, which Medusa heads have")
    num_heads, num_layers = 1 + max(head for head, _ in blocks), 1 + max(block for _, block in blocks)
    notes = []
    said_heads, said_layers = files.config.get("medusa_num_heads"), files.config.get("medusa_num_layers", num_layers)
    if isinstance(said_heads, int) and said_heads < num_heads and said_layers == num_layers:
        notes.append(f"config.json says {said_heads} heads, the file has {num_heads}: all are loaded")
    elif said_heads not in (None, num_heads) or said_layers != num_layers:
        raise _refusal(files, f"config.json says {said_heads} heads of {said_layers} blocks, the file has {num_heads} of "
                       f"{num_layers}", "download both files again")  # fmt: skip
    finals = [f"{index}.{num_layers}.weight" for index in range(num_heads)]
    lent = target.lm_head if not any(name in tensors for name in finals) else None
    with torch.device("meta"):
        heads = MedusaHeads(target.hidden_size, target.vocab_size, num_heads, num_layers, lm_head=lent)
    wanted = heads.own_state()
    names = {name: _medusa_name(name, num_layers) for name in wanted}
    ours = {theirs: name for name, theirs in names.items()}
    found = {ours.get(name, name): value for name, value in tensors.items()}
    check_tensors(files.where, layout.name, found, wanted, {**{name: name for name in found}, **names})
    heads.load_state_dict({name: target.like(value) for name, value in found.items()}, strict=False, assign=True)
    shared = () if lent is None else tuple(finals)
    heads.report = HeadReport(source=files.where, layout=layout.name, shared=shared, notes=tuple(notes))
    return heads


def _medusa_name(name: str, num_layers: int) -> str:
    """blocks.{i}.{j}.linear.* -> {i}.{j}.linear.*; lm_heads.{i}.weight -> {i}.{num_layers}.weight."""
    name = re.sub(r"^lm_heads\.(\d+)\.", rf"\1.{num_layers}.", name)
    return name.removeprefix("blocks.")


# Saving


def save_head(head: Eagle3Head | MedusaHeads, folder: str | Path, layout: str | None = None) -> None:
    """Write config.json and safetensors under a layout's own names, so that other engines read them.

    Args:
        layout: "safeailab", "specforge" (the default) or "speculators" for EAGLE-3, "medusa" for Medusa.
    """
    known = (MEDUSA.name,) if isinstance(head, MedusaHeads) else tuple(EAGLE3_LAYOUTS)
    layout = layout or (MEDUSA.name if isinstance(head, MedusaHeads) else SPECFORGE.name)
    if layout not in known:
        raise unknown_option("save_head", layout, known)
    if isinstance(head, MedusaHeads):
        config = {"medusa_num_heads": head.num_heads, "medusa_num_layers": head.num_layers,
                  "hidden_size": head.hidden_size, "vocab_size": head.vocab_size}  # fmt: skip
        tensors = {_medusa_name(name, head.num_layers): value for name, value in head.own_state().items()}
        write_head(folder, config, tensors, MEDUSA.weights[0])
        return
    form = EAGLE3_LAYOUTS[layout]
    _check_expressible(head, form)
    tensors = {_theirs(name, form): value for name, value in head.own_state().items()}
    tensors["lm_head.weight"] = head.lm_head.weight  # a lent one, too: readers without it would draw it at random
    if head.d2t is not None:
        tensors["d2t"], tensors["t2d"] = head.d2t, t2d_of(head.vocabulary(), head.spec.layer.vocab_size)
    write_head(folder, _config(head.spec, form, head.lm_head.weight.dtype), tensors, form.weights[0])


def _check_expressible(head: Eagle3Head, layout: HeadLayout) -> None:
    """What a layout's readers would ignore is not written in it."""
    spec = head.spec
    used = {name for name in (*layout.flags, "qk_norm", "fc_bias") if getattr(spec, name)}
    used |= {"attention_bias"} if spec.layer.attention_bias else set()
    used |= {"more_layers"} if len(head.layers) > 1 else set()
    used |= {"other_than_3_taps"} if len(spec.tap_after) != 3 else set()
    lost = sorted(used - set(layout.knows))
    if lost:
        raise OptionError(f"readers of the {layout.name} layout would ignore {', '.join(lost)}", at=f"layout={layout.name!r}",
                          where="save_head", help="save it with layout='speculators'")  # fmt: skip


def _config(spec: Eagle3Spec, layout: HeadLayout, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a layout."""
    layer, rope = spec.layer, dict(spec.layer.rope_parameters or {})
    theta, kind = rope.pop("rope_theta", 10000.0), rope.pop("rope_type", "default")
    rope.pop("type", None)
    sizes = {name: getattr(layer, name) for name in SIZES}
    scaling = None if kind == "default" else {"type" if kind == "linear" else "rope_type": kind, **rope}
    sizes |= {"num_hidden_layers": layer.num_hidden_layers, "rope_theta": theta, "rope_scaling": scaling,
              "tie_word_embeddings": False}  # fmt: skip
    config = {**layout.config, "draft_vocab_size": spec.draft_vocab_size, "torch_dtype": str(dtype).removeprefix("torch.")}
    if layout.layer_config is None:
        config |= sizes
        config |= {name: True for name in layout.flags if getattr(spec, name)}
    else:
        config[layout.layer_config] = {"model_type": LAYER_MODEL_TYPES[spec.qk_norm], **sizes}
        config |= {name: getattr(spec, name) for name in layout.flags}
    if spec.target_hidden_size != layer.hidden_size:
        config["target_hidden_size"] = spec.target_hidden_size
    assert layout.taps is not None, "every EAGLE-3 layout names its taps"
    value: Any = [after - layout.taps.shift for after in spec.tap_after]
    for key in reversed(layout.taps.path):
        value = {key: value}
    return config | value
