"""bench --shape: random weights of a named shape, acceptance as asked for, bytes that add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness.models import captured
from harness.programs import DRAFTERS

from autospec.api import Limits, OptimizedModel, optimize
from autospec.benching import profile, roofline, shape, steps
from autospec.benching.random_model import peaked, random_head, random_model, random_mtp
from autospec.cli import main
from autospec.errors import OptionError
from autospec.model_zoo.shapes import SHAPES
from autospec.program import Program
from autospec.trees import chain, dynamic_tree

CPU = torch.device("cpu")
TINY = SHAPES["tiny-llama"]


def command(*words: str) -> list[str]:
    return ["bench", "--shape", "tiny-llama", "--device", "cpu", "--compile", "eager", *words]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape, "STEPS", {"cpu": 4})
    monkeypatch.setattr(roofline, "BUFFER", {"cpu": 1 << 20})
    out = tmp_path / "shape.json"
    words = ["--speculation", "none", "eagle3:2@2.5", "eagle3-tree:2,2,4", "--acceptance", "0.9,0.3", "--batch", "1,2",
             "--prompt", "9", "--new-tokens", "20", "--rounds", "1", "--json", str(out)]  # fmt: skip
    assert main(command(*words)) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    rows = found["rows"]
    assert [(one["speculation"], one["batch"]) for one in rows] == [
        (name, batch) for name in ("none", "eagle3:2", "eagle3-tree:2,2,4") for batch in (1, 2)
    ]
    assert [one["asked_length"] for one in rows] == pytest.approx([None] * 2 + [2.5] * 2 + [2.2] * 2)
    for one in rows:
        assert f"| {one['speculation']} | {one['batch']} | **{one['decode'][0]:.1f}**" in printed
        assert one["step"] > 0
        assert one["host"] is not None
        assert one["verify"] is None
        assert one["bytes_total"] == sum(one["bytes"].values())
        assert one["bound"] == pytest.approx(one["fraction"] * one["step"])
        parts = one["start_up"]
        assert parts["first_token"] == pytest.approx(sum(parts.values()) - parts["first_token"])
        assert parts["passes"] > 0
        assert parts["prefill"] > 0
        assert one["deepest"] == (2 if one["asked_length"] else 0)
        assert one["first_children"] <= one["deepest"]
        assert (one["length"] is None) == (one["asked_length"] is None)
        if one["length"] is not None:
            assert one["length"] == pytest.approx(1 + sum(one["per_depth"]))
            assert one["length"] > 1.5
            assert one["decode_at_asked"] / one["decode"][0] == pytest.approx(one["asked_length"] / one["length"])
    assert rows[0]["bytes"]["draft"] == 0 < rows[2]["bytes"]["draft"] == rows[4]["bytes"]["draft"]
    assert rows[1]["bytes"]["kv"] == 2 * rows[0]["bytes"]["kv"]


def test_latents_experts_and_mtp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 in small, drafting with an MTP module made for it, the last row in a program of its own; what it reads of
    the experts stands apart."""
    monkeypatch.setattr(shape, "STEPS", {"cpu": 4})
    monkeypatch.setattr(roofline, "BUFFER", {"cpu": 1 << 20})
    out, tiny = tmp_path / "shape.json", SHAPES["tiny-deepseek-v3"]
    words = ["--shape", "tiny-deepseek-v3", "--speculation", "none", "mtp:3@2.82", "--batch", "2", "--prompt", "9",
             "--new-tokens", "40", "--rounds", "1", "--buckets", "1", "--verify", "--json", str(out)]  # fmt: skip
    assert main(command(*words)) == 0
    plain, drafted = json.loads(out.read_text())["rows"]
    assert drafted["asked_length"] == pytest.approx(2.82)
    assert 2.0 < drafted["length"] == pytest.approx(1 + sum(drafted["per_depth"]))
    assert drafted["deepest"] == 3
    assert 0 < drafted["verify"] < drafted["step"]
    assert plain["verify"] is None
    assert drafted["host"] is None  # its last steps are narrower ones
    layers, expert = tiny.layers - 1, 3 * 16 * tiny.hidden * 4
    needed = [16 * (1 - (1 - 4 / 16) ** tokens) for tokens in (2, 8, 2 * 2.82)]
    assert plain["bytes"]["experts"] == pytest.approx(layers * expert * needed[0], abs=2)
    passes = needed[2] + 2 * needed[0]
    assert drafted["bytes"]["experts"] == pytest.approx(expert * (layers * needed[1] + passes), abs=8)
    assert drafted["bytes"]["target"] == plain["bytes"]["target"]
    assert plain["bytes"]["kv"] == 2 * 29 * (16 + 8) * tiny.layers * 4


