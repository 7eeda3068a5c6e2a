"""generate() against transformers' generate: prompts, padding, lengths, ends, options and streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from harness.models import oracle
from harness.text import char_tokenizer
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer

from autospec.api import OptimizedModel

Make = Callable[..., OptimizedModel]
PLAIN = {"do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("drafter", ["plain", "ngram", "small", "twin", "auto"])
def test_a_ragged_batch_padded_left(optimized: Make, judge: Any, padded: Any, prompts: Any, drafter: str) -> None:
    ids, mask = padded(prompts, "left")
    expected = judge.generate(ids, attention_mask=mask, max_new_tokens=40, **PLAIN)
    got = optimized(drafter).generate(ids, attention_mask=mask, max_new_tokens=40, **PLAIN)
    assert torch.equal(got, expected)
    assert got.dtype == torch.int64


def test_padding_on_the_right_and_a_list_of_prompts(optimized: Make, padded: Any, prompts: Any) -> None:
    """Transformers decodes right-padded prompts wrongly; ours give what each prompt gives alone."""
    ids, mask = padded(prompts, "right")
    alone = [oracle("target", prompt, 12) for prompt in prompts]
    right = optimized().generate(ids, attention_mask=mask, max_new_tokens=12, **PLAIN)
    assert torch.equal(right[:, : ids.shape[1]], ids)
    assert right[:, ids.shape[1] :].tolist() == alone
    listed = optimized().generate(prompts, max_new_tokens=12, **PLAIN)
    assert torch.equal(listed[:, : ids.shape[1]], padded(prompts, "left")[0])
    assert listed[:, ids.shape[1] :].tolist() == alone
    tensors = optimized().generate([torch.tensor(prompt) for prompt in prompts], max_new_tokens=12, **PLAIN)
    assert torch.equal(tensors, listed)


def test_the_ways_to_pass_a_prompt(optimized: Make, prompts: Any) -> None:
    fast, ids = optimized(), torch.tensor(prompts[:1])
    mask = torch.ones_like(ids)
    expected = fast.generate(ids, max_new_tokens=6, **PLAIN)
    assert torch.equal(fast(ids, max_new_tokens=6, **PLAIN), expected)
    assert torch.equal(fast.generate(inputs=ids, max_new_tokens=6, **PLAIN), expected)
    assert torch.equal(fast.generate(ids[0], max_new_tokens=6, **PLAIN), expected)
    assert torch.equal(fast.generate(prompts[0], max_new_tokens=6, **PLAIN), expected)
    assert torch.equal(fast.generate(ids.to(torch.int32), max_new_tokens=6, **PLAIN), expected)
    assert torch.equal(fast.generate({"input_ids": ids, "attention_mask": mask}, max_new_tokens=6, **PLAIN), expected)
    assert torch.equal(fast.generate(ids.tolist(), mask.tolist(), max_new_tokens=6, **PLAIN), expected)
    padded_list = fast.generate([[0, 0, *prompts[0]]], [[0, 0, *mask[0].tolist()]], max_new_tokens=6, **PLAIN)
    assert torch.equal(padded_list[:, 2:], expected)


@pytest.mark.parametrize("drafter", ["ngram", "twin"])
def test_several_eos_ids(optimized: Make, judge: Any, padded: Any, prompts: Any, drafter: str) -> None:
    ids, mask = padded(prompts, "left")
    ends = [oracle("target", prompts[0], 9)[8], oracle("target", prompts[1], 4)[3]]
    for eos in (ends, ends[0], torch.tensor(ends)):
        options = {"eos_token_id": eos, "pad_token_id": 63, "max_new_tokens": 30, "do_sample": False}
        expected = judge.generate(ids, attention_mask=mask, **options)
        assert torch.equal(optimized(drafter).generate(ids, attention_mask=mask, **options), expected)


def test_without_a_pad_id_the_first_eos_id_pads(optimized: Make, prompts: Any) -> None:
    eos = oracle("target", prompts[1], 4)[3]
    bare = OptimizedModel(**{**vars_of(optimized()), "generation_defaults": {}}, _sessions=optimized()._sessions)
    out = bare.generate(prompts, eos_token_id=[eos, 62], max_new_tokens=30, do_sample=False)
    assert out[1, 19 + 3 :].tolist() == [eos] * (out.shape[1] - 22)
    assert out[0, : 19 - 7].tolist() == [eos] * 12


def vars_of(model: OptimizedModel) -> dict[str, Any]:
    names = ("target", "draft", "speculation", "compile", "limits", "generation_defaults")
    return {name: getattr(model, name) for name in names}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"max_new_tokens": 7}, {"max_length": 30}, {"max_length": 30, "max_new_tokens": 4},
        {"max_new_tokens": None}, {"max_length": 25, "max_new_tokens": None}, {"max_new_tokens": 1},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_lengths(optimized: Make, judge: Any, padded: Any, prompts: Any, options: dict[str, Any]) -> None:
    ids, mask = padded(prompts, "left")
    expected = judge.generate(ids, attention_mask=mask, **PLAIN, **options)
    assert torch.equal(optimized().generate(ids, attention_mask=mask, **PLAIN, **options), expected)


@pytest.mark.parametrize(
    ("checkpoint", "config", "keywords"),
    [
        ({"max_new_tokens": 5}, None, {}),
        ({"max_new_tokens": 5}, None, {"max_new_tokens": 9}),
        ({"max_new_tokens": 5}, {"max_new_tokens": 3}, {}),
        ({"max_new_tokens": 5}, {"max_new_tokens": 3}, {"max_new_tokens": 4}),
        ({"max_length": 27}, None, {}),
        ({"max_new_tokens": 5}, None, {"max_length": 30}),
        ({"repetition_penalty": 1.4, "max_new_tokens": 9}, None, {}),
        ({"repetition_penalty": 1.4, "max_new_tokens": 9}, {"max_new_tokens": 8}, {}),
        ({"repetition_penalty": 1.4, "max_new_tokens": 9}, {"repetition_penalty": 1.1}, {}),
        ({"repetition_penalty": 1.4, "max_new_tokens": 9}, None, {"repetition_penalty": 1.0}),
        ({"eos_token_id": [22, 7, 12, 48], "max_new_tokens": 30}, None, {}),
        ({"eos_token_id": [22, 7, 12, 48], "max_new_tokens": 30}, None, {"eos_token_id": None}),
        ({"eos_token_id": [22, 7, 12, 48], "max_new_tokens": 30}, None, {"eos_token_id": 5}),
        ({"do_sample": True, "temperature": 0.7, "max_new_tokens": 8}, None, {"do_sample": False}),
        ({"do_sample": True, "temperature": 0.7, "max_new_tokens": 8}, None, {"do_sample": None}),
        ({"do_sample": True, "max_new_tokens": 8}, {"do_sample": False}, {}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_priorities_are_those_of_transformers(
    optimized: Make, judge: Any, padded: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch,
    checkpoint: dict[str, Any], config: dict[str, Any] | None, keywords: dict[str, Any],
) -> None:  # fmt: skip
    """Keywords, then generation_config, then the checkpoint's own, then the defaults."""
    ids, mask = padded(prompts, "left")
    own = GenerationConfig(pad_token_id=0, **checkpoint)
    monkeypatch.setattr(judge, "generation_config", own)
    given = None if config is None else GenerationConfig(pad_token_id=0, **config)
    expected = judge.generate(ids, attention_mask=mask, generation_config=given, **keywords)
    fast = OptimizedModel(**{**vars_of(optimized()), "generation_defaults": own.to_dict()}, _sessions=optimized()._sessions)
    assert torch.equal(fast.generate(ids, attention_mask=mask, generation_config=given, **keywords), expected)
    if config is not None:
        as_dict = {"pad_token_id": 0, **config}
        assert torch.equal(fast.generate(ids, attention_mask=mask, generation_config=as_dict, **keywords), expected)


