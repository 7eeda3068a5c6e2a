"""How many CPU threads torch may use."""

from __future__ import annotations

import os

import torch


def available_cores() -> int:
    """Cores in the affinity mask; containers often see more than they have."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def limit_threads() -> None:
    """Lower torch's CPU threads to the cores there are; never raise what the user chose. More threads than cores make
    every parallel loop wait for the scheduler: a step of 0.7 ms was seen to take 880 ms."""
    if torch.get_num_threads() > available_cores():
        torch.set_num_threads(available_cores())
