"""The planner: how the engine walks over tokens x vocabulary within a budget of bytes. Pure functions of sizes.

G is one product of [N, H, V]. A *pass* visits tiles of some rows and some columns; what a strategy needs:

=========  ===============================================  ===========================  ============================
strategy   passes                                           products (two heads)         kept for backward
=========  ===============================================  ===========================  ============================
forward    statistics                                       1G (2G)                      nothing
eager      statistics and gradient of whole rows            3G (4G)                      the gradients themselves
recompute  statistics; gradient in backward                 4G (6G)                      O(N)
frozen     statistics and gradient of hidden, whole rows    2G (3G)                      [N, H]
stash      recompute, with the logits of some rows kept     between eager and recompute  chunks of logits
=========  ===============================================  ===========================  ============================

Passes that need whole rows walk over row blocks. The others take as many rows as they can and walk over the vocabulary:
each slice of the weight is then read, and each slice of its gradient written, once.

Where low-precision operands are multiplied as they are (GPUs), gradients of logits go into a buffer of that type, which
may hold a *group* of several row blocks: few rows of float32 logits, many rows of gradients for each product with the
weight's gradient, whose float32 sums are read and written once a group.

The cost model is ``products + bytes / machine.bandwidth + touched bytes / machine.touch + tiles * machine.overhead``:
enough to weigh chunk sizes, not a promise of seconds. A product takes ``flops / machine.flops``, and the reading of the
weight is added (CPUs) or runs beside it (``machine.overlaps``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Machine:
    """What the cost model knows of a device: rates in FLOP/s and bytes/s, seconds per tile, default cap in bytes."""

    name: str
    flops: float
    bandwidth: float
    touch: float  # first touch of fresh memory
    overhead: float
    cap: int
    low_flops: float = 0.0  # of products of low-precision operands with a float32 result, where ``low_products``
    low_products: bool = False  # low-precision operands are multiplied as they are, not upcast
    overlaps: bool = False  # operands are read beside the arithmetic


def machine(device: torch.device) -> Machine:
    return cpu(torch.get_num_threads()) if device.type == "cpu" else gpu()


def cpu(threads: int) -> Machine:
    """A server core with AVX-512, times ``threads``: rates as measured with two threads on a Xeon of 2023."""
    return Machine(f"cpu, {threads} threads", 1.5e11 * threads, 1.2e10 * threads, 7e9 * threads, 1e-3, 256 * MIB)


def gpu() -> Machine:
    """An H100's rates, from data sheets and a first look: to be replaced by measured ones, see docs/status.md."""
    return Machine("gpu", 5e13, 2.9e12, math.inf, 6e-5, 1024 * MIB, 6.5e14, low_products=True, overlaps=True)


@dataclass(frozen=True)
class Side:
    """One head: hidden size (0 for materialised logits), bytes per input element, whether tiles need a buffer."""

    hidden: int
    itemsize: int
    buffered: bool = True
    hidden_grad: bool = False
    weight_grad: bool = False


@dataclass(frozen=True)
class Shape:
    """All that planning depends on."""

    tokens: int
    vocab: int
    student: Side
    teacher: Side | None = None
    itemsize: int = 4  # of the compute type
    per_row: bool = False  # results per token, upstream gradient known only in backward
    one_scalar: bool = True  # per row, one upstream scalar decides the gradient of hidden: frozen is possible
    whole_rows: bool = False  # statistics need whole rows (generic divergences, row functions)
    scratch: int = 0  # further [rows, columns] buffers (row functions, separate outputs)

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @property
    def gradient(self) -> bool:
        return any(side.hidden_grad or side.weight_grad for side in self.sides)


