"""The bench verb: what it measures is what happened, what it predicts is what a run then does, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import captured, model
from harness.programs import CHOICES, DRAFTERS
from harness.text import char_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from autospec import bench
from autospec.api import Limits, OptimizedModel
from autospec.benching import grid, picture, record, steps, sweep, text
from autospec.benching.contenders import Ours
from autospec.benching.results import Parts, Run
from autospec.cli import main
from autospec.config import DraftTargetConfig, Eagle3Config, MTPConfig, NGramConfig
from autospec.errors import AutospecError, CapacityError, CheckpointError, OptionError
from autospec.kernels.build_dynamic_tree import build_dynamic_tree
from autospec.trees import chain, dynamic_tree, static_tree

PROMPTS = [[5, 9, 13, 2, 5, 9], [33, 7, 7, 20, 41]]
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
SAMPLED: dict[str, Any] = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "seed": 3}


def optimized(drafter: str) -> OptimizedModel:
    speculation, draft = DRAFTERS[drafter]
    return OptimizedModel(captured("target"), captured(draft) if draft else None, speculation, "eager", Limits(1, 64, None),
                          {"pad_token_id": 0})  # fmt: skip


def measured(drafter: str, options: dict[str, Any] = GREEDY) -> Run:
    """A run with its steps recorded."""
    run = Run(drafter, drafter, optimized(drafter))
    run.fast.generate([PROMPTS[0]], **options)
    bench.time_runs([run], PROMPTS, options, 1)
    for prompt in PROMPTS:
        with record.recorded(run.fast.session) as seen:
            run.fast.generate([prompt], **options)
        run.steps.append(seen)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a draft that is often right, and prompts of every kind, on disk."""
    made = tmp_path_factory.mktemp("bench")
    target = model("target")
    target.save_pretrained(made / "target")
    char_tokenizer().save_pretrained(made / "target")
    own = {name: value.clone() for name, value in target.state_dict().items()}
    try:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in target.parameters():
                parameter.add_(0.03 * parameter.std() * torch.randn_like(parameter))
        target.save_pretrained(made / "near")
    finally:
        target.load_state_dict(own)
    lines = ['{"input_ids": [5, 9, 13, 2, 5, 9]}', '"abba"', '{"prompt": "hello"}', "[33, 7, 7, 20]"]
    (made / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return made


def command(folder: Path, *words: str) -> list[str]:
    return ["bench", str(folder / "target"), "--prompts", str(folder / "prompts.jsonl"), "--new-tokens", "20", "--repeats", "1",
            "--compile", "eager", "--device", "cpu", *words]  # fmt: skip


def test_several_drafters_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near, out = f"draft:{folder / 'near'}", folder / "all.json"
    words = ["--speculation", "ngram", "--max-draft-len", "3", "--speculation", near, "--eagle-choices", "[[0],[1],[0,0]]",
             "--speculation", near, "--max-draft-len", "3", "--dynamic-tree-max-topk", "2", "--speculation", "auto"]  # fmt: skip
    assert main(command(folder, *words, "--json", str(out), "--picture", str(folder / "all.png"))) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    names = ["ngram, chain of 3", "static tree of 3 nodes, 2 levels", "dynamic tree of 6 nodes, 3 levels, top 2", "auto, up to"]
    assert all(name in printed for name in names)
    baseline, *runs = found["runs"]
    assert [one["speculation"] for one in runs] == [None, "ngram", near, near, "auto"]
    assert all(one["is_identical"] for one in found["runs"])
    for one in found["runs"]:
        for times in (one["step_seconds_percentiles"], one["first_token_seconds"]):
            assert 0 < times["50"] <= times["90"] <= times["99"]
    assert baseline["name"] == "transformers generate"
    assert runs[1]["speed_up_over_transformers"] == pytest.approx(runs[1]["tokens_per_second"] / baseline["tokens_per_second"])
    static, dynamic = runs[2:4]
    assert static["acceptance"]["mean_acceptance_length"] > 1.5
    assert {tuple(one["place"]) for one in static["nodes"]} == {(0,), (1,), (0, 0)}
    assert {tuple(one["place"]) for one in dynamic["nodes"]} <= {(d, r) for d in (1, 2, 3) for r in (0, 1)}
    for one in runs:
        times = one["step_seconds"]
        assert times["step"] == pytest.approx(times["verify"] + times["draft"] + times["glue"])
        assert times["glue"] > 0
    assert (folder / "all.png").read_bytes()[:4] == b"\x89PNG"


def test_sampled_tokens_are_those_of_plain_decoding(folder: Path) -> None:
    words = ["--speculation", f"draft:{folder / 'near'}", "--temperature", "0.8", "--seed", "4"]
    assert main(command(folder, *words)) == 0


def test_tokens_that_differ_exit_with_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = bench.in_turn

    def wrong(contenders: Any, *rest: Any) -> Any:
        found = timed(contenders, *rest)
        (number,) = [i for i, one in enumerate(contenders) if one.name == planted]
        found[number][0].outputs[0][-1] += 1
        return found

    monkeypatch.setattr(bench, "in_turn", wrong)
    monkeypatch.setattr(grid, "in_turn", wrong)
    for planted in ("ngram, chain of 8", "transformers generate"):
        assert main(command(folder, "--speculation", "ngram")) == 1
        assert re.search(rf"{planted} .* NO( |$)", capsys.readouterr().out, re.MULTILINE)
    planted = "ngram, chain of 8"
    assert main(command(folder, "--speculation", "ngram", "--batch-sizes", "2")) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"{planted} .* NO ", printed)
    assert f"batch 2, prompts as given: {planted}: 1 of 4 outputs differ from transformers generate's; " in printed
    assert re.search(r"\n  prompt 0, token \d+: the two tokens' logits are .* apart", printed)


