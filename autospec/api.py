"""autospec.optimize: a Hugging Face causal LM in, a model with the same tokens and more of them per step out."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autospec import debug
from autospec.config import Speculation, parse_speculation
from autospec.errors import CapacityError, OptionError
from autospec.kernels.noise import row_key
from autospec.limits import (
    SMALLEST_BUCKET,
    Limits,
    check_index_form,
    check_index_quantization,
    next_power_of_two,
    saved_shapes,
    shape_for,
)
from autospec.program import CapturedHead, CapturedModel, Program, Shape, state_bytes
from autospec.report import explain_text, pass_table
from autospec.runtime.metrics import Metrics
from autospec.runtime.options import GenerateOptions, fields_of, parse
from autospec.runtime.prompts import check_prompt, read_prompts, with_outputs
from autospec.runtime.request import Request
from autospec.runtime.session import Session
from autospec.runtime.stopping import StopStrings
from autospec.state import MAX_EOS
from autospec.threads import limit_threads

Draft = CapturedModel | CapturedHead


@dataclass
class OptimizedModel:
    """A captured model and the programs built for it so far; see `autospec.optimize`."""

    target: CapturedModel
    draft: Draft | None
    speculation: Speculation
    compile: str
    limits: Limits
    generation_defaults: Mapping[str, Any]
    left_out: frozenset[str] = frozenset()  # names of optional passes that do not run
    show_progress: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)  # folders or hub ids of "target" and "draft"
    metrics: Metrics = field(default_factory=Metrics)
    _sessions: dict[Shape, Session] = field(default_factory=dict, repr=False)
    _weights: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.RLock, repr=False, compare=False)
    _is_running: bool = field(default=False, repr=False, compare=False)
    _acceptance: tuple[float, ...] = ()  # synthetic, of a bench; nothing else that a user passes leads here

    @property
    def program(self) -> Program:
        """The most recently built program; before the first call of generate, the smallest one is built."""
        if not self._sessions:
            room = min(SMALLEST_BUCKET, self.limits.max_length or SMALLEST_BUCKET, self.target.facts.max_positions)
            self._session(1, room, sampling=False)
        return next(reversed(self._sessions.values())).program

    @property
    def session(self) -> Session:
        """The session that ran last; its state is that of the last call."""
        _ = self.program
        return next(reversed(self._sessions.values()))

    def save(
        self, directory: str | Path, *, batch_sizes: Sequence[int] = (1,), max_length: int | None = None,
        sampling: bool | None = None, compile: str | None = None, overwrite: bool = False,
        checkpoint: str | Path | None = None,
    ) -> Path:  # fmt: skip
        """Write an artifact that `autospec.load` runs without transformers: see `autospec.export`."""
        from autospec.exporter import Exported, export_to

        shapes = saved_shapes(self.target.facts, self.limits, self.speculation, batch_sizes, max_length, sampling)
        what = Exported(
            self.target, self.draft, self.speculation, shapes, self.sources, self.generation_defaults, self.left_out
        )
        return export_to(
            directory, what, compile=compile, overwrite=overwrite, progress=self.show_progress, checkpoint=checkpoint
        )

    def explain(self) -> str:
        """What each pass did and why it left things alone, and the kernel chosen for each op."""
        return explain_text(self.target, self.draft, self.program)

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: Any = None,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor:
        """Generate as transformers' generate does: [rows, width of the prompt + longest output] int64.

        Args:
            input_ids: prompts [B, S], padded on either side if attention_mask says so; a list of unpadded prompts is
                padded on the left.
            attention_mask: [B, S], 0 where input_ids is padding.
            generation_config: transformers' GenerationConfig (or a dictionary of its fields).
            streamer: one of transformers' streamers, for a single row.
            options: fields of the generation config, plus `seed` (int) and `tokenizer` (for stop_strings).

        Raises:
            OptionError: an option is unknown or unsupported; CapacityError: a prompt is empty or nothing fits.
        """
        if options.get("inputs") is not None and input_ids is None:
            input_ids = options.pop("inputs")
        if options.pop("inputs", None) is not None:
            raise OptionError("generate was given both input_ids and inputs", at="inputs", where="generate",
                              help="pass the prompt once")  # fmt: skip
        if input_ids is None:
            raise OptionError("generate needs input_ids", at="input_ids=None", where="generate", help="pass a prompt")
        asked = parse(options, fields_of(generation_config), self.generation_defaults)
        ids, prompts = read_prompts(input_ids, attention_mask, asked.pad_id)
        requests = self._requests(ids, prompts, asked)
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise OptionError(f"a streamer needs put and end, {type(streamer).__name__} lacks them", at="streamer",
                              where="generate", help="pass one of transformers' streamers")  # fmt: skip
        if streamer is not None and len(requests) > 1:
            raise OptionError("a streamer takes one row", at=f"{len(requests)} rows", where="generate",
                              help="generate the rows one at a time, or without a streamer")  # fmt: skip
        with self._alone():
            return self._generate(ids, requests, asked, streamer)

    __call__ = generate

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Calls share caches and state: another thread waits, a streamer that calls generate again is refused."""
        with self._lock:
            if self._is_running:
                raise OptionError("generate was called again from inside a call, by its streamer", at="generate",
                                  where=self.target.facts.name, help="call it after the first one returned")  # fmt: skip
            self._is_running = True
            try:
                yield
            finally:
                self._is_running = False

    def _generate(self, ids: Tensor, requests: list[Request], asked: GenerateOptions, streamer: Any) -> Tensor:
        longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
        sampling = any(request.sampling.needs_scores for request in requests)
        rows = self._rows_at_once(len(requests), longest, sampling)
        # Nothing was touched until here: a refused call leaves the model as it was.
        self.metrics = Metrics()
        try:
            if streamer is not None:
                streamer.put(ids.cpu())
            session = self._session(rows, longest, sampling)
            session.run(requests, asked.eos_ids, self.metrics, _stream_to(streamer))
        finally:
            if streamer is not None:
                streamer.end()
        return with_outputs(ids, requests, asked)

    def _requests(self, ids: Tensor, prompts: list[list[int]], asked: GenerateOptions) -> list[Request]:
        facts = self.target.facts
        count = asked.new_tokens(ids.shape[1], facts.max_positions)
        if len(asked.eos_ids) > MAX_EOS:
            raise OptionError(f"{len(asked.eos_ids)} eos ids were given, at most {MAX_EOS} are supported",
                              at="eos_token_id", where="generate", help="keep those the model emits")  # fmt: skip
        stop = StopStrings(asked.tokenizer, asked.stop_strings) if asked.stop_strings is not None else None
        requests = []
        for number, prompt in enumerate(prompts):
            check_prompt(number, prompt, count, facts)
            for copy in range(asked.num_return_sequences):
                key = row_key(asked.seed, number, copy)
                requests.append(Request(prompt, count, asked.sampling, key, should_stop=stop))
        return requests

    def _rows_at_once(self, rows: int, longest: int, sampling: bool) -> int:
        """How many rows one program takes: all of them, unless the user or the memory says fewer."""
        most = rows if self.limits.max_batch_size is None else min(rows, self.limits.max_batch_size)

        def missing(rows: int, share: float) -> int:
            """Bytes that a program for this many rows lacks; none if it is there already."""
            shape = self._shape(rows, longest, sampling)
            if self._built(shape) is not None:
                return 0
            needed = state_bytes(self.target, self.draft, shape)
            return max(0, needed - int(share * _free_bytes(self.target.facts.device)))

        while self._sessions and missing(most, 0.5):
            # The caches of other shapes are the first thing to give back; the oldest stands first.
            del self._sessions[next(iter(self._sessions))]
        while most > 1 and missing(most, 0.5):
            most = (most + 1) // 2
        if missing(most, 1.0):
            needed, free = state_bytes(self.target, self.draft, self._shape(most, longest, sampling)), _free_bytes(
                self.target.facts.device
            )
            raise CapacityError(
                f"a cache for {longest} tokens needs {needed / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free",
                at=f"{longest} tokens in one row", where=self.target.facts.name,
                help="shorten the prompt or max_new_tokens",
            )  # fmt: skip
        return most

    def _shape(self, rows: int, longest: int, sampling: bool) -> Shape:
        return shape_for(self.target.facts, self.limits, self.speculation, next_power_of_two(rows), longest, sampling)

    def _built(self, shape: Shape) -> Shape | None:
        """The shape of a program that is there and does for this one: the same but for at most twice the rows; on a
        GPU, where idle rows cost little and compiling a minute, any number up to a limit that the user fixed."""
        most = 2 * shape.batch_size
        if self.target.facts.device.type == "cuda":
            most = max(most, self.limits.max_batch_size or 0)
        wide_enough = [
            built for built in self._sessions
            if replace(built, batch_size=shape.batch_size) == shape and shape.batch_size <= built.batch_size <= most
        ]  # fmt: skip
        return min(wide_enough, key=lambda built: built.batch_size, default=None)

    def _session(self, rows: int, longest: int, sampling: bool) -> Session:
        shape = self._shape(rows, longest, sampling)
        shape = self._built(shape) or shape
        session = self._sessions.pop(shape, None)
        if session is None:
            program = self._build(shape)
            if debug.options().table:
                print("\n".join(pass_table(program.records)))
            buckets = [rows for rows in self.limits.batch_buckets if rows < program.shape.batch_size]
            narrow = {rows: partial(self._build, program.shape.narrow(rows)) for rows in buckets}
            session = Session(program, self._reader(program.shape), narrow)
        self._sessions[shape] = session  # the last one used stands last
        return session

    def _reader(self, shape: Shape) -> Callable[[], Program] | None:
        """What builds the reader of prompts for refilled rows; None: the batch's own prefill reads them."""
        return lambda: self._build(shape.reader())

    def _build(self, shape: Shape) -> Program:
        from autospec.assemble import build_program  # a saved model generates without the compiler

        return build_program(
            self.target, self.draft, self.speculation, shape, self.compile, self._weights, self.show_progress,
            self.left_out, self._acceptance,
        )  # fmt: skip


