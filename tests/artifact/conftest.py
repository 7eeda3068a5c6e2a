"""Artifacts of tiny models, written once per process and copied where a test breaks them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.artifacts import tiny_optimized

from autospec.artifact import manifest
from autospec.errors import AutospecError


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """written(drafter): the folder of the tiny target's artifact; tests leave it as it is."""
    made: dict[str, Path] = {}

    def write(drafter: str) -> Path:
        if drafter not in made:
            folder, both = tmp_path_factory.mktemp("artifact") / "tiny", drafter == "ngram"
            made[drafter] = tiny_optimized(drafter).save(folder, batch_sizes=(2,), sampling=None if both else True)
        return made[drafter]

    return write


@pytest.fixture(scope="session")
def refused() -> Callable[..., AutospecError]:
    """refused(kind, call): the error that the call raises; it has all four lines."""

    def check(kind: type[AutospecError], call: Callable[[], Any]) -> AutospecError:
        with pytest.raises(kind) as caught:
            call()
        labels = [line[:7].strip() for line in str(caught.value).splitlines()[1:]]
        assert labels == ["at", "in", "help"], f"not four lines:\n{caught.value}"
        return caught.value

    return check


@pytest.fixture
def broken(written: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the n-gram artifact, to be tampered with."""
    return Path(shutil.copytree(written("ngram"), tmp_path / "copy"))


@pytest.fixture
def sealed(broken: Path) -> Callable[..., Path]:
    """sealed(change): the copy after change(content), its manifest written anew as an attacker would."""

    def seal(change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
        content = json.loads((broken / manifest.NAME).read_text())
        (broken / manifest.NAME).unlink()
        listed = content.pop("files")
        content.pop("sha256")
        manifest.write_manifest(broken, content)
        content = json.loads((broken / manifest.NAME).read_text())
        content.pop("sha256")
        content["files"] = {name: facts for name, facts in content["files"].items() if name in listed}
        if change is not None:
            change(content)
        content["sha256"] = manifest._digest(content)
        (broken / manifest.NAME).write_text(json.dumps(content))
        return broken

    return seal
