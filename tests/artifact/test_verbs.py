"""export and generate on the command line: text without transformers, mistakes in four lines, status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.artifacts import demo

from autospec.benching import artifact
from autospec.benching.contenders import percentiles
from autospec.cli import main
from autospec.loaded import load

pytestmark = pytest.mark.xdist_group("demo artifacts")
PROMPT = "def add(a, b):"
SCRIPT = """
import sys
from autospec.cli import main
status = main(sys.argv[1:])
assert not [name for name in sys.modules if name.startswith("transformers")]
sys.exit(status)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fast = demo("ngram")
    fast.sources = {**fast.sources, "target": "model_zoo/demo/target"}  # type: ignore[misc]
    root = Path(__file__).resolve().parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return fast.save(tmp_path_factory.mktemp("demo") / "exported", max_length=64, sampling=False)


def test_text_without_transformers(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parents[2] / "model_zoo/demo/target")
    ids = demo("ngram").generate(tokenizer(PROMPT, return_tensors="pt").input_ids, max_new_tokens=12, do_sample=False)
    options = ["generate", str(exported), "--prompt", PROMPT, "--max-new-tokens", "12", "--compile", "eager"]
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, *options], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-1500:]
    assert ran.stdout == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "DIR", "--prompt", "x", "--speculation", "ngram"], "an artifact has the drafter it was exported with"),
        (["generate", "DIR", "--prompt", "x", "--max-draft-len", "3"], "an artifact has the drafter it was exported with"),
        (["generate", "DIR", "--prompt", "x", "--dtype", "float32"], "an artifact has the dtype it was exported with"),
        (["export", "bundled:target", "-o", "x", "--dtype", "float32", "--meta"], "--meta copies weights as they are stored"),
        (["generate", "bundled:target", "--prompt", "x", "--fallback"], "--fallback is for a folder"),
        (["generate", "bundled:target", "--prompt", "x", "--compile", "aot"], "packages belong to an artifact"),
        (["export", "bundled:target", "-o", "x", "--batch-sizes", "1,b"], "--batch-sizes must be numbers"),
        (["generate", "DIR", "--prompt", "x", "--device", "gpu"], "there is no device called 'gpu'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(exported) if word == "DIR" else word for word in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-4]
    assert [line.split()[0] for line in lines[-3:]] == ["at", "in", "help"]


def test_bench_measures_an_artifact(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def old(*args: Any, **options: Any) -> Any:
        loaded = load(*args, **options)
        loaded.artifact.manifest["torch"] = "1.0"
        return loaded

    monkeypatch.setattr(artifact, "load", old)
    (tmp_path / "p.jsonl").write_text('{"input_ids": [464, 1140, 2531]}\n"import os"\n')
    options = ["--compile", "eager", "--new-tokens", "8", "--repeats", "1", "--prompts", str(tmp_path / "p.jsonl")]
    source = str(Path(__file__).resolve().parents[2] / "model_zoo/demo/target")
    files = ["--json", str(tmp_path / "bench.json"), "--picture", str(tmp_path / "bench.png")]
    assert main(["bench", str(exported), *options, *files, "--against", source, "--batch-sizes", "1,2"]) == 0
    printed = capsys.readouterr().out
    assert "loading to the first token took" in printed
    assert f"torch {torch.__version__}, eager" in printed, "of this process, whatever exported it"
    runs = json.loads((tmp_path / "bench.json").read_text())["runs"]
    names = ["transformers generate", "plain", "artifact, eager"]
    assert [one["name"] for one in runs] == [f"{name}, batch {batch}, prompts as given" for batch in (1, 2) for name in names]
    assert all(one["is_identical"] for one in runs)
    assert len(runs[2]["acceptance"]["per_depth"]) == 4
    steps = runs[2]["step_seconds_percentiles"]
    assert 0 < steps["50"] <= steps["90"] <= steps["99"]
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["bench", str(exported), *options, "--against", "none"]) == 0
    assert "measured alone, without transformers' generate and plain decoding: as asked for" in capsys.readouterr().out
    for more, message in (
        (["--new-tokens", "64"], "do not fit, a row holds 64"), (["--acceptance", "3"], "an artifact has none"),
        (["--start-up", "--against", "none"], "--start-up optimises the model from scratch, too"),
    ):  # fmt: skip
        assert main(["bench", str(exported), *options, *more]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text('{"text": 3}\n')
    assert main(["bench", str(exported), *options]) == 2
    assert "neither text nor token ids" in capsys.readouterr().err


def test_percentiles() -> None:
    assert percentiles([float(n) for n in range(1, 101)]) == {"50": 50.0, "90": 90.0, "99": 99.0}
    assert percentiles([3.0]) == {"50": 3.0, "90": 3.0, "99": 3.0}
    assert percentiles([]) == {}
