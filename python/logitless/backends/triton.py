"""The triton backend: launches the kernels of ``logitless.kernels`` for float32 chunks on a GPU.

Chunks may also hold float16 or bfloat16 logits (materialised ones, read as they are), and gradients may be written in
those types. Under ``TRITON_INTERPRET=1``, set before the first import, the kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
from torch import Tensor

from logitless.backends import BASIS, Chunk, Combination, Factors, Normalizers, accumulator_names, tuning
from logitless.divergences import RowSum

NAME = "triton"
LOW_PRECISION = True
NUMBERS_PER_TILE = 128  # rows of a program of the close kernel
INTERPRETED_ELEMENTS = 8192  # of a tile: the interpreter's time is that of its operations, whatever their size


def _load():
    """The modules of the kernels and None, or None and the reason why they cannot be used."""
    try:
        import triton

        if tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 4):
            return None, f"Triton 3.4 or newer is needed, this is {triton.__version__}"
        from logitless import kernels
        from logitless.kernels import close, configs, divergences, generic, gradient, product, statistics  # noqa: F401
    except ImportError as error:
        return None, f"Triton does not load: {error}"
    return kernels, None


_kernels, PROBLEM = _load()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    import triton

    return not isinstance(_kernels.statistics.statistics, triton.JITFunction)


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and device.type == ("cpu" if interpreted() else "cuda")


# ---- launching


@functools.lru_cache
def processors(index: int | None) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    return 1 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def on(device: torch.device):
    """Launches go to the current device: make it that of the tensors."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _tile(kernel: str, columns: int, device: torch.device, run):
    """The tile of a kernel; ``run(tile)`` launches it, for tuning, without a change to its inputs."""
    configs = _kernels.configs
    if interpreted():
        return configs.row_tile(columns, INTERPRETED_ELEMENTS, 1)
    candidates = configs.CANDIDATES[kernel]
    if not tuning.wanted():
        return configs.row_tile(columns, *candidates[0])
    key = f"{torch.cuda.get_device_name(device)}, {kernel}, {configs.power_of_two(columns)} columns"
    return configs.row_tile(
        columns, *tuning.fastest(key, candidates, lambda candidate: run(configs.row_tile(columns, *candidate)))
    )


