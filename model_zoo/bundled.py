"""Where the bundled models are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autospec.errors import CheckpointError

DEMO = Path(__file__).resolve().parent / "demo"
PREFIX = "bundled:"


def resolve(model: str) -> str:
    """`bundled:target` and `bundled:draft` as paths; anything else as it is."""
    if not model.startswith(PREFIX):
        return model
    name = model.removeprefix(PREFIX)
    folder = DEMO / name
    if not (folder / "config.json").is_file():
        known = sorted(path.name for path in DEMO.iterdir() if (path / "config.json").is_file())
        raise CheckpointError(f"there is no bundled model '{name}'", at=model, where=str(DEMO.name),
                              help=f"bundled are: {', '.join(PREFIX + item for item in known)}")  # fmt: skip
    return str(folder)


def demo_prompts() -> list[dict[str, Any]]:
    """The bundled prompts: text, package, file and licence of each."""
    prompts: list[dict[str, Any]] = json.loads((DEMO / "prompts.json").read_text())
    return prompts
