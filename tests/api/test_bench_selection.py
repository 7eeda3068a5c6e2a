"""What a bench says of float8 index keys: shares that were counted, and tokens that were decoded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import captured, model, oracle
from harness.programs import prompts_of
from torch import Tensor

from autospec import bench
from autospec.api import Limits, OptimizedModel
from autospec.benching import selection
from autospec.cli import main
from autospec.config import Speculation
from autospec.errors import OptionError
from autospec.kernels.append_index_keys import dequantize_keys, quantize_keys

pytestmark = pytest.mark.xdist_group("sparse")  # so that each model is captured once

TEXTS = prompts_of(4, (40, 5, 25))
TOPK = 6  # keys that the model selects
PROMPTS, NEW_TOKENS = prompts_of(2, (9, 14)), 12


def optimized(form: str | None, speculation: Speculation = None) -> OptimizedModel:
    limits = Limits(1, 64, None, index_quantization=form)
    return OptimizedModel(captured("sparse"), None, speculation, "eager", limits, {"pad_token_id": 0})


class Rounded:
    """Stands in for transformers' cache: gives an indexer its keys back as float8 holds them."""

    def update_indexer(self, keys: Tensor, _layer: int) -> Tensor:
        return dequantize_keys(*quantize_keys(keys))


def shares_by_transformers(text: list[int]) -> list[list[float]]:
    """By indexer, of the tokens that choose: its own selections on this text, and those by rounded keys."""
    sparse: Any = model("sparse")
    indexers, calls = [layer.self_attn.indexer for layer in sparse.model.layers], []
    hooks = [
        one.register_forward_hook(lambda one, args, kwargs, out: calls.append((one, args, kwargs, out)), with_kwargs=True)
        for one in indexers
    ]
    with torch.no_grad():
        sparse(torch.tensor([text]), use_cache=False)
    for hook in hooks:
        hook.remove()
    found = []
    for indexer, args, kwargs, plain in calls:
        given = dict(zip(("hidden_states", "q_resid", "position_embeddings", "attention_mask", "position_ids"), args, strict=False))
        coarse = indexer(**{**given, **kwargs, "past_key_values": Rounded()})
        pairs = zip(plain[0, TOPK:].tolist(), coarse[0, TOPK:].tolist(), strict=True)
        found.append([len({*mine} & {*theirs}) / TOPK for mine, theirs in pairs])
    assert len(found) == 2
    return found


def test_shares_are_those_of_transformers_own_indexers() -> None:
    expected = [[], []]
    for text in TEXTS:
        for shares, more in zip(expected, shares_by_transformers(text), strict=True):
            shares += more
    every = [share for shares in expected for share in shares]
    found = selection.agreement(captured("sparse"), TEXTS)
    assert found.rows == len(every) == 2 * (34 + 19)
    assert found.mean == pytest.approx(sum(every) / len(every))
    assert found.worst == pytest.approx(min(every))
    assert found.by_indexer == [pytest.approx(sum(shares) / len(shares)) for shares in expected]
    assert 0.8 < sum(every) / len(every) < 1


def _coarser(k: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with scales of 1, 2 and 4 times what they need: normed keys all have about the same."""
    scales = quantize_keys(k)[1] * torch.tensor([1.0, 2.0, 4.0]).repeat(k.shape[1])[: k.shape[1]]
    return (k / scales[..., None]).to(torch.float8_e4m3fn), scales


FORMS = {
    "as it is": (lambda k: (k, torch.ones_like(k[..., 0])), (1, 1)),
    "rounded": (_coarser, (0.8, 0.999)),
    "scales of another row": (lambda k: (_coarser(k)[0], _coarser(k)[1].roll(1, 1)), (0, 0.8)),
    "keys of another row": (lambda k: (_coarser(k)[0].roll(1, 1), _coarser(k)[1].roll(1, 1)), (0, 0.8)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_quantisation_does_is_what_is_seen(form: str) -> None:
    """Keys as they are agree completely; a defect agrees less than rounding does."""
    quantize, (least, most) = FORMS[form]
    mean = selection.agreement(captured("sparse"), TEXTS, quantize).mean  # type: ignore[arg-type]
    assert mean is not None
    assert least <= mean <= most


def test_texts_too_short_to_choose_from() -> None:
    found = selection.agreement(captured("sparse"), [[5] * TOPK, [7, 8]])
    assert found == selection.Agreement(0, None, None, [])
    assert "no text is long enough" in selection.Selection(found, 1, 3, None).text()
    assert "all 3 tokens are those of keys as they are" in selection.Selection(found, 1, 3, None).text()


@pytest.mark.parametrize("grid", [False, True])
def test_the_bench_reports_both(
    grid: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other tokens than transformers' are no failure here: they are counted."""

    def optimize(module: Any, speculation: Any, *, compile: str, index_quantization: str | None) -> OptimizedModel:
        assert (compile, index_quantization) == ("eager", "fp8")
        return optimized(index_quantization, speculation)

    monkeypatch.setattr(bench, "optimize", optimize)
    monkeypatch.setattr(bench, "_load", lambda asked: model("sparse"))
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    words = ["--prompts", str(tmp_path / "prompts.jsonl"), "--new-tokens", str(NEW_TOKENS), "--repeats", "1", "--device", "cpu",
             "--compile", "eager", "--speculation", "none", "--json", str(tmp_path / "out.json"),
             "--index-quantization", "fp8", *(["--batch-sizes", "2"] if grid else [])]  # fmt: skip
    assert main(["bench", "sparse", *words]) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    exact = [oracle("sparse", prompt, NEW_TOKENS) for prompt in PROMPTS]
    expected = selection.agreement(captured("sparse"), [p + e for p, e in zip(PROMPTS, exact, strict=True)])
    found = written["selection"]
    assert found["agreement"] == {"rows": expected.rows, "mean": expected.mean, "worst": expected.worst,
                                  "by_indexer": expected.by_indexer}  # fmt: skip
    assert f"{found['differences']['agreeing']} of {2 * NEW_TOKENS} tokens come before" in printed
    assert re.search(rf"float8 index keys: {100 * (expected.mean or 0):.2f}% of the selected keys stay", printed)
    assert "index keys in float8" in printed.splitlines()[0]
    assert found["tokens"] == 2 * NEW_TOKENS
    if grid:
        return
    coarse = [optimized("fp8").generate([prompt], max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
              for prompt in PROMPTS]  # fmt: skip
    assert coarse != exact, "the case has no difference to count"
    pairs = zip(coarse, exact, strict=True)
    agreeing = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), NEW_TOKENS) for pair in pairs]
    assert found["differences"]["agreeing"] == sum(agreeing)


@pytest.mark.parametrize("words", [["generate", "m", "--prompt", "x"], ["explain", "m"], ["export", "m", "-o", "exported"]])
def test_every_verb_passes_it_on(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def asked_for(*args: Any, **options: Any) -> None:
        seen.append(options["index_quantization"])
        raise OptionError("seen")

    for name in ("optimize", "export"):
        monkeypatch.setattr(f"autospec.api.{name}", asked_for)
    monkeypatch.setattr("autospec.cli._tokenizer", lambda asked: None)
    for more, form in (([], None), (["--index-quantization", "fp8"], "fp8")):
        assert main([*words, *more]) == 2
        assert seen.pop() == form
