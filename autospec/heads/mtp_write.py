"""Writing MTP modules as their family does, for `load_mtp` and for other engines.

    MTPHead --the family's names--> tensors --experts one by one--> config.json and model.safetensors

The folder has the modules alone. Its config.json is the target's with the number of modules in it, so engines that want
one checkpoint find in it what the target's own says. Embedding and lm_head are the target's and are not repeated: engines
share them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from autospec.heads.files import write_head
from autospec.heads.mtp import MTPHead
from autospec.heads.mtp_files import decoder_of, dtypes_like, full_attention_layer, theirs

WEIGHTS = "model.safetensors"


def save_mtp(head: MTPHead, folder: str | Path) -> None:
    """Write a folder that `MTPConfig(speculative_model=folder)` takes; every tensor in the dtype it has in the target."""
    config = json.loads(head.target.config.to_json_string())
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and "num_hidden_layers" in part:
            part |= dict.fromkeys(head.layout.counted_by, len(head.depths))
    write_head(folder, config, written_tensors(head), WEIGHTS)


def written_tensors(head: MTPHead) -> dict[str, Tensor]:
    """The modules' tensors by the names and in the shapes of the family's files."""
    decoder = decoder_of(head.target)
    dtype_of = dtypes_like(decoder.layers[full_attention_layer(decoder, type(head.target).__name__)])
    plain = head.target.get_input_embeddings().weight.dtype
    found = {
        theirs(name, head.layout, len(decoder.layers)): value.detach().to(dtype_of.get(name.split(".", 2)[2], plain))
        for name, value in head.own_state().items()
    }
    return unstack_experts(found)


def unstack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stack_experts`: what transformers stacks is one matrix per expert in the files of every family here.

    Stacks of another form (transposed, with biases) stay as they are.
    """
    found = dict(tensors)
    for name, down in tensors.items():
        prefix, is_stack, _ = name.partition(".experts.down_proj")
        stacked = tensors.get(f"{prefix}.experts.gate_up_proj")
        if name != f"{prefix}.experts.down_proj" or stacked is None or not is_stack:
            continue
        count, width, inner = down.shape
        if stacked.shape != (count, 2 * inner, width) or f"{prefix}.experts.down_proj_bias" in tensors:
            continue
        del found[name], found[f"{prefix}.experts.gate_up_proj"]
        for e in range(count):
            gate, up = stacked[e].chunk(2)
            own = {"gate": gate, "up": up, "down": down[e]}
            found |= {f"{prefix}.experts.{e}.{kind}_proj.weight": value for kind, value in own.items()}
    return found
