"""The one list of passes, in order: a table of contents of the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from autospec.config import (
    AutoConfig,
    DraftTargetConfig,
    Eagle3Config,
    MedusaConfig,
    MTPConfig,
    NGramConfig,
    Speculation,
)
from autospec.debug import ROUTES, disabled_kernels, forced_kernels
from autospec.errors import OptionError, unknown_option
from autospec.ir.passes import Pass, Stage
from autospec.ir.slots import Slot
from autospec.passes.attach_draft_head import AttachDraftHead
from autospec.passes.attach_draft_model import AttachDraftModel
from autospec.passes.attach_medusa_heads import AttachMedusaHeads
from autospec.passes.bind_positions import BindPositions
from autospec.passes.expand_dsa_decode import ExpandDsaDecode
from autospec.passes.fix_order import FixOrder
from autospec.passes.fold_noops import FoldNoops
from autospec.passes.fuse_linears import FuseLinears
from autospec.passes.fuse_neighbours import FuseNeighbours
from autospec.passes.fuse_rope import FuseRope
from autospec.passes.gather_logits import GatherLogits
from autospec.passes.mask_tree import MaskTree
from autospec.passes.multiply_outer import MultiplyOuter
from autospec.passes.narrow_linears import NarrowLinears
from autospec.passes.offset_draft_layers import WEIGHT_PREFIX, OffsetDraftLayers
from autospec.passes.pack_linears import PackLinears
from autospec.passes.pad_linears import PadLinears
from autospec.passes.page_index_cache import PageIndexCache
from autospec.passes.page_kv_cache import PageKvCache
from autospec.passes.page_latent_cache import PageLatentCache
from autospec.passes.propose_draft import ProposeNgram, ProposeNothing
from autospec.passes.quantize_draft import QuantizeDraft
from autospec.passes.recognize_attention import RecognizeAttention
from autospec.passes.recognize_dsa import RecognizeDsa
from autospec.passes.recognize_mla import RecognizeMla
from autospec.passes.select_kernels import SelectKernels
from autospec.passes.skip_unread_rows import SkipUnreadRows
from autospec.passes.spare_decoding_rows import SpareDecodingRows
from autospec.passes.spare_experts import SpareExperts
from autospec.passes.specialize_shapes import SpecializeShapes
from autospec.passes.synthesize_acceptance import SynthesizeAcceptance
from autospec.passes.tag_roles import TagRoles
from autospec.passes.tap_hidden_states import TapHiddenStates
from autospec.passes.verify_draft import CommitPrompt, VerifyDraft
from autospec.passes.widen_decode import FeedPrompt, WidenDecode
from autospec.program import ModelFacts, Shape
from autospec.state import StateShape


@dataclass(frozen=True)
class DraftParts:
    """A draft model or head, specialised and paged for the places where it is spliced in.

    Args:
        catch_up: where it runs what it has not seen, at the end of a step; Medusa heads have nothing else.
        expand: where it runs one level of nodes, by their number.
        prefill: where it reads a chunk of the prompt.
        tap_after, d2t: of a head.
        fill, fill_prefill: further modules of a head where they only keep their caches, in a step and in a chunk.
        regrow: by level, the module that guesses there on all rows that the draft has grown so far.
        is_head: it reads the target's hidden states.
    """

    facts: ModelFacts
    catch_up: fx.GraphModule
    expand: Mapping[int, fx.GraphModule]
    prefill: fx.GraphModule
    is_head: bool = False
    tap_after: tuple[int, ...] = ()
    d2t: Slot | None = None
    fill: tuple[fx.GraphModule, ...] = ()
    fill_prefill: tuple[fx.GraphModule, ...] = ()
    regrow: tuple[fx.GraphModule, ...] = ()


def pass_types() -> list[type[Pass]]:
    """Every pass of the pipeline, by name."""
    found = {one for one in globals().values() if isinstance(one, type) and issubclass(one, Pass) and one is not Pass}
    return sorted(found, key=lambda one: one.name)


def left_out(asked: str | Sequence[str] | None) -> frozenset[str]:
    """What `passes=` asks for: names of optional passes, each written "-name", that shall not run."""
    if asked is not None and not isinstance(asked, (str, list, tuple)):
        raise OptionError(f"passes must be names such as '-fuse-linears', got {type(asked).__name__}",
                          at=f"passes={asked!r:.60}", where="autospec.optimize", help="pass a list")  # fmt: skip
    types = {one.name: one for one in pass_types()}
    optional = [name for name, one in types.items() if one.is_optional]
    names = [word.strip() for word in (asked.split(",") if isinstance(asked, str) else asked or ()) if word.strip()]
    for name in names:
        place = {"at": f"passes={name!r}", "where": "autospec.optimize"}
        if name.removeprefix("-") not in types:
            raise unknown_option("passes", name, [f"-{known}" for known in optional])
        if not name.startswith("-"):
            raise OptionError(f"passes can only leave passes out, '{name}' runs anyway", **place,
                              help=f"write '-{name}' to leave it out")  # fmt: skip
        if not types[name[1:]].is_optional:
            raise OptionError(f"{name[1:]} cannot be left out: the program would be wrong without it", **place,
                              help=f"optional are {', '.join(optional)}")  # fmt: skip
    return frozenset(name[1:] for name in names)


def understand(max_positions: int) -> list[Stage]:
    """From an exported graph to canonical ops and roles."""
    return [
        Stage("understand", [
            RecognizeAttention(max_positions=max_positions), RecognizeMla(), RecognizeDsa(), BindPositions(), TagRoles(),
        ]),
    ]  # fmt: skip


def understand_head() -> list[Stage]:
    """A draft head's graph calls the canonical ops already; what it keeps may be latents."""
    return [Stage("understand", [RecognizeMla(), RecognizeDsa(), TagRoles()])]


