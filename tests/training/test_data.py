"""From files to rows: formats, splits, padding, text of the target's own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.training import tiny_model, tiny_tokenizer

from autospec.errors import AutospecError, CheckpointError, OptionError
from autospec.training.data import make_rows, read_documents, split, token_counts, write_rows

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


def ids(text: str) -> list[int]:
    found: list[int] = tiny_tokenizer()(text)["input_ids"]
    return found


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_text_file_is_one_document_and_a_line_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo é")
    lines = write_lines(tmp_path / "b.jsonl", {"text": "three", "other": 1}, "", {"text": "four"})
    found = read_documents([tmp_path / "a.txt", lines], tiny_tokenizer())
    assert found == [ids("one\n\ntwo é"), ids("three"), ids("four")]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_chats_go_through_the_template(tmp_path: Path, key: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert read_documents([write_lines(tmp_path / "c.jsonl", {key: chat})], tokenizer) == [ids("<user>hi\n<assistant>ho\n")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "no JSON"), ("[1]", "a list, not an object"), ({"prompt": "x"}, "neither text nor messages, but prompt"),
        ({"text": 3}, "neither text nor messages"), ({"messages": [{"role": "user", "content": "x"}]}, "no chat template"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: Any, says: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", {"text": "fine"}, line)
    with pytest.raises(OptionError, match=says) as caught:
        read_documents([path], tiny_tokenizer())
    assert f"{path}, line 2" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 4


def test_a_template_may_refuse(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(OptionError, match="roles must alternate"):
        read_documents([write_lines(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "x"}]})], tokenizer)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_text("")
    for path, says in (("a.bin", "not UTF-8"), ("none.txt", "cannot be read: No such file")):
        with pytest.raises(CheckpointError, match=says):
            read_documents([tmp_path / path], tiny_tokenizer())
    with pytest.raises(OptionError, match="no text"):
        read_documents([tmp_path / "empty.txt"], tiny_tokenizer())


def test_documents_are_held_out_whole() -> None:
    documents = [[i] * 5 for i in range(10)]
    train, held_out = split(documents, 0.2, seed=1)
    assert len(held_out) == 2
    assert sorted(train + held_out) == documents
    assert split(documents, 0.2, seed=1) == (train, held_out)
    assert split([[1, 2, 3, 4]], 0.25, seed=0) == ([[1, 2, 3]], [[4]])
    assert split(documents, 0.0, seed=0) == (documents, [])
    with pytest.raises(AutospecError, match="share"):
        split(documents, 1.0, seed=0)


def test_rows_follow_one_another_or_begin_anew() -> None:
    documents = [[5, 6, 7], [8, 9], [3] * 9]
    packed = make_rows(documents, 4, least=3, eos=1)
    assert packed.tokens.tolist() == [[5, 6, 7, 1], [8, 9, 1, 3], [3, 3, 3, 3], [3, 3, 3, 3]]  # the rest is too short
    assert packed.weights.tolist() == [[1, 1, 1, 0]] * 4
    apart = make_rows(documents, 4, least=2, eos=None)
    assert torch.equal(make_rows([[], *documents], 4, least=3, eos=1).tokens, packed.tokens), "an empty document is none"
    assert apart.tokens.tolist() == [[5, 6, 7, 0], [8, 9, 0, 0], [3] * 4, [3] * 4]
    assert apart.weights.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert token_counts(apart, 10).tolist() == [0, 0, 0, 8, 0, 1, 1, 1, 1, 1]


def test_the_target_goes_on_from_cuts_of_the_text() -> None:
    model = tiny_model()
    rows = make_rows([torch.randint(3, 64, (400,), generator=torch.Generator().manual_seed(0)).tolist()], 16, 4, None)
    before = torch.random.get_rng_state()
    own = write_rows(model, rows, 6, seed=3, batch_size=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert own.tokens.shape == own.weights.shape == (6, 16)
    texts = [row[:4] for row in rows.tokens.tolist()]
    for i, (row, weight) in enumerate(zip(own.tokens, own.weights.bool(), strict=True)):
        assert row[:4].tolist() in texts
        counted = weight.nonzero()[:, 0]
        if i < 4:  # the first batch is greedy: what counts is what the target says
            said = model(row[None].long()).logits[0].argmax(-1)
            assert torch.equal(said[counted], row[counted + 1].long())
    again = write_rows(model, rows, 6, seed=3, batch_size=4)
    assert torch.equal(own.tokens, again.tokens)
    with pytest.raises(OptionError, match="row of 16 tokens"):
        write_rows(model, make_rows([[3] * 5], 16, 2, None), 2, seed=0, batch_size=2)


def test_nothing_counts_after_an_end_of_text() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[1] = model.lm_head.weight.abs().sum(0)  # an end of text comes soon
    rows = make_rows([torch.randint(3, 64, (400,), generator=torch.Generator().manual_seed(0)).tolist()], 16, 4, None)
    own = write_rows(model, rows, 8, seed=0, batch_size=8)
    ended = 0
    for row, weight in zip(own.tokens.tolist(), own.weights.tolist(), strict=True):
        if 1 in row:
            end = row.index(1)
            ended += 1
            assert not any(weight[end:])
            assert weight[end - 1] == 1
    assert ended
