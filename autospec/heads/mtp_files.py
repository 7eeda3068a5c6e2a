"""Reading the MTP modules of a checkpoint, which from_pretrained drops.

    names in the safetensors --layout--> which modules there are --read--> tensors --rename, stack experts--> MTPHead

A module is loaded whole or not at all. Its block is made by the class of the target's last layer with full attention, and
every tensor takes the dtype that the same tensor has there. float8 in blocks, as DeepSeek-V3 is published, is read too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autospec.errors import CheckpointError
from autospec.heads.files import check_tensors, read_named, tensor_names
from autospec.heads.mtp import MTPHead, MTPModule
from autospec.heads.report import HeadReport
from autospec.model_zoo.mtp_heads import MTP_LAYOUTS, MTPLayout

UNREAD = r".*rotary_emb\.inv_freq"
BLOCK = (128, 128)  # of weights that one scale of DeepSeek's float8 files holds for, where config.json does not say
BLOCK_SCALE = "_scale_inv"
FULL_ATTENTION = ("full_attention", "indexed_attention", "deepseek_sparse_attention")  # the last is transformers 5.17's
SCALES = r".*(\.weight_scale|\.qweight|\.scales)"


def load_mtp(source: str | Path, target: Any, most: int) -> MTPHead:
    """Load the first `most` modules of a checkpoint for a target (a transformers causal LM), in eval mode.

    Raises:
        CheckpointError: there are none, they do not fit the target, or the target cannot lend what they need.
    """
    where = str(source)
    decoder = decoder_of(target)
    num_layers = len(decoder.layers)
    folder, files = tensor_names(source)
    layout = recognise(files, num_layers, where)
    count = min(number_of_modules(layout, files, num_layers), most)
    owned = {name: file for name, file in files.items() if _is_owned(name, layout, count, num_layers)}
    if scaled := next((name for name in owned if re.fullmatch(SCALES, name)), None):
        raise CheckpointError("the MTP modules are quantized, and weights are read as they are", at=scaled, where=where,
                              help="name a checkpoint that has them in bf16: MTPConfig(speculative_model=PATH)")  # fmt: skip
    like = full_attention_layer(decoder, where)
    tensors = stack_experts(dequantized(read_named(owned), _block_size(folder), where))
    shared = _shared(tensors, target, layout, count, num_layers)
    for name in shared:
        tensors.pop(name, None)
    head = MTPHead(layout, target, [_module(k, layout, decoder, like, target, tensors) for k in range(count)])
    wanted = head.own_state()
    spell = {name: theirs(name, layout, num_layers) for name in wanted}
    used = set(spell.values())
    found = {name: tensors[spelt] for name, spelt in spell.items() if spelt in tensors}
    found |= {name: value for name, value in tensors.items() if name not in used}
    check_tensors(where, layout.name, found, wanted, {**{name: name for name in found}, **spell})
    weight, dtype_of = next(target.parameters()), dtypes_like(decoder.layers[like])
    ready: dict[str, Tensor] = {}  # by the file's names: what modules share stays one tensor
    for name, spelt in spell.items():
        dtype = dtype_of.get(name.split(".", 2)[2], weight.dtype)
        ready.setdefault(spelt, tensors[spelt].to(device=weight.device, dtype=dtype))
    head.load_state_dict({name: ready[spelt] for name, spelt in spell.items()}, strict=False, assign=True)
    empty = [name for name, value in (*head.depths.named_parameters(), *head.depths.named_buffers()) if value.is_meta]
    assert not empty, f"no file has a value for {empty[:3]}"
    head.depths.requires_grad_(False)
    head.report = HeadReport(source=where, layout=layout.name, shared=tuple(sorted(shared)))
    return head.eval()


def dtypes_like(layer: nn.Module) -> dict[str, torch.dtype]:
    """The dtypes of a module's block, by names inside the module: those of the target's layer, unless it is quantized."""
    return {f"block.{name}": value.dtype for name, value in layer.state_dict().items() if value.dtype.itemsize > 1}


def recognise(names: Iterable[str], num_layers: int, where: str) -> MTPLayout:
    """The layout of the MTP modules among a checkpoint's tensors."""
    known = set(names)
    for layout in MTP_LAYOUTS:
        if _spelt(layout.proj, 0, num_layers) + ".weight" in known:
            return layout
    proj = ", ".join(_spelt(layout.proj, 0, num_layers) for layout in MTP_LAYOUTS)
    raise CheckpointError("the checkpoint has no MTP modules", at=f"none of {proj}", where=where,
                          help="name one that has them, MTPConfig(speculative_model=PATH), or draft with 'auto'")  # fmt: skip


def has_mtp(source: str | Path, target: Any) -> bool:
    """Whether a checkpoint, or the model's own if it is named "mtp", has MTP modules for a target."""
    if str(source) == "mtp":
        return True
    try:
        recognise(tensor_names(source)[1], int(target.config.get_text_config(decoder=True).num_hidden_layers), str(source))
    except CheckpointError:
        return False
    return True


def number_of_modules(layout: MTPLayout, names: Iterable[str], num_layers: int) -> int:
    """How many modules a checkpoint has, from the first on."""
    known, count = list(names), 0
    while any(name.startswith(_spelt(layout.block, count, num_layers) + ".") for name in known):
        count += 1
    return count


def theirs(name: str, layout: MTPLayout, num_layers: int) -> str:
    """depths.{k}.{part}.{rest} -> the name in the file."""
    _, k, part, rest = name.split(".", 3)
    return f"{_spelt(getattr(layout, part), int(k), num_layers)}.{rest}"