def test_by_batch_size_and_prompt_length(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens of transformers, plain decoding and a drafter are the same in every cell."""
    out = folder / "grid.json"
    words = ["--batch-sizes", "1,3", "--prompt-lengths", "5", "--speculation", "ngram", "--json", str(out)]
    assert main(command(folder, *words, "--picture", str(folder / "grid.png"))) == 0
    printed, runs = capsys.readouterr().out, json.loads(out.read_text())["runs"]
    assert [(one["batch_size"], one["prompt_length"]) for one in runs] == [(1, 5)] * 3 + [(3, 5)] * 3
    assert "batch 3, prompts of 5 tokens" in printed
    assert "greedy, batch 1, 3" in printed
    assert all(one["is_identical"] for one in runs)
    assert all(one["first_token_seconds"]["50"] > 0 < one["step_seconds_percentiles"]["50"] for one in runs)
    assert runs[4]["speed_up"] == 1.0
    assert runs[5]["acceptance"]["mean_acceptance_length"] > 1
    assert (folder / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_timed_was_built_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that need a longer program than the first ones do; and a call is timed as a whole."""
    plain, built = optimized("plain"), []
    plain.limits = Limits(None, None, None)
    build, in_turn = OptimizedModel._build, grid.in_turn
    monkeypatch.setattr(OptimizedModel, "_build", lambda self, shape: built.append(shape.max_length) or build(self, shape))

    def timed(*args: Any) -> Any:
        assert built == [128, 256]
        return in_turn(*args)

    monkeypatch.setattr(grid, "in_turn", timed)
    (cell,) = grid.measure([Ours("plain", plain)], [[5, 9], [7] * 130], [(1, None)], {"max_new_tokens": 4, "do_sample": False}, 1)
    assert built == [128, 256]
    for one in cell.results[0].timed:
        assert one.metrics is not None
        assert one.seconds > one.metrics.seconds
        assert one.first_tokens[0] - one.metrics.first_token_seconds == pytest.approx(one.seconds - one.metrics.seconds)


def test_synthetic_acceptance_is_what_was_asked_for_and_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--acceptance", "1,1,0", "--speculation", f"draft:{folder / 'near'}", "--max-draft-len", "3", "--without-transformers",
             "--json", str(folder / "synthetic.json")]  # fmt: skip
    assert main(command(folder, *words)) == 0
    plain, drafted = json.loads((folder / "synthetic.json").read_text())["runs"]
    assert plain["synthetic_acceptance_length"] is None
    assert drafted["is_identical"] is None
    assert drafted["synthetic_acceptance_length"] == 3
    assert drafted["acceptance"]["per_depth"] == [pytest.approx(1, abs=0.2), pytest.approx(1, abs=0.2), 0]
    assert re.search(r"synthetic 3.00 .* synthetic ", capsys.readouterr().out)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(1, 7), st.integers(1, 9))
def test_batches_hold_every_prompt_and_prompts_the_text_behind_it(prompts: list[list[int]], batch: int, length: int) -> None:
    whole = grid.batches_of(prompts, batch, None)
    assert all(len(rows) == batch for rows in whole)
    assert [row for rows in whole for row in rows][: len(prompts)] == prompts
    cut = [row for rows in grid.batches_of(prompts, batch, length) for row in rows]
    for number, prompt in enumerate(prompts):
        assert len(cut[number]) == length
        assert cut[number][: len(prompt)] == prompt[:length]