def test_a_checkpoint_that_samples_by_default(optimized: Make, prompts: Any) -> None:
    fast = optimized(defaults={"do_sample": True, "temperature": 1.5, "top_k": 0, "pad_token_id": 0})
    greedy = optimized().generate(prompts[:1], max_new_tokens=20, **PLAIN)
    sampled = [fast.generate(prompts[:1], max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1])
    assert not torch.equal(sampled[0], sampled[2])
    assert not torch.equal(sampled[0], greedy)
    assert torch.equal(fast.generate(prompts[:1], max_new_tokens=20, do_sample=False), greedy)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty(optimized: Make, judge: Any, padded: Any, prompts: Any, penalty: float) -> None:
    """Padding is no history, whoever added it."""
    ids, mask = padded(prompts, "left")
    options = {"max_new_tokens": 30, "repetition_penalty": penalty, **PLAIN}
    expected = judge.generate(ids, attention_mask=mask, **options)
    for drafter in ("plain", "ngram", "twin"):
        assert torch.equal(optimized(drafter).generate(ids, attention_mask=mask, **options), expected)
    listed = optimized().generate(prompts, **options)[:, ids.shape[1] :]
    for row, prompt in enumerate(prompts):
        alone = judge.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert torch.equal(listed[row], alone)


def test_a_pad_id_outside_the_vocabulary_is_no_history(optimized: Make, padded: Any, prompts: Any) -> None:
    ids, mask = padded(prompts, "left", -1)
    options = {"max_new_tokens": 20, "repetition_penalty": 1.5, **PLAIN}
    got = optimized().generate(ids, attention_mask=mask, **options)
    assert torch.equal(got[:, ids.shape[1] :], optimized().generate(prompts, **options)[:, ids.shape[1] :])


