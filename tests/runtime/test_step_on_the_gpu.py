"""A step never waits for the host, and replayed as a CUDA graph it emits what the uncompiled graphs do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from harness.models import tiny
from torch.profiler import ProfilerActivity, profile

import autospec
from autospec.api import OptimizedModel
from autospec.errors import LoweringError
from autospec.heads.eagle3 import Eagle3Head, Eagle3Spec
from autospec.heads.medusa import MedusaHeads

CHOICES = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]
TREES: dict[str, dict[str, Any]] = {
    "chain": {"max_draft_len": 3},
    "static": {"eagle_choices": CHOICES},
    "dynamic": {"max_draft_len": 4, "dynamic_tree_max_topk": 4, "max_total_draft_tokens": 20},
}


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def nothing_new() -> Iterator[None]:
    """No graph is compiled or captured, no kernel compiled."""
    from triton.runtime.jit import JITFunction

    refused = AssertionError("warm-up is over")
    with (
        mock.patch("torch._inductor.standalone_compile", side_effect=refused),
        mock.patch.object(JITFunction, "_do_compile", side_effect=refused),
        mock.patch.object(torch.cuda.CUDAGraph, "capture_begin", side_effect=refused),
    ):
        yield


def _drafter(kind: str, target: Any, cuda: torch.device, tree: dict[str, Any]) -> Any:
    if kind == "model":
        return autospec.DraftTargetConfig(tiny("llama", 1, num_hidden_layers=1).to(cuda), **tree)
    if kind == "medusa":
        return autospec.MedusaConfig(MedusaHeads(32, 64, 4).to(cuda).eval(), **tree)
    spec = Eagle3Spec(layer=target.config, draft_vocab_size=64, tap_after=(0, 0, 1), target_hidden_size=32)
    head = Eagle3Head(spec, target.get_input_embeddings().weight).to(cuda)
    return autospec.Eagle3Config(head.eval(), **tree)


@pytest.mark.cuda
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    ("kind", "tree", "compile"),
    [
        ("eagle", "dynamic", "inductor"), ("model", "static", "inductor"),
        ("model", "dynamic", "eager"), ("eagle", "chain", "eager"), ("medusa", "static", "eager"),
    ],
)  # fmt: skip
def test_a_step_does_not_wait(cuda: torch.device, kind: str, tree: str, compile: str, do_sample: bool) -> None:
    target = tiny("llama").to(cuda)
    prompts = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0)).to(cuda)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": do_sample, "seed": 5, "pad_token_id": 0}
    expected = autospec.optimize(target, None, compile="eager").generate(prompts, **options)
    fast: OptimizedModel = autospec.optimize(target, _drafter(kind, target, cuda, TREES[tree]), compile=compile)
    assert torch.equal(fast.generate(prompts, **options), expected)
    step = next(iter(fast.session.steps.values()))
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(3):
            step()
        fast.session.prefill()
    torch.cuda.synchronize()
    if compile == "inductor":
        others = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(1)).to(cuda)
        with nothing_new(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as told:
            fast.generate(others, **options)
        replays = sum(event.count for event in told.key_averages() if event.key == "cudaGraphLaunch")
        assert replays > sum(fast.metrics.steps.values()) > 0, "every step, and a chunk of the prompt, is a replay"


def test_what_is_new_is_noticed() -> None:
    with nothing_new(), pytest.raises(LoweringError, match="warm-up is over"):
        autospec.optimize(tiny("llama"), None).generate([[5, 9]], max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.cuda
@pytest.mark.parametrize("do_sample", [False, True])
def test_a_queue_read_one_launch_late(cuda: torch.device, do_sample: bool) -> None:
    """Nine prompts through two rows, results read behind the next launch, the last row alone: plain decoding's tokens."""
    target = tiny("llama").to(cuda)
    prompts = torch.randint(1, 64, (9, 9), generator=torch.Generator().manual_seed(0)).to(cuda)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": do_sample, "seed": 5, "eos_token_id": 3, "pad_token_id": 0}
    expected = autospec.optimize(target, None, compile="eager").generate(prompts, **options)
    fast: OptimizedModel = autospec.optimize(
        target, _drafter("model", target, cuda, TREES["dynamic"]), compile="eager", max_batch_size=2, batch_buckets=(1,)
    )
    assert fast.generate(prompts, **options).tolist() == expected.tolist()
    assert fast.session.lag == 1
    narrow = fast.session._narrow[1]
    with no_waiting():
        narrow.take([1])
        narrow.give_back()