def test_options_of_a_draft_belong_to_the_drafter_before_them() -> None:
    found = bench.speculations(["m", "--max-draft-len", "5", "--speculation", "ngram", "--speculation=draft:d",
                                "--max-draft-len", "3", "--speculation", "none", "--speculation", "eagle3:h",
                                "--dynamic-tree-max-topk", "2", "--speculation", "mtp", "--speculation", "mtp:m"])  # fmt: skip
    names, chosen = zip(*found, strict=True)
    assert names == ("ngram", "draft:d", "eagle3:h", "mtp", "mtp:m")
    assert chosen == (NGramConfig(5), DraftTargetConfig("d", 3), Eagle3Config("h", 5, dynamic_tree_max_topk=2),
                      MTPConfig(max_draft_len=5), MTPConfig("m", 5))  # fmt: skip


def test_drafters_by_default() -> None:
    assert [name for name, _ in bench.speculations(["m"])] == ["ngram"]
    assert [name for name, _ in bench.speculations(["bundled:target"])] == list(bench.DEMO_DRAFTERS)


@pytest.mark.parametrize("drafter", ["ngram", "near", "twin static", "near dynamic", "eagle dynamic", "medusa static"])
def test_the_host_sees_what_the_device_counts(drafter: str) -> None:
    run = measured(drafter)
    counted, device = run.acceptance, run.metrics
    assert counted.steps == sum(one.row_steps for one in device)
    assert counted.reached == [sum(depth) for depth in zip(*(one.reached for one in device), strict=True)]
    if not run.tree.is_chain:
        assert counted.nodes == sum(one.nodes_verified for one in device)
        ranks = [sum(counts) for counts in zip(*(one.rank_counts for one in device), strict=True)]
        assert [counted.ranks[rank] for rank in range(len(ranks))] == ranks


def test_recording_leaves_the_session_as_it_was() -> None:
    session = (run := measured("ngram")).fast.session
    before = dict(session.steps)
    with record.recorded(session), steps.clocked(session):
        run.fast.generate([PROMPTS[0]], **GREEDY)
    assert session.steps == before


def test_steps_inside_a_loop_are_not_counted_outside() -> None:
    output = [*range(10, 26)] * 3  # begins to repeat itself at 16

    def step(first: int) -> record.Step:
        return record.Step((0, output[first]), (-1, 0), tuple(output[first : first + 2]), first, 1)

    found = record.outside_loops([step(first) for first in (1, 13, 15, 16, 17, 30)], output)
    assert [one.first for one in found] == [1, 13, 15]
    assert record.outside_loops([step(40)], [*range(100)]) != []


def test_acceptance_by_node() -> None:
    tree = static_tree([[0], [1], [0, 0], [1, 0]])
    first = record.Step((9, 1, 2, 3, 4), (-1, 0, 0, 1, 2), (2, 4, 7), 1, 2)
    second = record.Step((9, 1, 2, 3, 4), (-1, 0, -1, 1, 2), (1, 8), 4, 2)  # node 2 is absent, and node 4 with it
    rates = record.node_rates([first, second], tree)
    assert first.path == (2, 4)
    assert second.path == (1,)
    assert {place: (one.offered, one.accepted) for place, one in rates.items()} == {
        (0,): (1.0, 0.5), (1,): (0.5, 0.5), (0, 0): (1.0, 0.0), (1, 0): (0.5, 0.5)
    }  # fmt: skip
    grown = record.node_rates([first, second], dynamic_tree(2, 2, 4))
    assert {place: (one.offered, one.accepted) for place, one in grown.items()} == {
        (1, 0): (1.0, 0.5), (1, 1): (0.5, 0.5), (2, 0): (1.5, 0.5)
    }  # fmt: skip
    assert grown[2, 0].rate == pytest.approx(1 / 3)


@pytest.mark.parametrize("drafter", ["near", "eagle static", "medusa dynamic"])
def test_a_verify_only_step_is_the_step_without_its_drafter(drafter: str) -> None:
    run = measured(drafter)
    program, length = run.fast.session.program, run.tree.max_draft_len
    bare = steps.verify_only(run.fast.target, program.shape, length, "eager", program.weights)
    tokens = PROMPTS[0] + run.outputs[0][:8]
    whole, verified = (steps.Frozen.of(one, tokens) for one in (steps.only_step(program, length), bare))
    assert set(bare.state_slots()) <= set(program.state_slots())
    assert not any(name.startswith("draft.") for name in bare.weights)
    assert len(bare.weights) < len(steps.only_step(program, length).weights)
    for _ in range(2):
        assert whole.seconds() > 0
        assert verified.seconds() > 0
        for name in ("tokens", "kv_lens", "finished"):
            assert torch.equal(whole.state[name], verified.state[name]), name
    assert int(whole.state["kv_lens"][0]) >= len(tokens), "the row was live and moved, and by one step only"
    assert int(whole.state["kv_lens"][0]) < len(tokens) + length + 1