def test_num_return_sequences(optimized: Make, prompts: Any) -> None:
    """Prompt-major, each with noise of its own; the first is the one that a single sequence would be."""
    fast = optimized()
    options = {"do_sample": True, "temperature": 1.2, "max_new_tokens": 15, "seed": 5, "pad_token_id": 0}
    many = fast.generate(prompts[:2], num_return_sequences=3, **options)
    assert many.shape == (6, 19 + 15)
    assert torch.equal(many[[0, 3]], fast.generate(prompts[:2], **options))
    assert len({tuple(row) for row in many[:3].tolist()}) == 3


def test_prompts_longer_than_a_chunk_and_more_than_rows(optimized: Make, judge: Any) -> None:
    """150 prompt tokens in chunks of 64; five rows, two at a time; the noise of a request does not depend on its row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 64, (5, 150), generator=generator)
    expected = judge.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, **PLAIN)
    narrow = optimized("ngram", max_batch_size=2)
    assert torch.equal(optimized().generate(ids, max_new_tokens=30, **PLAIN), expected)
    assert torch.equal(narrow.generate(ids, max_new_tokens=30, **PLAIN), expected)
    assert {shape.batch_size for shape in narrow._sessions} == {2}
    options = {"do_sample": True, "seed": 9, "max_new_tokens": 20, "pad_token_id": 0}
    assert torch.equal(narrow.generate(ids, **options), optimized().generate(ids, **options))
    assert narrow.metrics.prompt_tokens == 5 * 150
    assert narrow.metrics.new_tokens == 5 * 20


def test_a_batch_ends_in_the_programs_of_its_buckets(optimized: Make) -> None:
    """Rows of other lengths end at other times; once built, the narrower programs serve the next call as well."""
    wide = optimized("small dynamic")
    fast = OptimizedModel(**vars_of(wide) | {"limits": replace(wide.limits, batch_buckets=(1, 2, 64))})
    generator = torch.Generator().manual_seed(4)
    for options in (PLAIN, {"do_sample": True, "seed": 9, "pad_token_id": 0, "eos_token_id": [7, 11]}):
        ids = torch.randint(1, 64, (4, 20), generator=generator)
        assert torch.equal(fast.generate(ids, max_new_tokens=40, **options), wide.generate(ids, max_new_tokens=40, **options))
        assert set(fast.session._narrow) == {1, 2}
    assert any(narrow.rows for narrow in fast.session._narrow.values()), "nobody went on in a narrower program"


def test_buckets_grow_and_are_kept(optimized: Make, prompts: Any) -> None:
    fast = OptimizedModel(**vars_of(optimized("plain")))
    fast.generate(prompts[:1], max_new_tokens=5, **PLAIN)
    small = fast.session
    assert (small.program.shape.batch_size, small.program.shape.max_length) == (1, 128)
    fast.generate(prompts[:3], max_new_tokens=150, **PLAIN)
    assert (fast.program.shape.batch_size, fast.program.shape.max_length) == (4, 256)
    fast.generate(prompts[:1], max_new_tokens=9, **PLAIN)
    assert fast.session is small
    fast.generate(prompts[:1], max_new_tokens=9, do_sample=True)
    assert fast.program.shape.sampling
    assert len(fast._sessions) == 3


def test_a_wider_program_is_used_again(optimized: Make, prompts: Any) -> None:
    """Of twice the rows at most; a program that is wide by accident must not run every single prompt."""
    fast = OptimizedModel(**vars_of(optimized("ngram")))
    both = fast.generate(prompts[:2], max_new_tokens=9, **PLAIN)
    wide = fast.session
    alone = fast.generate(prompts[:1], max_new_tokens=9, **PLAIN)
    assert fast.session is wide
    assert alone[0, len(prompts[0]) :].tolist() == both[0, -9:].tolist()
    fast.generate(prompts + prompts[:2], max_new_tokens=9, **PLAIN)
    fast.generate(prompts[:1], max_new_tokens=9, **PLAIN)
    assert fast.session is wide, "the narrowest that is wide enough"
    assert {shape.batch_size for shape in fast._sessions} == {2, 8}
    fast.generate(prompts[:3], max_new_tokens=9, **PLAIN)
    assert {shape.batch_size for shape in fast._sessions} == {2, 8}
    del fast._sessions[wide.program.shape]
    fast.generate(prompts[:1], max_new_tokens=9, **PLAIN)
    assert {shape.batch_size for shape in fast._sessions} == {1, 8}


def test_a_queue_in_request_order(optimized: Make, judge: Any) -> None:
    """Eleven prompts through four rows, a reader beside them: outputs stand where their prompts stood."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 64, (length,), generator=generator).tolist() for length in (7, 90, 3, 20, 5, 70, 9, 1, 30, 4, 11)]
    fast = optimized("twin", max_batch_size=4)
    options = {"do_sample": True, "seed": 9, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 3}
    got = fast.generate(prompts, num_return_sequences=2, **options)
    assert torch.equal(got, optimized().generate(prompts, num_return_sequences=2, **options))
    assert {shape.batch_size for shape in fast._sessions} == {4}
    assert fast.metrics.acceptance_per_depth[0] > 0.8, "drafts of the target itself"


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_sizes(optimized: Make, prompts: Any, page_size: int) -> None:
    fast = optimized("ngram", page_size=page_size, max_length=100)
    assert fast.generate(prompts, max_new_tokens=40, **PLAIN).tolist() == optimized().generate(
        prompts, max_new_tokens=40, **PLAIN
    ).tolist()  # fmt: skip
    assert (fast.program.shape.page_size, fast.program.shape.max_length) == (page_size, 100)


