"""What a captured graph keeps of every token: keys and values, or a latent and its rope part; and keys of indexers."""

from __future__ import annotations

from torch import fx

from autospec.ir.match import calls, operand
from autospec.kernels.attention import attention
from autospec.kernels.latent_attention import latent_attention
from autospec.kernels.select_keys import select_keys


def kept_rows(module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Both tensors of every cache: k and v [B, Hkv, S, *], or latent and k_rope [B, S, *]; calls that share them count once."""
    pairs = {(operand(node, 1), operand(node, 2)) for node in calls(module, attention)}
    pairs |= {(operand(node, 2), operand(node, 3)) for node in calls(module, latent_attention)}
    return list(pairs)


def index_keys(module: fx.GraphModule) -> list[fx.Node]:
    """The keys [B, S, Di] that indexers select by; selections that share them count once."""
    return list(dict.fromkeys(operand(node, 2) for node in calls(module, select_keys)))


def spared_in_float8(module: fx.GraphModule) -> int:
    """Bytes of one token's rows that index keys in float8, with a float32 scale each, do not take."""
    kept = [source.meta["val"] for source in index_keys(module)]
    return sum(value.shape[-1] * (value.dtype.itemsize - 1) - 4 for value in kept)


def bytes_per_token(module: fx.GraphModule) -> int:
    """Size of one token's rows in all caches."""
    total = 0
    for source in (*(source for pair in kept_rows(module) for source in pair), *index_keys(module)):
        value = source.meta["val"]
        heads = value.shape[1] if value.dim() == 4 else 1
        total += heads * value.shape[-1] * value.dtype.itemsize
    return total
