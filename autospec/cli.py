"""The command line: verbs over models, printing what can be pasted back.

Errors that a user can cause exit with status 2 and say what to do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autospec.arguments import Parser, check_files, check_temperature
from autospec.drafter_arguments import model_arguments, speculation_of
from autospec.errors import AutospecError, OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            # torch's own pytree and export code warns about itself on every copy; nobody at a command line can act on it.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.showwarning = _warn
            if given and given[0] in _WITH_OWN_OPTIONS:
                return _WITH_OWN_OPTIONS[given[0]][0](given[1:])
            asked = _parser().parse_args(given)
            return int(asked.run(asked) or 0)
    except AutospecError as error:
        print(f"autospec: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read what was printed has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is the rest an error when the process ends
        return 141
    except KeyboardInterrupt:
        print("autospec: interrupted", file=sys.stderr)
        return 130


def _warn(message: Warning | str, *place: object, **more: object) -> None:
    """A warning without the line of code that gave it."""
    print(f"autospec: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="autospec", description="Lossless speculative decoding of Hugging Face causal LMs.",
        epilog="example:\n  autospec generate bundled:target --prompt 'def add(a, b):' --max-new-tokens 32\n\n"
               "autospec COMMAND --help says more of each, with an example.",
    )  # fmt: skip
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = _verb(verbs, "demo", _demo, "optimise the bundled code model and compare it with transformers",
                 "autospec demo --new-tokens 64")  # fmt: skip
    demo.add_argument("--new-tokens", type=int, default=128, help="tokens per prompt (default 128)")
    demo.add_argument("--prompts", type=int, default=6, help="how many of the bundled prompts (default 6)")
    demo.add_argument("--repeats", type=int, default=3, help="timed runs of each prompt; the median counts (default 3)")
    demo.add_argument("--compile", default="inductor", choices=("inductor", "eager"))
    demo.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    demo.add_argument("--picture", default="demo.png", metavar="FILE", help="where the picture goes (default demo.png)")

    generate = _verb(verbs, "generate", _generate, "complete a prompt",
                     "autospec generate bundled:target --prompt 'def add(a, b):' --max-new-tokens 32")  # fmt: skip
    model_arguments(generate, or_artifact=True)
    generate.add_argument("--prompt", required=True, help="text to complete")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)

    _export_arguments(verbs)

    explain = _verb(verbs, "explain", _explain, "print what every pass did, and why not",
                    "autospec explain bundled:target --speculation ngram --compile eager --html explained.html")  # fmt: skip
    model_arguments(explain, or_artifact=True)
    explain.add_argument("--html", default=None, metavar="FILE", help="also write a page with every pass's diff")
    explain.add_argument("--bench", default=None, metavar="JSON", help="what `autospec bench --json` wrote, for the page's charts")

    _verb(verbs, "passes", _passes, "list the passes and their options", "autospec passes")

    run = _verb(verbs, "run", _run, "run passes on a model's captured graph, for those who write one",
                "autospec run 'specialize-shapes{batch_size=1, q_len=4}, fold-noops' bundled:draft --dump dumps")  # fmt: skip
    run.add_argument("passes", help="name{option=value, ...}, name, ...; `autospec passes` lists them")
    run.add_argument("model", help="path or hub id of a causal LM; bundled:target is the demo model")
    run.add_argument("--dump", default=None, metavar="DIR", help="write NN_pass.{before,after}.txt for every pass")
    run.add_argument("--load", default=None, metavar="FILE", help="a Python file with passes of your own")
    run.add_argument("--print", action="store_true", help="print the graph as it is in the end")

    _train_arguments(verbs)

    for name, (_, help_text) in _WITH_OWN_OPTIONS.items():
        verbs.add_parser(name, help=help_text)
    return parser


def _verb(verbs: Any, name: str, run: Any, help_text: str, example: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name, help=help_text, description=help_text, epilog=f"example:\n  {example}"
    )
    parser.set_defaults(run=run)
    return parser


def _export_arguments(verbs: Any) -> None:
    export = _verb(verbs, "export", _export, "write a folder that runs without transformers and the model's code",
                   "autospec export bundled:target --speculation ngram -o exported --force\n"
                   "  autospec generate exported --prompt 'def add(a, b):' --compile eager")  # fmt: skip
    model_arguments(export, compiles=False)
    export.add_argument("-o", "--output", required=True, metavar="DIR", help="the folder to write")
    export.add_argument("--batch-sizes", default="1", metavar="LIST", help="rows at once, such as 1,4 (default 1)")
    export.add_argument("--max-length", type=int, default=None, help="tokens per row, prompt and output (default 512)")
    export.add_argument("--page-size", type=int, default=None, help="cache rows per page")
    export.add_argument("--decoding", default="both", choices=("both", "greedy", "sampling"),
                        help="programs that sample, greedy ones, or both (default)")  # fmt: skip
    export.add_argument("--compile", default=None, choices=("aot",),
                        help="also package the graphs with AOTInductor for this kind of machine")  # fmt: skip
    export.add_argument("--meta", action="store_true",
                        help="never load the weights: capture on meta, then copy them tensor by tensor")  # fmt: skip
    export.add_argument("--force", action="store_true", help="replace an artifact that stands there")


def _train_arguments(verbs: Any) -> None:
    from autospec.training.arguments import add_arguments

    train = verbs.add_parser("train", help="train a draft head for a model on your own text",
                             epilog="example:\n  autospec train eagle3 bundled:target --data notes.txt --out my-head")  # fmt: skip
    for kind, parser in add_arguments(train).items():
        parser.set_defaults(run=_train, kind=kind)


def _model(asked: argparse.Namespace) -> Any:
    """The model that a verb was given: its folder or hub id, or loaded, where another dtype is asked for."""
    from autospec.model_zoo.bundled import resolve

    if asked.dtype is None:
        return resolve(asked.model)
    import torch

    from autospec.loading import load_model

    return load_model(resolve(asked.model), "model").to(dtype=getattr(torch, asked.dtype))


def _optimized(asked: argparse.Namespace) -> Any:
    """The model that a verb was given, optimised just now or loaded from an artifact."""
    from autospec.artifact.manifest import is_artifact

    if is_artifact(asked.model):
        fast = _loaded(asked)
    else:
        from autospec.api import optimize

        for option in ("fallback", "device", "weights"):
            if getattr(asked, option):
                raise OptionError(f"--{option} is for a folder that `autospec export` wrote", at=f"--{option}",
                                  where=asked.model, help="leave it out")  # fmt: skip
        if asked.compile == "aot":
            raise OptionError("packages belong to an artifact", at="--compile aot", where=asked.model,
                              help=f"run `autospec export {asked.model} --compile aot -o DIR` first")  # fmt: skip
        fast = optimize(
            _model(asked), speculation_of(asked), compile=asked.compile or "inductor", index_quantization=asked.index_quantization
        )
    fast.show_progress = True
    return fast


def _loaded(asked: argparse.Namespace) -> Any:
    from autospec.loaded import load

    drafting = ("speculation", "max_draft_len", "eagle_choices", "dynamic_tree_max_topk", "max_total_draft_tokens")
    if asked.dtype is not None:
        raise OptionError("an artifact has the dtype it was exported with", at="--dtype", where=asked.model,
                          help=f"leave it out, or export the model again with --dtype {asked.dtype}")  # fmt: skip
    if asked.index_quantization is not None:
        raise OptionError("an artifact has the index keys it was exported with", at="--index-quantization", where=asked.model,
                          help="leave it out, or export the model again")  # fmt: skip
    for name in drafting:
        if getattr(asked, name) is not None:
            option = "--" + name.replace("_", "-")
            raise OptionError("an artifact has the drafter it was exported with", at=option, where=asked.model,
                              help=f"leave {option} out, or export the model again")  # fmt: skip
    return load(asked.model, compile=asked.compile, device=asked.device, weights=asked.weights, fallback=asked.fallback)


def _export(asked: argparse.Namespace) -> int:
    from autospec.api import export

    if asked.dtype is not None and asked.meta:
        raise OptionError("--meta copies weights as they are stored", at="--dtype", where="autospec export",
                          help="leave out --meta or --dtype")  # fmt: skip
    try:
        sizes = [int(word) for word in asked.batch_sizes.split(",")]
    except ValueError:
        raise OptionError(f"--batch-sizes must be numbers, got {asked.batch_sizes!r}", at="--batch-sizes",
                          where="autospec export", help="for example --batch-sizes 1,4") from None  # fmt: skip
    path = export(
        _model(asked), asked.output, speculation_of(asked), batch_sizes=sizes, max_length=asked.max_length,
        sampling={"both": None, "greedy": False, "sampling": True}[asked.decoding], compile=asked.compile,
        overwrite=asked.force, page_size=asked.page_size, meta=asked.meta, progress=True,
        index_quantization=asked.index_quantization,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"wrote {path}: {size / 1e6:.1f} MB")
    print(f"try: autospec generate {path} --prompt 'def add(a, b):'")
    return 0


def _tokenizer(asked: argparse.Namespace) -> Any:
    """encode(text) -> [1, S] ids, decode(ids) -> text; an artifact's needs no transformers."""
    from autospec.artifact.manifest import is_artifact

    if is_artifact(asked.model):
        from autospec.runtime.text import load_tokenizer

        return load_tokenizer(asked.model)
    from autospec.loading import tokenizer_of

    return tokenizer_of(asked.model, "autospec generate")


