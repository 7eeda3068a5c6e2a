"""Models to export: the bundled one with its drafters, and tiny ones of several families; and a machine to run them on."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from autospec.api import Limits, OptimizedModel
from autospec.assemble import capture_model
from autospec.capture_head import capture_head
from autospec.config import DraftTargetConfig, Eagle3Config, NGramConfig
from autospec.loading import load_draft_head, load_model
from autospec.model_zoo.bundled import resolve
from autospec.program import CapturedModel
from harness.models import captured, tiny
from harness.programs import DRAFTERS

KINDS: dict[str, Any] = {
    "ngram": NGramConfig(max_draft_len=4),
    "draft": DraftTargetConfig(resolve("bundled:draft"), max_draft_len=2),
    "eagle3": Eagle3Config(resolve("bundled:eagle3"), max_draft_len=3, dynamic_tree_max_topk=2, max_total_draft_tokens=6),
}

PROMPTS = [[5, 9, 2, 44, 5, 9, 2], [17, 3, 17, 3, 17], [8]]
OPTIONS: tuple[dict[str, Any], ...] = (
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.9, "top_k": 0, "seed": 7},
)
FAMILIES = ("llama", "gemma3_text", "mixtral", "gpt2")

# What a user's machine runs: no test code, no transformers.
SCRIPT = """
import json, sys
import autospec
how, asked = json.loads(sys.stdin.read())
found = []
for folder, prompts, options in asked:
    fast = autospec.load(folder, compile=how)
    found.append([fast.generate(prompts, **one).tolist() for one in options])
loaded = [name for name in sys.modules if name.startswith(("transformers", "autospec."))]
print(json.dumps([found, loaded]))
"""


def same_elsewhere(folder: Path, models: list[OptimizedModel], how: str = "eager", **options: Any) -> None:
    """Export the models, load them with compile=how in a process that imports neither transformers nor what needs models, and
    compare the tokens."""
    asked = [{"max_new_tokens": 12, "pad_token_id": 0, **one} for one in OPTIONS]
    made, expected = [], []
    for number, fast in enumerate(models):
        made.append((str(fast.save(folder / str(number), sampling=True, **options)), PROMPTS, asked))
        expected.append([fast.generate(PROMPTS, **one).tolist() for one in asked])
    given = json.dumps([how, made])
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], input=given, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"exit status {ran.returncode}: {ran.stderr[-2000:]}"
    got, loaded = json.loads(ran.stdout.splitlines()[-1])
    for number, (tokens, wanted) in enumerate(zip(got, expected, strict=True)):
        assert tokens == wanted, f"model {number}"
    banned = ("transformers", "autospec.capture", "autospec.legality", "autospec.loading", "autospec.heads", "autospec.frontend")
    assert not [name for name in loaded if name.startswith(banned)]


@functools.cache
def demo(kind: str, device: str = "cpu") -> OptimizedModel:
    """The bundled model with a drafter, running eagerly; it is captured once."""
    module, target = _demo_target(device)
    speculation, draft = KINDS[kind], None
    if kind == "draft":
        draft = capture_model(load_model(speculation.speculative_model, "speculative_model", like=module), "draft")
    if kind == "eagle3":
        draft = capture_head(load_draft_head(speculation.speculative_model, module), target)
    sources = {"target": resolve("bundled:target"), "draft": kind}
    return OptimizedModel(target, draft, speculation, "eager", Limits(None, 64, None), {}, sources=sources)


@functools.cache
def _demo_target(device: str) -> tuple[Any, CapturedModel]:
    module = load_model("bundled:target", "model").float().to(device)  # stored as bfloat16, where near ties could flip
    return module, capture_model(module)


@functools.cache
def family(name: str, device: str = "cpu") -> OptimizedModel:
    """A tiny random model of a family with n-gram drafts."""
    captured = capture_model(tiny(name, seed=4).to(device))
    return OptimizedModel(captured, None, NGramConfig(max_draft_len=3), "eager", Limits(None, 64, None), {})


def tiny_optimized(drafter: str) -> OptimizedModel:
    """What optimize() returns for the tiny target, without capturing it again."""
    speculation, draft = DRAFTERS[drafter]
    model = captured(draft) if draft else None
    return OptimizedModel(captured("target"), model, speculation, "eager", Limits(None, 96, 8), {"pad_token_id": 0})