def specialise(shape: Shape, q_len: int, *, is_length_given: bool = False, reads_prompt: bool = False) -> list[Stage]:
    """Static shapes and paged caches; what target and draft have in common."""
    pages: dict[str, Any] = {
        "page_size": shape.page_size, "num_pages": shape.num_pages, "pages_per_row": shape.pages_per_row,
        "is_length_given": is_length_given,
    }  # fmt: skip
    return [
        Stage("specialise", [SpecializeShapes(batch_size=shape.batch_size, q_len=q_len), FoldNoops()]),
        Stage("cache", [
            PageIndexCache(**pages, quantization=shape.index_quantization),
            PageLatentCache(**pages, reads_prompt=reads_prompt), PageKvCache(**pages),
        ]),
    ]  # fmt: skip


def draft_catch_up(shape: Shape, layer_idx_offset: int) -> list[Stage]:
    """An external draft model where it runs the tokens it has not seen, the last of which is the root."""
    rows = 2 if shape.tree.is_chain else shape.tree.max_draft_len + 1
    return [
        *specialise(shape, rows, is_length_given=True),
        Stage("speculate", [OffsetDraftLayers(layer_idx_offset=layer_idx_offset),
                            GatherLogits(given_for=shape.batch_size), spare(shape, rows)]),
    ]  # fmt: skip


def draft_level(shape: Shape, rows: int, layer_idx_offset: int) -> list[Stage]:
    """An external draft model where it runs the nodes of one level."""
    masked = [] if shape.tree.is_chain else [
        MaskTree(batch_size=shape.batch_size, num_nodes=rows, is_mask_given=True)
    ]  # fmt: skip
    return [
        *specialise(shape, rows, is_length_given=True),
        Stage("speculate", [*masked, OffsetDraftLayers(layer_idx_offset=layer_idx_offset)]),
    ]


def draft_prefill(shape: Shape, layer_idx_offset: int) -> list[Stage]:
    """An external draft model where it reads the prompt."""
    return [
        *specialise(shape, shape.prefill_len, is_length_given=True, reads_prompt=True),
        Stage("speculate", [OffsetDraftLayers(layer_idx_offset=layer_idx_offset)]),
    ]


