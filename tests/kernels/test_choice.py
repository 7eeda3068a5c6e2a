"""Choosing by measurement: once per shape, remembered, and never at the price of a wrong or a failing kernel."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autospec.kernels import choice
from autospec.kernels.paged_attention import paged_attention
from autospec.kernels.paged_mla import paged_mla
from autospec.kernels.registry import Implementation, KernelOp
from autospec.kernels.visible_slots import unpack_tree_mask, visible_slots

SPEEDS = {"quick": 3.5, "slow": 9.25, "wrong": 1.0, "broken": 1.0, "full": 1.0}


def quick(x: Tensor) -> Tensor:
    return x * 2


def slow(x: Tensor) -> Tensor:
    return x * 2


def wrong(x: Tensor) -> Tensor:
    return x * 3


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no nvcc\nin PATH")


def full(x: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("out of memory")


NAMES = {function: function.__name__ for function in (quick, slow, wrong, broken, full)}


def twin(function: Any) -> Implementation:
    return Implementation(function.__name__, lambda args: None, function, function)


QUICK, SLOW = twin(quick), twin(slow)


class Bench:
    """An op with inputs to measure with, on a machine whose clock says what SPEEDS says."""

    def __init__(self) -> None:
        self.kernel = KernelOp("double", quick, (), None, None, sample=self.sample)  # type: ignore[arg-type]
        self.timed: list[str] = []
        self.running = ""

    def sample(self, args: Any, generator: torch.Generator) -> dict[str, Any]:
        assert generator.initial_seed() == 0
        return {"x": torch.randn(args["x"].shape, generator=generator)}

    def times(self, *candidates: Implementation, shape: tuple[int, ...] = (4, 5)) -> choice.Times:
        self.order = iter(candidates)
        return choice.times_of(self.kernel, candidates, {"x": torch.empty(shape)})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Bench:
    one = Bench()

    def clock(run: Any) -> float:
        (measured,) = run.__defaults__
        run()
        one.timed.append(NAMES[measured])
        return SPEEDS[NAMES[measured]]

    monkeypatch.setattr(choice, "time_graph", clock)
    monkeypatch.setattr(choice, "environment", lambda device: "H100, torch 2.11")
    monkeypatch.setattr(choice, "free_memory", lambda device: 10_000)
    monkeypatch.setattr(choice, "_seen", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return one


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(choice, "_seen", {})


def test_the_fastest_is_taken_whatever_the_order(bench: Bench) -> None:
    times = bench.times(SLOW, QUICK)
    assert times.best([SLOW, QUICK]) is QUICK
    assert str(times) == "slow 9.2 us, quick 3.5 us"
    assert times.best([SLOW]) is SLOW


def test_measured_once_per_shape(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.times(SLOW, QUICK)
    assert bench.times(SLOW, QUICK) == first
    forget(monkeypatch)
    assert bench.times(SLOW, QUICK) == first
    assert bench.timed == ["slow", "quick"]
    bench.times(SLOW, QUICK, shape=(4, 6))
    assert bench.timed == ["slow", "quick"] * 2
    stored = json.loads(choice.times_file().read_text())
    assert stored == {"H100, torch 2.11": {
        f"double(x=float32[4, {n}])": {"slow": 9.25, "quick": 3.5} for n in (5, 6)}}
    assert [path.name for path in choice.times_file().parent.iterdir()] == ["kernel_times.json"], "no half-written file"


def test_another_gpu_or_version_is_measured_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.times(SLOW, QUICK)
    monkeypatch.setattr(choice, "environment", lambda device: "H200, torch 2.11")
    bench.times(SLOW, QUICK)
    assert len(bench.timed) == 4
    assert set(json.loads(choice.times_file().read_text())) == {"H100, torch 2.11", "H200, torch 2.11"}


def test_a_new_candidate_is_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.times(SLOW)
    for _ in range(2):
        forget(monkeypatch)
        assert bench.times(SLOW, QUICK).best([SLOW, QUICK]) is QUICK
    assert bench.timed == ["slow", "slow", "quick"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 3}', '{"a": {"b": {"c": "fast"}}}', '{"a": {"b": {"c": NaN}}}', "\x00"])
def test_a_corrupt_file_is_ignored_and_said_so(bench: Bench, content: str) -> None:
    choice.times_file().parent.mkdir(parents=True)
    choice.times_file().write_text(content)
    with pytest.warns(UserWarning, match=r"kernel_times\.json cannot be read"):
        assert bench.times(SLOW, QUICK).best([SLOW, QUICK]) is QUICK
    assert choice.read_file()["H100, torch 2.11"], "the next process reads it"


def test_a_folder_that_cannot_be_written_is_said_so(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be"):
        assert bench.times(SLOW, QUICK).best([SLOW, QUICK]) is QUICK


def test_wrong_and_failing_ones_are_out_with_the_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [SLOW, twin(wrong), twin(broken)]
    times = bench.times(*candidates)
    assert times.best(candidates) is SLOW
    assert times.failures == {"wrong": "its result is off by 0.5 of the largest value",
                              "broken": "it fails: RuntimeError: no nvcc in PATH"}
    bench.times(*candidates)
    assert bench.timed == ["slow"], "a failure is remembered by the process"
    forget(monkeypatch)
    bench.times(*candidates)
    assert bench.timed == ["slow", "slow"], "and tried again by the next one"
    only = [twin(broken), QUICK]
    assert bench.times(*only, shape=(3,)).best(only) is QUICK


def test_one_that_turned_out_wrong_loses_its_old_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.times(SLOW, QUICK)
    forget(monkeypatch)
    third = twin(broken)
    with monkeypatch.context() as strict:
        strict.setattr(choice, "allowed_deviation", lambda result: -1.0)
        assert bench.times(SLOW, QUICK, third).best([SLOW, QUICK, third]) is None, "all failed: the reference runs"
    assert choice.read_file() == {"H100, torch 2.11": {"double(x=float32[4, 5])": {}}}


def test_short_memory_leaves_the_first(bench: Bench) -> None:
    candidates = [SLOW, QUICK]
    times = bench.times(*candidates, shape=(100, 100))
    assert str(times) == "not measured: it would take 0.0 GB, 0.0 GB are free"
    assert times.best(candidates) is SLOW
    candidates = [SLOW, twin(full)]
    times = bench.times(*candidates)
    assert str(times) == "not measured: the GPU's memory is full"
    assert times.best(candidates) is SLOW
    assert not choice.times_file().exists()


def test_what_a_compiled_graph_runs_is_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.DIRECT, slow, quick)
    assert bench.times(SLOW).microseconds == {"slow": SPEEDS["quick"]}
    assert bench.timed == ["quick"]


def test_random_numbers_of_the_user_stay_as_they_are(bench: Bench) -> None:
    before = torch.get_rng_state()
    bench.times(SLOW, QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_measured_on_a_cpu() -> None:
    assert not choice.can_measure({"x": torch.zeros(1)})
    assert not choice.can_measure({"n": 3})


def test_a_key_tells_arguments_apart() -> None:
    op = KernelOp("op", quick, (), None, None)  # type: ignore[arg-type]
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert choice.spec_text(op, {"x": x, "mask": None, "window": 0, "pages": [x, x]}) == (
        "op(x=bfloat16[2, 3], window=0, pages=[bfloat16[2, 3], bfloat16[2, 3]])"
    )
    assert choice.shapes_text({"x": x, "mask": None, "scale": 0.3, "window": 0, "chunk": 7}) == "x [2, 3], chunk 7"


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 4), q_len=st.integers(1, 40), before=st.integers(0, 9), is_tree=st.booleans(), words=st.integers(0, 1),
       pages=st.integers(3, 12), has_lens=st.booleans(), is_latent=st.booleans())
def test_inputs_of_attention_are_realistic(batch, q_len, before, is_tree, words, pages, has_lens, is_latent):
    """Inside their pages, about the middle, every page once, and a tree in which parents come first."""
    count, capacity = q_len + before, pages * 16
    mask = torch.zeros(batch, count, (count + 31) // 32 + words, dtype=torch.int32) if is_tree else None
    places = (torch.zeros(batch, pages, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32),
              torch.zeros(batch, dtype=torch.int32) if has_lens else None, mask)  # fmt: skip
    q, rows = torch.zeros(batch, q_len, 4, 8), torch.zeros(1 + batch * pages, 16, 2, 8)
    op, args = paged_attention, paged_attention.bind((q, rows, rows[..., :6], *places, torch.zeros(4), 0.3), {})
    if is_latent:
        latent_pages = rows[:, :, 0, :1].expand(-1, -1, 11)
        op, args = paged_mla, paged_mla.bind((q, q[..., :3], latent_pages, *places, 0.3, torch.zeros(4)), {})
    made = op.sample(args, torch.Generator().manual_seed(0))
    for name, value in args.items():
        assert type(made[name]) is type(value)
        if isinstance(value, Tensor):
            assert (made[name].shape, made[name].dtype) == (value.shape, value.dtype), name
    assert made["page_table"].sort().values.unique().numel() == batch * pages
    assert made["page_table"].min() >= 1
    lens = made["kv_lens"]
    assert ((lens >= 0) & ((lens + q_len - capacity // 2).abs() <= capacity // 16 + 1) | (lens == 0)).all()
    if is_tree:
        seen = unpack_tree_mask(made["tree_mask"])
        assert seen.diagonal(dim1=1, dim2=2).all()
        assert not seen.triu(1).any()
        assert seen[:, :, 0].all(), "one tree, not several"
        assert visible_slots(lens, q_len, capacity, 0, 0, made["tree_mask"]).any(-1).all()
    assert op(**made).isfinite().all()


@pytest.mark.cuda
def test_a_choice_on_the_gpu(cuda: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Whatever can run is timed, and agrees."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    args = paged_attention.bind((
        torch.empty(2, 8, 32, 128, dtype=torch.bfloat16, device=cuda),
        *(torch.empty(301, 16, 8, 128, dtype=torch.bfloat16, device=cuda) for _ in range(2)),
        torch.empty(2, 150, dtype=torch.int32, device=cuda), torch.empty(2, dtype=torch.int32, device=cuda), None,
        torch.empty(2, 8, 1, dtype=torch.int32, device=cuda)), {"scale": 0.1})
    assert choice.can_measure(args)
    able = [one for one in paged_attention.implementations if one.why_not(args) is None]
    assert able[0].backend == "triton"
    times = choice.times_of(paged_attention, able, args)
    assert set(times.microseconds) == {one.backend for one in able}, times.failures
    assert all(1.0 < time < 1000.0 for time in times.microseconds.values())
    assert choice.read_file()[choice.environment(cuda)]
