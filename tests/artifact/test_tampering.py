"""An artifact that is not what was written is refused in four lines, before anything in it is read or run."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import autospec
from autospec.artifact import manifest
from autospec.artifact.weights import FILE
from autospec.errors import ArtifactError, CheckpointError
from autospec.ir.archive import why_not_data
from autospec.runtime.text import load_tokenizer

GRAPH = "graphs/2x96-greedy/step_4.pt2"


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that read what an artifact holds, if one is called."""
    touched: list[str] = []
    for owner, name in ((torch.export, "load"), (torch, "load"), (pickle, "loads"), (pickle, "load")):
        monkeypatch.setattr(owner, name, lambda *args, name=name, **kwargs: touched.append(name))
    return touched


def refusal(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        autospec.load(folder, compile="eager").generate([[1, 2]], max_new_tokens=2, do_sample=False)
    assert [line[:7].strip() for line in str(caught.value).splitlines()[1:]] == ["at", "in", "help"]
    return str(caught.value)


@pytest.mark.parametrize("name", [FILE, GRAPH, "explain.json"])
def test_a_flipped_byte(broken: Path, untouched: list[str], name: str) -> None:
    data = bytearray((broken / name).read_bytes())
    data[len(data) // 2] ^= 1
    (broken / name).write_bytes(data)
    text = refusal(broken)
    assert "its SHA-256 differs" in text
    assert name in text
    assert not untouched


def test_every_byte_of_the_manifest_counts(broken: Path) -> None:
    path = broken / manifest.NAME
    data = path.read_bytes()
    for place in range(0, len(data), max(1, len(data) // 40)):
        flipped = bytearray(data)
        flipped[place] ^= 2
        path.write_bytes(flipped)
        if json_or_none(flipped) != json.loads(data):  # a changed blank says the same
            refusal(broken)


def json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("name", [FILE, GRAPH, "explain.json"])
def test_a_missing_and_a_shortened_file(broken: Path, untouched: list[str], name: str) -> None:
    data = (broken / name).read_bytes()
    (broken / name).write_bytes(data[:-1])
    assert f"a file has {len(data) - 1} bytes" in refusal(broken)
    (broken / name).unlink()
    assert "a file is missing" in refusal(broken)
    assert not untouched


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the manifest is not JSON"),
        ("[1]", "the manifest is a list, not an object"),
        ("\x00\x01", "the manifest is not JSON"),
        ("[" * 100_000, "the manifest is not JSON"),
        ("{}", "names no format version"),
        ('{"format": "1"}', "names no format version"),
        ('{"format": 2}', "the artifact has format 2, this autospec reads up to 1"),
        ('{"format": 1}', "the manifest was changed after it was written"),
    ],
)
def test_a_manifest_that_is_none(broken: Path, text: str, message: str) -> None:
    (broken / manifest.NAME).write_text(text)
    assert message in refusal(broken)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.json", "leaves the directory"),
        ("graphs/../../outside.json", "leaves the directory"),
        ("/etc/hostname.json", "not plain and relative"),
        ("graphs//x.json", "not plain and relative"),
        ("graphs\\x.json", "not plain and relative"),
        ("", "not plain and relative"),
        ("graphs/code.pkl", "a kind that is never loaded"),
        ("graphs/code.py", "a kind that is never loaded"),
        ("graphs", "a kind that is never loaded"),
    ],
)
def test_paths_that_no_export_writes(sealed: Callable[..., Path], broken: Path, name: str, message: str) -> None:
    (broken.parent / "outside.json").write_text("{}")
    facts = {"bytes": 2, "sha256": manifest._sha256(broken.parent / "outside.json")}
    assert message in refusal(sealed(lambda content: content["files"].update({name: facts})))


@pytest.mark.parametrize("link", [FILE, "graphs"])
def test_symbolic_links(broken: Path, untouched: list[str], link: str) -> None:
    (broken / link).rename(broken.parent / "elsewhere")
    (broken / link).symlink_to(broken.parent / "elsewhere")
    assert "through a symbolic link" in refusal(broken)
    assert not untouched


