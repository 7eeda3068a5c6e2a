"""Time the kernels on this machine's GPU: python -m autospec.bench_kernels [OP ...] prints Markdown tables.

Every time is the median of CUDA-graph replays, beside the least bytes that must move, the reference (eager, in a CUDA
graph too) and the deviation from it on fresh random inputs (for paged attention: from the reference in float64).
"""

from __future__ import annotations

import argparse
import importlib
import platform

import torch

from autospec.kernels.timing import Measurement

FILES = [
    "paged_attention", "flashinfer", "fused_linear", "append_kv", "append_rotated", "compact_kv", "tree_tables",
    "accept_tree", "choose_tokens", "rank_children", "grow_frontier", "build_dynamic_tree", "ngram_propose", "skinny_linear",
    "synthesize_tokens",
    "paged_mla", "gluon_mla", "flashinfer_mla", "append_latent", "expand_latent", "experts",
    "append_index_keys", "dsa_indexer_logits", "dsa_topk", "paged_sparse_mla",
]  # fmt: skip
BANDWIDTH = 3.0e12  # bytes per second, a large copy on an H100 80GB SXM, 2026-11-13


def versions() -> str:
    """GPU, driver-independent versions: what a figure is worth nothing without."""
    import triton

    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"


def line(row: Measurement) -> str:
    """One line of the Markdown table; times in microseconds."""
    bound = row.bytes_moved / BANDWIDTH * 1e6
    reference = "" if row.reference_microseconds is None else f"{row.reference_microseconds:.1f}"
    return f"| {row.op} | {row.case} | {bound:.1f} | **{row.microseconds:.1f}** | {reference} | {row.error:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="autospec.bench_kernels", description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", nargs="*", metavar="OP", help=f"kernel files, of {', '.join(FILES)}; all by default")
    files = parser.parse_args().files or FILES
    unknown = [name for name in files if name not in FILES]
    if unknown:
        parser.error(f"no kernel file {unknown[0]} with a bench; there are {', '.join(FILES)}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch.manual_seed(torch.seed() % 2**32)
    print(f"{versions()}, seed {torch.initial_seed()}\n")
    print("| op | case | bytes bound, us | us | reference, us | deviation |\n|---|---|---|---|---|---|")
    for name in files:
        for row in importlib.import_module(f"autospec.kernels.{name}").bench(torch.device("cuda")):
            print(line(row), flush=True)


if __name__ == "__main__":
    main()