def test_passes_that_do_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in a step nor in one that only verifies; the table's head says so."""
    monkeypatch.setattr(shape, "STEPS", {"cpu": 4})
    monkeypatch.setattr(roofline, "BUFFER", {"cpu": 1 << 20})
    found: list[list[str]] = []

    def told(asked: object, program: Program, batch: int) -> tuple[list[float], tuple[float, float]]:
        found.append([slot.name for graph in program.graphs.values() for slot in graph.slots if slot.kind == "weight"])
        return [1.0, 1.0], (0.0, 0.0)

    monkeypatch.setattr(shape, "_replay", told)
    words = ["--speculation", "eagle3:2", "--acceptance", "0.9,0.3", "--prompt", "9", "--new-tokens", "4", "--rounds", "1",
             "--verify"]  # fmt: skip
    assert main(command(*words)) == 0
    assert "passes  " not in capsys.readouterr().out
    assert main(command(*words, "--without", "fuse-linears, skip-unread-rows")) == 0
    assert "passes       all but fuse-linears, skip-unread-rows" in capsys.readouterr().out
    fused = [sum("+" in name for name in names) for names in found]
    assert len(fused) == 4
    assert min(fused[:2]) > 0
    assert fused[2:] == [0, 0]


def test_as_many_experts_as_tokens_choose() -> None:
    """Against draws: 300 passes of 5 tokens that take 8 of 32 each."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.rand(300, 5, 32, generator=generator).topk(8).indices
    seen = torch.zeros(300, 32).scatter_(1, drawn.flatten(1), 1.0).mean()
    assert roofline.expected_share(32, 8, 5) == pytest.approx(float(seen), abs=0.01)
    assert roofline.expected_share(32, 8, 1) == 0.25
    assert roofline.expected_share(8, 8, 1) == 1.0


def accepted(drafter: str, rates: tuple[float, ...], planted: bool = False) -> list[float]:
    """Acceptance by depth of long outputs, each depth with its standard deviation's worth of steps."""
    speculation, draft = DRAFTERS[drafter]
    fast = OptimizedModel(captured("target"), captured(draft), speculation, "eager", Limits(4, 90, None),  # type: ignore[arg-type]
                          {"pad_token_id": 0}, _acceptance=rates)  # fmt: skip
    if planted:
        fast.program.weights["synthetic.rates"].mul_(0.5)
    fast.generate([[5, 9, 13]] * 4, max_new_tokens=80, do_sample=False)
    return fast.metrics.acceptance_per_depth


@pytest.mark.parametrize("drafter", ["eagle", "eagle dynamic"])
def test_acceptance_is_what_was_asked_for(drafter: str) -> None:
    """Within four standard deviations over about 130 steps, and what the limit cuts off at the end."""
    rates = (0.9, 0.6, 0.4, 0.1)
    for found, rate in zip(accepted(drafter, rates), rates, strict=True):
        assert abs(found - rate) < 0.04 + 4 * (rate * (1 - rate) / 130) ** 0.5


def test_other_acceptance_than_asked_for_is_seen() -> None:
    found = accepted("eagle", (0.9, 0.6, 0.4, 0.1), planted=True)
    assert abs(found[0] - 0.9) > 0.04 + 4 * (0.9 * 0.1 / 130) ** 0.5


def test_nothing_a_user_passes_leads_to_synthetic_acceptance() -> None:
    assert OptimizedModel(captured("target"), None, None, "eager", Limits(1, 64, None), {})._acceptance == ()
    with pytest.raises(TypeError):
        optimize(captured("target"), acceptance=(0.5,))  # type: ignore[call-arg]


def test_depths_of_a_draft() -> None:
    assert shape._depths([-1]) == (0, 0)
    assert shape._depths([-1, 0, 1, 2, -1]) == (3, 3)
    assert shape._depths([-1, 0, 0, 2, 3, -1, 5]) == (3, 1)  # the first child has none; a node below an absent one is absent


@pytest.mark.parametrize(("asked", "levels"), [(3.91, 7), (1.0, 3), (4.0, 3), (2.2, 2)])
def test_a_geometric_profile_has_the_length_that_was_asked_for(asked: float, levels: int) -> None:
    found = profile.rates(asked, levels)
    assert len(found) == levels
    assert profile.mean_length(found) == pytest.approx(asked)
    assert [found[0] ** (depth + 1) for depth in range(levels)] == pytest.approx(list(found))


def test_given_rates_are_taken_as_they_are() -> None:
    assert profile.parse("0.9,0.5") == (0.9, 0.5)
    assert profile.parse("0.7") == (0.7,)
    assert profile.parse("3.91") == 3.91
    assert profile.rates((0.9, 0.5), 3) == (0.9, 0.5, 0.0)


@pytest.mark.parametrize("text", ["much", "0.5,0.6", "1.5,0.2", "-1"])
def test_other_profiles_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="the acceptance"):
        profile.parse(text)


