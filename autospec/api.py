"""autospec.optimize: a Hugging Face causal LM in, a model with the same tokens and more of them per step out."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autospec import debug
from autospec.config import Speculation, parse_speculation, tree_of
from autospec.errors import CapacityError, OptionError
from autospec.kernels.noise import row_key
from autospec.program import CapturedHead, CapturedModel, ModelFacts, Program, Shape, state_bytes
from autospec.report import explain_text, pass_table
from autospec.runtime.metrics import Metrics
from autospec.runtime.options import GenerateOptions, check_names, parse
from autospec.runtime.request import Request
from autospec.runtime.session import Session
from autospec.runtime.stopping import StopStrings
from autospec.state import MAX_EOS
from autospec.threads import limit_threads
from autospec.trees import chain

Draft = CapturedModel | CapturedHead

_SAVED_LENGTH = 512  # tokens per row of an artifact unless said otherwise; a guess: caches cost memory from the start
_SMALLEST_BUCKET = 128  # tokens; a program for fewer would be rebuilt for the next prompt


@dataclass(frozen=True)
class Limits:
    """What the user fixed; None grows as needed."""

    max_batch_size: int | None
    max_length: int | None
    page_size: int | None
    exact: int = 0  # nodes of every step, where steps must be equal to the bit; 0: as many as pay


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
            room = min(_SMALLEST_BUCKET, self.limits.max_length or _SMALLEST_BUCKET, self.target.facts.max_positions)
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

        shapes = self._saved_shapes(batch_sizes, max_length, sampling)
        what = Exported(
            self.target, self.draft, self.speculation, shapes, self.sources, self.generation_defaults, self.left_out
        )
        return export_to(
            directory, what, compile=compile, overwrite=overwrite, progress=self.show_progress, checkpoint=checkpoint
        )

    def _saved_shapes(
        self, batch_sizes: Sequence[int], max_length: int | None, sampling: bool | None
    ) -> tuple[Shape, ...]:
        """One shape per batch size, greedy and sampling unless one of them is asked for."""
        length = max_length or self.limits.max_length or min(_SAVED_LENGTH, self.target.facts.max_positions)
        sizes = list(dict.fromkeys(batch_sizes))
        for name, value in (("max_length", length), *(("batch_sizes", size) for size in sizes or [0])):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be positive integers, got {value!r}", at=f"{name}={value!r}",
                                  where="autospec.export", help="for example batch_sizes=(1, 4), max_length=1024")  # fmt: skip
        if length > self.target.facts.max_positions:
            raise CapacityError(
                f"max_length is {length}, but the model has {self.target.facts.max_positions} positions",
                at=f"max_length={length}", where=self.target.facts.name, help="choose a smaller max_length",
            )  # fmt: skip
        limits = Limits(None, length, self.limits.page_size, self.limits.exact)
        kinds = (False, True) if sampling is None else (sampling,)
        made = [
            shape_for(self.target.facts, limits, self.speculation, size, length, kind) for size in sizes for kind in kinds
        ]
        return tuple(dict.fromkeys(made))

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
        asked = parse(options, _as_dict(generation_config), self.generation_defaults)
        ids, prompts = _prompts(input_ids, attention_mask, asked.pad_id)
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
        return _assemble(ids, requests, asked)

    def _requests(self, ids: Tensor, prompts: list[list[int]], asked: GenerateOptions) -> list[Request]:
        facts = self.target.facts
        count = asked.new_tokens(ids.shape[1], facts.max_positions)
        if len(asked.eos_ids) > MAX_EOS:
            raise OptionError(f"{len(asked.eos_ids)} eos ids were given, at most {MAX_EOS} are supported",
                              at="eos_token_id", where="generate", help="keep those the model emits")  # fmt: skip
        stop = StopStrings(asked.tokenizer, asked.stop_strings) if asked.stop_strings is not None else None
        requests = []
        for number, prompt in enumerate(prompts):
            _check_prompt(number, prompt, count, facts)
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
            session = Session(program, self._reader(program.shape))
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


def shape_for(
    facts: ModelFacts, limits: Limits, speculation: Speculation, batch: int, longest: int, sampling: bool
) -> Shape:
    """What a program is specialised for, to hold requests of `longest` tokens."""
    on_cpu = facts.device.type == "cpu"
    length = limits.max_length
    if length is None:
        length = min(max(_SMALLEST_BUCKET, next_power_of_two(longest)), facts.max_positions)
        length = max(length, longest)
    elif longest > length:
        raise CapacityError(
            f"a request needs {longest} tokens, the cache was limited to {length} per row",
            at=f"max_length={length}", where="autospec.optimize",
            help="lower max_new_tokens, or optimize with a larger max_length",
        )  # fmt: skip
    if limits.max_batch_size is not None:
        batch = min(batch, limits.max_batch_size)
    # A CPU reads every page of the table, so small pages waste less; on an H100 64 is up to 6% faster than 16.
    page_size = limits.page_size or (32 if on_cpu else 64)
    prefill_len = min(64 if on_cpu else 512, length)
    tree = chain(limits.exact - 1) if limits.exact else tree_of(speculation)
    return Shape(batch, length, page_size, prefill_len, tree, sampling, is_exact=limits.exact > 0)


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
    limit_threads()
    nodes = exact_nodes(exact, chosen)
    captured = capture_all(model, chosen, max_length)
    if nodes:
        check_exact(captured.target)
    return OptimizedModel(
        captured.target, captured.draft, chosen, compile, Limits(max_batch_size, max_length, page_size, nodes),
        captured.defaults, without, sources=captured.sources,
    )  # fmt: skip


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
) -> Path:
    """Write a directory that runs without transformers: graphs, weights, tokenizer and a manifest over all of them.

    Args:
        model, speculation, page_size, passes: as in `optimize`.
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
    fast = optimize(model, speculation, compile="eager", page_size=page_size, passes=passes)
    fast.show_progress = progress
    return fast.save(
        directory, batch_sizes=batch_sizes, max_length=max_length, sampling=sampling, compile=compile,
        overwrite=overwrite, checkpoint=checkpoint,
    )  # fmt: skip


