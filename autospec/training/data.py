"""The user's text as rows of tokens: plain text, JSON lines with a text, chats through the tokenizer's template.

    files -> documents -> held out by document -> rows of one length, padded on the right
                                                     + rows that the target wrote itself after cuts of them
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from autospec.errors import CheckpointError, OptionError
from autospec.training.loop import Rows

MESSAGES = ("messages", "conversations")  # what chat data calls the list of turns
CUT = 0.25  # of a row: how much text the target goes on from, at least


def read_documents(paths: Sequence[str | Path], tokenizer: Any) -> list[list[int]]:
    """Token ids of every document: a text file is one, a .jsonl file has one per line."""
    documents = []
    for path in map(Path, paths):
        found = list(_lines_of(path, tokenizer)) if path.suffix == ".jsonl" else [_encode(_text_of(path), tokenizer)]
        documents += [ids for ids in found if ids]
    if not documents:
        raise OptionError("the data has no text", at=", ".join(map(str, paths)), where="autospec train --data",
                          help="name text files, or .jsonl files with a text or messages in each line")  # fmt: skip
    return documents


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError("the file is not UTF-8 text", at=f"{path}, byte {error.start}", where="autospec train --data",
                              help="name text files or .jsonl files") from error  # fmt: skip
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", at=str(path), where="autospec train --data",
                              help="check the path") from error  # fmt: skip


def _encode(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def _lines_of(path: Path, tokenizer: Any) -> Iterator[list[int]]:
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        if not line.strip():
            continue

        def refuse(rule: str, help: str, number: int = number) -> OptionError:
            return OptionError(rule, at=f"{path}, line {number}", where="autospec train --data", help=help)

        try:
            found = json.loads(line)
        except ValueError as error:
            raise refuse(f"the line is no JSON: {error}", "each line of a .jsonl file is an object") from error
        if not isinstance(found, dict):
            raise refuse(f"the line is a {type(found).__name__}, not an object", 'write {"text": ...} or {"messages": [...]}')
        chat = next((found[name] for name in MESSAGES if name in found), None)
        if chat is not None:
            yield _chat(chat, tokenizer, refuse)
        elif isinstance(found.get("text"), str):
            yield _encode(found["text"], tokenizer)
        else:
            raise refuse(f"the line has neither text nor messages, but {', '.join(sorted(found)) or 'nothing'}",
                         'write {"text": ...} or {"messages": [...]}')  # fmt: skip


def _chat(messages: Any, tokenizer: Any, refuse: Any) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise refuse("the line is a chat, and the model's tokenizer has no chat template", "give plain text for a base model")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise refuse(f"the chat template refuses the messages: {reason:.160}",
                     "messages are objects with a role and a content, in the order the template wants") from error  # fmt: skip
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def split(documents: list[list[int]], share: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Documents to train on and documents held out; of a single document, its end."""
    if not 0 <= share < 1:
        raise OptionError(f"the held-out share must be at least 0 and below 1, got {share}", at="--held-out",
                          where="autospec train", help="0.02 is usual; 0 holds nothing out")  # fmt: skip
    if share == 0:
        return documents, []
    if len(documents) == 1:
        cut = round((1 - share) * len(documents[0]))
        return [documents[0][:cut]], [documents[0][cut:]]
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(documents) - 1, max(1, round(share * len(documents))))
    held_out = set(order[:count])
    return [d for i, d in enumerate(documents) if i not in held_out], [documents[i] for i in sorted(held_out)]


def make_rows(documents: list[list[int]], length: int, least: int, eos: int | None) -> Rows:
    """Rows of `length` tokens: documents one after another, the last row padded.

    Args:
        least: rows with fewer tokens are left out.
        eos: stands between documents; None: every document begins a row of its own.
    """
    pieces: list[list[int]] = []
    documents = [ids for ids in documents if ids]  # as is what a short document holds out
    if eos is None:
        streams = documents
    else:
        streams = [[token for ids in documents for token in (ids if ids[-1] == eos else [*ids, eos])]]
    for ids in streams:
        pieces += [ids[i : i + length] for i in range(0, len(ids), length)]
    pieces = [piece for piece in pieces if len(piece) >= least]
    tokens = torch.zeros(len(pieces), length, dtype=torch.int32)
    weights = torch.zeros(len(pieces), length, dtype=torch.uint8)
    for i, piece in enumerate(pieces):
        tokens[i, : len(piece)] = torch.tensor(piece, dtype=torch.int32)
        weights[i, : len(piece) - 1] = 1  # what follows the last token is not known
    return Rows(tokens, weights)


def join(*parts: Rows) -> Rows:
    """Rows of one length, one after another."""
    return Rows(torch.cat([part.tokens for part in parts]), torch.cat([part.weights for part in parts]))


@torch.no_grad()
def write_rows(model: Any, rows: Rows, count: int, seed: int, batch_size: int) -> Rows:
    """`count` rows that begin like some of `rows` and go on as the model likes: half greedily, half sampled.

    Nothing before the first token of its own counts, nor what follows an end of text.
    """
    full = (rows.weights[:, :-1] > 0).all(-1).nonzero()[:, 0]
    length = rows.tokens.shape[1]
    if not len(full):
        raise OptionError(f"no text is as long as a row of {length} tokens, so the target cannot go on from cuts of it",
                          at="--self-generated", where="autospec train", help="lower --length, or leave it out")  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    devices = [model.device] if model.device.type == "cuda" else []
    found = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for i, start in enumerate(tqdm(range(0, count, batch_size), desc="target writes", mininterval=1.0)):
            chosen = full[torch.randint(len(full), (min(batch_size, count - start),), generator=generator)]
            low = max(1, int(CUT * length))
            cut = int(torch.randint(low, max(low + 1, length // 2 + 1), (), generator=generator))
            prompts = rows.tokens[chosen, :cut].long().to(model.device)
            found.append(_continued(model, prompts, length, sample=i % 2 == 1))
    return join(*found)


def _continued(model: Any, prompts: Tensor, length: int, sample: bool) -> Rows:
    cut = prompts.shape[1]
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    eos = _ids(model.generation_config.eos_token_id)
    pad = eos[0] if eos else 0
    out = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=length - cut, pad_token_id=pad, **options)
    out = torch.nn.functional.pad(out, (0, length - out.shape[1]), value=pad)
    ended = torch.isin(out, torch.tensor(eos, dtype=out.dtype, device=out.device))
    ended[:, :cut] = False
    weights = (ended.cumsum(-1) == 0).to(torch.uint8)
    weights[:, : cut - 1] = 0
    weights[:, -1] = 0
    return Rows(out.int().cpu(), weights.cpu())


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]


def token_counts(rows: Rows, vocab_size: int) -> Tensor:
    """[V] how often each token occurs, padding aside."""
    real = torch.cat([torch.ones_like(rows.weights[:, :1]), rows.weights[:, :-1]], dim=1) > 0
    return torch.bincount(rows.tokens[real].long(), minlength=vocab_size)
