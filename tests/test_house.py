"""The rules of the house: floors, one name per thing, and what every file of a kind has."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from autospec import pipeline
from autospec.ir.passes import Pass
from autospec.kernels.registry import load_all

ROOT = Path(__file__).resolve().parents[1]

# Imports only go down. A module that is not listed here has the floor of its folder.
FLOORS = {
    "autospec.errors": 0, "autospec.config": 0, "autospec.debug": 0, "autospec.trees": 0,
    "autospec.threads": 0, "autospec.arguments": 0, "autospec.drafter_arguments": 4,
    "autospec.kernels": 1, "autospec.ir": 1, "autospec.masks": 1, "autospec.symbolic_masks": 1,
    "autospec.model_zoo": 2, "autospec.program": 2, "autospec.state": 2, "autospec.heads": 2, "autospec.drafting": 2,
    "autospec.artifact": 2, "autospec.limits": 2,
    "autospec.passes": 3,
    "autospec.capture": 4, "autospec.decompose": 4, "autospec.exactness": 4,
    "autospec.capture_checks": 4, "autospec.capture_facts": 4, "autospec.capture_interfaces": 4, "autospec.capture_paths": 4,
    "autospec.capture_rotary": 4, "autospec.capture_slots": 4, "autospec.capture_trace": 4,
    "autospec.capture_head": 4, "autospec.legality": 4, "autospec.loading": 4, "autospec.assemble": 4,
    "autospec.frontend": 4, "autospec.exporter": 4, "autospec.aot": 4, "autospec.hollow": 4, "autospec.pass_list": 4,
    "autospec.pipeline": 4, "autospec.lower": 4, "autospec.early_start": 4,
    "autospec.capture_experts": 4, "autospec.in_float32": 4,
    "autospec.runtime": 5,
    "autospec.api": 6, "autospec.loaded": 6, "autospec.report": 6, "autospec.cli": 6,
    "autospec.bench": 6, "autospec.benching": 6, "autospec.bench_kernels": 6, "autospec.demo": 6,
    "autospec.zoo": 6, "autospec.tiny_models": 6, "autospec.check_draft": 6,
    "autospec.report_html": 6, "autospec.report_charts": 6,
    "autospec.training": 6, "autospec.model_zoo.demo.evaluate": 6,
    "autospec.model_zoo.demo.train": 6, "autospec.model_zoo.demo.train_heads": 6, "autospec.model_zoo.demo.train_mla": 6,
}  # fmt: skip

RUNTIME_MAY_IMPORT = (
    "autospec.program", "autospec.kernels", "autospec.errors", "autospec.config", "autospec.trees", "autospec.runtime",
    "autospec.artifact", "autospec.debug",
)  # fmt: skip
KERNELS_MAY_IMPORT = {"torch", "triton", "flashinfer", "autospec"}

# The glossary has one name per thing; these are what others call them.
SYNONYMS = {
    "kv_lens": ("seq_lens", "seqlens", "cache_lens", "cache_seqlens", "context_lens", "past_lens", "kv_lengths"),
    "page_table": ("block_table", "block_tables", "page_tables", "page_indices"),
    "page_size": ("block_size", "tokens_per_block"),
    "max_draft_len": ("num_spec_tokens", "num_speculative_tokens", "num_draft_tokens", "gamma", "spec_len"),
    "tree_parents": ("parent_ids", "parent_indices", "retrieve_index", "tree_indices"),
    "draft_tokens": ("draft_ids", "draft_token_ids", "candidate_ids", "proposed_tokens", "spec_tokens"),
    "tree_mask": ("tree_attention_mask", "custom_mask", "spec_decoding_mask"),
    "target_tokens": ("target_ids", "verified_tokens", "target_predict"),
    "accept_length": ("num_accepted", "accepted_len", "accept_lens", "acc_len"),
    "accept_path": ("accept_index", "accepted_path", "best_path"),
    "bonus_token": ("bonus_ids", "next_root", "extra_token"),
    "tap_after": ("aux_layers", "tap_layers", "capture_layers"),
    "positions": ("pos_ids",),
}  # fmt: skip

PASS_FILES = sorted((ROOT / "passes").glob("*.py"))


def _sources() -> list[Path]:
    """Python files of the compiler, tests aside, each once."""
    folders = ("autospec", "passes", "kernels", "model_zoo")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if not any(parent.is_symlink() for parent in path.parents))


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "autospec" else ("autospec", *parts))


def _tracked() -> list[Path]:
    """Files under version control; everything where there is none (a release)."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode == 0 and listing.stdout:
        return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and not any(part[0] == "." for part in path.parts[1:])]


def _floor(module: str) -> int | None:
    while module not in FLOORS and "." in module:
        module = module.rpartition(".")[0]
    return FLOORS.get(module)


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, lazily too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                continue  # a sibling, so the same floor
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if node.module == "autospec" or whole in FLOORS else str(node.module)


def test_every_module_has_a_floor() -> None:
    missing = [_module(path) for path in _sources() if path.stem != "__init__" and _floor(_module(path)) is None]
    assert not missing, f"give them a floor in {Path(__file__).name}: {missing}"


def test_imports_only_go_down() -> None:
    wrong = []
    for path in _sources():
        own = _floor(_module(path))
        if own is None:
            continue  # autospec/__init__.py: names that are loaded when asked for
        for name in _imports(path):
            theirs = _floor(name) if name.startswith("autospec.") else None
            if theirs is not None and theirs > own:
                wrong.append(f"{_module(path)} (floor {own}) imports {name} (floor {theirs})")
    assert not wrong, "\n".join(wrong)