def head_catch_up(shape: Shape, rows: int, layer_idx_offset: int) -> list[Stage]:
    """A draft head where it reads the target's features of the tokens that were committed."""
    return [
        *specialise(shape, rows, is_length_given=True, reads_prompt=rows == shape.prefill_len),
        Stage("speculate", [OffsetDraftLayers(layer_idx_offset=layer_idx_offset),
                            GatherLogits(given_for=shape.batch_size), spare(shape, rows)]),
    ]  # fmt: skip


def head_fill(shape: Shape, rows: int, layer_idx_offset: int) -> list[Stage]:
    """A further module of a head on the same rows: nothing that it computes but its K/V is read."""
    return [
        *specialise(shape, rows, is_length_given=True, reads_prompt=rows == shape.prefill_len),
        Stage("speculate", [OffsetDraftLayers(layer_idx_offset=layer_idx_offset)]),
    ]


def spare(shape: Shape, q_len: int) -> SpareExperts:
    """Routing of what holds no token, in a graph of `q_len` rows per request."""
    return SpareExperts(batch_size=shape.batch_size, q_len=q_len, max_nodes=shape.tree.num_nodes)


def medusa_heads(shape: Shape) -> list[Stage]:
    """Medusa heads on one row per request."""
    return [
        Stage("specialise", [SpecializeShapes(batch_size=shape.batch_size, q_len=1), FoldNoops()]),
        Stage("speculate", [OffsetDraftLayers(layer_idx_offset=0)]),
    ]


def levels(shape: Shape) -> set[int]:
    """The numbers of rows that the levels of a draft have."""
    return {shape.tree.rows_at(level) for level in range(shape.tree.max_draft_len - 1)}


def prefill(shape: Shape, facts: ModelFacts, speculation: Speculation, draft: DraftParts | None) -> list[Stage]:
    """A chunk of every prompt; where a prompt ends, its first token and the first draft."""
    sizes = state_shape(shape, facts)
    return [
        *specialise(shape, shape.prefill_len, reads_prompt=True),
        Stage("widen", [
            *taps(draft),
            FeedPrompt(batch_size=shape.batch_size, q_len=shape.prefill_len, token_room=shape.token_room,
                       max_position=facts.max_positions),
            spare(shape, shape.prefill_len),
            GatherLogits(),
            CommitPrompt(sizes=sizes),
        ]),
        Stage("speculate", [*drafter(shape, facts, speculation, draft, is_prefill=True), SpareDecodingRows()]),
        *finish(shape, speculation),
    ]  # fmt: skip


def step(
    shape: Shape, facts: ModelFacts, speculation: Speculation, draft: DraftParts | None, draft_len: int,
    acceptance: tuple[float, ...] = (),
) -> list[Stage]:  # fmt: skip
    """Verify `draft_len` drafts per request, commit, and seed the next draft.

    Args:
        acceptance: synthetic rates by depth that a bench asks for; (): the target decides.
    """
    sizes, tree = state_shape(shape, facts), shape.tree
    next_n = draft_len + 1 if tree.is_chain else tree.num_nodes
    masked = [] if tree.is_chain else [MaskTree(batch_size=shape.batch_size, num_nodes=tree.num_nodes)]
    return [
        *specialise(shape, next_n),
        Stage("widen", [
            *taps(draft),
            WidenDecode(batch_size=shape.batch_size, next_n=next_n, max_nodes=tree.num_nodes,
                        max_position=facts.max_positions),
            *masked,
            spare(shape, next_n),
            VerifyDraft(sizes=sizes, draft_len=draft_len),
            *([SynthesizeAcceptance(sizes=sizes, rates=acceptance)] if acceptance else []),
        ]),
        Stage("speculate", drafter(shape, facts, speculation, draft, is_prefill=False)),
        *finish(shape, speculation),
    ]  # fmt: skip


def taps(draft: DraftParts | None) -> list[Pass]:
    """What a head needs of the target's graph."""
    return [TapHiddenStates(tap_after=draft.tap_after)] if draft is not None and draft.is_head else []


