"""`autospec bench DIR`: an exported artifact on this machine, beside transformers' generate and plain decoding.

Those two need the model that was exported; where it is not here, the artifact is measured alone, and the report says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from autospec.arguments import Parser, check_at_least, check_files, sizes
from autospec.artifact.manifest import is_artifact
from autospec.benching import grid, grid_report, startup
from autospec.benching.contenders import Contender, Ours, Transformers
from autospec.benching.prompts import read_prompts
from autospec.errors import OptionError
from autospec.loaded import LoadedModel, load
from autospec.model_zoo.bundled import resolve
from autospec.runtime.text import load_tokenizer

WHERE = "autospec bench DIR"


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Whether what is to be measured is an artifact."""
    return any(is_artifact(word) for word in arguments)


def parser() -> argparse.ArgumentParser:
    """The options of `autospec bench DIR`."""
    made = Parser(
        prog="autospec bench", description=__doc__.split("\n", 1)[0],
        epilog="example:\n  autospec bench exported --batch-sizes 1,4 --prompt-lengths 32 --json grid.json --picture grid.png",
    )  # fmt: skip
    made.add_argument("model", help="a folder that `autospec export` wrote")
    made.add_argument("--compile", default=None, choices=("aot", "inductor", "eager"), help="as in autospec generate")
    made.add_argument("--fallback", action="store_true", help="use the portable graphs where the packages do not fit")
    made.add_argument("--device", default=None, help="cpu or cuda (default: where it was exported)")
    made.add_argument("--weights", default=None, metavar="DIR", help="checkpoint of an artifact of graphs only")
    made.add_argument("--against", default=None, metavar="MODEL",
                      help="the model for transformers' generate and plain decoding, or none (default: what was exported, if it "
                           "is here)")  # fmt: skip
    made.add_argument("--prompts", type=Path, default=None, metavar="FILE",
                      help="one prompt a line; .jsonl as in autospec bench MODEL (default: the bundled ones)")  # fmt: skip
    made.add_argument("--batch-sizes", type=sizes, default=(1,), metavar="B,B,...",
                      help="rows at once (default 1); more than were exported run in waves")  # fmt: skip
    made.add_argument("--prompt-lengths", type=sizes, default=None, metavar="S,S,...",
                      help="in tokens, cut from the prompts' text (default: the prompts as they are)")  # fmt: skip
    made.add_argument("--acceptance", default=None, metavar="X", help="refused: the graphs of an artifact verify for real")
    made.add_argument("--new-tokens", type=int, default=64, help="tokens per prompt (default 64)")
    made.add_argument("--repeats", type=int, default=3, help="timed runs of each prompt; the median counts (default 3)")
    made.add_argument("--start-up", action="store_true",
                      help="also: load it in a fresh process, and optimise the model from scratch in another")  # fmt: skip
    made.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all numbers; explain --bench draws them")
    made.add_argument("--picture", type=Path, default=None, metavar="FILE", help="draw them")
    return made