def _as_dict(generation_config: Any) -> Mapping[str, Any] | None:
    """The fields of a generation config; unknown ones are refused in a dictionary, checkpoints may carry them."""
    if generation_config is None:
        return None
    if isinstance(generation_config, Mapping):
        check_names("generation_config", generation_config)
        return generation_config
    if not hasattr(generation_config, "to_dict"):
        raise OptionError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}",
                          at=f"generation_config={generation_config!r:.60}", where="generate",
                          help="pass transformers' GenerationConfig or a dictionary of its fields")  # fmt: skip
    fields: Mapping[str, Any] = generation_config.to_dict()
    return fields


def _prompts(input_ids: Any, attention_mask: Any, pad_id: int) -> tuple[Tensor, list[list[int]]]:
    """The padded ids [B, S] as given, and each row's real tokens."""
    if isinstance(input_ids, Mapping):
        if "input_ids" not in input_ids:
            raise OptionError("the mapping holds no input_ids", at=f"keys {', '.join(map(str, input_ids))}"[:80],
                              where="generate", help="pass what the tokenizer returned")  # fmt: skip
        attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
        input_ids = input_ids["input_ids"]
    if isinstance(input_ids, str) or (isinstance(input_ids, (list, tuple)) and any(isinstance(x, str) for x in input_ids)):
        raise OptionError("generate takes token ids, not text", at=f"input_ids={input_ids!r:.40}", where="generate",
                          help="tokenize the text first: tokenizer(text, return_tensors='pt').input_ids")  # fmt: skip
    rows = _rows_of(input_ids) if attention_mask is None else None
    if rows is not None:
        width = max(len(row) for row in rows)
        padded = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], dtype=torch.int64)
        return padded.reshape(len(rows), width), rows
    ids = _as_tensor(input_ids, "input_ids")
    if ids.dim() == 1:
        ids = ids[None]
    if ids.numel() == 0:
        raise CapacityError("the prompt is empty", at=f"input_ids of shape {tuple(ids.shape)}", where="generate",
                            help="give at least one token, for example the bos token")  # fmt: skip
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise OptionError(f"input_ids must be integers [batch, length], got {ids.dtype} of shape {tuple(ids.shape)}",
                          at="input_ids", where="generate", help="pass token ids, one row per prompt")  # fmt: skip
    ids = ids.long()
    if attention_mask is None:
        return ids, ids.tolist()
    given = _as_tensor(attention_mask, "attention_mask")
    if not bool(((given == 0) | (given == 1)).all()):
        raise OptionError("attention_mask must hold 0 for padding and 1 for tokens", at="attention_mask", where="generate",
                          help="an additive mask cannot be given here")  # fmt: skip
    mask = given.bool().to(ids.device)
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != ids.shape:
        raise OptionError(f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}",
                          at="attention_mask", where="generate", help="give one entry per token")  # fmt: skip
    # A prompt is one run of ones: it starts at most once.
    starts = torch.nn.functional.pad(mask.int(), (1, 0)).diff(dim=1).clamp(min=0).sum(1)
    if bool((starts > 1).any()):
        raise OptionError(f"attention_mask has holes inside the prompt of row {int(starts.argmax())}",
                          at="attention_mask", where="generate", help="pad on the left or the right only")  # fmt: skip
    return ids, [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


def _rows_of(input_ids: Any) -> list[list[int]] | None:
    """A list of prompts, each a list or a tensor of ids; None if input_ids is something else."""
    if not isinstance(input_ids, (list, tuple)) or not input_ids:
        return None
    if not all(isinstance(row, (list, tuple)) or (isinstance(row, Tensor) and row.dim() > 0) for row in input_ids):
        return None
    rows = [row.reshape(-1).tolist() if isinstance(row, Tensor) else list(row) for row in input_ids]
    for number, row in enumerate(rows):
        wrong = [token for token in row if isinstance(token, (bool, float, str)) or not hasattr(token, "__index__")]
        if wrong:
            raise OptionError(f"the prompt of row {number} holds {wrong[0]!r:.40}, which is no token id",
                              at=f"input_ids[{number}]", where="generate", help="tokenize the text first")  # fmt: skip
        huge = [token for token in row if abs(int(token)) >= 2**31]
        if huge:
            raise OptionError(f"token id {huge[0]} is no token id", at=f"input_ids[{number}]", where="generate",
                              help="was another tokenizer used?")  # fmt: skip
    return [[int(token) for token in row] for row in rows]


def _as_tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{name} is no rectangular array of integers: {str(error).splitlines()[0]}"[:200], at=name,
                          where="generate", help="pass a tensor or a list of prompts") from None  # fmt: skip