def dequantized(tensors: Mapping[str, Tensor], block: tuple[int, int], where: str) -> dict[str, Tensor]:
    """float8 matrices with a scale for each block of them, as DeepSeek-V3 publishes, in bfloat16; the others as they are."""
    found = {name: value for name, value in tensors.items() if not name.endswith(BLOCK_SCALE)}
    for name in tensors.keys() - found.keys():
        scale, weight = tensors[name], found.get(name.removesuffix(BLOCK_SCALE))
        blocks = None if weight is None else tuple(-(-size // by) for size, by in zip(weight.shape, block, strict=False))
        if weight is None or weight.dim() != 2 or blocks != tuple(scale.shape):
            shape = "no weight" if weight is None else f"a weight of {list(weight.shape)} in blocks of {list(block)}"
            raise CheckpointError(f"a scale of {list(scale.shape)} does not fit {shape}", at=name, where=where,
                                  help="compare weight_block_size in config.json with the file")  # fmt: skip
        rows, columns = weight.shape
        scales = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        found[name.removesuffix(BLOCK_SCALE)] = (weight.float() * scales).to(torch.bfloat16)
    return found


def _block_size(folder: Path) -> tuple[int, int]:
    """Rows and columns of a block, by config.json."""
    path = folder / "config.json"
    found = json.loads(path.read_text()).get("quantization_config") if path.is_file() else None
    rows, columns = (found or {}).get("weight_block_size") or BLOCK
    return int(rows), int(columns)


def stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts that a file has one by one as the two tensors that transformers makes of them, where all are there."""
    found = dict(tensors)
    pattern = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
    by_prefix: dict[str, dict[tuple[str, int], str]] = {}
    for name in tensors:
        if match := pattern.fullmatch(name):
            by_prefix.setdefault(match[1], {})[match[3], int(match[2])] = name
    for prefix, names in by_prefix.items():
        count = 1 + max(index for _, index in names)
        if len(names) == 3 * count:
            gate, up, down = (torch.stack([found.pop(names[kind, e]) for e in range(count)]) for kind in ("gate", "up", "down"))
            found |= {f"{prefix}.gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}.down_proj": down}
    return found


def _spelt(template: str, k: int, num_layers: int) -> str:
    return template.format(k=k, layer=num_layers + k)


def _is_owned(name: str, layout: MTPLayout, count: int, num_layers: int) -> bool:
    """Whether a tensor is one of the first `count` modules'."""
    if re.fullmatch(UNREAD, name) or not any(name.startswith(_spelt(layout.root, k, num_layers)) for k in range(count)):
        return False
    stem, _, _ = layout.block.partition("{")
    number = re.match(re.escape(stem) + r"(\d+)\.", name)
    first = 0 if "{k}" in layout.block else num_layers
    return number is None or int(number[1]) < first + count


def decoder_of(target: Any) -> Any:
    """The part of a causal LM that has layers, a final norm and rotary embeddings."""
    decoder = target.get_decoder() if hasattr(target, "get_decoder") else None
    lost = [name for name in ("layers", "norm", "rotary_emb") if getattr(decoder, name, None) is None]
    if lost or target.get_output_embeddings() is None:
        what = "decoder" if decoder is None else ", ".join(lost) or "output embeddings"
        raise CheckpointError(f"the target has no {what} to make MTP modules with",
                              at="model.get_decoder()", where=type(target).__name__,
                              help="MTP modules are known for models built like DeepSeek-V3, Qwen3-Next or Qwen2")  # fmt: skip
    return decoder


def full_attention_layer(decoder: Any, where: str) -> int:
    """The last layer of the target that attends to everything, or selects by itself what it attends to: blocks are like it."""
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    indexers = getattr(decoder.config, "indexer_types", None) or ["full"] * len(decoder.layers)
    full = [
        index for index, (kind, indexer) in enumerate(zip(kinds, indexers, strict=False))
        if kind in FULL_ATTENTION and indexer == "full"
    ]  # fmt: skip
    if not full:
        raise CheckpointError("the target has no layer with full attention, which MTP modules have", at=f"layer_types={kinds}",
                              where=where, help="draft with 'auto'")  # fmt: skip
    return full[-1]


def _shared(tensors: Mapping[str, Tensor], target: Any, layout: MTPLayout, count: int, num_layers: int) -> set[str]:
    """Copies of the target's embedding and lm_head, by the file's names."""
    found = set()
    for template, lent in ((layout.embed_tokens, target.get_input_embeddings()), (layout.lm_head, target.get_output_embeddings())):
        for k in range(count if template else 0):
            name = f"{_spelt(str(template), k, num_layers)}.weight"
            own = tensors.get(name)
            if own is not None and own.shape == lent.weight.shape and torch.equal(own.to(lent.weight), lent.weight):
                found.add(name)
    return found


def _module(
    k: int, layout: MTPLayout, decoder: Any, like: int, target: Any, tensors: Mapping[str, Tensor]
) -> MTPModule:
    """Module k without weights; embeddings and lm_head are its own where the file has other ones than the target."""
    embedding, lm_head = target.get_input_embeddings(), target.get_output_embeddings()
    vocab_size, hidden_size = embedding.weight.shape

    def is_own(template: str | None) -> bool:
        return template is not None and f"{_spelt(template, k, len(decoder.layers))}.weight" in tensors

    with torch.device("meta"):
        block = type(decoder.layers[like])(decoder.config, like)
        own_embedding = nn.Embedding(vocab_size, hidden_size) if is_own(layout.embed_tokens) else None
        own_lm_head = nn.Linear(hidden_size, lm_head.weight.shape[0], bias=False) if is_own(layout.lm_head) else None
    return MTPModule(hidden_size, decoder.norm, block, own_embedding, own_lm_head)
