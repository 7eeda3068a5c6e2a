"""`exact=True`: what it asks of a configuration and of a model.

Steps of one width run the same kernels with the same tiles, whoever drafts, and attention in slot order (passes/fix_order.py). A
token's numbers then depend on its own row alone: as a draft that is verified, or as the only token of a plain step.
"""

from __future__ import annotations

from autospec.config import AutoConfig, Speculation, tree_of
from autospec.errors import OptionError
from autospec.ir.match import calls
from autospec.ir.text import node_text
from autospec.kernels.experts import experts
from autospec.kernels.grouped_mm import grouped_mm
from autospec.kernels.latent_attention import latent_attention
from autospec.program import CapturedModel
from autospec.trees import MAX_NODES

_WIDTH = 8  # nodes; those of EAGLE-3's chain of 7
_WHERE = "autospec.optimize"
_UNKNOWN = (latent_attention, experts, grouped_mm)  # ops whose kernels may sum a row in another order beside other rows


def exact_nodes(exact: bool | int, speculation: Speculation) -> int:
    """Nodes of every step; 0 where nothing exact was asked for.

    Raises:
        OptionError: the steps of this configuration cannot have one width, or `exact` is not a number of nodes.
    """
    if exact is False:
        return 0
    at = f"exact={exact!r:.40}"
    if not isinstance(exact, int) or (exact is not True and not 2 <= exact <= MAX_NODES):
        raise OptionError(f"exact must be True or a number of nodes from 2 to {MAX_NODES}, got {exact!r:.40}", at=at, where=_WHERE,
                          help="True is 8: a chain of 7 and its root")  # fmt: skip
    nodes = _WIDTH if exact is True else exact
    if isinstance(speculation, AutoConfig):
        raise OptionError("'auto' has steps of several widths, which round differently", at=at, where=_WHERE,
                          help="choose a drafter with max_draft_len, or None")  # fmt: skip
    tree = tree_of(speculation)
    if not tree.is_chain:
        raise OptionError("a tree's nodes are summed in another order once they are committed", at=at, where=_WHERE,
                          help="exact decoding takes chains")  # fmt: skip
    if speculation is not None and tree.num_nodes != nodes:
        raise OptionError(f"a chain of {tree.max_draft_len} has steps of {tree.num_nodes} nodes, not of {nodes}", at=at,
                          where=_WHERE, help=f"set max_draft_len={nodes - 1}, or exact={tree.num_nodes} in both")  # fmt: skip
    return nodes


def check_exact(target: CapturedModel) -> None:
    """Refuse models with ops whose order of summation was not looked into."""
    for node in calls(target.graph, _UNKNOWN):
        raise OptionError("a token's numbers may be summed in an order that depends on its neighbours", at=node_text(node),
                          where=target.facts.name, help="exact decoding takes dense models with ordinary attention")  # fmt: skip