def test_to_the_last_position(optimized: Make, judge: Any) -> None:
    """256 positions: prompt and output fill them all."""
    ids = torch.randint(1, 64, (1, 230), generator=torch.Generator().manual_seed(8))
    expected = judge.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=26, **PLAIN)
    for drafter in ("ngram", "twin"):
        assert torch.equal(optimized(drafter).generate(ids, max_new_tokens=26, **PLAIN), expected)


def test_stop_strings(optimized: Make, judge: Any, padded: Any, prompts: Any) -> None:
    """Rows end with the token that completes a stop string, as in transformers, inside accepted runs too."""
    tokenizer = char_tokenizer()
    ids, mask = padded(prompts, "left")
    outputs = [oracle("target", prompt, 30) for prompt in prompts]
    texts = [tokenizer.decode(output) for output in outputs]
    # Without an eos id transformers lets stopped rows go on while others run; with one it pads them, as we always do.
    unused = next(token for token in range(64) if all(token not in output for output in outputs))
    plain = {**PLAIN, "eos_token_id": unused}
    cases = [texts[0][5:8], [texts[0][9:11], texts[2][3:5]], texts[1][0], [texts[1][2:9], "~"], "~~~~"]
    for stop in cases:
        options = {"stop_strings": stop, "tokenizer": tokenizer, "max_new_tokens": 30, **plain}
        try:
            expected = judge.generate(ids, attention_mask=mask, **options)
        except ValueError:  # transformers refuses a stop string that no token can spell
            expected = judge.generate(ids, attention_mask=mask, max_new_tokens=30, **plain)
        for drafter in ("plain", "ngram", "twin"):
            assert torch.equal(optimized(drafter).generate(ids, attention_mask=mask, **options), expected), (
                stop,
                drafter,
            )


def test_a_stop_string_may_begin_in_the_prompt(optimized: Make, judge: Any, prompts: Any) -> None:
    tokenizer = char_tokenizer()
    ids = torch.tensor(prompts[:1])
    whole = tokenizer.decode([*prompts[0], *oracle("target", prompts[0], 3)])
    prompt = tokenizer.decode(prompts[0])
    stop = whole[len(prompt) - 1 : len(prompt) + 2]
    options = {"stop_strings": stop, "tokenizer": tokenizer, "max_new_tokens": 20, **PLAIN}
    assert torch.equal(optimized().generate(ids, **options), judge.generate(ids, **options))


class _Recorder:
    """What a streamer receives."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_sees_prompt_then_every_token_then_the_end(optimized: Make, prompts: Any) -> None:
    streamer = _Recorder()
    out = optimized("twin").generate(prompts[:1], streamer=streamer, max_new_tokens=13, **PLAIN)
    assert streamer.puts[0] == prompts[0]
    assert [token for put in streamer.puts[1:] for token in put] == out[0, len(prompts[0]) :].tolist()
    assert all(len(put) == 1 for put in streamer.puts[1:])
    assert streamer.ended == 1


def test_text_streamers(optimized: Make, judge: Any, prompts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, ids = char_tokenizer(), torch.tensor(prompts[:1])
    out = optimized().generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), max_new_tokens=20, **PLAIN)
    expected = tokenizer.decode(out[0, ids.shape[1] :])
    assert capsys.readouterr().out.strip() == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    options = {"streamer": streamer, "max_new_tokens": 20, **PLAIN}
    thread = Thread(target=optimized().generate, args=(ids,), kwargs=options)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_a_streamer_ends_when_the_run_fails(optimized: Make, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads an iterator streamer would wait for ever."""
    fast, streamer = optimized("plain"), _Recorder()
    monkeypatch.setattr(type(fast.session), "run", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fast.generate(prompts[:1], streamer=streamer, max_new_tokens=3, **PLAIN)
    assert streamer.ended == 1