def optimize(
    model: Any,
    speculation: Any = "auto",
    *,
    compile: str = "inductor",
    max_batch_size: int | None = None,
    max_length: int | None = None,
    page_size: int | None = None,
    passes: str | Sequence[str] | None = None,
    exact: bool | int = False,
    batch_buckets: Sequence[int] = (),
    index_quantization: str | None = None,
) -> OptimizedModel:
    """Compile a Hugging Face causal LM into a program that emits the same tokens, several per step.

    Args:
        model: a loaded causal LM, or a path or hub id.
        speculation: "auto" (n-gram drafts whose length follows the measured acceptance), "ngram", None (plain
            decoding), or a configuration such as NGramConfig or DraftTargetConfig.
        compile: "inductor", or "eager" for the same graphs uncompiled.
        max_batch_size: rows at once; of more prompts, each waits for a row that has ended. None: as many as are asked for and fit.
        max_length: tokens per row, prompt and output together. None: grows in powers of two.
        page_size: cache rows per page.
        passes: optional passes to leave out, written "-name", such as ["-fuse-linears"]; None runs all.
        exact: logits of a chain equal those of plain decoding to the bit, in any dtype, where both are optimised with it: every
            step then has this many nodes (True: 8, those of a chain of 7) and sums in the same order for each.
        batch_buckets: numbers of rows, such as (16, 32), whose steps are compiled as well: once no prompt waits and so few rows are
            left, a batch goes on with the smallest that holds them. It pays where a step of all rows costs more.
        index_quantization: "fp8" keeps the keys by which sparse attention (DSA) selects in 8 bits, as DeepSeek's own kernels do:
            about half the bytes, and the one option here that may change tokens, as it may select other keys than the model.

    Raises:
        CaptureError: the model cannot be captured or decoded step by step, with the reason.
        OptionError, CheckpointError: an argument or a checkpoint is wrong.
    """
    from autospec.exactness import check_exact, exact_nodes
    from autospec.frontend import capture_all
    from autospec.pipeline import left_out

    chosen = parse_speculation(speculation)
    if compile not in ("inductor", "eager"):
        raise OptionError(f"compile must be 'inductor' or 'eager', got {compile!r}", at=f"compile={compile!r}",
                          where="autospec.optimize", help="'eager' runs the same graphs uncompiled")  # fmt: skip
    without = left_out(passes)
    for name, value in (("max_batch_size", max_batch_size), ("max_length", max_length), ("page_size", page_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name} must be a positive integer, got {value!r}", at=f"{name}={value!r}",
                              where="autospec.optimize", help="leave it out to let it grow as needed")  # fmt: skip
    is_listed = isinstance(batch_buckets, Sequence) and not isinstance(batch_buckets, str)
    if not is_listed or any(isinstance(rows, bool) or not isinstance(rows, int) or rows < 1 for rows in batch_buckets):
        shown = f"{batch_buckets!r:.60}"
        raise OptionError(f"batch_buckets must be positive integers, got {shown}", at=f"batch_buckets={shown}",
                          where="autospec.optimize", help="for example batch_buckets=(16, 32)")  # fmt: skip
    check_index_form(index_quantization)
    limit_threads()
    nodes = exact_nodes(exact, chosen)
    captured = capture_all(model, chosen, max_length)
    if nodes:
        check_exact(captured.target)
    draft = captured.draft
    check_index_quantization(index_quantization, captured.target.facts, None if draft is None else draft.facts)
    limits = Limits(max_batch_size, max_length, page_size, nodes, tuple(batch_buckets), index_quantization)
    return OptimizedModel(
        captured.target, captured.draft, chosen, compile, limits, captured.defaults, without, sources=captured.sources
    )