def finish(shape: Shape, speculation: Speculation) -> list[Stage]:
    """What every graph of a program ends with."""
    quantized = [QuantizeDraft(prefix=WEIGHT_PREFIX)] if getattr(speculation, "draft_quantization", None) == "fp8" else []
    # An exact prompt is computed alike whether a head reads all rows of its last layers or nothing does.
    settled = FixOrder() if shape.is_exact else SkipUnreadRows()
    return [Stage("optimise", [settled, FuseLinears(), *quantized]), select()]


def select() -> Stage:
    """The only stage that looks at the machine; a saved program runs it where it is loaded."""
    disabled, forced = disabled_kernels(), forced_kernels()
    asked = dict(forced).get("dsa_indexer_logits", "")
    expanded = ExpandDsaDecode(disabled=disabled, route=asked if asked in ROUTES else "")
    chosen = SelectKernels(disabled=disabled, forced=forced)
    return Stage("select", [
        MultiplyOuter(), FuseNeighbours(), FuseRope(), expanded, PackLinears(), NarrowLinears(), PadLinears(), chosen,
    ])  # fmt: skip


def portable(stages: Sequence[Stage]) -> list[Stage]:
    """A plan without the stages that depend on the machine."""
    return [stage for stage in stages if stage.name != select().name]


def drafter(
    shape: Shape, facts: ModelFacts, speculation: Speculation, draft: DraftParts | None, *, is_prefill: bool
) -> list[Pass]:
    """The passes that seed the next draft."""
    if isinstance(speculation, DraftTargetConfig):
        assert draft is not None, "an external draft needs its parts"
        return [
            AttachDraftModel(
                sizes=state_shape(shape, facts), max_position=draft.facts.max_positions,
                catch_up=draft.catch_up, expand=draft.expand, prefill=draft.prefill if is_prefill else None,
                draft_temperature=speculation.draft_temperature,
            )
        ]  # fmt: skip
    if isinstance(speculation, (Eagle3Config, MTPConfig)):
        assert draft is not None, "a head needs its parts"
        return [
            AttachDraftHead(
                sizes=state_shape(shape, facts), max_position=draft.facts.max_positions,
                catch_up=draft.prefill if is_prefill else draft.catch_up, expand=draft.expand, d2t=draft.d2t,
                fill=draft.fill_prefill if is_prefill else draft.fill, regrow=draft.regrow,
                draft_temperature=speculation.draft_temperature,
            )
        ]  # fmt: skip
    if isinstance(speculation, MedusaConfig):
        assert draft is not None, "heads need their parts"
        return [
            AttachMedusaHeads(sizes=state_shape(shape, facts), heads=draft.catch_up,
                              draft_temperature=speculation.draft_temperature)
        ]  # fmt: skip
    if isinstance(speculation, (NGramConfig, AutoConfig)):
        return [
            ProposeNgram(
                batch_size=shape.batch_size, max_nodes=shape.tree.num_nodes, max_draft_len=shape.tree.max_draft_len,
                max_matching_ngram_size=speculation.max_matching_ngram_size,
                is_use_oldest=isinstance(speculation, NGramConfig) and speculation.is_use_oldest,
            )
        ]  # fmt: skip
    return [ProposeNothing(batch_size=shape.batch_size, max_nodes=shape.tree.num_nodes)]


def state_shape(shape: Shape, facts: ModelFacts) -> StateShape:
    """The sizes that choosing and committing need."""
    return StateShape(
        batch_size=shape.batch_size, token_room=shape.token_room, vocab_size=facts.vocab_size,
        tree=shape.tree, sampling=shape.sampling,
    )  # fmt: skip


def draft_lens(speculation: Speculation, shape: Shape) -> tuple[int, ...]:
    """The draft lengths that a program for this speculation has steps for."""
    if isinstance(speculation, AutoConfig):
        return speculation.draft_lens
    return (shape.tree.max_draft_len,)
