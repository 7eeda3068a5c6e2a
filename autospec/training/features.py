"""What heads learn from: a frozen causal LM, read through hooks.

    ids -> layer tap_after[0] ... layer tap_after[-1] -> hidden that lm_head reads -> logits

Hooks, since the last entry of output_hidden_states has passed the final norm and a layer's output has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autospec.errors import OptionError


@dataclass(frozen=True)
class Features:
    """One pass of the target: taps [B, S, num_taps * H] in layer order, hidden [B, S, H] at lm_head, logits [B, S, V]."""

    taps: Tensor
    hidden: Tensor
    logits: Tensor


def default_taps(num_layers: int) -> tuple[int, ...]:
    """The layers whose outputs EAGLE-3 reads unless told otherwise."""
    if num_layers < 7:
        return tuple(sorted({0, (num_layers - 1) // 2, num_layers - 1}))
    return (1, num_layers // 2 - 1, num_layers - 4)


def decoder_layers(model: nn.Module, num_layers: int) -> nn.ModuleList:
    """The list of the model's decoder layers: the outermost list that is as long as the model is deep."""

    def search(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                yield child
            else:
                yield from search(child)

    found = next(search(model), None)
    if found is None:
        raise OptionError(f"no list of {num_layers} decoder layers was found", at="num_hidden_layers",
                          where=type(model).__name__, help="only models with one list of decoder layers can be tapped")  # fmt: skip
    return found


def check_taps(tap_after: tuple[int, ...], num_layers: int) -> None:
    """Taps are distinct layers in ascending order."""
    if not tap_after or list(tap_after) != sorted(set(tap_after)) or not 0 <= tap_after[0] <= tap_after[-1] < num_layers:
        raise OptionError(f"taps must be distinct layers from 0 to {num_layers - 1} in ascending order, got {list(tap_after)}",
                          at="tap_after", where="train eagle3",
                          help=f"the default is {list(default_taps(num_layers))}")  # fmt: skip


class Target:
    """A frozen causal LM whose features are read.

    Args:
        model: a causal LM in eval mode; its parameters stop asking for gradients.
        tap_after: 0-based layers whose output is read; none for Medusa.
    """

    def __init__(self, model: Any, tap_after: tuple[int, ...] = ()) -> None:
        self.model = model.requires_grad_(False)
        self.config = model.config.get_text_config(decoder=True)
        self.tap_after = tap_after
        self._seen: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        if tap_after:
            check_taps(tap_after, self.config.num_hidden_layers)
            layers = decoder_layers(model, self.config.num_hidden_layers)
            for index in tap_after:
                self._hooks.append(layers[index].register_forward_hook(self._reader(index)))
        self.lm_head = model.get_output_embeddings()
        if self.lm_head is None:
            raise OptionError("the model has no output embeddings", at="get_output_embeddings() is None",
                              where=type(model).__name__, help="heads are trained for causal LMs")  # fmt: skip
        self._hooks.append(self.lm_head.register_forward_pre_hook(self._read_hidden))

    @property
    def embed_tokens(self) -> Tensor:
        """The embedding weight [V, H]."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.device

    def close(self) -> None:
        """Leave the model as it was found."""
        for hook in self._hooks:
            hook.remove()

    def _reader(self, index: int) -> Any:
        def read(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[index] = output[0] if isinstance(output, tuple) else output

        return read

    def _read_hidden(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen[-1] = inputs[0]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Features:
        """input_ids [B, S]; padding, if any, stands on the right, where causal attention never looks back to it."""
        logits = self.model(input_ids, use_cache=False).logits
        taps = [self._seen[index] for index in self.tap_after]
        hidden = self._seen[-1]
        self._seen.clear()
        return Features(torch.cat(taps, dim=-1) if taps else hidden[..., :0], hidden, logits)
