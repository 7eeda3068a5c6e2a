"""Index keys in float8 may change what a model says, and never what drafting says: tokens are those of plain decoding with them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.laws import GREEDY, WARM, at_rest, same_tokens
from harness.models import captured, hf_cache, model, oracle
from harness.programs import MixedDraft, Plant, Workshop, prompts_of, requests_of, run
from torch import Tensor

from autospec.api import optimize
from autospec.config import DraftTargetConfig
from autospec.errors import OptionError
from autospec.ir.match import calls
from autospec.kernels.append_index_keys import KEYS
from autospec.kernels.expand_requests import expand_requests
from autospec.limits import check_index_quantization
from autospec.report import kernel_rows
from autospec.runtime.metrics import Metrics
from autospec.runtime.request import SamplingParams
from autospec.runtime.session import Session

PROMPTS, NEW_TOKENS, SPARE = prompts_of(1, (3, 17, 9, 33)), 16, 8
ONE_WORKER = pytest.mark.xdist_group("sparse")  # so that each model is captured once


@functools.cache
def plainly(sampling: SamplingParams = GREEDY, target: str = "sparse") -> list[list[int]]:
    """Prompts and what plain decoding with float8 keys says after them, further than the laws look."""
    session = Workshop().session(target=target, sampling=sampling.needs_scores, index_quantization="fp8")
    requests = requests_of(PROMPTS, NEW_TOKENS + SPARE, sampling)
    run(session, requests)
    return [request.prompt + request.output for request in requests]


def drafted(workshop: Workshop, drafter: str, sampling: SamplingParams = GREEDY, target: str = "sparse") -> Metrics:
    """The same tokens with a drafter ("ngram": drafts right up to 0 to 4 tokens in turn), and index keys of these tokens."""
    futures = plainly(sampling, target)
    session = workshop.session(drafter, target=target, sampling=sampling.needs_scores, index_quantization="fp8")
    requests = requests_of(PROMPTS, NEW_TOKENS, sampling)
    script = MixedDraft(futures, accept=lambda row, step: (step + row) % 5) if drafter == "ngram" else None
    metrics = run(session, requests, script=script)
    same_tokens(requests, [text[len(p) : len(p) + NEW_TOKENS] for text, p in zip(futures, PROMPTS, strict=True)])
    at_rest(session, requests)
    for row, request in enumerate(requests):
        keys_are_fresh(session, row, request.prompt + request.output, target)
    return metrics


def keys_are_fresh(session: Session, row: int, ids: list[int], target: str) -> None:
    """Committed keys of the first indexer, which nothing selects before, are transformers' own, rounded."""
    wanted = hf_cache(target, ids)[1][0][: len(ids) - 1]
    got = session.committed_index_keys(row, 0, len(ids) - 1)
    assert session.state["index_pages.0"].dtype == KEYS
    # Half a unit of float8, of the element or of the smallest number beside the row's largest; see test_append_index_keys.
    bound = torch.maximum(wanted.abs() / 16, wanted.abs().amax(-1, keepdim=True) / 448 * 2.0**-9) * 1.001
    assert ((got - wanted).abs() <= bound).all(), f"index keys of row {row} are not those of its tokens"