@dataclass(frozen=True)
class Tiling:
    """Blocks of one pass: logits of ``rows`` x ``columns``, low-precision gradients of ``group`` x ``columns``."""

    rows: int
    columns: int
    group: int = 0  # 0: as many as rows

    def row_blocks(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """(block, group) of [start, stop): at most ``rows`` each, in groups of at most ``group``."""
        for group in _steps(start, stop, max(self.rows, self.group)):
            for block in _steps(group.start, group.stop, self.rows):
                yield block, group

    def column_blocks(self, vocab: int) -> Iterator[slice]:
        yield from _steps(0, vocab, self.columns)


@dataclass(frozen=True)
class Plan:
    """A strategy with its tiles and what they cost."""

    strategy: str
    forward: Tiling
    backward: Tiling | None  # of a separate gradient pass
    stash_rows: int
    upcast: int  # columns whose low-precision weights are upcast at a time
    workspace: int  # bytes of chunk buffers
    accumulators: int  # bytes of float32 sums for low-precision gradients
    state: int  # bytes kept for backward besides gradients
    products: float  # in G
    seconds: float


@lru_cache(maxsize=4096)
def plan(shape: Shape, machine: Machine, strategy: str = "auto", workspace: int | None = None) -> Plan:
    """The cheapest plan within ``workspace`` bytes; by default the smallest within 3% of the best below the cap.

    Raises:
        ValueError: ``strategy`` cannot serve this shape, or ``workspace`` is too small for one row.
    """
    strategies = applicable(shape)
    if strategy != "auto":
        if strategy not in strategies:
            raise ValueError(f"strategy: {strategy!r} {_REASONS[strategy]}; here: auto, {', '.join(strategies)}")
        strategies = [strategy]
    elif "eager" in strategies:
        strategies = ["eager"]  # fewer products than any other
    if workspace is not None:
        plans = _plans(shape, machine, strategies, workspace)
        if not plans:
            least = _least(shape, strategies)
            raise ValueError(f"workspace: {workspace} bytes are too few, this needs at least {least}")
        return min(plans, key=lambda p: p.seconds)
    sizes = [size for size in _SIZES if size <= machine.cap]
    while not (plans := [p for size in sizes for p in _plans(shape, machine, strategies, size)]):
        sizes.append(2 * sizes[-1])  # a vocabulary of which one row exceeds the cap
    best = min(p.seconds for p in plans)
    return min((p for p in plans if p.seconds <= 1.03 * best), key=lambda p: (p.workspace, p.seconds))


LOGIT_BLOCKS = (256, 512, 1024, 2048, 4096)  # rows of float32 logits at a time, where a group has more
_SIZES = [round(MIB * 2 ** (step / 2)) for step in range(0, 30)]
_REASONS = {
    "forward": "is for results without gradient",
    "eager": "needs a reduced loss (its gradient is formed in the forward pass)",
    "recompute": "needs a gradient",
    "frozen": "needs a weight without gradient and one upstream scalar per row",
    "stash": "needs a gradient",
}


def applicable(shape: Shape) -> list[str]:
    """The strategies that can serve a shape."""
    if not shape.gradient:
        return ["forward"]
    found = [] if shape.per_row else ["eager"]
    found += ["recompute", "stash"]
    student_only = shape.teacher is None or not (shape.teacher.hidden_grad or shape.teacher.weight_grad)
    if shape.one_scalar and shape.student.hidden and not shape.student.weight_grad and student_only:
        found.append("frozen")
    return found


def _plans(shape: Shape, machine: Machine, strategies: list[str], budget: int) -> list[Plan]:
    makers = {"forward": _forward, "eager": _eager, "frozen": _eager, "recompute": _recompute, "stash": _stash}
    plans = [makers[strategy](shape, machine, strategy, budget) for strategy in strategies]
    return [p for p in plans if p is not None]


def _forward(shape: Shape, machine: Machine, strategy: str, budget: int) -> Plan | None:
    room = budget - _upcast(shape, machine, budget)[1]
    tilings = _whole_tilings(shape, machine, room, 0) if shape.whole_rows else _sliced_tilings(shape, machine, room, 0)
    return _best(_priced(shape, machine, strategy, tiling, None, 0, budget) for tiling in tilings)


def _eager(shape: Shape, machine: Machine, strategy: str, budget: int) -> Plan | None:
    room = budget - _upcast(shape, machine, budget)[1]
    tilings = _whole_tilings(shape, machine, room, _operand(shape, machine))
    return _best(_priced(shape, machine, strategy, tiling, None, 0, budget) for tiling in tilings)


def _recompute(shape: Shape, machine: Machine, strategy: str, budget: int, stash_rows: int = 0) -> Plan | None:
    room = budget - _upcast(shape, machine, budget)[1] - stash_rows * _row_bytes(shape)
    forward = (_whole_tilings if shape.whole_rows else _sliced_tilings)(shape, machine, room, 0)
    # a row function differentiates whole rows, and it has scratch
    whole = shape.scratch > 1
    backward = (_whole_tilings if whole else _sliced_tilings)(shape, machine, room, _operand(shape, machine))
    return _best(_priced(shape, machine, strategy, f, b, stash_rows, budget) for f in forward for b in backward)


def _stash(shape: Shape, machine: Machine, strategy: str, budget: int) -> Plan | None:
    """Three quarters of the budget keep logits, as far as whole rows fit; the rest is for tiles."""
    buffered = any(side.buffered for side in shape.sides)
    stash_rows = min(shape.tokens, budget * 3 // 4 // _row_bytes(shape)) if buffered else 0
    return _recompute(shape, machine, strategy, budget, stash_rows)


def _best(plans: Iterator[Plan]) -> Plan | None:
    return min(plans, key=lambda p: p.seconds, default=None)


def _row_bytes(shape: Shape) -> int:
    """Of the logits of one row, of all buffered heads."""
    return max(1, sum(side.buffered for side in shape.sides)) * shape.vocab * shape.itemsize


def _low(shape: Shape) -> list[Side]:
    return [side for side in shape.sides if side.hidden and side.itemsize < shape.itemsize]


def _upcast(shape: Shape, machine: Machine, budget: int) -> tuple[int, int]:
    """(columns, bytes) of low-precision weight upcast at a time: an eighth of the budget, at most 16 MiB."""
    low = [side.hidden for side in _low(shape)]
    if not low or machine.low_products:
        return shape.vocab, 0
    width = max(low) * shape.itemsize
    columns = max(1, min(shape.vocab, min(budget // 8, 16 * MIB) // width))
    return columns, columns * width


def _low_hidden_bytes(shape: Shape, machine: Machine) -> int:
    """Of the upcast hidden states of one row."""
    return 0 if machine.low_products else sum(side.hidden for side in _low(shape)) * shape.itemsize


def _operand(shape: Shape, machine: Machine) -> int:
    """Bytes of an element's gradients in low precision, of all heads that have such."""
    wants = [side.itemsize for side in _low(shape) if side.hidden_grad or side.weight_grad]
    return sum(wants) if machine.low_products else 0


def _buffers(shape: Shape) -> int:
    return sum(side.buffered for side in shape.sides) + shape.scratch


def _whole_tilings(shape: Shape, machine: Machine, room: int, operand: int) -> list[Tiling]:
    per_row = _buffers(shape) * shape.vocab * shape.itemsize + _low_hidden_bytes(shape, machine)
    per_gradient = operand * shape.vocab
    rows = room // (per_row + per_gradient) if per_row + per_gradient else max(1, shape.tokens)
    if rows < 1:
        return []
    # tiles of a product that are filled in part cost like whole ones
    whole_tiles = machine.overlaps and 128 <= rows < shape.tokens
    tilings = [Tiling(rows // 128 * 128 if whole_tiles else _even(shape.tokens, rows), shape.vocab)]
    if per_gradient:  # few rows of logits, many of gradients
        for block in LOGIT_BLOCKS:
            if block < rows and (group := (room - block * per_row) // per_gradient) > block:
                tilings.append(Tiling(block, shape.vocab, min(group // block * block, shape.tokens)))
    return tilings


def _sliced_tilings(shape: Shape, machine: Machine, room: int, operand: int) -> list[Tiling]:
    """The fewest row blocks whose slices are still wide enough for efficient products."""
    element = max(1, _buffers(shape)) * shape.itemsize + operand
    narrow = min(shape.vocab, 1024)
    hidden = _low_hidden_bytes(shape, machine)
    rows = max(1, shape.tokens)
    while rows > 1 and rows * (element * narrow + hidden) > room:
        rows = -(-rows // 2)
    columns = (room - rows * hidden) // (rows * element)
    if columns < 1:
        return []
    if columns < shape.vocab:  # whole cache lines, and balanced slices
        blocks = -(-shape.vocab // columns)
        columns = min(columns, -(-shape.vocab // blocks // 16) * 16)
    return [Tiling(rows, min(columns, shape.vocab))]


def _least(shape: Shape, strategies: list[str]) -> int:
    """The smallest budget for which some strategy has a plan, by bisection."""
    machine = cpu(1)
    high = 1
    while not _plans(shape, machine, strategies, high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _plans(shape, machine, strategies, middle) else (middle, high)
    return high


def _priced(
    shape: Shape,
    machine: Machine,
    strategy: str,
    forward: Tiling,
    backward: Tiling | None,
    stash_rows: int,
    budget: int,
) -> Plan:
    n, v = shape.tokens, shape.vocab
    upcast, upcast_bytes = _upcast(shape, machine, budget)
    fused = strategy in ("eager", "frozen")
    gradient_pass = forward if fused else backward
    seconds = traffic = accumulators = products = 0.0
    tiles = sum(
        _count(n, tiling.rows) * _count(v, tiling.columns) for tiling in (forward, backward) if tiling is not None
    )

    def multiply(share: float, flops: float, read: float) -> float:
        """Seconds of a share of a product that reads so many bytes of operands."""
        rate = machine.low_flops if low and machine.low_products else machine.flops
        times = (share * flops / rate, read / machine.bandwidth)
        return max(times) if machine.overlaps else sum(times)

    for side in shape.sides:
        if not side.hidden:
            continue
        low = side.itemsize < shape.itemsize
        g = 2.0 * n * side.hidden * v
        upcasts = low and not machine.low_products
        read = v * side.hidden * (side.itemsize + (2 * shape.itemsize if upcasts else 0))
        products += 1
        seconds += multiply(1, g, _count(n, forward.rows) * read)
        if backward is not None:
            share = 1 - stash_rows / max(n, 1)
            products += share
            seconds += multiply(share, g, _count(n, backward.rows) * read)
        if gradient_pass is None:
            continue
        groups = _count(n, max(gradient_pass.rows, gradient_pass.group))
        column_blocks = _count(v, gradient_pass.columns)
        if side.hidden_grad:
            products += 1
            seconds += multiply(1, g, groups * read)
            traffic += 2 * column_blocks * n * side.hidden * shape.itemsize
            if low:
                accumulators += n * side.hidden * shape.itemsize
        if side.weight_grad and strategy != "frozen":
            products += 1
            seconds += multiply(1, g, 0)
            if not machine.overlaps:
                traffic += 2 * groups * v * side.hidden * shape.itemsize
            elif not low or groups > 1:  # written by the first group, read and written by others, rounded at the end
                rounding = shape.itemsize + side.itemsize if low else 0
                traffic += v * side.hidden * ((2 * groups - 1) * shape.itemsize + rounding)
            if low and groups > 1:
                accumulators += v * side.hidden * shape.itemsize
    if machine.overlaps:  # row kernels: one reading for statistics, one reading and one writing for the gradient
        readings = (2 if gradient_pass is not None else 1) * len(shape.sides)
        writing = 0 if gradient_pass is None else _operand(shape, machine) or shape.itemsize
        traffic += n * v * (readings * shape.itemsize + writing)
    else:
        sweeps = 2 + (4 if gradient_pass is not None else 0) + (1 if backward is not None else 0)
        traffic += sweeps * len(shape.sides) * n * v * shape.itemsize
    tiles_bytes = 0
    for tiling in (forward, backward):
        if tiling is None:
            continue
        size = tiling.rows * (_buffers(shape) * tiling.columns * shape.itemsize + _low_hidden_bytes(shape, machine))
        if tiling is gradient_pass:
            size += max(tiling.rows, tiling.group) * tiling.columns * _operand(shape, machine)
        tiles_bytes = max(tiles_bytes, size)
    workspace = tiles_bytes + upcast_bytes + stash_rows * _row_bytes(shape)
    state = 0
    if strategy == "frozen":
        state = n * shape.student.hidden * shape.itemsize
    elif backward is not None:
        state = 64 * n
    seconds += traffic / machine.bandwidth + workspace / machine.touch + tiles * machine.overhead
    return Plan(strategy, forward, backward, stash_rows, upcast, workspace, int(accumulators), state, products, seconds)


def _even(total: int, block: int) -> int:
    """The largest block of a walk over ``total`` in as few blocks of at most ``block`` as can be, all alike."""
    return max(1, -(-total // max(1, _count(total, block))))


def _count(total: int, block: int) -> int:
    return -(-total // block) if total else 0


def _steps(start: int, stop: int, block: int) -> Iterator[slice]:
    for begin in range(start, stop, block):
        yield slice(begin, min(begin + block, stop))
