"""Calls functions of kernel files where Triton is interpreted: reads pickled (file or module, name, args, kwargs) from
stdin, answers (error or None, result, args and kwargs as the call left them) on stdout. Started by conftest.py."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
import sys
import traceback
import warnings

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, where a kernel computes log2(0)


def load(place: str):
    """A module by its name or by its file."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location("interpreted_file", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    import torch
    from harness.wire import dump

    torch.set_num_threads(1)
    while True:
        try:
            place, name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            result = getattr(load(place), name)(*args, **kwargs)
            answer = (None, result, args, kwargs)
        except Exception:
            answer = (traceback.format_exc(), None, None, None)
        dump(answer, answers)


if __name__ == "__main__":
    main()