def _check_prompt(number: int, prompt: list[int], count: int, facts: Any) -> None:
    if not prompt:
        raise CapacityError(f"the prompt of row {number} is empty", at="input_ids", where="generate",
                            help="give at least one token, for example the bos token")  # fmt: skip
    if len(prompt) + count > facts.max_positions:
        raise CapacityError(
            f"row {number} asks for {len(prompt)} prompt tokens and {count} new ones, "
            f"but the model has {facts.max_positions} positions",
            at=f"prompt of {len(prompt)} tokens, max_new_tokens={count}", where=facts.name,
            help="shorten the prompt or lower max_new_tokens",
        )  # fmt: skip
    wrong = [token for token in prompt if not 0 <= token < facts.vocab_size]
    if wrong:
        raise OptionError(f"token id {wrong[0]} is outside the vocabulary of {facts.vocab_size}",
                          at=f"row {number}", where="generate",
                          help="mask padding with attention_mask; was another tokenizer used?")  # fmt: skip


def _stream_to(streamer: Any) -> Any:
    if streamer is None:
        return None

    def emit(row: int, tokens: list[int]) -> None:
        for token in tokens:
            streamer.put(torch.tensor([token]))

    return emit


def _assemble(ids: Tensor, requests: list[Request], asked: GenerateOptions) -> Tensor:
    """Prompts as they were given, outputs behind them, padded on the right."""
    width = max(len(request.output) for request in requests)
    rows = [request.output + [asked.pad_id] * (width - len(request.output)) for request in requests]
    prompts = ids.repeat_interleave(asked.num_return_sequences, dim=0)
    return torch.cat([prompts, torch.tensor(rows, dtype=ids.dtype, device=ids.device)], dim=1)


def _free_bytes(device: torch.device) -> int:
    """Memory that a cache may take on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def next_power_of_two(value: int) -> int:
    """The lowest power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()


__all__ = ["OptimizedModel", "export", "optimize"]