def _generate(asked: argparse.Namespace) -> int:
    check_temperature(asked.temperature, "autospec generate")
    if asked.temperature == 0 and (asked.top_k != 0 or asked.top_p != 1.0):
        warnings.warn("--top-k and --top-p have no effect on greedy decoding: add --temperature", stacklevel=1)
    tokenizer = _tokenizer(asked)
    fast = _optimized(asked)
    prompt = tokenizer.encode(asked.prompt)
    sampling: dict[str, Any] = {"do_sample": False}
    if asked.temperature > 0:
        sampling = {"do_sample": True, "temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
    output = fast.generate([prompt], max_new_tokens=asked.max_new_tokens, seed=asked.seed, **sampling)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(fast.metrics, file=sys.stderr)
    return 0


def _explain(asked: argparse.Namespace) -> int:
    from autospec import debug
    from autospec.report_html import page

    check_files({"--html": asked.html}, "autospec explain")
    if asked.bench is not None and asked.html is None:
        raise OptionError("--bench is drawn on the page of --html", at="--bench", where="autospec explain",
                          help="add --html FILE")  # fmt: skip
    bench = None if asked.bench is None else _read_bench(asked.bench)
    with debug.keeping() as texts:
        fast = _optimized(asked)
        print(fast.explain())
    if asked.html is not None:
        artifact = getattr(fast, "artifact", None)
        kept = [*artifact.texts(), *texts] if artifact is not None else texts
        _write(asked.html, page(fast.target, fast.draft, fast.program, kept, bench))
        print(f"wrote {asked.html}", file=sys.stderr)
    return 0


def _read_bench(path: str) -> Any:
    from autospec.report_html import charts

    try:
        with open(path, encoding="utf-8") as file:
            bench = json.load(file)
        charts(bench)  # what cannot be drawn is told before a model is built
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise OptionError(f"--bench needs what `autospec bench --json` wrote: {type(error).__name__}", at=path,
                          where="autospec explain", help="run autospec bench MODEL --json bench.json") from None  # fmt: skip
    return bench


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OptionError(f"the file cannot be written: {error.strerror}", at=path, where="autospec explain",
                          help="name a file in a folder that exists") from None  # fmt: skip


def _passes(asked: argparse.Namespace) -> int:
    from autospec.report import list_passes

    print("\n".join(list_passes()))
    return 0


def _run(asked: argparse.Namespace) -> int:
    from autospec.assemble import capture_model, copy_graph
    from autospec.debug import DebugOptions
    from autospec.ir.passes import Stage
    from autospec.ir.runner import run_stages
    from autospec.ir.text import graph_text
    from autospec.loading import check_causal_lm, load_model
    from autospec.pass_list import parse_passes, passes_in
    from autospec.report import pass_table

    passes = parse_passes(asked.passes, passes_in(asked.load) if asked.load else None)
    model = load_model(asked.model, "model")
    check_causal_lm(model)
    graph = copy_graph(capture_model(model).graph)
    options = DebugOptions(dump=asked.dump is not None, verify=True, directory=Path(asked.dump or "."))
    if asked.dump is not None:
        try:
            options.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"the folder cannot be made: {error.strerror}", at=f"--dump {asked.dump}", where="autospec run",
                              help="name a folder of yours") from None  # fmt: skip
    try:
        records = run_stages(graph, [Stage("run", passes)], graph_name="run", debug=options)
    except AssertionError as error:
        raise OptionError(f"a pass broke a promise: {str(error)[:200]}", at=asked.passes[:60], where="autospec run",
                          help="an earlier pass is missing, or this one reports other than what it did") from error  # fmt: skip
    except AutospecError:
        raise
    except Exception as error:
        if asked.load:  # whoever writes a pass wants to see where it failed
            traceback.print_exc()
        told = f"{type(error).__name__} {' '.join(getattr(error, '__notes__', ()))}"
        raise OptionError(f"{told}: {' '.join(str(error).split())[:200]}", at=asked.passes[:60], where="autospec run",
                          help="its options may be wrong, or an earlier pass is missing") from error  # fmt: skip
    print("\n".join(pass_table(records)))
    if asked.print:
        print(graph_text(graph), end="")
    if asked.dump is not None:
        print(f"wrote {asked.dump}/run: the graph before and after each pass")
    return 0