@pytest.mark.parametrize("tree", [chain(3), static_tree(CHOICES), dynamic_tree(3, 4, 14)], ids=str)
def test_frozen_drafts_are_whole(tree: Any) -> None:
    parents = steps.links(tree)
    assert len(parents) == tree.num_nodes
    assert parents[0] == -1
    assert all(0 <= parent < node for node, parent in enumerate(parents) if node)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_replayed_drafts_do_what_runs_do(options: dict[str, Any]) -> None:
    """One recording of a K predicts the acceptance of every smaller tree, and a chain that of shorter chains."""
    base = measured("near dynamic", options)
    for top_k in (1, 3):
        widest = chain(4) if top_k == 1 else dynamic_tree(top_k, 4, 4)
        proposals = sweep.propose(base.fast, sweep.with_tree(base.fast.speculation, widest), PROMPTS, options)
        assert [one.text for one in proposals] == base.outputs
        smaller = [chain(2), chain(4)] if top_k == 1 else [dynamic_tree(3, d, m) for d, m in ((2, 5), (4, 9))]
        for tree in smaller:
            real = Run("", "", OptimizedModel(base.fast.target, base.fast.draft, sweep.with_tree(base.fast.speculation, tree),
                                              "eager", base.fast.limits, base.fast.generation_defaults))  # fmt: skip
            bench.time_runs([real], PROMPTS, options, 1)
            length = 1 + sum(sum(one.reached) for one in real.metrics) / sum(one.row_steps for one in real.metrics)
            assert sweep.mean_length(proposals, tree, with_loops=True) == pytest.approx(length), str(tree)


def test_the_history_is_found_behind_every_kernel() -> None:
    """On a GPU the op that builds the tree is no longer the canonical one; a sweep there found no candidates."""
    assert len(build_dynamic_tree.every_form) > 1
    for op in build_dynamic_tree.every_form:
        graph = fx.Graph()
        made = graph.call_function(op, (*(graph.placeholder(name) for name in ("root", "tokens", "scores", "parents")), 4))
        graph.output((made,))
        module = fx.GraphModule(torch.nn.Module(), graph)
        sweep._return_history(module)
        assert [str(node) for node in graph.output_node().args[0][-3:]] == ["tokens", "scores", "parents"], op


@pytest.mark.parametrize(("drafter", "trees"), [("ngram", False), ("medusa", True)])
def test_a_sweep(drafter: str, trees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "SAMPLES", 1)
    run = measured(drafter)
    found = sweep.sweep("medusa:h", run.fast, PROMPTS, run.outputs, GREEDY, nodes=(1, 2, 4, 8), topks=(2,), glue=1e-5)
    assert [row.nodes for row in found.rows] == [2, 4, 8]
    assert all(row.chain is not None for row in found.rows)
    assert [row.tree is not None for row in found.rows] == [trees] * 3
    assert set(found.times.draft) == ({1, 2} if trees else {1})
    for row in found.rows:
        assert row.chain is not None
        assert row.chain.tree.num_nodes <= row.nodes
        assert row.tree is None or row.tree.tree.num_nodes == row.nodes
    printed = text.sweep_table(found, "some/model")
    assert "wins" in printed
    assert found.best is found.plain or found.best.options in printed


def _swept(tree_lengths: dict[int, float]) -> sweep.Sweep:
    def budget(tree: Any, length: float) -> sweep.Budget:
        return sweep.Budget(tree, length, length, 0.010, 0.001, 0.0)

    line = budget(chain(2), 2.0)
    rows = [sweep.Row(n, line, budget(dynamic_tree(4, 2, n - 1), length)) for n, length in tree_lengths.items()]
    times = sweep.Times({(True, 1): 0.01, (True, 16): 0.02, (False, 4): 0.01, (False, 16): 0.02}, {1: (0.1, 0.2)})
    return sweep.Sweep("eagle3:h", times, budget(chain(0), 1.0), rows)


