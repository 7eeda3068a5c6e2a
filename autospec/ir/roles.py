"""Roles: what a node is for, written once by tag-roles so that no pass reads names.

`meta["role"]` is one of these strings; `meta["layer"]` is the 0-based decoder layer a node belongs to.
"""

from __future__ import annotations

from typing import Literal

from torch import fx

Role = Literal[
    "attention", "layer_output", "lm_head", "draft_tokens", "q_lens", "tree_mask",
    "taps", "accept_path", "commit",
]  # fmt: skip


def tag(node: fx.Node, role: Role) -> None:
    node.meta["role"] = role


def with_role(module: fx.GraphModule, role: Role) -> list[fx.Node]:
    """All nodes of a role, in graph order."""
    return [node for node in module.graph.nodes if node.meta.get("role") == role]


def the(module: fx.GraphModule, role: Role) -> fx.Node:
    """The one node of a role."""
    found = with_role(module, role)
    assert len(found) == 1, f"the graph has {len(found)} nodes of role {role}, expected one: run tag-roles first"
    return found[0]
