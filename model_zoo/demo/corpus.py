"""Permissively licensed Python source, read from the running interpreter.

    stdlib + site-packages -> licence allow list -> file filter -> split by package -> (train, held-out)

Nothing is downloaded: the corpus is whatever the interpreter has installed, and every package's version and licence is
recorded. A file of a held-out package never trains anything, nor does a file that shares most of its lines with one.
"""

import hashlib
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.message import Message
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# Every term of a licence expression must be here (one of them, where the terms are joined by OR). The last line covers
# C and C++ code that numpy and torch bundle and name in their metadata; no Python file is under those alone.
ALLOWED = {
    "MIT", "MIT-0", "MIT-CMU", "HPND", "ISC", "BSD", "BSD-2-Clause", "BSD-3-Clause", "0BSD",
    "Apache-2.0", "PSF-2.0", "Python-2.0",
    "Zlib", "CC0-1.0", "BSL-1.0", "Apache-2.0 WITH LLVM-exception",
}  # fmt: skip

# Metadata older than SPDX expressions: what authors and trove classifiers write -> SPDX ("BSD": variant unsaid).
SPELLINGS = {
    "mit license": "MIT", "the mit license": "MIT", "expat": "MIT", "mit-cmu": "MIT-CMU",
    "historical permission notice and disclaimer (hpnd)": "HPND", "isc license": "ISC", "isc license (iscl)": "ISC",
    "bsd license": "BSD", "new bsd": "BSD-3-Clause", "new bsd license": "BSD-3-Clause", "3-clause bsd": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause", "bsd 3-clause": "BSD-3-Clause", "bsd 3-clause license": "BSD-3-Clause",
    "modified bsd license": "BSD-3-Clause", "bsd-3": "BSD-3-Clause", "bsd 2-clause": "BSD-2-Clause",
    "apache": "Apache-2.0", "apache 2": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache-2": "Apache-2.0",
    "apache license": "Apache-2.0", "apache license 2.0": "Apache-2.0", "apache 2.0 license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0", "apache license version 2.0": "Apache-2.0",
    "apache-2.0 license": "Apache-2.0", "apache software license": "Apache-2.0",
    "psf": "PSF-2.0", "python software foundation license": "PSF-2.0",
}  # fmt: skip

# Never trained on. Names with "python/" are modules of the standard library.
HELD_OUT = ("python/json", "python/email", "python/http", "humanize", "sortedcontainers", "werkzeug")