def test_what_a_sweep_concludes() -> None:
    wins = text.sweep_table(_swept({4: 1.9, 8: 2.4, 16: 2.6}), "m")
    assert "a tree beats the best chain of any length (L=2) at N = 8, 16" in wins
    assert "autospec bench m --speculation eagle3:h --max-draft-len 2 --dynamic-tree-max-topk 4 --max-total-draft-tokens 15" in wins
    loses = text.sweep_table(_swept({4: 1.9, 8: 1.8}), "m")
    assert "no tree beats the best chain (L=2) in wall clock on this machine" in loses
    assert loses.endswith("autospec bench m --speculation eagle3:h --max-draft-len 2")


def test_a_busy_machine_is_told() -> None:
    run = measured("plain")
    title = dict.fromkeys(("model",), "")
    for step, is_told in ((0.1 * sum(run.seconds), True), (0.0, False)):
        run.parts = Parts(step, 0.0, 0.0)
        assert ("the machine was busy" in text.table(bench.Bench(title, [run], []))) == is_told


def test_a_sweep_tells_of_a_busy_machine_too() -> None:
    quiet = _swept({4: 1.9})
    assert "the machine was busy" not in text.sweep_table(quiet, "m")
    quiet.times.verify[True, 1] = 0.0221
    assert "the machine was busy" in text.sweep_table(quiet, "m")


def test_times_between_sizes_lie_on_lines() -> None:
    times = _swept({}).times
    assert times.verify_at(16, True) == 0.02
    assert times.verify_at(10, False) == pytest.approx(0.015)
    assert times.draft_at(chain(3)) == pytest.approx(0.5)


def test_a_picture_of_every_kind_of_draft(tmp_path: Path) -> None:
    runs = [measured("plain"), *(measured(name) for name in ("auto", "twin static", "medusa dynamic"))]
    title = dict.fromkeys(("model", "dtype", "device", "torch", "compile", "decoding", "prompts", "new_tokens"), "")
    picture.draw(bench.Bench(title, runs, [_swept({4: 1.9, 8: 2.4})]), tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 20_000


def test_prompts_of_every_kind(folder: Path, tmp_path: Path) -> None:
    tokenizer = char_tokenizer()
    abba, hello = (tokenizer(word)["input_ids"] for word in ("abba", "hello"))
    target = str(folder / "target")
    assert bench.prompts_for(target, folder / "prompts.jsonl") == [PROMPTS[0], abba, hello, [33, 7, 7, 20]]
    (tmp_path / "lines.txt").write_text("abba\n\nhello\n")
    assert bench.prompts_for(target, tmp_path / "lines.txt") == [abba, hello]
    assert len(bench.prompts_for("bundled:target", None)) > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "no-such-file.txt"], "cannot be read"),
        (["--prompts", "bad.jsonl"], "neither text nor token ids"),
        (["--prompts", "empty.txt"], "no prompts"),
        (["--new-tokens", "1"], "at least 2"),
        (["--repeats", "0"], "at least 1"),
        (["--temperature", "-1"], "must not be negative"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--batch-sizes", "2", "--prompt-lengths", "4000"], "do not fit, a row holds"),
        (["--batch-sizes", "1", "--sweep-tree", "--speculation", "ngram"], "one at a time"),
        (["--acceptance", "2.5", "--speculation", "auto"], "auto chooses its own"),
        (["--acceptance", "2", "--speculation", "none"], "plain decoding has none"),
        (["--acceptance", "0.2,0.5", "--speculation", "ngram"], "the acceptance rises"),
        (["--speculation", "auto", "--sweep-tree"], "whose budget can be chosen"),
        (["--speculation", "ngram", "--eagle-choices", "[[0]]"], "needs a drafter that takes it"),
        (["--temperature", "nan"], "must be a number"),
        (["--json", "no-such-folder/out.json"], "no folder"),
        (["--picture", "."], "--picture names a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals(
    words: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., AutospecError],
) -> None:  # fmt: skip
    (tmp_path / "bad.jsonl").write_text('{"input_ids": [1, "b"]}\n')
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.chdir(tmp_path)
    kind = CapacityError if "do not fit" in message else OptionError
    error = refused(kind, lambda: bench.run(command(folder, *words)[1:]))
    assert message in str(error)


def test_a_model_without_prompts_or_tokenizer(folder: Path, tmp_path: Path, refused: Callable[..., AutospecError]) -> None:
    assert "needs prompts" in str(refused(OptionError, lambda: bench.prompts_for("some/model", None)))
    model("target").save_pretrained(tmp_path / "bare")
    (tmp_path / "lines.txt").write_text("abba\n")
    call = lambda: bench.prompts_for(str(tmp_path / "bare"), tmp_path / "lines.txt")  # noqa: E731
    assert "tokenizer cannot be loaded" in str(refused(CheckpointError, call))