def run(arguments: Sequence[str]) -> int:
    """Measure, print, save; 0 if all tokens are the same."""
    asked = parser().parse_args(arguments)
    _check(asked)
    start = time.perf_counter()
    fast = load(asked.model, compile=asked.compile, device=asked.device, weights=asked.weights, fallback=asked.fallback)
    prompts = read_prompts(asked.prompts, lambda: load_tokenizer(asked.model), WHERE)
    cells = [(batch, length) for length in asked.prompt_lengths or (None,) for batch in asked.batch_sizes]
    room = max(program.shape.max_length for program in fast.artifact.programs)
    if asked.prompt_lengths is None:
        prompts = [prompt for prompt in prompts if len(prompt) + asked.new_tokens <= room] or prompts
    grid.check_room(prompts, cells, asked.new_tokens, room, WHERE)
    fast.generate([prompts[0]], max_new_tokens=1, do_sample=False, **grid.WITHOUT_END)
    title: dict[str, Any] = {
        "model": asked.model, "dtype": str(fast.target.facts.dtype).removeprefix("torch."), "device": str(fast.target.facts.device),
        "torch": f"torch {torch.__version__}", "compile": fast.compile, "prompts": f"{len(prompts)} prompts",
        "new_tokens": f"{asked.new_tokens} new tokens each",
        **({"index_keys": "index keys in float8"} if fast.artifact.programs[0].shape.index_quantization else {}),
    }  # fmt: skip
    print(", ".join(map(str, title.values())))
    title["load_to_first_token_seconds"] = time.perf_counter() - start
    print(f"loading to the first token took {title['load_to_first_token_seconds']:.2f} s, in this process")
    source, reason = _source(asked.against, fast)
    if reason:
        print(f"measured alone, without transformers' generate and plain decoding: {reason}")
    if asked.start_up:
        title |= _start_up(asked, fast, source, reason, prompts[0])
    quantization = fast.artifact.programs[0].shape.index_quantization
    contenders = [*(_others(source, fast, quantization) if source else []), Ours(f"artifact, {fast.compile}", fast)]
    options = {"max_new_tokens": asked.new_tokens, "do_sample": False}
    found = grid.measure(contenders, prompts, cells, options, asked.repeats, is_quantized=quantization is not None)
    return grid_report.report(found, title, asked.json, asked.picture)


def _check(asked: argparse.Namespace) -> None:
    """Refuse what could only fail after minutes."""
    check_at_least(asked, {"new_tokens": 1, "repeats": 1}, WHERE)
    check_files({"--json": asked.json, "--picture": asked.picture}, WHERE)
    if asked.acceptance is not None:
        raise OptionError("synthetic acceptance is built into a program, and an artifact has none", at="--acceptance", where=WHERE,
                          help="autospec bench MODEL --acceptance X measures the model itself")  # fmt: skip


def _source(asked: str | None, fast: LoadedModel) -> tuple[str | None, str]:
    """The model behind an artifact, and why there is none."""
    if asked == "none":
        return None, "as asked for"
    if importlib.util.find_spec("transformers") is None:
        return None, "transformers is not installed"
    source = resolve(asked or fast.sources.get("target", ""))
    if asked is not None or (Path(source) / "config.json").is_file():
        return source, ""
    return None, f"the model that was exported, '{source}', is not here; name it with --against MODEL"


def _others(source: str, fast: LoadedModel, quantization: str | None) -> list[Contender]:
    """transformers' generate and plain decoding of the same model, in the artifact's dtype and on its device, its index keys as
    the artifact keeps them."""
    from autospec.api import optimize
    from autospec.loading import load_model

    facts = fast.target.facts
    module = load_model(source, "--against").to(device=facts.device, dtype=facts.dtype)
    how = "inductor" if fast.compile == "aot" else fast.compile
    plain = optimize(module, None, compile=how, index_quantization=quantization)
    return [Transformers(module), Ours(grid.PLAIN, plain)]


def _start_up(asked: argparse.Namespace, fast: LoadedModel, source: str | None, reason: str, prompt: list[int]) -> dict[str, Any]:
    """Both starts, one after the other, and how they compare."""
    if source is None:
        raise OptionError(f"--start-up optimises the model from scratch, too: {reason}", at="--start-up", where=WHERE,
                          help="name the model with --against MODEL")  # fmt: skip
    loaded = startup.loading(asked.model, prompt, compile=fast.compile)
    scratch = startup.optimising(fast.artifact, source, prompt, compile="eager" if fast.compile == "eager" else "inductor")
    print(f"to the first token, each in a fresh process: loading {loaded.seconds:.2f} s, optimising from scratch "
          f"{scratch.seconds:.2f} s ({scratch.seconds / loaded.seconds:.1f} times as long); with imports "
          f"{loaded.with_imports:.2f} s and {scratch.with_imports:.2f} s"
          + ("" if loaded.tokens == scratch.tokens else "; their tokens differ"))  # fmt: skip
    return {"start_up_seconds": {
        "loading": loaded.seconds, "optimising": scratch.seconds,
        "loading_with_imports": loaded.with_imports, "optimising_with_imports": scratch.with_imports,
    }}  # fmt: skip
