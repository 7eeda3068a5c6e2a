"""The options of `autospec train`. Nothing here imports torch: the command line reads it before it knows the verb."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autospec.training.train import TrainingOptions

EXAMPLE = "autospec train {} bundled:target --data notes.txt chats.jsonl --out my-head"
NOT_OPTIONS = ("run", "kind")


def add_arguments(train: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of `train eagle3`, `train medusa` and `train mtp`."""
    kinds = train.add_subparsers(title="heads", required=True, metavar="HEAD")
    found = {}
    for kind, help_text in (
        ("eagle3", "an EAGLE-3 head, by training-time test"),
        ("medusa", "Medusa heads"),
        ("mtp", "modules for multi-token prediction, each a layer of the target's own kind"),
    ):
        parser = kinds.add_parser(
            kind, help=help_text, description=help_text, epilog=f"example:\n  {EXAMPLE.format(kind)}",
        )  # fmt: skip
        _common(parser)
        {"eagle3": _eagle3, "medusa": _medusa, "mtp": _mtp}[kind](parser)
        found[kind] = parser
    return found


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="path or hub id of a causal LM; bundled:target is the demo model")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE",
                        help="text files (a document each) and .jsonl files (a text or messages in each line)")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the head goes, with its checkpoints and report")
    add = parser.add_argument
    add("--length", type=int, default=1024, help="tokens per row (default 1024)")
    add("--held-out", type=float, default=0.05, help="share of the documents to evaluate on (default 0.05)")
    add("--self-generated", type=float, default=0.0, metavar="SHARE",
        help="share of the rows that the target writes after cuts of the text (default 0; 0.7 helps a small head)")  # fmt: skip
    add("--epochs", type=float, default=2.0, help="how often the rows are seen (default 2)")
    add("--steps", type=int, default=None, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, default=8, help="rows per optimizer step (default 8)")
    add("--accumulate", type=int, default=1, help="pieces a batch is run in, to save memory (default 1)")
    add("--learning-rate", type=float, default=1e-4, help="peak (default 1e-4; 1e-3 for a head below 10M parameters)")
    add("--warmup", type=int, default=None, help="steps of warm-up before the cosine (default: a tenth, at most 100)")
    add("--clip", type=float, default=0.5, help="largest gradient norm (default 0.5)")
    add("--decay", type=float, default=0.8, help="weight of each draft token relative to the one before (default 0.8)")
    add("--precision", default="auto", help="auto, bf16 or float32 (default auto: bf16 on a GPU that has it)")
    add("--eval-every", type=int, default=None, help="steps between evaluations (default: a tenth of all)")
    add("--save-every", type=int, default=None, help="steps between checkpoints, 0 for none (default: a tenth of all)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--seed", type=int, default=0)
    add("--device", default=None, help="cpu or cuda (default: cuda if there is one)")


def _eagle3(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tap-after", type=int, nargs="+", default=None, metavar="LAYER",
                        help="0-based layers that are read (default 1, L/2-1, L-4; below 7 layers 0, (L-1)//2, L-1)")  # fmt: skip
    parser.add_argument("--draft-vocab-size", type=int, default=None, help="default 32000, or all of a smaller vocabulary")
    parser.add_argument("--intermediate-size", type=int, default=None, help="of the MLP (default: the target's)")
    parser.add_argument("--unrolled-steps", type=int, default=7, help="draft tokens that training looks ahead (default 7)")


def _medusa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-heads", type=int, default=4, help="draft tokens (default 4)")
    parser.add_argument("--num-layers", type=int, default=1, help="residual blocks per head (default 1)")
    parser.add_argument("--share-lm-head", action="store_true", help="train the blocks only, before the target's lm_head")
    parser.add_argument("--hard", action="store_true", help="learn the text's tokens, not the target's distribution")


def _mtp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-modules", type=int, default=1,
                        help="module i guesses draft token i, the first one again beyond the last (default 1)")  # fmt: skip
    parser.add_argument("--unrolled-steps", type=int, default=3, help="draft tokens that training looks ahead (default 3)")
    parser.add_argument("--start-from", default=None, metavar="CHECKPOINT",
                        help="go on with the modules of a checkpoint, such as the model's own, or of an earlier --out")  # fmt: skip


def options_of(asked: Any) -> TrainingOptions:
    """The options as one value."""
    from autospec.training.train import TrainingOptions

    values = {name: value for name, value in vars(asked).items() if name not in NOT_OPTIONS}
    if values.get("tap_after") is not None:
        values["tap_after"] = tuple(values["tap_after"])
    return TrainingOptions(**values)