def test_a_pass_never_imports_another_pass() -> None:
    for path in PASS_FILES:
        assert not [name for name in _imports(path) if name.startswith("autospec.passes")], path.name


def test_kernels_import_torch_triton_and_flashinfer_only() -> None:
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for name in _imports(path):
            is_ours = name.startswith("autospec.kernels") or name in ("autospec.errors", "autospec.debug")
            top = name.partition(".")[0]
            assert is_ours or top in KERNELS_MAY_IMPORT - {"autospec"} or top in _standard(), f"{path.name} imports {name}"
            assert not name.startswith("torch.fx"), f"{path.name} imports {name}"
        assert not re.search(r"\bfrom torch import .*\bfx\b", path.read_text()), f"{path.name} imports fx"


def _standard() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names


def test_the_runtime_imports_no_compiler() -> None:
    for path in sorted((ROOT / "autospec" / "runtime").glob("*.py")):
        wrong = [name for name in _imports(path) if name.startswith("autospec") and not name.startswith(RUNTIME_MAY_IMPORT)]
        assert not wrong, f"{path.name} imports {wrong}"


def test_kernels_have_no_package_file() -> None:
    """Hugging Face publishes a package called kernels; a regular package of ours would shadow it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("kernels", "passes", "model_zoo"):
        assert (ROOT / "autospec" / name).resolve() == ROOT / name


@pytest.mark.parametrize("name", SYNONYMS)
def test_one_name_per_thing(name: str) -> None:
    words = re.compile(rf"\b(?:{'|'.join(SYNONYMS[name])})\b")
    for path in _sources():
        found = words.search(path.read_text())
        assert found is None, f"{path.relative_to(ROOT)} says {found[0]}; the glossary says {name}"


def test_nothing_is_left_to_do() -> None:
    words = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b")
    unwritten = re.compile(r"\braise NotImplemented" + r"(?:Error)?\b")
    for path in _tracked():
        if path.suffix in (".py", ".toml", ".md", ".txt", ".yml"):
            text = path.read_text(errors="replace")
            found = words.search(text) or (None if "tests" in path.parts else unwritten.search(text))
            assert found is None, f"{path.relative_to(ROOT)} says {found[0]}"


def test_no_file_names_a_machine() -> None:
    places = re.compile(r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|Us" + r"ers|mnt|scratch)/[\w.-]+")
    hosts = re.compile(r"\b(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d{1,3}\.\d{1,3}\b")
    for path in _tracked():
        if path.suffix in (".py", ".toml", ".md", ".txt", ".json", ".yml", "") and path.stat().st_size < 2_000_000:
            text = path.read_text(errors="replace")
            for pattern in (places, hosts):
                found = pattern.search(text)
                assert found is None, f"{path.relative_to(ROOT)} names {found[0]}"


@pytest.mark.parametrize("path", PASS_FILES, ids=lambda path: path.stem)
def test_a_pass_file_opens_with_a_picture_and_says_why_it_is_legal(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    lines = text.splitlines()
    assert lines, "a pass file opens with a docstring"
    assert lines[0].endswith((".", ":")), "the first line is a sentence"
    assert "\nLegal: " in text, "it says why the rewrite is legal"
    picture = text[: text.index("\nLegal: ")]
    assert any(line.startswith("    ") and ("->" in picture) for line in picture.splitlines()), "before -> after, indented"


def _passes() -> list[type[Pass]]:
    found = []
    for path in PASS_FILES:
        module = importlib.import_module(f"autospec.passes.{path.stem}")
        found += [
            one for _, one in inspect.getmembers(module, inspect.isclass)
            if issubclass(one, Pass) and one is not Pass and one.__module__ == module.__name__
        ]  # fmt: skip
    return found


def test_every_pass_is_in_the_pipeline() -> None:
    text = (ROOT / "autospec" / "pipeline.py").read_text()
    for one in _passes():
        assert re.search(rf"\b{one.__name__}\(", text), f"{one.__name__} is in no stage of pipeline.py"
    assert {one.__name__ for one in pipeline.pass_types()} == {one.__name__ for one in _passes()}


def test_passes_are_frozen_values_with_names() -> None:
    names = [one.name for one in _passes()]
    assert len(set(names)) == len(names)
    for one in _passes():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)+", one.name), f"{one.name} is not verb-object"
        assert one.__dataclass_params__.frozen, f"{one.__name__} is not frozen"  # type: ignore[attr-defined]
        assert one.__doc__, f"{one.__name__} has no docstring"


def test_every_kernel_has_a_reference_that_states_its_shapes() -> None:
    for name, kernel in load_all().items():
        text = inspect.getdoc(kernel.reference) or ""
        assert re.search(r"\[[A-Z]", text), f"the reference of {name} does not say its shapes: {text!r}"


def test_weights_in_the_repository_are_small() -> None:
    kinds = {".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf", ".onnx"}
    total = sum(path.stat().st_size for path in _tracked() if path.suffix in kinds)
    assert total < 24e6, f"{total / 1e6:.1f} MB of weights"


def test_functions_stay_small() -> None:
    """A smell test, not a quota: Python functions of the compiler below 80 lines, kernels aside."""
    for path in _sources():
        if path.parent.name == "kernels" or "demo" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length < 80, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


@pytest.mark.xdist_group("together")
def test_groups_reach_the_scheduler(request: pytest.FixtureRequest) -> None:
    """With pytest 9.2.0 they did not: tests of one group ran in every worker, and each captured the models anew."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("needs workers, and --dist loadgroup")
    assert request.node.nodeid.endswith("@together")