SKIPPED_MODULES = {"test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
# Vendored code has a licence of its own; data folders of test suites hold vectors, not code.
SKIPPED_FOLDERS = {
    "_vendor", "vendor", "vendored", "vendored_packages", "third_party", "extern", "externals", "_externals",
    "_distutils_hack", "testdata", "test_data", "fixtures", "__pycache__",
}  # fmt: skip
GENERATED = re.compile(
    rb"(auto-?\s?generated|@generated|generated (by|from|file)|do not (edit|modify)|code generator)", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file that is in: where it is from and what it says."""

    package: str
    version: str
    licence: str
    path: str  # inside the package's installation, never absolute
    text: str


@dataclass(kw_only=True)
class Corpus:
    """Files to train on, files held out, and the reasons why others are in neither."""

    train: list[Source] = field(default_factory=list)
    held_out: list[Source] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    refused: dict[str, str] = field(default_factory=dict)  # package -> licence that is not on the list

    def describe(self) -> dict[str, Any]:
        """The corpus as numbers: packages by size, bytes and files per split, what was dropped."""
        return {
            "train": summary(self.train),
            "held_out": summary(self.held_out),
            "dropped_files": dict(self.dropped.most_common()),
            "refused_packages": self.refused,
        }


def summary(sources: list[Source]) -> dict[str, Any]:
    """Packages with version, licence, files and bytes, the largest first, and their totals."""
    packages: dict[str, dict[str, Any]] = {}
    for source in sources:
        row = packages.setdefault(
            source.package, {"version": source.version, "licence": source.licence, "files": 0, "bytes": 0}
        )
        row["files"] += 1
        row["bytes"] += len(source.text.encode())
    by_size = dict(sorted(packages.items(), key=lambda item: -item[1]["bytes"]))
    total = sum(row["bytes"] for row in by_size.values())
    return {"files": len(sources), "bytes": total, "packages": by_size}


def licence_of(metadata: Message) -> str:
    """A distribution's licence as an SPDX expression where it can be told, else what the metadata says."""
    expression = metadata.get("License-Expression")
    if expression:
        return str(expression)
    written = str(metadata.get("License") or "").strip()
    if written and "\n" not in written and is_allowed(spelled := SPELLINGS.get(written.lower(), written)):
        return spelled
    classifiers = [c.rsplit("::", 1)[-1].strip() for c in metadata.get_all("Classifier") or [] if c[:7] == "License"]
    terms = [SPELLINGS.get(c.lower(), c) for c in classifiers if c != "OSI Approved"]
    return " AND ".join(terms) or written[:60].splitlines()[0] if terms or written else "unknown"


def is_allowed(expression: str) -> bool:
    """True if each AND term of the expression offers an alternative that is on the list."""
    terms = re.sub(r"[()]", "", expression).split(" AND ")
    return all(any(choice.strip() in ALLOWED for choice in term.split(" OR ")) for term in terms)


def installed_files(refused: dict[str, str]) -> Iterator[tuple[str, str, str, str, Path]]:
    """(package, version, licence, path inside it, file) of every Python file under an allowed licence."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    for file in sorted(stdlib.rglob("*.py")):
        path = file.relative_to(stdlib)
        if path.parts[0] not in SKIPPED_MODULES:
            module = f"python/{path.parts[0].removesuffix('.py')}"
            yield module if module in HELD_OUT else "python", version, "PSF-2.0", path.as_posix(), file
    seen = set()
    for dist in sorted(distributions(), key=lambda d: str(d.metadata["Name"]).lower()):
        package = str(dist.metadata["Name"]).lower().replace("_", "-")
        licence = licence_of(dist.metadata)  # type: ignore[arg-type]
        if package in seen:
            continue
        seen.add(package)
        if not is_allowed(licence):
            refused[package] = licence
            continue
        for entry in dist.files or ():
            if entry.suffix == ".py" and ".." not in entry.parts:
                yield package, dist.version, licence, entry.as_posix(), Path(str(dist.locate_file(entry)))


def why_not(path: str, raw: bytes) -> str | None:
    """Why a file is no use for learning to write Python, or None."""
    if SKIPPED_FOLDERS & set(path.split("/")):
        return "vendored or test data"
    if not 200 <= len(raw) <= 400_000:
        return "too short or too long"
    if path.endswith(("_pb2.py", "_pb2_grpc.py")) or GENERATED.search(raw[:1500]):
        return "generated"
    if max(map(len, raw.split(b"\n"))) > 400:
        return "minified or data lines"
    if len(raw.translate(None, b"0123456789")) < 0.82 * len(raw):
        return "number table"
    if len(zlib.compress(raw, 1)) < 0.1 * len(raw):
        return "repeats itself"
    if raw.isascii():
        return None
    try:
        letters = len(raw.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    return "mostly not ASCII" if letters < 0.9 * len(raw) else None


def long_lines(text: str) -> list[int]:
    """Hashes of the lines that say something: what two versions of one file share."""
    return [hash(line) for line in map(str.strip, text.splitlines()) if len(line) > 25]


def collect(max_files: int | None = None) -> Corpus:
    """Read, filter, de-duplicate and split. `max_files` bounds each split (for smoke runs)."""
    corpus = Corpus()
    wanted = list(installed_files(corpus.refused))
    if max_files is not None:
        held_out = [row for row in wanted if row[0] in HELD_OUT]
        wanted = held_out[:max_files] + [row for row in wanted if row[0] not in HELD_OUT][:max_files]

    def read(row: tuple[str, str, str, str, Path]) -> Source | str:
        package, version, licence, path, file = row
        try:
            raw = file.read_bytes().replace(b"\r\n", b"\n")
        except OSError:
            return "not readable"
        reason = why_not(path, raw)
        return reason or Source(package=package, version=version, licence=licence, path=path, text=raw.decode())

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, wanted, chunksize=64))
    files = [result for result in results if isinstance(result, Source)]
    corpus.dropped.update(result for result in results if isinstance(result, str))

    digests = set()
    files.sort(
        key=lambda source: source.package not in HELD_OUT
    )  # held-out first, so that a copy is dropped from train
    guarded: set[int] = set()
    for source in files:
        digest = hashlib.blake2b(source.text.encode(), digest_size=16).digest()
        if digest in digests:
            corpus.dropped["duplicate"] += 1
        elif source.package in HELD_OUT:
            corpus.held_out.append(source)
            guarded.update(long_lines(source.text))
        elif is_near_copy(source.text, guarded):
            corpus.dropped["near copy of a held-out file"] += 1
        else:
            corpus.train.append(source)
        digests.add(digest)
    return corpus


def is_near_copy(text: str, guarded: set[int]) -> bool:
    """True if a third of the text's long lines stand in held-out files (licence headers alone do not reach that)."""
    lines = long_lines(text)
    return len(lines) > 20 and sum(line in guarded for line in lines) > len(lines) / 3