def test_a_file_that_is_not_listed_is_never_opened(sealed: Callable[..., Path]) -> None:
    def point_elsewhere(content: dict[str, Any]) -> None:
        content["programs"][0]["graphs"][0]["file"] = "../outside.pt2"

    assert "a file that it does not list" in refusal(sealed(point_elsewhere))


@pytest.mark.parametrize("key", ["models", "programs", "weights", "speculation", "generation_defaults"])
def test_a_manifest_without_one_of_its_parts(sealed: Callable[..., Path], key: str) -> None:
    assert "does not describe a program" in refusal(sealed(lambda content: content.pop(key)))


def test_a_manifest_without_programs(sealed: Callable[..., Path]) -> None:
    assert "does not describe a program" in refusal(sealed(lambda content: content.update(programs=[])))


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], bytes | None], size: int | None = None) -> None:
    """Rewrite a safetensors header after change(header), which may return what to write instead."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    text = change(header) or json.dumps(header).encode()
    path.write_bytes((size or len(text)).to_bytes(8, "little") + text + data[end:])


def twice(header: dict[str, Any]) -> bytes:
    name = next(iter(header))
    return (json.dumps(header)[:-1] + f", {json.dumps({name: header[name]})[1:]}").encode()


def matrix(header: dict[str, Any]) -> dict[str, Any]:
    """An entry that is not square."""
    return next(one for one in header.values() if len(set(one["shape"])) == 2)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], bytes | None], int | None, str]] = {
    "turned": (lambda h: matrix(h).update(shape=matrix(h)["shape"][::-1]), None, "the graphs take"),
    "another dtype": (lambda h: matrix(h).update(dtype="I32"), None, "the graphs take"),
    "twice": (twice, None, "twice"),
    "too large": (lambda h: None, 1 << 62, "header too large"),
    "overlapping": (lambda h: [*h.values()][1].update(data_offsets=next(iter(h.values()))["data_offsets"]), None, "cannot be read"),
    "no header": (lambda h: b"[]", None, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_weights_that_no_graph_takes(sealed: Callable[..., Path], broken: Path, case: str, untouched: list[str]) -> None:
    change, size, message = HEADERS[case]
    rewrite_header(broken / FILE, change, size)
    with pytest.raises((ArtifactError, CheckpointError), match=message):
        autospec.load(sealed(), compile="eager")
    assert not untouched


@pytest.mark.parametrize("size", [0, -1, True, "2", None])
def test_a_program_of_no_size(sealed: Callable[..., Path], size: Any) -> None:
    text = refusal(sealed(lambda content: content["programs"][0]["shape"].update(page_size=size)))
    assert "describes a program of page_size" in text


def test_a_shape_that_another_version_wrote(sealed: Callable[..., Path]) -> None:
    text = refusal(sealed(lambda content: content["programs"][0]["shape"].pop("is_exact")))
    assert "the manifest's Shape lacks is_exact" in text
    text = refusal(sealed(lambda content: content["programs"][0]["shape"].update(is_exact=False, of_tomorrow=1)))
    assert "the manifest's Shape has a strange of_tomorrow" in text
    assert "export the model again" in text


def test_a_tokenizer_that_is_none(broken: Path, refused: Callable[..., Any]) -> None:
    (broken / "tokenizer").mkdir(exist_ok=True)
    (broken / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "the tokenizer cannot be read" in str(refused(ArtifactError, lambda: load_tokenizer(broken)))


def repack(path: Path, change: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> None:
    """Rewrite an archive after change(entries without their folder -> bytes)."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(f"{root}/{name}", data)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, bytes]], None]:
    """change(graph's JSON) as a change of an archive."""

    def apply(entries: dict[str, bytes]) -> None:
        content = json.loads(entries["models/model.json"])
        change(content)
        entries["models/model.json"] = json.dumps(content).encode()

    return apply


