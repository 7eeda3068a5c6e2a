"""For which machine a package was compiled, and why another one cannot run it."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_INSTRUCTIONS = re.compile(r"(?:avx|sse|ssse|fma|f16c|bmi|amx|gfni|vaes|vpcl|popcnt|abm|movbe|adx|sha_|sve|asimd|neon|i8mm|bf16)")


def machine(device: torch.device) -> dict[str, Any]:
    """What a package depends on, on this machine."""
    facts = {"torch": str(torch.__version__), "device": device.type, "platform": platform.system(), "cpu": platform.machine()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {**facts, "name": torch.cuda.get_device_name(device), "gpu": f"sm_{major}{minor}"}
    return {**facts, "instructions": sorted(instructions())}


def instructions() -> set[str]:
    """Extensions of the CPU's instruction set, as the kernel lists them; none where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return {word for word in listed.partition(":")[2].split() if _INSTRUCTIONS.match(word)}


def why_not_here(built: Mapping[str, Any], device: torch.device) -> str | None:
    """Why packages that were built for another machine cannot run on this device, or None."""
    if built["device"] != device.type:
        return f"the packages are for {built['device']}, not for {device.type}"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "the packages are for CUDA, and there is no CUDA device here"
    here = machine(device)
    named = {"torch": "torch", "platform": "the system", "cpu": "the processor", "gpu": "the GPU"}
    for key, name in named.items():
        if built.get(key) != here.get(key):
            return f"the packages were compiled for {name} {built.get(key)}, here is {here.get(key)}"
    missing = sorted(set(built.get("instructions", ())) - set(here.get("instructions", ())))
    if missing:
        return f"the packages use instructions that this processor lacks: {', '.join(missing[:6])}"
    return None
