"""For tests of training: a tiny target, heads that are not trivial, and a draft by plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from autospec.heads.eagle3 import Eagle3Head
from autospec.training.eagle3 import Eagle3Shape, new_head
from autospec.training.features import Target

VOCAB = 64


def tiny_model(layers: int = 4, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A random Llama whose guesses depend on what it reads."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
        "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **(sizes | options))).eval()


def random_head(target: Target, draft_vocab_size: int = VOCAB, num_layers: int = 1, seed: int = 0) -> Eagle3Head:
    """A head whose attention and MLP matter: nothing in it is zero."""
    torch.manual_seed(seed)
    d2t = None
    if draft_vocab_size < VOCAB:
        ids = torch.randperm(VOCAB)[:draft_vocab_size].sort().values
        d2t = ids - torch.arange(draft_vocab_size)
    head = new_head(target, Eagle3Shape(draft_vocab_size=draft_vocab_size, num_layers=num_layers), d2t)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.requires_grad and parameter.dim() == 2 and "lm_head" not in name:
                parameter.normal_(std=0.3)
    return head.eval()


def feed(head: Eagle3Head, tokens: Tensor, hidden: Tensor, positions: Tensor, caches: dict[int, Any]) -> tuple[Tensor, Tensor]:
    """One row through the head over a growing key/value cache, which it joins: plain decoding, one row at a time."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if layer in caches:
            k, v = torch.cat([caches[layer][0], k], dim=2), torch.cat([caches[layer][1], v], dim=2)
        caches[layer] = (k, v)
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).transpose(1, 2)

    usual, head.attend = head.attend, attend
    try:
        return head(tokens, hidden, positions)
    finally:
        head.attend = usual


@torch.no_grad()
def drafted(
    head: Eagle3Head, tokens: Tensor, taps: Tensor, start: int, choose: Callable[[int, Tensor], Tensor], steps: int
) -> list[Tensor]:
    """Logits [B, draft_vocab] of each level of a chain that begins after row `start`, row by row over a growing cache.

    `choose(level, logits)` names the token [B] that is drafted.
    """
    caches: dict[int, Any] = {}
    fused = head.fuse(taps)
    for row in range(start + 1):
        position = torch.tensor([[row]])
        logits, out = feed(head, tokens[:, row + 1 : row + 2], fused[:, row : row + 1], position, caches)
    found = [logits[:, -1]]
    for level in range(1, steps):
        token = choose(level, found[-1])[:, None]
        logits, out = feed(head, token, out, torch.tensor([[start + level]]), caches)
        found.append(logits[:, -1])
    return found


def tiny_tokenizer() -> Any:
    """Bytes, and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *letters])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