def _demo(asked: argparse.Namespace) -> int:
    from autospec.demo import run_demo

    return run_demo(
        new_tokens=asked.new_tokens, num_prompts=asked.prompts, repeats=asked.repeats, compile=asked.compile,
        device=asked.device, picture=asked.picture,
    )  # fmt: skip


def _train(asked: argparse.Namespace) -> int:
    from autospec.training.arguments import options_of
    from autospec.training.train import train

    record = train(asked.kind, options_of(asked))
    agreement = " ".join(f"{100 * share:.0f}" for share in record["agreement"])
    print(f"{record['measured_on']}: loss {record['loss']:.3f}, agreement {agreement} %, "
          f"acceptance length of a chain {record['acceptance_length']:.2f}")  # fmt: skip
    print(f"wrote {asked.out}: the head, training.json and training.png")
    return 0


def _check_draft(rest: Sequence[str]) -> int:
    from autospec.check_draft import run

    return run(rest)


def _bench(rest: Sequence[str]) -> int:
    from autospec.bench import run

    return run(rest)


def _zoo(rest: Sequence[str]) -> int:
    from autospec.zoo import main as zoo_main

    return int(zoo_main(rest) or 0)


# Verbs that parse their options themselves: argparse's REMAINDER does not take a first word that starts with a dash.
_WITH_OWN_OPTIONS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "bench": (_bench, "measure drafters against plain decoding, and draw it"),
    "check-draft": (_check_draft, "what a draft head's files say, and how often it agrees"),
    "zoo": (_zoo, "try every causal-LM type that transformers knows"),
}


if __name__ == "__main__":
    sys.exit(main())