def export(
    model: Any,
    directory: str | Path,
    speculation: Any = "auto",
    *,
    batch_sizes: Sequence[int] = (1,),
    max_length: int | None = None,
    sampling: bool | None = None,
    compile: str | None = None,
    overwrite: bool = False,
    page_size: int | None = None,
    passes: str | Sequence[str] | None = None,
    meta: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    index_quantization: str | None = None,
) -> Path:
    """Write a directory that runs without transformers: graphs, weights, tokenizer and a manifest over all of them.

    Args:
        model, speculation, page_size, passes, index_quantization: as in `optimize`.
        directory: the folder to write; it appears when it is complete.
        batch_sizes: rows at once, one program each; more prompts run in waves.
        max_length: tokens per row, prompt and output together; None: 512, or what the model has.
        sampling: programs that sample, or greedy ones; None: both.
        compile: "aot" also packages the graphs with AOTInductor for this machine's kind of device.
        overwrite: replace an artifact that stands there.
        meta: where `model` is a folder, never load its weights: capture on `meta`, then copy them tensor by tensor.
        checkpoint: where the weights of a loaded model on `meta` are; None: its graphs are exported without them.
        progress: show a bar.

    Raises:
        ArtifactError: the folder cannot be written; and what `optimize` raises.
    """
    if meta:
        from autospec.loading import model_on_meta, resolve

        model, checkpoint = model_on_meta(model), checkpoint or resolve(str(model))
    fast = optimize(
        model, speculation, compile="eager", page_size=page_size, passes=passes, index_quantization=index_quantization
    )
    fast.show_progress = progress
    return fast.save(
        directory, batch_sizes=batch_sizes, max_length=max_length, sampling=sampling, compile=compile,
        overwrite=overwrite, checkpoint=checkpoint,
    )  # fmt: skip


def _stream_to(streamer: Any) -> Any:
    if streamer is None:
        return None

    def emit(row: int, tokens: list[int]) -> None:
        for token in tokens:
            streamer.put(torch.tensor([token]))

    return emit


def _free_bytes(device: torch.device) -> int:
    """Memory that a cache may take on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


__all__ = ["Limits", "OptimizedModel", "export", "optimize"]
