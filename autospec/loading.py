"""Loading what a user names, and the checks that come before capture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from autospec.capture_facts import text_config
from autospec.config import Eagle3Config, MedusaConfig, MTPConfig, Ranking
from autospec.errors import CaptureError, CheckpointError, OptionError
from autospec.heads.checkpoint import load_head
from autospec.heads.mtp import MTPHead
from autospec.heads.mtp_files import load_mtp
from autospec.hollow import parameters_on_meta
from autospec.model_zoo.bundled import resolve
from autospec.program import CapturedHead


def load_model(model: Any, option: str, like: Any = None) -> Any:
    """A loaded causal LM in eval mode: the module itself, or one loaded from a path or hub id.

    Args:
        option: the argument's name, for messages.
        like: a module whose dtype and device a loaded draft takes.
    """
    if isinstance(model, torch.nn.Module):
        if any(part.training for part in model.modules()):
            raise CaptureError("the model is in training mode", at=f"{option}.training is True",
                               where=type(model).__name__, help="call model.eval()")  # fmt: skip
        return model
    if not isinstance(model, (str, Path)):
        raise OptionError(f"{option} must be a loaded module or a path, got {type(model).__name__}",
                          at=f"{option}={model!r:.60}", where="autospec.optimize",
                          help="load it with AutoModelForCausalLM.from_pretrained, or name its folder")  # fmt: skip
    from transformers import AutoModelForCausalLM

    model = resolve(str(model))
    options: dict[str, Any] = {"dtype": "auto"}
    if like is not None:
        weight = next(like.parameters())
        options = {"dtype": weight.dtype}
        if weight.is_cuda:
            options["device_map"] = {"": weight.device}
    _check_place(model, option)
    try:
        load: Any = AutoModelForCausalLM.from_pretrained
        loaded, info = load(str(model), output_loading_info=True, **options)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"the checkpoint cannot be loaded: {type(error).__name__}: {reason[:200]}", at=str(model), where=option,
            help="a truncated or corrupt file must be downloaded again; an encoder-decoder model is not supported"
            if Path(model).exists() else f"there is no folder '{model}' here: check the name, or download the model first",
        ) from error  # fmt: skip
    missing = sorted(info.get("missing_keys", ()))
    mismatched = sorted(str(key) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        names = ", ".join([*missing, *mismatched][:4])
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors and has {len(mismatched)} of the wrong shape: {names}",
            at=str(model), where=option, help="random weights would have taken their place; check the files",
        )  # fmt: skip
    return loaded.eval()


def _check_place(model: str, option: str) -> None:
    """Raise CheckpointError for a folder that is not there or holds no model; a hub id passes."""
    looks_local = not model or model.startswith(("/", ".", "~")) or model.count("/") > 1
    if looks_local and (not model or not Path(model).exists()):
        raise CheckpointError("there is no such folder", at=f"{option}={model!r}", where="autospec.optimize",
                              help="name a folder written by save_pretrained, or a hub id such as 'name/model'")  # fmt: skip
    if Path(model).exists() and not (Path(model) / "config.json").is_file():
        raise CheckpointError("the folder has no config.json", at=model, where=option,
                              help="name a folder written by save_pretrained")  # fmt: skip


def tokenizer_of(model: str, where: str) -> Any:
    """transformers' tokenizer of a folder or hub id; a bundled name is one too.

    Raises:
        CheckpointError: there is no such model, or it comes without a tokenizer.
    """
    from transformers import AutoTokenizer

    place = resolve(model)
    _check_place(place, "model")
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        help = "text needs one; prompts in a .jsonl file may hold token ids instead"
        if not Path(place).exists():
            help = f"there is no folder '{model}' here: check the name"
        raise CheckpointError(f"the model's tokenizer cannot be loaded: {reason:.120}", at=model, where=where, help=help) from error


def checked_device(device: str | None, where: str) -> str:
    """A device that can hold a tensor; None: cuda if there is one, else cpu.

    Raises:
        OptionError: there is no such device here.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"there is no device '{place}' here: {str(error).splitlines()[0]:.120}", at=f"--device {place}",
                          where=where, help="cpu always works") from None  # fmt: skip
    return place


def model_on_meta(path: Any) -> Any:
    """A causal LM of a folder's configuration, without weights."""
    if not isinstance(path, (str, Path)) or not (Path(resolve(str(path))) / "config.json").is_file():
        raise OptionError("meta=True takes a folder with a config.json and safetensors", at=f"model={path!r:.60}",
                          where="autospec.export", help="download the model, or load it")  # fmt: skip
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = resolve(str(path))
    config = AutoConfig.from_pretrained(folder)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(config, "dtype", None) or torch.float32)
    with contextlib.suppress(OSError):  # few models have none
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config._name_or_path = folder
    return model.eval()


def check_causal_lm(model: Any) -> None:
    """Refuse what is no decoder-only language model, before anything is traced."""
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        raise CaptureError("this is not a Hugging Face causal LM", at="no config or no generate", where=name,
                           help="load one with AutoModelForCausalLM.from_pretrained")  # fmt: skip
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError("an encoder-decoder model has no single decoder graph", at="is_encoder_decoder=True",
                           where=name, help="only decoder-only causal LMs are supported")  # fmt: skip
    if not hasattr(text_config(model), "vocab_size"):
        raise CaptureError("the configuration names no vocab_size", at="model.config", where=name,
                           help="only language models over token ids are supported")  # fmt: skip


