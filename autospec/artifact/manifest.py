"""manifest.json: what an artifact holds, and a SHA-256 of every file.

Everything is checked before anything is deserialised: paths stay inside the directory, files are what they were when
they were written, and none is of a kind that runs code by being read. A digest says that a file is intact, not who
wrote it: machine code in `aot/` is run, so it is for artifacts from people you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from autospec.errors import ArtifactError

FORMAT = 1  # of the directory; a reader refuses a newer one
NAME = "manifest.json"
EXPLAIN = "explain.json"  # what the passes did, for explain()
TEXTS = "texts.json.gz"  # graphs before and after each pass
TOKENIZER = "tokenizer"  # a folder
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".pt2", ".safetensors", ".so", ".gz")  # nothing that is unpickled

_LARGEST_MANIFEST = 64 << 20  # bytes; those of 100 layers and ten shapes have 3 MB
_CHUNK = 1 << 20
_AGAIN = "export the model again, or copy the whole folder again"


def refuse(rule: str, at: object, folder: Path, help: str = _AGAIN) -> ArtifactError:
    """The error for an artifact that cannot be read as it is."""
    return ArtifactError(rule, at=at, where=str(folder), help=help)


def is_artifact(path: str | Path) -> bool:
    """Whether a folder looks like an exported artifact."""
    return (Path(path) / NAME).is_file()


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Describe every file in the folder and write manifest.json."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    whole = {"format": FORMAT, **content, "files": files}
    (folder / NAME).write_text(json.dumps({**whole, "sha256": _digest(whole)}, indent=1) + "\n")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of an artifact whose files are all there and as they were written.

    Raises:
        ArtifactError: with the file and the reason.
    """
    folder = Path(directory)
    content = _parsed(folder)
    version = content.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise refuse(f"the manifest names no format version, but {version!r:.40}", NAME, folder)
    if version > FORMAT:
        raise refuse(f"the artifact has format {version}, this autospec reads up to {FORMAT}", f'"format": {version}', folder,
                     "install the autospec that wrote it, or a newer one")  # fmt: skip
    if content.pop("sha256", None) != _digest(content):
        raise refuse("the manifest was changed after it was written", NAME, folder)
    files = content.get("files")
    if not isinstance(files, dict):
        raise refuse("the manifest lists no files", NAME, folder)
    for name, facts in files.items():
        _check_name(name, folder)
        _check_file(name, facts, folder)
    return content


def _parsed(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not folder.is_dir():
        raise refuse("there is no such folder", str(folder), folder, "name a folder that `autospec export` wrote")
    if not path.is_file() or path.is_symlink():
        raise refuse(f"the folder has no {NAME}", NAME, folder, "name a folder that `autospec export` wrote")
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise refuse(f"the manifest has {path.stat().st_size} bytes", NAME, folder)
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise refuse(f"the manifest is not JSON: {str(error)[:120]}", NAME, folder) from None
    if not isinstance(content, dict):
        raise refuse(f"the manifest is a {type(content).__name__}, not an object", NAME, folder)
    return content


def _check_name(name: str, folder: Path) -> None:
    """A listed path stays inside the directory, even through links, and is of a kind that may be read."""
    pure = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or ":" in name or pure.is_absolute() or pure.as_posix() != name:
        raise refuse("the manifest lists a path that is not plain and relative", repr(name)[:80], folder)
    if ".." in pure.parts:
        raise refuse("the manifest lists a path that leaves the directory", repr(name)[:80], folder)
    if pure.suffix not in SUFFIXES:
        raise refuse(f"the manifest lists a file of a kind that is never loaded ('{pure.suffix}')", repr(name)[:80], folder,
                     "pickles and Python files are no part of an artifact")  # fmt: skip
    for depth in range(1, len(pure.parts) + 1):
        if (folder / Path(*pure.parts[:depth])).is_symlink():
            raise refuse("the manifest lists a path through a symbolic link", repr(name)[:80], folder)


def _check_file(name: str, facts: Any, folder: Path) -> None:
    path = folder / name
    try:
        found = path.stat()
    except OSError:
        raise refuse("a file is missing", name, folder) from None
    if not stat.S_ISREG(found.st_mode):
        raise refuse("a listed path is no file", name, folder)
    expected = facts if isinstance(facts, dict) else {}
    if found.st_size != expected.get("bytes"):
        raise refuse(f"a file has {found.st_size} bytes, the manifest says {expected.get('bytes')!r:.20}", name, folder)
    if _sha256(path) != expected.get("sha256"):
        raise refuse("a file was changed after it was written: its SHA-256 differs", name, folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def being_written(directory: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` when the block ends, and goes if it does not end well.

    Args:
        overwrite: an artifact that stands there already is replaced; anything else never is.
    """
    final = Path(directory).absolute()
    if final.exists() or final.is_symlink():
        is_empty = final.is_dir() and not final.is_symlink() and not any(final.iterdir())
        if not is_empty and not (overwrite and is_artifact(final)):
            what = "an artifact is there already" if is_artifact(final) else "something that is no artifact is there already"
            raise ArtifactError(what, at=str(directory), where="autospec.export",
                                help="name another folder, or say overwrite=True (--force) to replace an artifact")  # fmt: skip
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(f"the folder cannot be written: {error.strerror}", at=str(directory), where="autospec.export",
                            help="name a folder in a place that you may write to") from None  # fmt: skip
    old = partial.with_suffix(".old")
    try:
        yield partial
        # Deleting takes a while and can be interrupted; a rename is done or not done.
        if final.exists():
            final.rename(old)
        partial.rename(final)
    finally:
        if old.exists() and not final.exists():
            old.rename(final)
        for rest in (partial, old):
            shutil.rmtree(rest, ignore_errors=True)