@ONE_WORKER
def test_these_models_are_changed_by_it(workshop: Workshop) -> None:
    """Otherwise the laws below would hold of keys as they are."""
    told = [oracle("sparse", prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert [text[len(p) : len(p) + NEW_TOKENS] for text, p in zip(plainly(), PROMPTS, strict=True)] != told
    keys_are_fresh(workshop.session(target="sparse", index_quantization="fp8"), 0, [1], "sparse")


@ONE_WORKER
def test_nobody_gets_it_without_asking(workshop: Workshop) -> None:
    """Tokens of the default are transformers' (test_sparse); nothing of it is in float8."""
    slots = workshop.session("ngram", target="sparse").program.state_slots()
    assert {slot.dtype for name, slot in slots.items() if name.startswith("index_pages.")} == {torch.float32}
    assert not any(name.startswith("index_scale_pages.") for name in slots)


def chain(workshop: Workshop) -> None:
    assert drafted(workshop, "ngram").mean_acceptance_length > 2


def tree(workshop: Workshop) -> None:
    """The draft is the model itself, whose keys are in float8 as well: what it drafts right is what fits its tree."""
    assert drafted(workshop, "sparse twin static").mean_acceptance_length > 2.5


@ONE_WORKER
def test_a_chain_says_what_plain_decoding_says(workshop: Workshop) -> None:
    chain(workshop)
    assert drafted(workshop, "ngram", WARM, "shared").mean_acceptance_length > 2


@ONE_WORKER
def test_a_tree_says_what_plain_decoding_says(workshop: Workshop) -> None:
    tree(workshop)


@ONE_WORKER
def test_a_module_whose_passes_share_a_selection(workshop: Workshop) -> None:
    drafted(workshop, "mtp-share dynamic")
    session = workshop.session("mtp-share dynamic", target="sparse", index_quantization="fp8")
    kept = [name for name in session.state if name.startswith("index_scale_pages.")]
    assert len(kept) == 3, "two layers of the target and the module have keys"


@ONE_WORKER
def test_the_expanded_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOSPEC_KERNELS", "dsa_indexer_logits=expanded")
    workshop = Workshop()
    chain(workshop)
    (session,) = workshop._sessions.values()
    assert list(calls(session.program.graphs["step_4"].module, expand_requests))  # type: ignore[arg-type]


def _one_late(op: Any, k: Tensor, pages: Tensor, scales: Tensor, page_table: Tensor, kv_lens: Tensor) -> None:
    op(k, pages, scales, page_table, kv_lens + 1)


def _other_scales(op: Any, k: Tensor, pages: Tensor, scales: Tensor, *where: Tensor) -> None:
    """A row's scale is that of the row before it."""
    op(k, pages, scales, *where)
    op(k.roll(1, 1), pages.clone(), scales, *where)


def _scales_not_moved(op: Any, pages: list[Tensor], *args: Any) -> None:
    op([one for one in pages if one.dim() > 2], *args)


def _unscaled(op: Any, *args: Any, **kwargs: Any) -> Any:
    return op(*args, **{**kwargs, "index_scales": torch.ones_like(kwargs["index_scales"])})


PLANTS: list[tuple[Plant, Callable[[Workshop], None]]] = [
    (Plant("index keys one slot late", "append_index_keys", _one_late, ("step",)), chain),
    (Plant("scales of another row", "append_index_keys", _other_scales, ("step",)), chain),
    (Plant("scales left out", "dsa_indexer_logits", _unscaled, ("step",)), chain),
    (Plant("scales not moved", "compact_kv", _scales_not_moved), tree),
]


@ONE_WORKER
@pytest.mark.parametrize(("plant", "law"), PLANTS, ids=[plant.name for plant, _ in PLANTS])
def test_a_planted_bug_is_caught(plant: Plant, law: Callable[[Workshop], None]) -> None:
    with pytest.raises(AssertionError):
        law(Workshop(plant))


@ONE_WORKER
def test_what_cannot_be_quantised_is_refused() -> None:
    sparse, dense = captured("sparse").facts, captured("target").facts
    check_index_quantization("fp8", sparse, None)
    check_index_quantization("fp8", dense, sparse)
    with pytest.raises(OptionError, match="must be 'fp8' or None, got 'int8'"):
        optimize("nothing is loaded before that", index_quantization="int8")
    with pytest.raises(OptionError, match="models that select their keys, and this one attends to all"):
        check_index_quantization("fp8", dense, dense)


@ONE_WORKER
def test_memory_is_counted_as_it_is_allocated(workshop: Workshop) -> None:
    """The rows of all caches, by which a batch is sized, in both forms."""
    for form in (None, "fp8"):
        session = workshop.session("ngram", target="sparse", index_quantization=form)
        shape, facts = session.program.shape, session.program.facts
        pages = [tensor.nbytes for name, tensor in session.state.items() if "pages." in name]
        assert sum(pages) == shape.num_pages * shape.page_size * facts.bytes_kept(form)
    assert facts.spared_in_float8 == 2 * (model("sparse").config.index_head_dim * 3 - 4)


@pytest.mark.cuda
@pytest.mark.parametrize("compile", ["eager", "inductor"])
def test_on_a_gpu(cuda: torch.device, compile: str) -> None:
    """Plain decoding and a tree, by the kernels that write and read float8."""
    target = copy.deepcopy(model("sparse")).to(cuda)
    asked: dict[str, Any] = {"compile": compile, "index_quantization": "fp8", "max_length": 64}
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    plain = optimize(target, None, **asked)
    expected = [plain.generate([prompt], **options) for prompt in PROMPTS]
    fast = optimize(target, DraftTargetConfig(target, eagle_choices=[[0], [1], [0, 0], [1, 0]]), **asked)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert torch.equal(fast.generate([prompt], **options), tokens)
        assert fast.metrics.mean_acceptance_length > 2
    chosen = {row.op: row.backend for row in kernel_rows(fast.program) if row.op in ("append_index_keys", "dsa_indexer_logits")}
    assert len(chosen) == 2
    assert "reference" not in chosen.values()
    session = fast.session
    row = session.committed_index_keys(0, 0, len(PROMPTS[-1]))
    wanted = hf_cache("sparse", PROMPTS[-1])[1][0].to(cuda)
    assert ((row - wanted).abs() <= wanted.abs() / 16 + wanted.abs().amax(-1, keepdim=True) / 448 * 2.0**-9 + 1e-5).all()