def check_draft(target: Any, draft: Any) -> None:
    """The draft must be a causal LM over the target's vocabulary, on its device."""
    check_causal_lm(draft)
    ours, theirs = int(text_config(target).vocab_size), int(text_config(draft).vocab_size)
    if ours != theirs:
        raise OptionError(
            f"the draft model has a vocabulary of {theirs}, the target of {ours}",
            at=f"speculative_model={type(draft).__name__}", where="DraftTargetConfig",
            help="use a draft with the target's tokenizer",
        )  # fmt: skip
    here, there = next(target.parameters()), next(draft.parameters())
    if here.device != there.device:
        raise OptionError(f"the draft is on {there.device}, the target on {here.device}", where="DraftTargetConfig",
                          at="speculative_model", help="move one of them")  # fmt: skip


def load_draft_head(source: Any, target: Any) -> Any:
    """The head itself, or one loaded from a path or hub id for this target, on its device and in its dtype."""
    if isinstance(source, torch.nn.Module):
        return source
    if not isinstance(source, (str, Path)):
        raise OptionError(f"speculative_model must be a loaded head or a path, got {type(source).__name__}",
                          at=f"speculative_model={source!r:.60}", where="autospec.optimize",
                          help="name a head's folder or hub id")  # fmt: skip
    source = resolve(str(source))
    weight = next(target.parameters())
    config, output = text_config(target), target.get_output_embeddings()
    return load_head(
        source, target_hidden_size=int(config.hidden_size), target_vocab_size=int(config.vocab_size),
        target_layers=int(config.num_hidden_layers), embed_tokens=target.get_input_embeddings().weight,
        lm_head=None if output is None else output.weight, dtype=weight.dtype, device=weight.device,
    ).eval()  # fmt: skip


def load_mtp_modules(config: MTPConfig, target: Any) -> MTPHead:
    """The modules themselves, or as many as the draft can use of those in a checkpoint, by default the target's own."""
    source = config.speculative_model
    assert config.max_draft_len is not None, "a configuration fills it in"
    most = config.max_draft_len if config.use_mtp_vanilla else 1
    if isinstance(source, MTPHead):
        return source.first(most)
    if source is None:
        source = getattr(target.config, "_name_or_path", "")
        if not source:
            raise OptionError("the target does not say which checkpoint it was loaded from", at="speculative_model=None",
                              where="MTPConfig", help="name it: MTPConfig(speculative_model=PATH)")  # fmt: skip
    if not isinstance(source, (str, Path)):
        raise OptionError(f"speculative_model must be an MTPHead or a path, got {type(source).__name__}",
                          at=f"speculative_model={source!r:.60}", where="MTPConfig",
                          help="name a checkpoint's folder or hub id")  # fmt: skip
    return load_mtp(resolve(str(source)), target, most)


# Heads by the name in their facts: what they are called, and the configuration that takes them.
_KINDS = {
    "Eagle3Head": ("an EAGLE-3 head", "Eagle3Config"), "MedusaHeads": ("Medusa heads", "MedusaConfig"),
    "MTPHead": ("MTP modules", "MTPConfig"),
}  # fmt: skip


def check_head(config: Eagle3Config | MedusaConfig | MTPConfig, head: CapturedHead) -> None:
    """The draft that is asked for must be one the head can make."""
    tree, name = config.tree, type(config).__name__
    kind, other = _KINDS[head.facts.name]
    if other != name:
        raise OptionError(f"{name} was given {kind}", at=f"speculative_model={config.speculative_model!r:.60}", where=name,
                          help=f"use autospec.{other}")  # fmt: skip
    if head.max_draft_len is not None and tree.max_draft_len > head.max_draft_len:
        raise OptionError(
            f"a draft of {tree.max_draft_len} levels needs as many heads, there are {head.max_draft_len}",
            at=f"max_draft_len={tree.max_draft_len}", where=name, help=f"use at most {head.max_draft_len} levels",
        )  # fmt: skip
    check_children(config, head.facts.vocab_size)


def check_children(config: Ranking, draft_vocab_size: int) -> None:
    """No node can have more children than the draft knows tokens."""
    tree = config.tree
    widest = max(tree.children_at(level) for level in range(tree.max_draft_len))
    if widest > draft_vocab_size:
        raise OptionError(f"{widest} children of a node are asked for, the draft knows {draft_vocab_size} tokens",
                          at=str(tree), where=type(config).__name__, help="use fewer children")  # fmt: skip


def _layer_lists(module: torch.nn.Module, depth: int) -> Iterator[tuple[torch.nn.Module, str, torch.nn.ModuleList]]:
    """The outermost lists of `depth` modules: a list inside a layer, of experts perhaps, is not one of layers."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.ModuleList) and len(child) == depth:
            yield module, name, child
        else:
            yield from _layer_lists(child, depth)


@contextlib.contextmanager
def draft_layers(draft: Any, num_draft_layers: int | None) -> Iterator[None]:
    """Let only the first `num_draft_layers` decoder layers of a draft run while it is captured."""
    config = text_config(draft)
    depth = int(config.num_hidden_layers)
    if num_draft_layers is not None and num_draft_layers > depth:
        raise OptionError(
            f"num_draft_layers is {num_draft_layers}, but the draft has {depth} layers",
            at=f"num_draft_layers={num_draft_layers}", where=type(draft).__name__,
            help=f"leave it out, or use at most {depth}",
        )  # fmt: skip
    if num_draft_layers is None or num_draft_layers == depth:
        yield
        return
    lists = list(_layer_lists(draft, depth))
    if not lists:
        raise OptionError(f"the draft's {depth} layers stand in no list that could be cut short",
                          at=f"num_draft_layers={num_draft_layers}", where=type(draft).__name__,
                          help="leave num_draft_layers out")  # fmt: skip
    try:
        for parent, name, child in lists:
            setattr(parent, name, child[:num_draft_layers])
        config.num_hidden_layers = num_draft_layers
        yield
    finally:
        for parent, name, child in lists:
            setattr(parent, name, child)
        config.num_hidden_layers = depth