def _parts(rows: int, columns: int, config, device: torch.device) -> tuple[int, int]:
    """(number of parts, columns of each but the last)."""
    count = _kernels.configs.parts(rows, columns, config, processors(device.index))
    width = -(-columns // (count * config.block)) * config.block
    return max(1, -(-columns // max(width, 1))), width


def _options(config) -> dict[str, object]:
    return {"num_warps": config.warps, "enable_fp_fusion": False}


def _sides(student: Chunk, teacher: Chunk | None) -> tuple[list, dict[str, bool]]:
    """Arguments and flags for the chunks; without a teacher the student stands in its place."""
    arguments: list = []
    flags: dict[str, bool] = {}
    for name, chunk in (("STUDENT", student), ("TEACHER", student if teacher is None else teacher)):
        bias = chunk.z if chunk.bias is None else chunk.bias.contiguous()
        arguments += [chunk.z, chunk.z.stride(0), bias, 0.0 if chunk.inner is None else chunk.inner]
        arguments.append(_given(chunk.floor, chunk.z))
        flags[f"{name}_BIAS"] = chunk.bias is not None
        flags[f"{name}_CAPPED"] = chunk.inner is not None
        flags[f"{name}_FILTERED"] = chunk.floor is not None
    return arguments, flags


def _given(tensor: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if tensor is None else tensor.contiguous()


# ---- the contract


def statistics(
    student: Chunk,
    teacher: Chunk | None,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    return _unpacked(*_statistics(student, teacher, targets, weights, wanted))


def _statistics(student, teacher, targets, weights, wanted) -> tuple[list[str], Tensor, Tensor | None]:
    """(names of the fields, accumulators [F, parts, rows], argmax [parts, rows])."""
    rows, columns = student.z.shape
    device = student.z.device
    sides, flags = _sides(student, teacher)
    outer = student.outer.contiguous() if teacher is None else torch.stack([student.outer, teacher.outer])

    def run(config):
        parts, width = _parts(rows, columns, config, device)
        names, accumulators, argmax = _accumulators(rows, parts, teacher is not None, targets, wanted, device)
        if rows:
            with on(device):
                _kernels.statistics.statistics[-(-rows // config.rows), parts](
                    *sides,
                    outer,
                    _given(targets, student.z),
                    _given(weights, student.z),
                    accumulators,
                    accumulators if argmax is None else argmax,
                    rows,
                    columns,
                    width,
                    parts,
                    **flags,
                    **_flags(teacher is not None, targets, weights, wanted),
                    ROWS=config.rows,
                    BLOCK=config.block,
                    **_options(config),
                )
        return names, accumulators, argmax

    return run(_tile("statistics" if teacher is None else "pair_statistics", columns, device, run))


def _accumulators(rows: int, parts: int, pair: bool, targets, wanted, device):
    """(names of the fields, accumulators [F, parts, rows], argmax [parts, rows] or None)."""
    names = accumulator_names(pair, targets, wanted)
    accumulators = torch.empty(len(names), parts, rows, dtype=torch.float64, device=device)
    argmax = torch.empty(parts, rows, dtype=torch.int64, device=device) if "argmax" in wanted else None
    return names, accumulators, argmax


def _flags(pair: bool, targets: Tensor | None, weights: Tensor | None, wanted: frozenset[str]) -> dict[str, bool]:
    """Of the kernels that make statistics."""
    return {
        "PAIR": pair,
        "TARGETS": targets is not None,
        "ENTROPY": "entropy" in wanted,
        "COLLISION": "collision" in wanted,
        "WEIGHTED": "weighted" in wanted,
        "WEIGHTS": weights is not None,
        "ARGMAX": "argmax" in wanted,
        "MOMENTS": "moments" in wanted and pair,
    }


def product_statistics(
    student: Factors,
    teacher: Factors | None,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    wanted: frozenset[str],
) -> dict[str, Tensor]:
    rows, columns = student.hidden.shape[0], student.weight.shape[0]
    device = student.hidden.device
    low = student.hidden.dtype != torch.float32 and (teacher is None or teacher.hidden.dtype != torch.float32)
    tile = _kernels.configs.product_tile(low, teacher is not None, interpreted())
    parts, width = _parts(rows, columns, tile, device)
    names, accumulators, argmax = _accumulators(rows, parts, teacher is not None, targets, wanted, device)
    if rows:
        arguments: list = []
        flags: dict[str, bool] = {}
        for name, side in (("STUDENT", student), ("TEACHER", student if teacher is None else teacher)):
            bias = side.hidden if side.bias is None else side.bias.contiguous()
            arguments += [side.hidden, side.hidden.stride(0), side.weight, side.weight.stride(0), bias]
            arguments += [0.0 if side.inner is None else side.inner, side.hidden.shape[1]]
            flags |= {f"{name}_BIAS": side.bias is not None, f"{name}_CAPPED": side.inner is not None}
        outer = student.outer.contiguous() if teacher is None else torch.stack([student.outer, teacher.outer])
        with on(device):
            _kernels.product.product_statistics[-(-rows // tile.rows), parts](
                *arguments,
                outer,
                _given(targets, outer),
                _given(weights, outer),
                accumulators,
                accumulators if argmax is None else argmax,
                rows,
                columns,
                width,
                parts,
                **flags,
                **_flags(teacher is not None, targets, weights, wanted),
                ROWS=tile.rows,
                BLOCK=tile.block,
                DEPTH=tile.depth,
                PRECISION="ieee",
                num_stages=tile.stages,
                **_options(tile),
            )
    return _unpacked(names, accumulators, argmax)


def _unpacked(names: list[str], accumulators: Tensor, argmax: Tensor | None) -> dict[str, Tensor]:
    found = dict(zip(names, accumulators.unbind()))
    return found if argmax is None else found | {"argmax": argmax}


def generic(
    student: Chunk,
    teacher: Chunk,
    normalizers: Normalizers,
    definition: RowSum,
    parameters: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """(sum_j f_j, sum_j h_j) per row, float64; of a log-sum (L, b)."""
    n = normalizers
    numbers = torch.stack(
        [student.outer, n.max, n.log_sum, teacher.outer, n.teacher_max, n.teacher_log_sum, *parameters]
    )
    sums = _generic(student, teacher, numbers, definition, 6)
    if definition.family == "log_sum":
        maximum, total = sums
        return (maximum + total.log()).logsumexp(0), parameters[1].double()
    value, slope = sums.sum(1)
    return value, slope


def _generic(student: Chunk, teacher: Chunk, numbers: Tensor, definition: RowSum, place: int) -> Tensor:
    """[2, parts, rows] float64 as the kernel says; the parameters are rows ``place`` and following of ``numbers``."""
    rows, columns = student.z.shape
    device = student.z.device
    sides, flags = _sides(student, teacher)

    def run(config) -> Tensor:
        parts, width = _parts(rows, columns, config, device)
        sums = torch.empty(2, parts, rows, dtype=torch.float64, device=device)
        if rows:
            with on(device):
                _kernels.generic.generic[-(-rows // config.rows), parts](
                    *sides,
                    numbers,
                    sums,
                    rows,
                    columns,
                    width,
                    parts,
                    **flags,
                    DIVERGENCE=_kernels.divergences.NUMBERS[definition.name],
                    PLACE=place,
                    ROWS=config.rows,
                    BLOCK=config.block,
                    **_options(config),
                )
        return sums

    return run(_tile("generic", columns, device, run))


def gradient(
    student: Chunk,
    teacher: Chunk | None,
    normalizers: Normalizers,
    combination: Combination,
    out: Tensor,
) -> None:
    n = normalizers
    numbers = [student.outer, n.max, n.log_sum]
    numbers += [] if teacher is None else [teacher.outer, n.teacher_max, n.teacher_log_sum]
    numbers += [combination.coefficients[name] for name in BASIS if name in combination.coefficients]
    for _, parameters, c in combination.generic:
        numbers += [c, *parameters]
    _gradient(student, teacher, torch.stack(numbers), combination, combination.coefficients, out)


def _places(combination: Combination) -> tuple[int, ...]:
    """Where the coefficient of each divergence stands, after those of the basis; its parameters follow it."""
    places, place = [], 0
    for _, parameters, _ in combination.generic:
        places.append(place)
        place += 1 + len(parameters)
    return tuple(places)


def _gradient(student, teacher, numbers: Tensor, combination: Combination, given, out: Tensor) -> None:
    """``given`` names the elements of the basis whose coefficients ``numbers`` has."""
    rows, columns = student.z.shape
    if not rows:
        return
    device = student.z.device
    extra = combination.rows
    if extra is not None and extra.stride(1) != 1:
        extra = extra.contiguous()
    sides, flags = _sides(student, teacher)

    def run(config, to: Tensor) -> None:
        with on(device):
            _kernels.gradient.gradient[-(-rows // config.rows), -(-columns // config.block)](
                *sides,
                numbers,
                _given(combination.targets, student.z),
                _given(combination.weights, student.z),
                student.z if extra is None else extra,
                0 if extra is None else extra.stride(0),
                _given(combination.live, student.z),
                to,
                to.stride(0),
                rows,
                columns,
                **flags,
                PAIR=teacher is not None,
                **{name.upper(): name in given for name in BASIS},
                DIVERGENCES=tuple(_kernels.divergences.NUMBERS[row.name] for row, _, _ in combination.generic),
                PLACES=_places(combination),
                WEIGHT_VECTOR=combination.weights is not None,
                ROW_GRADIENT=extra is not None,
                LIVE=combination.live is not None,
                ROWS=config.rows,
                BLOCK=config.block,
                **_options(config),
            )

    run(_tile("gradient", columns, device, lambda config: run(config, torch.empty_like(out))), out)


def fused(
    student: Chunk,
    teacher: Chunk | None,
    *,
    targets: Tensor | None,
    weights: Tensor | None,
    wanted: frozenset[str],
    combination: Combination,
    out: Tensor,
) -> dict[str, Tensor]:
    names, accumulators, argmax = _statistics(student, teacher, targets, weights, wanted)
    found = _unpacked(names, accumulators, argmax)
    c, unset = combination.coefficients, student.outer
    given = [name for name in BASIS if name == "q" or name in c]
    numbers = [student.outer, unset, unset] + ([] if teacher is None else [teacher.outer, unset, unset])
    numbers += [unset if name == "q" else c[name] for name in given]
    for _, parameters, coefficient in combination.generic:
        numbers += [coefficient, *parameters]
    zero = torch.zeros_like(unset) if "q" not in c or "q_lse" not in c else None
    open_q = len(numbers)
    numbers = torch.stack([*numbers, c.get("q", zero), c.get("q_lse", zero)])
    _close(names, accumulators, numbers, open_q, given, teacher is not None, None, ())
    if combination.generic:
        places = _places(combination)
        first = 6 + len(given)
        sums = [
            _generic(student, teacher, numbers, definition, first + place + 1)
            for (definition, _, _), place in zip(combination.generic, places, strict=True)
        ]
        for k, both in enumerate(sums):
            found[k, "value"], found[k, "slope"] = both
        slopes = torch.stack(sums) if len(sums) > 1 else sums[0]
        _close(names, accumulators, numbers, open_q, given, True, slopes, places)
    _gradient(student, teacher, numbers, combination, given, out)
    return found


def _close(names, accumulators, numbers, open_q, given, pair: bool, slopes: Tensor | None, places: tuple) -> None:
    _, parts, rows = accumulators.shape
    if not rows:
        return
    with on(numbers.device):
        _kernels.close.close[(-(-rows // NUMBERS_PER_TILE),)](
            accumulators,
            accumulators if slopes is None else slopes,
            numbers,
            open_q,
            rows,
            parts,
            1 if slopes is None else slopes.shape[-2],
            TARGETS="target" in names,
            ENTROPY="first" in names,
            COLLISION="square" in names,
            WEIGHTED="weighted" in names,
            PAIR=pair,
            MOMENTS="forward" in names,
            **{name.upper(): name in given for name in BASIS if name != "q"},
            SLOPES=places,
            ROWS=NUMBERS_PER_TILE,
            num_warps=4,
            enable_fp_fusion=False,
        )
