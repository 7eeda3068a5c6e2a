"""How soon the first token comes: an artifact loaded, and the same model optimised from scratch, each in a fresh process.

Both run one after the other, on the same prompt, and start with an empty compile cache: what the first call on a machine takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autospec.artifact.values import dtype_name
from autospec.errors import ArtifactError

_SCRIPT = """
import json, sys, time, warnings
started = time.perf_counter()
warnings.filterwarnings("ignore")
asked = json.loads(sys.stdin.read())
import torch, autospec
called = time.perf_counter()
if "source" in asked:
    speculation = None
    if asked["kind"]:
        from autospec import config
        from autospec.artifact.values import from_json
        speculation = from_json(getattr(config, asked["kind"]), asked["options"])
    from autospec.loading import load_model
    model = load_model(asked["source"], "model").to(device=asked["device"], dtype=getattr(torch, asked["dtype"]))
    fast = autospec.optimize(model, speculation, **asked["optimize"])
else:
    fast = autospec.load(asked["folder"], compile=asked["compile"])
output = fast.generate([asked["prompt"]], max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
ended = time.perf_counter()
output = fast.generate([asked["prompt"]], max_new_tokens=asked["new_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0)
banned = ("transformers", "autospec.passes", "autospec.lower", "autospec.capture", "torch._inductor.graph")
print(json.dumps({"seconds": ended - called, "with_imports": ended - started, "tokens": output[0].tolist(), "compile": fast.compile,
                  "compilers": [name for name in sys.modules if name.startswith(banned)]}))
"""


@dataclass(frozen=True)
class Start:
    """One process.

    Args:
        seconds: from the call of load or optimize to the first token; with_imports: from before torch is imported.
        tokens: prompt and output.
        compilers: modules of transformers and of a compiler that were imported.
    """

    seconds: float
    with_imports: float
    tokens: list[int]
    compile: str
    compilers: list[str]


def loading(folder: str, prompt: Sequence[int], *, compile: str | None = None, new_tokens: int = 8) -> Start:
    """Load an artifact in a fresh process."""
    return _run({"folder": folder, "compile": compile, "prompt": list(prompt), "new_tokens": new_tokens})


def optimising(
    artifact: Any, source: str, prompt: Sequence[int], *, compile: str = "inductor", new_tokens: int = 8
) -> Start:
    """Optimise what an artifact was exported from, for its smallest shape, in a fresh process."""
    shape = min((program.shape for program in artifact.programs), key=lambda shape: (shape.batch_size, shape.max_length))
    asked = {
        "source": source, "kind": artifact.speculation["kind"], "options": artifact.speculation["options"], "prompt": list(prompt),
        "new_tokens": new_tokens, "device": str(artifact.device), "dtype": dtype_name(artifact.facts.dtype),
        "optimize": {
            "compile": compile, "max_batch_size": shape.batch_size, "max_length": shape.max_length, "page_size": shape.page_size,
            "exact": shape.is_exact and shape.tree.num_nodes, "passes": [f"-{name}" for name in sorted(artifact.left_out)],
            "index_quantization": shape.index_quantization,
        },
    }  # fmt: skip
    return _run(asked)


def _run(asked: dict[str, Any]) -> Start:
    with tempfile.TemporaryDirectory() as empty:
        ran = subprocess.run([sys.executable, "-c", _SCRIPT], input=json.dumps(asked), capture_output=True, text=True, check=False,
                             env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty, "TRITON_CACHE_DIR": empty})  # fmt: skip
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ArtifactError(f"the process that was timed failed: {reason[:160]}", at=asked.get("folder") or asked["source"],
                            where="autospec bench --start-up", help="autospec generate tells more")  # fmt: skip
    return Start(**json.loads(ran.stdout.splitlines()[-1]))
