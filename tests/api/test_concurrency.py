"""Calls of generate that meet: threads wait for each other, a streamer that calls again is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from harness.models import model

import autospec
from autospec.errors import OptionError

OPTIONS = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


def test_threads_get_their_own_tokens() -> None:
    fast = autospec.optimize(model("target"), autospec.NGramConfig(2), compile="eager", max_length=96)
    prompts = [torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(length)) for length in (5, 9, 14, 22)]
    expected = [fast.generate(prompt, **OPTIONS) for prompt in prompts]
    got: dict[int, torch.Tensor] = {}

    def call(number: int) -> None:
        got[number] = fast.generate(prompts[number], **OPTIONS)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[number], expected[number]) for number in range(len(prompts)))


def test_a_streamer_cannot_generate() -> None:
    fast = autospec.optimize(model("target"), None, compile="eager", max_length=96)

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            if value.numel() == 1:
                fast.generate(torch.tensor([[1, 2]]), **OPTIONS)

        def end(self) -> None:
            pass

    with pytest.raises(OptionError, match="called again from inside a call"):
        fast.generate(torch.tensor([[3, 4, 5]]), streamer=Streamer(), **OPTIONS)
    assert fast.generate(torch.tensor([[3, 4, 5]]), **OPTIONS).shape == (1, 23)
