"""The demo model's tokenizer: byte-level BPE over pieces cut the way Python is written."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # separates files; bos and eos
PAD = "<|pad|>"  # never in the training text

# A line break and the indentation after it are one piece; a word takes one mark or blank before it (".join", "(self",
# "_name", " in"); numbers split in threes.
PIECES = Regex(r"\n+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` entries: 256 bytes, two special tokens, and merges learned from `texts`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True), AddedToken(PAD, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for AutoTokenizer of transformers 4 and 5."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], title: str) -> torch.Tensor:
    """All texts as one int32 stream, each after an <|endoftext|>."""
    bpe, start = tokenizer.backend_tokenizer, tokenizer.bos_token_id
    parts = []
    for i in tqdm(range(0, len(texts), 512), desc=title, mininterval=5):
        for encoding in bpe.encode_batch_fast(texts[i : i + 512]):
            parts.append(torch.tensor([start, *encoding.ids], dtype=torch.int32))
    return torch.cat(parts)