def first_node(content: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = content["graph_module"]["graph"]["nodes"][0]
    return node


def pickled(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Bomb(path),), buffer)
    return buffer.getvalue()


ARCHIVES: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "an extra file": (lambda e: e.update({"data/code.pkl": b"x"}), "holds 'data/code.pkl'"),
    "constants": (
        lambda e: e.update({"data/constants/model_constants_config.json": b'{"config": {"c": {}}}'}),
        "constants of its own",
    ),
    "legacy weights": (lambda e: e.update({"data/weights/model.pt": b"x"}), "holds 'data/weights/model.pt'"),
    "guards": (edit(lambda c: c.update(guards_code=["__import__('os').mkdir('x')"])), "has guards_code"),
    "symbols": (edit(lambda c: c.update(range_constraints={"s0": {}})), "has range_constraints"),
    "an expression": (
        edit(lambda c: first_node(c)["inputs"][0].update(arg={"as_expr": {"expr_str": "__import__('os').mkdir('x')"}})),
        "an argument of kind as_expr",
    ),
    "an object": (edit(lambda c: first_node(c)["inputs"][0].update(arg={"as_custom_obj": {}})), "of kind as_custom_obj"),
    "a function": (edit(lambda c: first_node(c).update(target="torch.hub.load")), "calls torch.hub.load"),
    "a library": (edit(lambda c: first_node(c).update(target="torch.ops.load_library")), "calls torch.ops.load_library"),
    "a file op": (edit(lambda c: first_node(c).update(target="torch.ops.aten.from_file.out")), "from_file.out, which is no op"),
    "looked-up metadata": (edit(lambda c: first_node(c).update(metadata={"source_fn_stack": "a,torch.hub.load"})), "looked up"),
    "a class": (
        edit(lambda c: c["graph_module"]["module_call_graph"][0]["signature"].update(in_spec='[1, {"type": "os.Path"}]')),
        "unknown classes",
    ),
    "no JSON": (lambda e: e.update({"models/model.json": b"{"}), "no graph archive"),
    "nothing": (lambda e: e.clear() or e.update({"x": b""}), "no graph archive"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_archives_with_more_than_a_graph(sealed: Callable[..., Path], broken: Path, case: str, untouched: list[str]) -> None:
    change, message = ARCHIVES[case]
    assert not list(why_not_data(broken / GRAPH)), "as it was written, the archive is data only"
    repack(broken / GRAPH, change)
    assert message in " ".join(why_not_data(broken / GRAPH))
    refusal(sealed())
    assert not untouched


def test_pickled_code_is_refused_and_not_run(
    sealed: Callable[..., Path], broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.export.load alone would run it."""
    mark = tmp_path / "ran"
    repack(broken / GRAPH, lambda entries: entries.update({"data/sample_inputs/model.pt": pickled(mark)}))
    assert "holds pickled code" in refusal(sealed())
    assert not mark.exists()
    monkeypatch.setattr(logging.getLogger("torch._export.serde.serialize"), "disabled", True)
    torch.export.load(broken / GRAPH)
    assert mark.exists(), "the test is about nothing if nobody would have run the code"


def test_a_compressed_archive(sealed: Callable[..., Path], broken: Path) -> None:
    repack(broken / GRAPH, lambda entries: None, zipfile.ZIP_DEFLATED)
    assert "is compressed" in refusal(sealed())


def test_a_graph_of_another_program(sealed: Callable[..., Path], broken: Path) -> None:
    (broken / GRAPH).write_bytes((broken / GRAPH.replace("step_4", "prefill")).read_bytes())
    with pytest.raises(ArtifactError, match=r"inputs, the manifest names|the graph's input"):
        autospec.load(sealed(), compile="eager").generate([[1, 2]], max_new_tokens=2, do_sample=False)
