"""What cannot be loaded says why, in four lines, and nothing is loaded in part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autospec.errors import AutospecError, CheckpointError, OptionError
from autospec.heads.checkpoint import load_head, save_head


def refusal(source: Any, raw: Any, **target: Any) -> str:
    """The text of the refusal, which has the four lines."""
    with pytest.raises(CheckpointError) as caught:
        load_head(source, **{**raw.target, **target})
    error: AutospecError = caught.value
    assert error.at and error.where and error.help  # noqa: PT018
    assert str(error).splitlines()[0] == error.rule
    return str(error)


Edit = Callable[[Any], object]


def _drop(*names: str) -> Edit:
    return lambda raw: [raw.tensors.pop(name) for name in names]


def _set(name: str, value: Any) -> Edit:
    return lambda raw: raw.tensors.__setitem__(name, value)


def _say(name: str, value: Any) -> Edit:
    return lambda raw: raw.config.__setitem__(name, value)


def _d2t(index: int, change: int) -> Edit:
    return lambda raw: raw.tensors["d2t"].__setitem__(index, raw.tensors["d2t"][index] + change)


def _several(*edits: Edit) -> Edit:
    return lambda raw: [edit(raw) for edit in edits]


IDS = "eagle_config"
CASES: dict[str, tuple[Edit, str]] = {
    "missing": (_drop("midlayer.mlp.up_proj.weight", "norm.weight"), "lacks midlayer.mlp.up_proj.weight, norm.weight"),
    "extra": (_set("midlayer.mlp.experts.weight", torch.zeros(2)), "unknown midlayer.mlp.experts.weight"),
    "misshapen": (_set("norm.weight", torch.zeros(31)), r"norm.weight \[31\] instead of \[32\]"),
    "all-at-once": (_several(_drop("norm.weight"), _set("x", torch.zeros(1)), _set("fc.weight", torch.zeros(32, 64))),
                    r"lacks norm.weight; it has the unknown x; misshapen are fc.weight \[32, 64\] instead of \[32, 96\]"),
    "other-target": (_say("vocab_size", 97), "vocabulary of 97, this one has 96"),
    "other-width": (_say("target_hidden_size", 64), "hidden size of 64, this one has 32"),
    "draft-vocabulary": (_say("draft_vocab_size", 41), "draft vocabulary of 41, the tensors have 40"),
    "no-d2t": (_drop("d2t"), "needs d2t"),
    "d2t-range": (_d2t(39, 96), "out of range: draft token 39"),
    "d2t-negative": (_d2t(0, -96), "out of range: draft token 0"),
    "d2t-twice": (lambda raw: _d2t(5, int(raw.tensors["d2t"][4] - raw.tensors["d2t"][5]) - 1)(raw), "not injective"),
    "d2t-floats": (lambda raw: _set("d2t", raw.tensors["d2t"].float())(raw), "float32"),
    "d2t-short": (lambda raw: _set("d2t", raw.tensors["d2t"][:7])(raw), r"\[7\] instead of integers \[40\]"),
    "t2d-other": (lambda raw: _set("t2d", ~raw.tensors["t2d"])(raw), "name different target tokens"),
    "t2d-short": (lambda raw: _set("t2d", raw.tensors["t2d"][:50])(raw), r"shape \[50\] instead of \[96\]"),
    "t2d-alone": (_several(_drop("d2t"), _say("draft_vocab_size", 96), _set("lm_head.weight", torch.zeros(96, 32))),
                  "no d2t"),
    "no-embeddings": (_several(_say("hidden_size", 24), _say("target_hidden_size", 32)), "lacks embed_tokens.weight"),
    "taps-beyond": (_say(IDS, {"eagle_aux_hidden_state_layer_ids": [1, 3, 9]}), "ascending layers of a target with 9"),
    "taps-descending": (_say(IDS, {"eagle_aux_hidden_state_layer_ids": [3, 1, 5]}), "ascending"),
    "taps-words": (_say(IDS, {"eagle_aux_hidden_state_layer_ids": "all"}), "no list of layer numbers"),
    "taps-embedding": (_say("eagle_aux_hidden_state_layer_ids", [0, 3, 5]), "count layer inputs"),
    "taps-twice": (_several(_say(IDS, {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}),
                            _say("eagle_aux_hidden_state_layer_ids", [1, 3, 5])), "twice, and they differ"),
    "no-taps-inside": (_say(IDS, {"use_aux_hidden_state": False}), "use_aux_hidden_state"),
    "more-layers": (_say("num_hidden_layers", 2), "says 2 decoder layers, the file has 1"),
    "part-of-a-layer": (_several(_say("num_hidden_layers", 2), _set("layers.1.hidden_norm.weight", torch.zeros(32))),
                        "lacks layers.1.mlp.down_proj.weight"),
    "eagle-config": (_say("eagle_config", [1]), "eagle_config is no object"),
    "negative": (_say("num_key_value_heads", -1), "makes no head|makes no decoder layer"),
    "rope-words": (_say("rope_theta", "x"), "makes no head|makes no decoder layer"),
    "eagle-1": (_drop("midlayer.hidden_norm.weight"), "no fc or no hidden_norm"),
    "mla": (_set("midlayer.self_attn.kv_a_proj_with_mqa.weight", torch.zeros(2)), "MLA"),
    "parallel": (_set("mask_hidden", torch.zeros(2)), "P-EAGLE"),
    "other-speculator": (_say("speculators_model_type", "dflash"), "'dflash'"),
    "nested-config": (_say("speculators_model_type", "eagle3"), "no transformer_layer_config"),
    "layer-type": (_several(_say("speculators_model_type", "eagle3"),
                            _say("transformer_layer_config", {"model_type": "gemma"})), "'gemma'"),
    "quantized": (_say("quantization_config", {"bits": 4}), "quantized"),
    "dynamic-rope": (_say("rope_scaling", {"type": "dynamic", "factor": 2.0}), "rotary"),
    "window": (_say("layer_types", ["sliding_attention"]), "sliding window"),
    "silent": (lambda raw: raw.config.pop("num_attention_heads"), "does not say num_attention_heads"),
    "nonsense": (_say("hidden_size", "wide"), "makes no decoder layer|vocabulary|hidden"),
    "two-claims": (_several(_say("num_hidden_layers", 2), _set("layers.1.hidden_norm.weight", torch.zeros(32)),
                            _set("layers.1.input_layernorm.weight", torch.ones(32))), "claim the place"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_does_not_fit(name: str, raw: Callable[..., Any], tmp_path: Path) -> None:
    import re

    edit, message = CASES[name]
    written = raw("specforge")
    edit(written)
    assert re.search(message, refusal(written.write(tmp_path), written))


def test_another_target(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("safeailab")
    written.write(tmp_path)
    assert "this one has 128" in refusal(tmp_path, written, target_vocab_size=128)
    assert "fc.weight [32, 96] instead of [32, 192]" in refusal(
        tmp_path, written, target_hidden_size=64, embed_tokens=torch.zeros(96, 64)
    )
    short = refusal(tmp_path, written, target_layers=6)
    assert "names no taps" in short
    assert "eagle_aux_hidden_state_layer_ids" in short


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "empty"])
def test_damaged_files(weights: str, damage: str, raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("safeailab")
    file = written.write(tmp_path, weights) / weights
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "corrupt": b"\x93junk" * 99, "empty": b""}[damage])
    text = refusal(tmp_path, written)
    assert "cannot be read" in text
    assert weights in text


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this pickle ran code",))


def test_a_pickle_runs_no_code(raw: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = raw("safeailab")
    written.write(tmp_path, "pytorch_model.bin")
    torch.save({"fc.weight": _Harmful()}, tmp_path / "pytorch_model.bin")
    assert "cannot be read" in refusal(tmp_path, written)
    assert "ran code" not in capsys.readouterr().out
    torch.save({"state": {"fc.weight": torch.zeros(1)}}, tmp_path / "pytorch_model.bin")
    assert "something else than named tensors" in refusal(tmp_path, written)


def test_a_config_that_is_not_there_or_no_json(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("safeailab")
    written.write(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "no JSON" in refusal(tmp_path, written)
    (tmp_path / "config.json").write_text("[]")
    assert "not an object" in refusal(tmp_path, written)
    (tmp_path / "config.json").unlink()
    assert "no config.json" in refusal(tmp_path, written)


def test_a_folder_without_weights_and_no_folder(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("safeailab")
    (tmp_path / "config.json").write_text(json.dumps(written.config))
    assert "no weights" in refusal(tmp_path, written)
    for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere", "a/b/c", ""):
        assert "no such draft head" in refusal(source, written)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    assert "not there" in refusal(tmp_path, written)


def test_a_hub_id_that_cannot_be_fetched(raw: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(name: str, **options: Any) -> str:
        raise ConnectionError(f"no route to {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    text = refusal("somebody/some-head", raw("safeailab"))
    assert "cannot be fetched: ConnectionError: no route to somebody/some-head" in text


def test_a_hub_id_is_fetched(raw: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    written = raw("safeailab")
    written.write(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    head = load_head("somebody/some-head", **written.target)
    assert head.report is not None
    assert head.report.source == "somebody/some-head"


def test_modules(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("safeailab")
    head = load_head(written.write(tmp_path), **written.target)
    assert load_head(head, **written.target) is head
    assert "other sizes" in refusal(head, written, target_vocab_size=128)
    assert "other sizes" in refusal(head, written, target_layers=5)
    assert "no draft head" in refusal(torch.nn.Linear(2, 2), written)


def test_layouts_that_cannot_say_it(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("speculators", norm_before_residual=True)
    head: Any = load_head(written.write(tmp_path), **written.target)
    for layout in ("safeailab", "specforge"):
        with pytest.raises(OptionError, match="ignore norm_before_residual"):
            save_head(head, tmp_path / layout, layout)
        assert not (tmp_path / layout).exists()
    with pytest.raises(OptionError, match="did you mean 'speculators'"):
        save_head(head, tmp_path / "x", "speculator")