@pytest.mark.parametrize("words", [
    ["--shape", "llama-3.1-80b"], ["--speculation", "eagle3:2,3"], ["--speculation", "eagle:7"],
    ["--speculation", "eagle3:2@3.91"], ["--acceptance", "0.9,0.8,0.7", "--speculation", "eagle3:2"], ["--rounds", "0"],
    ["--prompt", "200000"], ["--without", "fuse-lines"], ["--without", "verify-draft"],
    ["--json", "missing/shape.json"], ["--device", "abacus"],
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_at_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(*words)) == 2
    assert "autospec: " in capsys.readouterr().err


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_whole(name: str) -> None:
    one = SHAPES[name]
    assert all(0 <= layer < one.layers for layer in one.tap_after)
    assert one.draft_vocab <= one.vocab
    assert one.heads % one.kv_heads == 0


def test_llama_has_the_parameters_of_llama() -> None:
    """8.03 billion, of which a step reads all but the embedding: 15.0 GB in bf16."""
    model = random_model(SHAPES["llama-3.1-8b"], torch.device("meta"), torch.bfloat16, 0)
    assert sum(one.numel() for one in model.parameters()) == 8030261248
    assert model.config.rope_parameters["rope_theta"] == 500000.0


def test_deepseek_has_the_parameters_of_deepseek() -> None:
    """671 billion with all layers and experts; cut short it leaves 12 GB of an H100 free, its MTP module counted."""
    cut = SHAPES["deepseek-v3-16"]
    whole = replace(cut, layers=61, config={**cut.config, "n_routed_experts": 256, "first_k_dense_replace": 3})
    model = random_model(whole, torch.device("meta"), torch.bfloat16, 0)
    assert sum(one.numel() for one in model.parameters()) == 671026404352
    model = random_model(cut, torch.device("meta"), torch.bfloat16, 0)
    module = random_mtp(cut, model, torch.device("meta"), torch.bfloat16, 0)
    weights = [*model.state_dict().values(), *module.own_state().values()]
    assert 55e9 < sum(one.nbytes for one in weights) < 83e9 - 12e9


def test_weights_follow_from_the_seed() -> None:
    one, same, other = (random_model(TINY, CPU, torch.float32, seed) for seed in (0, 0, 1))
    first, second = (random_head(TINY, model, CPU, torch.float32, 5) for model in (one, same))
    weight = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(one.state_dict()[weight], same.state_dict()[weight])
    assert not torch.equal(one.state_dict()[weight], other.state_dict()[weight])
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert first.embed_tokens.weight.data_ptr() == one.model.embed_tokens.weight.data_ptr()
    assert first.vocabulary().tolist() == list(range(0, TINY.vocab, TINY.vocab // TINY.draft_vocab))


def test_a_peaked_head_is_as_sure_as_asked_for() -> None:
    std, generator = peaked(1000, 0.6), torch.Generator().manual_seed(9)
    best = torch.softmax(std * torch.randn(2000, 1000, generator=generator), -1).amax(1).mean()
    assert 0.56 < float(best) < 0.64


def test_bytes_of_a_step() -> None:
    """Every weight but the embedding, the head's as often as it runs, rows of every layer as often as it is read."""
    target, head = captured("target"), captured("eagle")
    own = sum(value.nbytes for name, value in target.weights.items() if "embed" not in name)  # type: ignore[union-attr]
    plain = roofline.step_bytes(target, None, chain(0), 2, 100)  # type: ignore[arg-type]
    assert plain.target == own
    assert (plain.draft, plain.kv) == (0, 200 * target.facts.bytes_per_token)  # type: ignore[union-attr]
    three = roofline.step_bytes(target, head, chain(3), 2, 100)  # type: ignore[arg-type]
    two = roofline.step_bytes(target, head, chain(2), 2, 100)  # type: ignore[arg-type]
    assert three.kv - two.kv == 200 * head.facts.bytes_per_token  # type: ignore[union-attr]
    assert three.draft - two.draft == roofline.weight_bytes(head.following, head.weights)[0] > 0  # type: ignore[union-attr, arg-type]
    assert roofline.step_bytes(target, head, dynamic_tree(2, 3, 5), 2, 100) == three  # type: ignore[arg-type]


def test_replayed_steps_move_on_and_are_put_back() -> None:
    speculation, draft = DRAFTERS["eagle"]
    fast = OptimizedModel(captured("target"), captured(draft), speculation, "eager", Limits(2, 90, None),  # type: ignore[arg-type]
                          {}, _acceptance=(1.0, 1.0, 0.0, 0.0))  # fmt: skip
    fast.generate([[5, 9], [2, 3]], max_new_tokens=4, do_sample=False)
    frozen = steps.Frozen.of_rows(steps.only_step(fast.program, 4), [[7] * 20, [9] * 20])
    for _ in range(2):
        assert len(frozen.streamed(5)) == 5
        assert frozen.state["kv_lens"].tolist() == [19 + 5 * 3] * 2
        assert not frozen.state["finished"].any()
