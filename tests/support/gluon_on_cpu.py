"""Runs kernels written in Gluon on the CPU, as late as they allow: copies land when somebody waits for their mbarrier, products
read shared memory when their group of warps waits for them, and groups of warps are threads that take turns: at waits which must
wait, and, if asked for, where an arrival lets another go on. What is read too early, or without a fence since it was written, or
overwritten while a product reads it, and a wait for what never comes fail. A group is one thread: a missing barrier() inside it
is not seen.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

FAILURES: list[BaseException] = []  # of the threads of a program


class Pointer:
    """Addresses of a tensor's elements, in 64 bits; whole numbers have 32 unless they are converted."""

    def __init__(self, memory: Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, torch.as_tensor(offset).long()
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + torch.as_tensor(other).long())

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offset[index])


def load(p: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    flat = p.memory.as_strided((p.memory.untyped_storage().nbytes() // p.memory.element_size(),), (1,), 0)
    offset = p.offset + p.memory.storage_offset()
    if mask is None:
        return flat[offset]
    offset, mask = torch.broadcast_tensors(offset, torch.as_tensor(mask))
    return torch.where(mask, flat[torch.where(mask, offset, 0)], torch.as_tensor(other, dtype=flat.dtype))


def store(p: Pointer, value: Tensor, mask: Tensor) -> None:
    offset, value, mask = torch.broadcast_tensors(p.offset, value, mask)
    p.memory.view(-1)[offset[mask]] = value[mask]


class Shared:
    """A view of shared memory, which holds NaN until something is stored; of what products may not read yet (tensor cores
    see what threads have written once a fence has followed); and of how many products in flight read it."""

    def __init__(self, memory: Tensor, unfenced: Tensor, readers: Tensor) -> None:
        self.memory, self.unfenced, self.readers, self.dtype = memory, unfenced, readers, memory.dtype

    def view(self, of: Callable[[Tensor], Tensor]) -> Shared:
        return Shared(of(self.memory), of(self.unfenced), of(self.readers))

    def index(self, i: Any) -> Shared:
        return self.view(lambda one: one[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self.view(lambda one: one.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self.view(lambda one: one.permute(order))

    def store(self, value: Tensor | float) -> None:
        assert not self.readers.any(), "what a product in flight reads is overwritten"
        self.memory.copy_(torch.as_tensor(value))
        self.unfenced.fill_(True)
        machine.unfenced.append(self.unfenced)

    def load(self, layout: Any) -> Tensor:
        return self.memory.clone()


class Barriers(list):
    """An array of mbarriers."""

    index = list.__getitem__


class Barrier:
    """Completed phases, arrivals that a phase takes, arrivals so far; copies that land in the first wait that they end."""

    hands_over = False  # whether who lets another go on goes on after it
    changed = threading.Condition()  # any barrier; the thread that runs holds its lock
    running: ClassVar[set[int]] = set()  # threads
    waiting: ClassVar[dict[int, tuple[Barrier, int]]] = {}  # of them, for a phase of this parity

    def __init__(self) -> None:
        self.phases, self.count, self.arrived = 0, 0, 0
        self.copies: list[Callable[[], None]] = []

    def arrive(self, count: int, copies: Sequence[Callable[[], None]] = ()) -> None:
        self.arrived += count
        self.copies += copies
        assert self.arrived <= self.count, "an arrival too many"
        if self.arrived == self.count:
            self.phases, self.arrived = self.phases + 1, 0
            self.changed.notify_all()
            while self.hands_over and any(one is self and self.is_complete(parity) for one, parity in self.waiting.values()):
                self.changed.wait()

    def is_complete(self, parity: int) -> bool:
        return self.phases % 2 != parity

    def wait(self, parity: Any) -> None:
        self.waiting[threading.get_ident()] = self, int(parity)
        if not self.is_complete(int(parity)):
            self.changed.notify_all()  # whoever let this group go on may go on itself
        while not self.is_complete(int(parity)):
            assert not FAILURES, "another thread failed"
            held = {one for one, (barrier, other) in self.waiting.items() if not barrier.is_complete(other)}
            assert held != self.running, "every group of warps waits for another"
            self.changed.wait()
        del self.waiting[threading.get_ident()]
        for copy in self.copies:
            copy()
        self.copies.clear()


class Product:
    """An accumulator in flight: operands must be there when it is issued, and are read when it ends."""

    def __init__(self, a: Shared, b: Shared, before: Any) -> None:
        self.a, self.b, self.before, self.value = a, b, before, None
        for one in (a, b):
            assert not one.memory.isnan().any(), "a product is issued before its operands are there"
            assert not one.unfenced.any(), "a product is issued without a fence behind what was written"
            one.readers += 1

    def finish(self) -> None:
        for one in (self.a, self.b):
            one.readers -= 1
        before = self.before.value if isinstance(self.before, Product) else self.before
        self.value = before + self.a.memory.float() @ self.b.memory.float()


class Machine(threading.local):
    """What a group of warps has in flight, and what it wrote since its last fence."""

    def __init__(self) -> None:
        self.copies: list[Callable[[], None]] = []
        self.products: list[Product] = []
        self.unfenced: list[Tensor] = []


machine = Machine()


def copy_async(to: Shared, p: Pointer, mask: Tensor) -> None:
    rows = load(p, mask)
    to.store(float("nan"))  # until it arrives
    machine.copies.append(lambda: to.store(rows))


def mbarrier_arrive(barrier: Barrier, increment_count: bool) -> None:
    barrier.arrive(128, machine.copies)
    machine.copies = []


def fence() -> None:
    for written in machine.unfenced:
        written.fill_(False)
    machine.unfenced = []


def warpgroup_mma(a: Shared, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = True) -> Product:
    machine.products.append(Product(a, b, acc if use_acc else torch.zeros_like(acc)))
    return machine.products[-1]


def warpgroup_mma_wait(running: int, results: list[Any]) -> Any:
    while len(machine.products) > running:
        machine.products.pop(0).finish()
    values = [one.value if isinstance(one, Product) else one for one in results]
    assert all(value is not None for value in values), "a result is read while its product is in flight"
    return values[0] if len(values) == 1 else tuple(values)


def warp_specialize(functions: list[Any], warps: list[int], registers: list[int]) -> None:
    FAILURES.clear()
    Barrier.waiting.clear()
    started = threading.Barrier(len(functions))

    def run(function: Callable[..., None], args: tuple[Any, ...]) -> None:
        Barrier.running.add(threading.get_ident())
        started.wait()
        with Barrier.changed:
            try:
                function(*args)
                assert not machine.products, "a group ended with products in flight"
            except BaseException as failure:
                FAILURES.append(failure)
            Barrier.running.discard(threading.get_ident())
            Barrier.waiting.pop(threading.get_ident(), None)
            Barrier.changed.notify_all()

    threads = [threading.Thread(target=run, args=one, name=one[0].__name__) for one in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if FAILURES:
        raise FAILURES[0]


def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == "barrier":
        return Barriers(Barrier() for _ in range(shape[0]))
    told = (torch.zeros(shape, dtype=one) for one in (torch.bool, torch.int8))
    return Shared(torch.full(shape, float("nan"), dtype=dtype), *told)


def as_tensors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*(torch.as_tensor(one) for one in args))


def no_layout(*args: Any) -> str:
    return "layout"


program = threading.local()
gl = SimpleNamespace(
    arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype), load=load, store=store,
    where=as_tensors(torch.where), maximum=as_tensors(torch.maximum), minimum=as_tensors(torch.minimum),
    max=lambda b, axis: b.amax(axis), sum=lambda b, axis: b.sum(axis), exp2=torch.exp2, log2=torch.log2,
    convert_layout=lambda b, layout: b, static_range=range, program_id=lambda axis: program.place[axis],
    allocate_shared_memory=allocate, warp_specialize=warp_specialize, float32=torch.float32, int64=torch.int64,
    BlockedLayout=no_layout, SliceLayout=no_layout, NVMMADistributedLayout=no_layout, NVMMASharedLayout=no_layout,
    SwizzledSharedLayout=no_layout,
)  # fmt: skip
PARTS = {
    "gl": gl, "gluon_jit": lambda function=None, **options: function or (lambda inner: inner), "copy_async": copy_async,
    "async_copy": SimpleNamespace(mbarrier_arrive=mbarrier_arrive),
    "barrier": lambda: None, "fence_async_shared": fence, "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "barrier", init=lambda barrier, count: setattr(barrier, "count", count),
        wait=Barrier.wait, arrive=lambda barrier, count: barrier.arrive(count),
    ),
}  # fmt: skip


def launch(kernel: Callable[..., None], grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Every program after the other."""
    del kwargs["num_warps"]
    machine.__init__()
    for i in range(grid[0]):
        for j in range(grid[1]):
            program.place = torch.tensor([i, j], dtype=torch.int32)
            kernel(*(Pointer(one) if isinstance(one, Tensor) else one for one in args), **kwargs)


def join(part: Tensor, lse: Tensor, out: Tensor, splits: int, columns: int, warps: int) -> None:
    """What splits.combine computes."""
    if splits > 1:
        weights = torch.nn.functional.softmax(lse * torch.log(torch.tensor(2.0)), -1).nan_to_num(0.0)
        out.copy_((torch.where(weights[..., None] > 0.0, part, 0.0) * weights[..., None]).sum(-2))


def load_for_cpu(path: str, monkeypatch: Any, op: Any, hands_over: bool = False) -> ModuleType:
    """A copy of a kernel file whose kernels run here; it registers nothing with `op`.

    Args:
        hands_over: groups of warps also take turns at arrivals that let another go on.
    """
    from autospec.kernels import gluon
    from autospec.kernels import launch as triton_launch

    monkeypatch.setattr(Barrier, "hands_over", hands_over)
    for name, part in PARTS.items():
        monkeypatch.setattr(gluon, name, part)
    for name in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(triton_launch, name, lambda: None)
    monkeypatch.setattr(op, "implementation", lambda *args, **options: lambda function: function)
    spec = importlib.util.spec_from_file_location("autospec.kernels.on_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    module.launch, module.combine = launch, join  # type: ignore[attr-defined]
    return module
