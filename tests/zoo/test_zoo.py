"""The zoo: a slice of it, its outcomes, and what it does about models that crash or hang."""

from __future__ import annotations

import json
import os
import time

import pytest

from autospec import zoo
from autospec.errors import OptionError
from autospec.tiny_models import MAX_POSITIONS, VOCAB_SIZE, WINDOW, tiny_config, tiny_model

QUICK = ("bart", "bloom", "falcon", "gpt_neo", "gptj", "granite", "opt", "starcoder2", "mistral", "xglm")


@pytest.mark.parametrize("model_type", QUICK)
def test_a_slice_is_identical(model_type):
    row = zoo.check_type(model_type, ("plain", "ngram"))
    assert row.outcome == "identical", row
    assert row.distinct >= 6, "the greedy text collapsed, so comparing it says little"


@pytest.mark.parametrize("model_type", ["jamba", "doge"])
def test_a_refusal_is_a_row_with_its_reason(model_type):
    row = zoo.check_type(model_type)
    assert row.outcome == "refused"
    assert row.reason


def test_a_wrong_token_is_seen(monkeypatch):
    """Planted: the reference is off by one token."""
    plain = zoo.reference_tokens

    def disturbed(*args):
        tokens, note = plain(*args)
        tokens[1, 20] += 1
        return tokens, note

    monkeypatch.setattr(zoo, "reference_tokens", disturbed)
    row = zoo.check_type("opt", ("plain",))
    assert row.outcome == "wrong"
    assert zoo.totals([row]).startswith("0 identical, 0 refused, 1 wrong")


def _crash(model_type, seed, connection):
    os._exit(7)


def _hang(model_type, seed, connection):
    time.sleep(60)


@pytest.mark.parametrize(("worker", "reason"), [(_crash, "exit code 7"), (_hang, "no answer within 2 s")])
def test_a_crash_and_a_hang_are_failures(monkeypatch, worker, reason):
    monkeypatch.setattr(zoo, "_worker", worker)
    (row,) = zoo.run_zoo(["opt"], jobs=1, time_limit=2)
    assert row.outcome == "failed"
    assert reason in row.reason


def test_an_exception_that_is_no_refusal_is_a_failure(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(zoo, "reference_tokens", broken)
    row = zoo.check_type("opt", ())
    assert row.outcome == "failed"
    assert "ZeroDivisionError: planted" in row.reason


def test_the_command(monkeypatch, tmp_path, capsys):
    rows = [zoo.Row("opt", "identical", drafters={"plain": True}), zoo.Row("mamba", "refused", "no attention | at all")]
    monkeypatch.setattr(zoo, "run_zoo", lambda types, jobs, **options: [r for r in rows if r.model_type in types])
    path = tmp_path / "rows.json"
    assert zoo.main(["--types", "opt,mamba", "--json", str(path), "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "`opt`" in text
    assert "| `mamba` | no attention / at all |" in text
    assert [row["outcome"] for row in json.loads(path.read_text())] == ["identical", "refused"]
    rows.append(zoo.Row("bert", "wrong", "tokens differ"))
    assert zoo.main(["--types", "bert"]) == 1
    with pytest.raises(OptionError, match="mambo"):
        zoo.main(["--types", "mambo"])


def test_every_type_is_tried():
    assert len(zoo.causal_lm_types()) > 150


def test_tiny_configurations_follow_the_rules():
    config = tiny_config("gemma3_text")
    assert (config.vocab_size, config.max_position_embeddings, config.sliding_window) == (VOCAB_SIZE, MAX_POSITIONS, WINDOW)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    model = tiny_model("deepseek_v3")
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
