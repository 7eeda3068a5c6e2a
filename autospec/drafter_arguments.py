"""The options of a command line that name a model and a drafter."""

from __future__ import annotations

import argparse
import json
from typing import Any

from autospec.errors import OptionError


def model_arguments(parser: argparse.ArgumentParser, *, or_artifact: bool = False, compiles: bool = True) -> None:
    """What verbs over a model and a drafter have in common.

    Args:
        or_artifact: an exported folder may be given instead, which brings its drafter with it.
        compiles: the verb runs the model.
    """
    known = "path or hub id of a causal LM; bundled:target is the demo model"
    parser.add_argument("model", help=f"{known}; or a folder that `autospec export` wrote" if or_artifact else known)
    parser.add_argument(
        "--speculation", default=None if or_artifact else "auto",
        help="auto, ngram, none, draft:MODEL for an external draft model, eagle3:HEAD, medusa:HEAD, mtp:HEAD, or mtp for "
        "the modules in the model's own checkpoint (default auto)",
    )
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"),
                        help="of the weights (default: the checkpoint's)")  # fmt: skip
    parser.add_argument("--max-draft-len", type=int, default=None, help="draft tokens per step, or levels of a tree")
    parser.add_argument("--eagle-choices", default=None, metavar="JSON",
                        help="a static draft tree as paths of child ranks, such as [[0],[1],[0,0]]")  # fmt: skip
    parser.add_argument("--dynamic-tree-max-topk", type=int, default=None, metavar="K", help="grow a dynamic draft tree")
    parser.add_argument("--max-total-draft-tokens", type=int, default=None, metavar="M", help="nodes of a dynamic tree")
    parser.add_argument("--index-quantization", default=None, choices=("fp8",),
                        help="keep the keys by which sparse attention selects in 8 bits; may change tokens")  # fmt: skip
    if compiles:
        how = ("inductor", "eager", "aot") if or_artifact else ("inductor", "eager")
        packaged = "; aot: what an artifact was packaged with" if or_artifact else ""
        parser.add_argument("--compile", default=None if or_artifact else "inductor", choices=how,
                            help=f"inductor (default) or eager{packaged}")  # fmt: skip
    if or_artifact:
        parser.add_argument("--fallback", action="store_true",
                            help="where an artifact's packages are for another machine, use its portable graphs")  # fmt: skip
        parser.add_argument("--device", default=None, help="cpu or cuda, for an artifact (default: where it was exported)")
        parser.add_argument("--weights", default=None, metavar="DIR", help="checkpoint of an artifact of graphs only")


def speculation_of(asked: argparse.Namespace) -> Any:
    """What `autospec.optimize` takes, from the options of `model_arguments`."""
    from autospec.config import DraftTargetConfig, Eagle3Config, MedusaConfig, MTPConfig, NGramConfig  # imports torch
    from autospec.model_zoo.bundled import resolve

    names = ("max_draft_len", "eagle_choices", "dynamic_tree_max_topk", "max_total_draft_tokens")
    given: dict[str, Any] = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if "eagle_choices" in given:
        given["eagle_choices"] = _paths(given["eagle_choices"])
    chosen = "auto" if asked.speculation is None else asked.speculation
    kind, _, source = chosen.partition(":")
    ranking = {"draft": DraftTargetConfig, "eagle3": Eagle3Config, "medusa": MedusaConfig, "mtp": MTPConfig}
    if chosen == "mtp":
        return MTPConfig(**given)
    if kind in ranking and not source:
        raise OptionError(f"--speculation {kind} needs the draft's folder or hub id", at=f"--speculation {chosen}",
                          where="autospec", help=f"write {kind}:PATH, such as eagle3:bundled:eagle3")  # fmt: skip
    if kind in ranking:
        return ranking[kind](resolve(source), **given)
    if chosen == "ngram" and set(given) <= {"max_draft_len"}:
        return NGramConfig(**given)
    if given:
        option = "--" + next(name for name in given if name != "max_draft_len" or len(given) == 1).replace("_", "-")
        raise OptionError(f"{option} needs a drafter that takes it, not '{chosen}'", at=option,
                          where=f"--speculation {chosen}",
                          help="add --speculation draft:MODEL, eagle3:HEAD, medusa:HEAD or mtp")  # fmt: skip
    return None if chosen == "none" else chosen


def _paths(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"--eagle-choices is no JSON: {error}", at=text[:60], where="autospec",
                          help="for example --eagle-choices '[[0],[1],[0,0]]'") from None  # fmt: skip
