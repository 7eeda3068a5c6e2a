"""Gluon behind paged_mla: refusals as facts, its kernel run on the CPU, what the compiler makes of it for an H100, and on a GPU
the result itself."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gluon_on_cpu
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autospec import DraftTargetConfig, NGramConfig, optimize
from autospec.api import OptimizedModel
from autospec.benching.differences import compare
from autospec.kernels import gluon, gluon_mla
from autospec.kernels.gluon_mla import attend_latent_pages, choose_splits, copyable, why_not_gluon
from autospec.kernels.paged_mla import exact_result, paged_mla
from autospec.kernels.tree_tables import tree_tables
from autospec.passes.select_kernels import SelectKernels
from autospec.tiny_models import tiny_model

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
SHARED_MEMORY = 227 * 1024  # bytes that a program may have on an H100


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine with an H100 and Gluon, as far as why_not asks; its architecture can be changed."""
    facts: dict[str, Any] = {"capability": (9, 0), "missing": None}
    monkeypatch.setattr(gluon_mla, "capability", lambda device: facts["capability"])
    monkeypatch.setattr(gluon_mla, "why_no_gluon", lambda: facts["missing"])
    monkeypatch.setattr(gluon_mla, "no_gpu", lambda args: None)
    return facts


def spec(**changes: Any) -> dict[str, Any]:
    """Arguments of DeepSeek-V3's shape with a chain of 4, as FakeTensors; sizes can be changed."""
    sizes = {"rank": 512, "rope": 64, "page": 64, "dtype": torch.bfloat16, "scale": 0.1, "offset": 0, "sinks": None} | changes
    width, dtype = sizes["rank"] + sizes["rope"], sizes["dtype"]
    with FakeTensorMode():
        pages = torch.empty(9 * sizes["page"] * width + sizes["offset"], dtype=dtype)[sizes["offset"] :]
        return paged_mla.bind((), {
            "q_latent": torch.empty(2, 4, 128, sizes["rank"], dtype=dtype),
            "q_rope": torch.empty(2, 4, 128, sizes["rope"], dtype=dtype),
            "latent_pages": pages.view(9, sizes["page"], width), "scale": sizes["scale"], "sinks": sizes["sinks"],
            "page_table": torch.empty(2, 4, dtype=torch.int32),
            "kv_lens": torch.empty(2, dtype=torch.int32),
        })  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), [
    ({}, None), ({"page": 16}, None), ({"rank": 256, "dtype": torch.float16}, None), ({"offset": 64}, None),
    ({"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
    ({"rank": 384}, "a latent of 384 and a rope part of 64 are not 128, 256 or 512 and 64"),
    ({"rope": 32}, "a latent of 512 and a rope part of 32 are not 128, 256 or 512 and 64"),
    ({"scale": 0.0}, "scale 0.0 is not positive"), ({"sinks": torch.zeros(128)}, "sinks are not handed to it"),
    ({"offset": 4}, "the pages begin 4 elements into their storage, no multiple of 8"),
])  # fmt: skip
def test_refusals_are_facts(hopper, changes, reason) -> None:
    assert why_not_gluon(spec(**changes)) == reason


def test_refusals_of_the_machine(hopper, monkeypatch) -> None:
    hopper["capability"] = (10, 0)
    assert why_not_gluon(spec()) == "its instructions are those of SM90, this is SM100"
    hopper["capability"] = None
    assert why_not_gluon(spec()) == "there is no GPU here to compile for"
    hopper["missing"] = "triton 3.4.0 has no Gluon for Hopper"
    assert why_not_gluon(spec()) == "triton 3.4.0 has no Gluon for Hopper"
    monkeypatch.undo()
    assert "not on a CUDA device" in why_not_gluon(paged_mla.bind((torch.zeros(1), *[torch.zeros(1)] * 4), {}))
    monkeypatch.setattr(gluon, "gluon", None)
    assert re.fullmatch("triton .* has no Gluon for Hopper|triton is not installed", gluon.why_no_gluon())


def test_it_is_chosen_by_measurement_or_name(hopper) -> None:
    """Behind Triton, so that it replaces it where it was measured to be faster."""
    backends = [one.backend for one in paged_mla.implementations]
    assert backends.index("triton") < backends.index("gluon")
    forced = SelectKernels(forced=(("paged_mla", "gluon"),)).choose(paged_mla, spec())
    assert forced.implementation is not None
    assert forced.implementation.op is torch.ops.autospec_gluon.paged_mla.default
    disabled = SelectKernels(disabled=frozenset({"gluon"}), forced=(("paged_mla", "gluon"),)).choose(paged_mla, spec())
    assert disabled.reasons["gluon"] == "switched off by AUTOSPEC_DISABLE_KERNELS"
    refused = SelectKernels(forced=(("paged_mla", "gluon"),)).choose(paged_mla, spec(scale=0.0))
    assert refused.reasons["gluon"] == "scale 0.0 is not positive"


@pytest.mark.parametrize(("batch", "q_len", "splits"), [(1, 4, 16), (1, 32, 2), (16, 4, 1), (1, 1, 32)])
def test_splits_fill_the_gpu_while_each_keeps_two_blocks(monkeypatch, batch, q_len, splits) -> None:
    """128 heads behind 4096 rows, 132 multiprocessors."""
    monkeypatch.setattr(gluon_mla, "multiprocessors", lambda tensor: 132)
    with FakeTensorMode():
        table, pages = torch.empty(batch, 65, dtype=torch.int32), torch.empty(9, 64, 576)
        assert choose_splits(torch.empty(batch, q_len, 128, 512), pages, table) == splits


def test_queries_are_copied_only_where_16_bytes_do_not_line_up() -> None:
    q = torch.arange(2 * 3 * 200).bfloat16().reshape(1, 2, 3, 200)
    for rows in (q[..., :64], q[..., 4:68]):  # heads 200 apart; not at a multiple of 16 bytes
        assert torch.equal(copyable(rows), rows)
        assert copyable(rows).is_contiguous()
    aligned = torch.zeros(1, 2, 3, 192)[..., 128:]
    assert copyable(aligned) is aligned


Arguments = tuple[Any, ...]


def padded_case(
    device: torch.device, batch: int, q_len: int, context: int, page: int, parents: torch.Tensor | None, heads: int, rank: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Arguments, torch.Tensor, torch.Tensor]:
    """Arguments with ragged lengths and padding, where slots that nobody sees hold NaN; the exact result, rows that are valid.

    Args:
        parents: of the nodes of a tree, of which the last q_len are asked for (None: a chain).
    """
    nodes = q_len if parents is None else parents.shape[1]
    count = (context + nodes + page - 1) // page + 1
    sizes = (batch, q_len, heads, rank), (batch, q_len, heads, 64), (1 + batch * count, page, rank + 64)
    q_latent, q_rope, pages = (torch.randn(size, device=device).to(dtype) for size in sizes)
    table = (1 + torch.randperm(batch * count, device=device)).reshape(batch, count).int()
    kv_lens = (context - 7 * torch.arange(batch, device=device)).clamp(min=0).int()
    q_lens = (q_len - torch.arange(batch, device=device)).clamp(min=0).int()
    rest = table, kv_lens, q_lens, None if parents is None else tree_tables(parents.to(device))[0], 0.1
    expected = exact_result((q_latent, q_rope, pages, *rest))
    slots = torch.arange(count * page, device=device)
    pages[0] = float("nan")
    for b in range(batch):
        unseen = slots[slots >= kv_lens[b] + nodes - q_len + q_lens[b]]
        pages[table[b, unseen // page].long(), unseen % page] = float("nan")
    return (q_latent, q_rope, pages, *rest), expected, torch.arange(q_len, device=device)[None] < q_lens[:, None]


def check(out: torch.Tensor, expected: torch.Tensor, valid: torch.Tensor) -> None:
    assert float((out.double() - expected)[valid].abs().max() / expected[valid].abs().max()) < 2.0**-7
    assert not out[~valid].any()


# Requests (the later ones have fewer valid rows, maybe none), rows, nodes before them (None: a chain), rows in the cache,
# page, heads (a tile of 64 rows holds several nodes, or part of one), elements of a latent.
CASES = [
    (1, 1, None, 0, 16, 20, 128), (2, 1, None, 90, 16, 16, 128), (2, 5, None, 63, 64, 20, 128), (2, 5, None, 300, 16, 40, 256),
    (1, 4, None, 700, 64, 128, 128), (1, 33, 0, 300, 64, 20, 128), (2, 3, 40, 100, 16, 16, 128),
]  # fmt: skip


@pytest.mark.parametrize("hands_over", [False, True])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("batch", "q_len", "earlier", "context", "page", "heads", "rank"), CASES)
def test_it_holds_wherever_copies_and_products_may_end(
    monkeypatch, random_parents, batch, q_len, earlier, context, page, heads, rank, splits, hands_over
) -> None:
    """Copies and products take effect at the last moment that the kernel allows, and who lets another group of warps go on goes
    on before or after it; one split has up to eleven blocks."""
    module = gluon_on_cpu.load_for_cpu(gluon_mla.__file__, monkeypatch, paged_mla, hands_over)
    generator = torch.Generator().manual_seed(context)
    parents = None if earlier is None else random_parents(generator, batch, earlier + q_len)
    args, expected, valid = padded_case(torch.device("cpu"), batch, q_len, context, page, parents, heads, rank)
    check(module.attend_latent_pages(*args, splits), expected, valid)


@pytest.mark.parametrize("splits", [1, 4])
def test_page_tables_may_be_views_and_too_short(monkeypatch, splits) -> None:
    """Slots past the last column do not exist, as in the reference."""
    module = gluon_on_cpu.load_for_cpu(gluon_mla.__file__, monkeypatch, paged_mla)
    args, expected, valid = padded_case(torch.device("cpu"), 2, 3, 140, 64, None, 20, 128)
    tables = torch.zeros(2, 9, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32).t()
    for table in tables:
        table[:, :4] = args[3]
        check(module.attend_latent_pages(*args[:3], table[:, :4], *args[4:], splits), expected, valid)
    short = (*args[:3], args[3][:, :2], *args[4:])
    check(module.attend_latent_pages(*short, splits), exact_result(short), valid)


def behind_many(args: Arguments) -> Arguments:
    """The same pages at the end of 2^31 elements and more, of which nothing else is ever touched."""
    pages = args[2]
    many = pages.new_empty(2**31 // pages[0].numel() + 1 + len(pages), *pages.shape[1:])
    many[-len(pages) :] = pages
    return (*args[:2], many, args[3] + len(many) - len(pages), *args[4:])


def test_pages_past_32_bits(monkeypatch) -> None:
    module = gluon_on_cpu.load_for_cpu(gluon_mla.__file__, monkeypatch, paged_mla)
    args, expected, valid = padded_case(torch.device("cpu"), 1, 2, 100, 64, None, 16, 128)
    check(module.attend_latent_pages(*behind_many(args), 1), expected, valid)


def wait_for_too_few(waits: Any, later: int, *results: Any) -> Any:
    return waits(later + 1, *results)


def wait_unless_copying(barrier: Any, parity: Any) -> None:
    """The producer does not ask whether a buffer is empty."""
    if threading.current_thread().name != "copy_blocks":
        barrier.wait(parity)


def wait_for_the_phase_before(barrier: Any, parity: Any) -> None:
    barrier.wait(parity if threading.current_thread().name == "copy_blocks" else 1 - parity)


def one_node_later(hide: Any, b_s: Any, p_mask: Any, i_t: Any, kv_len: Any, end: Any, earlier: Any, o_node: Any, *rest: Any) -> Any:
    """A row sees the node behind its own."""
    return hide(b_s, p_mask, i_t, kv_len, end, earlier, o_node + 1, *rest)


def nothing_hidden(hide: Any, b_s: Any, *rest: Any) -> Any:
    return b_s


def no_nodes_before(hide: Any, b_s: Any, p_mask: Any, i_t: Any, kv_len: Any, end: Any, earlier: Any, *rest: Any) -> Any:
    return hide(b_s, p_mask, i_t, kv_len, end, 0, *rest)


def plant(part: str, bug: Callable[..., Any]) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Put the bug before a function of the kernel's file."""

    def planted(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(module, part)
        monkeypatch.setattr(module, part, lambda *args: bug(right, *args))

    return planted


def plant_wait(bug: Callable[..., Any]) -> Callable[[Any, pytest.MonkeyPatch], None]:
    return lambda module, monkeypatch: monkeypatch.setattr(module.mbarrier, "wait", bug)


BUGS = {
    "products": (False, plant("warpgroup_mma_wait", wait_for_too_few)),
    "fence": (False, plant("fence_async_shared", lambda right: None)),
    "empty": (False, plant_wait(wait_unless_copying)), "full": (False, plant_wait(wait_for_the_phase_before)),
    "arrive": (False, plant("arrive", lambda right, barrier: None)),
    "one node later": (False, plant("hide_unseen", one_node_later)), "nothing hidden": (True, plant("hide_unseen", nothing_hidden)),
    "no nodes before": (True, plant("hide_unseen", no_nodes_before)),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(monkeypatch, random_parents, name) -> None:
    is_tree, bug = BUGS[name]
    module = gluon_on_cpu.load_for_cpu(gluon_mla.__file__, monkeypatch, paged_mla)
    bug(module, monkeypatch)
    parents = random_parents(torch.Generator().manual_seed(1), 1, 12) if is_tree else None
    args, expected, valid = padded_case(torch.device("cpu"), 1, 4, 700, 64, parents, 16, 128)
    with pytest.raises(AssertionError):
        check(module.attend_latent_pages(*args, 1), expected, valid)


# In the kernel's text; whether groups hand over at arrivals.
MUTATIONS = {
    "a buffer is freed while products read it": (
        "b_acc = warpgroup_mma_wait(3, [b_acc])\n        arrive(s_empty.index(OTHER))",
        "arrive(s_empty.index(OTHER))\n        b_acc = warpgroup_mma_wait(3, [b_acc])", True),
    "a buffer's right half is filled before it was read": ("mbarrier.wait(empty_r.index(i_c), unused)", "pass", False),
    "a buffer's left half is filled before it was read": ("mbarrier.wait(empty_l.index(i_c), unused)", "pass", True),
    "a half is multiplied before it arrived": ("mbarrier.wait(full_r.index(GROUP), phase)", "pass", False),
    "sums are joined before they are there": ("mbarrier.wait(s_done.index(OTHER), 0)", "pass", False),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_races_planted_in_its_text_are_caught(monkeypatch, tmp_path, name) -> None:
    right, wrong, hands_over = MUTATIONS[name]
    text = Path(gluon_mla.__file__).read_text()
    assert text.count(right) == 1
    (tmp_path / "mutated.py").write_text(text.replace(right, wrong))
    module = gluon_on_cpu.load_for_cpu(str(tmp_path / "mutated.py"), monkeypatch, paged_mla, hands_over)
    args, expected, valid = padded_case(torch.device("cpu"), 2, 5, 300, 16, None, 40, 256)
    with pytest.raises(AssertionError):
        check(module.attend_latent_pages(*args, 1), expected, valid)


def compile_for_hopper(kernel: Any, kwargs: dict[str, Any], args: tuple[Any, ...]) -> Any:
    """What triton makes of a launch on an H100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    options = {"num_warps": kwargs.pop("num_warps")}
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(GluonASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize(("page", "is_tree", "splits"), [(64, False, 1), (16, True, 16)])
def test_it_compiles_with_products_in_flight(monkeypatch, tmp_path, page, is_tree, splits) -> None:
    """DeepSeek-V3's sizes: every product on tensor cores, rows copied by 16 bytes, waits that leave products running, and no
    register spilled but a few around the tree's mask (triton 3.9: 32 bytes, 3.6: none)."""
    if gluon.why_no_gluon() is not None:
        pytest.skip(gluon.why_no_gluon())
    import triton

    compiled = []
    monkeypatch.setattr(gluon_mla, "launch", lambda kernel, grid, *args, **kwargs: compiled.append(
        compile_for_hopper(kernel, kwargs, args)))  # fmt: skip
    monkeypatch.setattr(gluon_mla, "combine", lambda *args, **kwargs: None)
    ints = {name: torch.zeros(size, dtype=torch.int32) for name, size in (("table", (1, 64)), ("lens", 1), ("mask", (1, 4, 1)))}
    attend_latent_pages(
        torch.zeros(1, 4, 128, 512).bfloat16(), torch.zeros(1, 4, 128, 64).bfloat16(), torch.zeros(3, page, 576).bfloat16(),
        ints["table"], ints["lens"], None, ints["mask"] if is_tree else None, 0.1, splits,
    )
    (binary,) = compiled
    ptx = binary.asm["ptx"]
    assert binary.metadata.shared <= SHARED_MEMORY
    # 16 deep each: scores of the first block and in two loops; values of the first block, twice in two loops, of the last.
    assert ptx.count("wgmma.mma_async") == 3 * 36 + 7 * 4
    # Products still running at each wait: three of scores while values of the other consumer's block are waited for.
    waits = sorted(int(left) for left in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", ptx))
    assert waits == [0, 0, 0, 0, 0, 0, 0, 0, 3, 3]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*", ptx)
    assert copies
    assert all("0x10" in copy for copy in copies)
    (tmp_path / "kernel.cubin").write_bytes(binary.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    assert max(map(int, re.findall(r"STACK:(\d+)", usage))) <= (32 if is_tree else 0)


def skip_unless_hopper(device: torch.device) -> None:
    if torch.cuda.get_device_capability(device) != (9, 0) or gluon.why_no_gluon() is not None:
        pytest.skip("needs an SM90 GPU and Gluon")


@pytest.mark.cuda
@pytest.mark.parametrize(("q_len", "earlier", "page", "heads", "rank", "dtype", "splits"), [
    (4, None, 64, 128, 512, torch.bfloat16, 1), (4, None, 16, 128, 512, torch.float16, 4), (70, 0, 64, 128, 512, torch.bfloat16, 4),
    (5, 30, 16, 20, 256, torch.bfloat16, 1), (3, None, 32, 16, 128, torch.float16, 16),
])  # fmt: skip
def test_on_a_gpu(cuda, random_parents, q_len, earlier, page, heads, rank, dtype, splits) -> None:
    """Every row of the table is compiled once; lengths and batch are not part of the compiled kernel."""
    skip_unless_hopper(cuda)
    for batch, context in ((1, 0), (1, 63), (2, 64), (5, 700), (3, 4096)):
        generator = torch.Generator().manual_seed(context)
        parents = None if earlier is None else random_parents(generator, batch, earlier + q_len)
        args, expected, valid = padded_case(cuda, batch, q_len, context, page, parents, heads, rank, dtype)
        for _ in range(3):  # races need not show at once
            check(attend_latent_pages(*args, splits), expected, valid)


@pytest.mark.cuda
def test_pages_past_32_bits_on_a_gpu(cuda) -> None:
    """4.3 GB of pages."""
    skip_unless_hopper(cuda)
    args, expected, valid = padded_case(cuda, 2, 4, 300, 64, None, 128, 512)
    check(attend_latent_pages(*behind_many(args), 1), expected, valid)


@pytest.mark.cuda
def test_in_a_captured_graph(cuda) -> None:
    """It is compiled by the calls before; a replay reads the lengths as they are then."""
    skip_unless_hopper(cuda)
    args, _, _ = padded_case(cuda, 2, 4, 900, 64, None, 128, 512)
    args[2].nan_to_num_(0.0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.ops.autospec_gluon.paged_mla(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.autospec_gluon.paged_mla(*args)
    for lens, valid in (([3, 900], [4, 4]), ([77, 0], [1, 0])):
        args[4].copy_(torch.tensor(lens))
        args[5].copy_(torch.tensor(valid))
        graph.replay()
        check(out, exact_result(args), torch.arange(4, device=cuda)[None] < args[5][:, None])


def deepseek(device: torch.device, dtype: torch.dtype) -> Any:
    """Two layers without experts, whose choice a rounding could tip, with latents that the kernel takes."""
    sizes = {"kv_lora_rank": 128, "qk_rope_head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    return tiny_model("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=2, **sizes).to(device, dtype)


PROMPTS = [torch.randint(1, 128, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (3, 20, 70)]


def continued(fast: OptimizedModel, count: int) -> list[list[int]]:
    rows = [fast.generate([one], max_new_tokens=count, do_sample=False, eos_token_id=-1)[0].tolist() for one in PROMPTS]
    return [row[len(one) :] for row, one in zip(rows, PROMPTS, strict=True)]


def test_a_program_decodes_with_it_as_with_the_reference(monkeypatch) -> None:
    """A dynamic tree of drafts, their levels and prompts, the kernel run on the CPU in two splits."""
    module = gluon_on_cpu.load_for_cpu(gluon_mla.__file__, monkeypatch, paged_mla)
    monkeypatch.setenv("AUTOSPEC_KERNELS", "paged_mla=reference")
    model = deepseek(torch.device("cpu"), torch.float32)
    tree = DraftTargetConfig(model, max_draft_len=2, dynamic_tree_max_topk=2, max_total_draft_tokens=5)
    fast = optimize(model, tree, compile="eager", max_length=128)
    expected, calls = continued(fast, 12), []

    def emulated(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = paged_mla.bind(args, kwargs)
        assert given.pop("sinks") is None
        calls.append(given["q_latent"].shape[1])
        return module.attend_latent_pages(*given.values(), splits=2)

    for graph in fast.program.graphs.values():
        for node in graph.module.graph.find_nodes(op="call_function", target=paged_mla.op):
            node.target = emulated
        graph.module.recompile()
    assert continued(fast, 12) == expected
    assert {6, 2} <= set(calls), "whole trees, and levels of two drafts"


@pytest.mark.cuda
@pytest.mark.compiled
def test_a_program_decodes_with_it_as_with_triton(cuda, monkeypatch) -> None:
    """Tokens part at near-ties only. (In bfloat16, with the kernel on the CPU, such logits were up to 4 numbers apart.)"""
    skip_unless_hopper(cuda)
    model, outputs = deepseek(cuda, torch.float16), {}
    for backend in ("triton", "gluon"):
        monkeypatch.setenv("AUTOSPEC_KERNELS", f"paged_mla={backend}")
        fast = optimize(model, NGramConfig(max_draft_len=3), max_length=128)
        outputs[backend] = continued(fast, 40)
        assert f"paged_mla: {backend} x 2" in [line for record in fast.program.records for line in record.details]
    found = compare("gluon", outputs["gluon"], outputs["triton"], PROMPTS, model)
    for fork in found.forks if found is not None else ():
        assert fork.gap is not None
        assert fork.resolution is not None
        assert abs(fork.gap) <= 8 * fork.resolution, found.text("Triton's")
