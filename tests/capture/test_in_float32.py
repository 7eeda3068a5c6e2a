"""A model in bfloat16 whose experts are nearly tied is captured; one whose experts are captured wrong is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autospec import capture_experts
from autospec.assemble import capture_model
from autospec.capture import eager_logits
from autospec.capture_checks import check_logits, compare_logits, example_inputs
from autospec.errors import CaptureError
from autospec.in_float32 import InFloat32
from autospec.kernels.experts import experts
from autospec.kernels.grouped_mm import grouped_mm
from autospec.legality import run_captured
from autospec.tiny_models import tiny_model


def half_model(model_type: str, seed: int = 0):
    return tiny_model(model_type, seed=seed, num_hidden_layers=2).to(torch.bfloat16)


def differs(model, captured) -> bool:
    """Whether model and graph differ in their own precision on what the checks run."""
    for shape in ((3, 7), (1, 13)):
        inputs = example_inputs(model, shape, seed=shape[1])
        try:
            compare_logits("", run_captured(captured.graph, captured.weights, *inputs), eager_logits(model, *inputs), "", "")
        except CaptureError:
            return True
    return False


def test_experts_that_change_places_are_no_defect():
    models = [half_model("granitemoe", seed) for seed in range(3)]
    assert any(differs(model, capture_model(model)) for model in models)  # or this test says nothing


SWAPPED = {
    "weights of another expert": lambda x, index, weights: (x, index, weights.flip(-1)),
    "the next expert": lambda x, index, weights: (x, (index + 1) % 8, weights),
}


@pytest.mark.parametrize(("bug", "model_type"), [*((bug, "qwen3_moe") for bug in SWAPPED), ("the next expert", "gpt_oss")])
def test_wrong_experts_are_refused_in_half_precision(monkeypatch, bug, model_type):
    right = capture_experts.experts_forward
    monkeypatch.setattr(capture_experts, "experts_forward", lambda module, *args: right(module, *SWAPPED[bug](*args)))
    with pytest.raises(CaptureError, match=r"differs from the model .* in float32 too"):
        capture_model(half_model(model_type))


@pytest.mark.parametrize(("chooses", "dtypes", "is_defect", "outcome"), [
    (True, (torch.bfloat16, torch.bfloat16), False, None),
    (True, (torch.bfloat16, torch.bfloat16), True, "in float32 too"),
    (False, (torch.bfloat16, torch.bfloat16), False, "allowed 5e-02"),
    (False, (torch.bfloat16, torch.float32), False, None),
    (False, (torch.bfloat16, torch.float32), True, "in float32 too"),
    (True, (torch.float32, torch.float32), True, "they differ: relative error 1.0e-01"),
])  # fmt: skip
def test_only_choices_and_rounded_numbers_are_looked_at_again(chooses, dtypes, is_defect, outcome):
    """Two ways to add numbers that bfloat16 tells apart: 256 + 1 is 256 there. The sums are in `dtypes`, and widened."""
    computed, returned = dtypes
    x = torch.tensor([256.0, 1.0, -256.0], dtype=computed)

    def run(_: Tensor | None) -> tuple[Tensor, Tensor]:
        if chooses:
            x.topk(2)
        return (x[0] + x[1] + x[2] + (0.1 if is_defect else 0.0)).to(returned), (x[0] + x[2] + x[1]).to(returned)

    if outcome is None:
        return check_logits("here", run, "they differ", "")
    with pytest.raises(CaptureError, match=outcome):
        check_logits("here", run, "they differ", "")


def test_every_result_is_that_of_the_float32_model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        half = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16).requires_grad_(False)
        x, index, weights = torch.randn(5, 8), torch.rand(5, 4).topk(2).indices, torch.rand(5, 2)
        gate_up, down = torch.randn(4, 12, 8).bfloat16(), torch.randn(4, 8, 6).bfloat16()
    ids, written = torch.arange(9), torch.zeros(2).bfloat16()
    with InFloat32() as mode:
        got = half(ids).to(torch.bfloat16) * torch.ones(8, dtype=torch.float16)
        mixed = experts(x.to(torch.bfloat16), index, weights, gate_up, down)
        grouped = grouped_mm(x, gate_up.transpose(1, 2), torch.tensor([1, 1, 4, 5]))
        written.add_(torch.ones(2).bfloat16())
    assert got.dtype == mixed.dtype == grouped.dtype == torch.float32
    assert not mode.chooses
    assert written.tolist() == [1.0, 1.0]  # a write reaches the tensor itself
    torch.testing.assert_close(got, half.float()(ids))
    torch.testing.assert_close(mixed, experts(x, index, weights, gate_up.float(), down.float()))
    torch.testing.assert_close(grouped, grouped_mm(x, gate_up.float().transpose(1, 2), torch.tensor([1, 1, 4, 5])))
