"""The command line: verbs over models, printing what can be pasted back.

Errors that a user can cause exit with status 2 and say what to do.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from autospec.errors import AutospecError, CheckpointError, OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    # torch's own pytree and export code warns about itself on every copy; nobody at a command line can act on it.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        if given and given[0] in _WITH_OWN_OPTIONS:
            return _WITH_OWN_OPTIONS[given[0]][0](given[1:])
        asked = parser.parse_args(given)
        return int(asked.run(asked) or 0)
    except AutospecError as error:
        print(f"autospec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autospec: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autospec", description="Lossless speculative decoding of Hugging Face causal LMs.", allow_abbrev=False
    )
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
    model_arguments(generate)
    generate.add_argument("--prompt", required=True, help="text to complete")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)

    explain = _verb(verbs, "explain", _explain, "print what every pass did, and why not",
                    "autospec explain bundled:target --speculation ngram --compile eager")  # fmt: skip
    model_arguments(explain)

    _verb(verbs, "passes", _passes, "list the passes and their options", "autospec passes")

    _train_arguments(verbs)

    for name, (_, help_text) in _WITH_OWN_OPTIONS.items():
        verbs.add_parser(name, help=help_text)
    return parser


def _verb(verbs: Any, name: str, run: Any, help_text: str, example: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name, help=help_text, description=help_text, epilog=f"example:\n  {example}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """What verbs over a model and a drafter have in common."""
    parser.add_argument("model", help="path or hub id of a causal LM; bundled:target is the demo model")
    parser.add_argument(
        "--speculation", default="auto",
        help="auto, ngram, none, draft:MODEL for an external draft model, eagle3:HEAD or medusa:HEAD (default auto)",
    )
    parser.add_argument("--max-draft-len", type=int, default=None, help="draft tokens per step, or levels of a tree")
    parser.add_argument("--eagle-choices", default=None, metavar="JSON",
                        help="a static draft tree as paths of child ranks, such as [[0],[1],[0,0]]")  # fmt: skip
    parser.add_argument("--dynamic-tree-max-topk", type=int, default=None, metavar="K", help="grow a dynamic draft tree")
    parser.add_argument("--max-total-draft-tokens", type=int, default=None, metavar="M", help="nodes of a dynamic tree")
    parser.add_argument("--compile", default="inductor", choices=("inductor", "eager"))


def _paths(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"--eagle-choices is no JSON: {error}", at=text[:60], where="autospec",
                          help="for example --eagle-choices '[[0],[1],[0,0]]'") from None  # fmt: skip


def _train_arguments(verbs: Any) -> None:
    from autospec.training.arguments import add_arguments

    train = verbs.add_parser("train", help="train a draft head for a model on your own text", allow_abbrev=False)
    for kind, parser in add_arguments(train).items():
        parser.set_defaults(run=_train, kind=kind)


def speculation_of(asked: argparse.Namespace) -> Any:
    """What `autospec.optimize` takes, from the options of `model_arguments`."""
    from autospec.config import DraftTargetConfig, Eagle3Config, MedusaConfig, NGramConfig
    from autospec.model_zoo.bundled import resolve

    names = ("max_draft_len", "eagle_choices", "dynamic_tree_max_topk", "max_total_draft_tokens")
    given: dict[str, Any] = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if "eagle_choices" in given:
        given["eagle_choices"] = _paths(given["eagle_choices"])
    kind, _, source = asked.speculation.partition(":")
    ranking = {"draft": DraftTargetConfig, "eagle3": Eagle3Config, "medusa": MedusaConfig}
    if kind in ranking and not source:
        raise OptionError(f"--speculation {kind} needs the draft's folder or hub id", at=f"--speculation {asked.speculation}",
                          where="autospec", help=f"write {kind}:PATH, such as eagle3:bundled:eagle3")  # fmt: skip
    if kind in ranking:
        return ranking[kind](resolve(source), **given)
    if asked.speculation == "ngram" and set(given) <= {"max_draft_len"}:
        return NGramConfig(**given)
    if given:
        option = "--" + next(name for name in given if name != "max_draft_len" or len(given) == 1).replace("_", "-")
        raise OptionError(f"{option} needs a drafter that takes it, not '{asked.speculation}'", at=option,
                          where=f"--speculation {asked.speculation}",
                          help="add --speculation draft:MODEL, eagle3:HEAD or medusa:HEAD")  # fmt: skip
    return None if asked.speculation == "none" else asked.speculation


def _optimized(asked: argparse.Namespace) -> Any:
    from autospec.api import optimize
    from autospec.model_zoo.bundled import resolve

    fast = optimize(resolve(asked.model), speculation_of(asked), compile=asked.compile)
    fast.show_progress = True
    return fast


def _generate(asked: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from autospec.model_zoo.bundled import resolve

    if asked.temperature < 0:
        raise OptionError(f"--temperature must not be negative, got {asked.temperature}", at="--temperature",
                          where="autospec generate", help="0 decodes greedily")  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(asked.model))
    except (OSError, ValueError) as error:
        raise CheckpointError("the model's tokenizer cannot be loaded", at=asked.model, where="autospec generate",
                              help=f"text needs one: {(str(error).splitlines() or [''])[0]:.120}") from error  # fmt: skip
    fast = _optimized(asked)
    inputs = tokenizer(asked.prompt, return_tensors="pt")
    sampling: dict[str, Any] = {"do_sample": False}
    if asked.temperature > 0:
        sampling = {"do_sample": True, "temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p}
    output = fast.generate(
        inputs["input_ids"], inputs.get("attention_mask"), max_new_tokens=asked.max_new_tokens, seed=asked.seed, **sampling
    )
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    print(fast.metrics, file=sys.stderr)
    return 0


def _explain(asked: argparse.Namespace) -> int:
    print(_optimized(asked).explain())
    return 0


def _passes(asked: argparse.Namespace) -> int:
    from autospec.report import list_passes

    print("\n".join(list_passes()))
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
