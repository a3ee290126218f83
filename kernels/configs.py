"""Tile sizes: heuristics by shape, and how rows are split over programs.

The first candidates are what serves; ``LOGITLESS_AUTOTUNE=1`` chooses among all (:mod:`logitless.backends.tuning`).
None has been measured yet, see docs/status.md: they are what compiles without spilling and keeps many loads in flight.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """A tile of a row kernel: ``rows`` x ``block`` elements at a time, by ``warps`` warps."""

    rows: int
    block: int
    warps: int


@dataclass(frozen=True)
class ProductConfig:
    """A tile of the product kernel: ``rows`` x ``block`` logits, ``depth`` of the hidden size at a time."""

    rows: int
    block: int
    depth: int
    warps: int
    stages: int


def product_tile(low: bool, pair: bool, interpreted: bool) -> ProductConfig:
    """``low``: float16 or bfloat16 operands; ``pair``: two heads, and so two tiles of sums."""
    if interpreted:
        return ProductConfig(64, 128, 64, 1, 1)
    if not low:
        return ProductConfig(32, 32, 32, 4, 2) if pair else ProductConfig(32, 64, 32, 4, 2)
    return ProductConfig(64 if pair else 128, 64, 64, 8, 3)  # the largest of which no target spills


def cost_tile(rows: int, adjacent: bool, interpreted: bool) -> Config:
    """Of a stored cost: long along the dimension that is ``adjacent`` in memory, rows or columns."""
    if interpreted:
        return Config(min(power_of_two(rows), 32), 32, 1)
    return Config(32, 64, 4) if adjacent else Config(4, 512, 4)


def longest_row(shared: int | None) -> int:
    """Columns of a cost that an iteration reads once: a row is in registers, and two more are on their way through
    ``shared`` memory, in bytes; None: through registers."""
    fits = 16384
    while shared is not None and 2 * 4 * fits + 1024 > shared:
        fits //= 2
    return fits


def iteration_stages(hip: bool) -> int:
    """Rows at a time in the pipeline of an iteration; AMD's keeps them in registers."""
    return 2 if hip else 3


def iteration_tile(m: int) -> Config:
    """Rows of ``m`` columns, whole."""
    block = power_of_two(m)
    return Config(max(1, 1024 // block), block, min(max(4, block // 512), 16))


def columns_tile(interpreted: bool) -> Config:
    """Columns x parts that are joined at a time."""
    return Config(512, 32, 1) if interpreted else Config(32, 32, 4)


def points_tile(products: bool, interpreted: bool) -> ProductConfig:
    """Of a cost between points, by ``products`` or by differences of coordinates: the largest that does not spill."""
    if interpreted:
        return ProductConfig(32, 32, 16, 1, 1)
    return ProductConfig(64, 64, 16, 8, 2) if products else ProductConfig(32, 64, 1, 4, 1)


LARGEST_RUN = 64  # points of a side in a whole run: the plan is in registers


def run_tile(n: int, m: int) -> Config:
    """Of a whole run: the problem, padded."""
    rows, block = power_of_two(n), power_of_two(m)
    return Config(rows, block, min(max(1, rows * block // 1024), 8))


def matrices_tile(n: int) -> Config:
    """``rows`` matrices of n x n, padded to ``block``."""
    block = power_of_two(n)
    rows = max(1, 1024 // block**2)
    return Config(rows, block, 8 if block == 64 else 4)


def power_of_two(x: int) -> int:
    """The least that is not less than x."""
    return 1 << max(0, x - 1).bit_length()


def row_tile(columns: int, elements: int, warps: int) -> Config:
    """``elements`` of one long row, or of several short ones."""
    block = min(power_of_two(columns), elements)
    return Config(elements // block, block, warps)


def parts(rows: int, columns: int, config: Config | ProductConfig, processors: int) -> int:
    """In how many parts the columns of each row are walked over.

    Some eight programs a multiprocessor keep it busy and make the last, partly filled wave short; a part is at least
    eight blocks, so that joining lanes costs little beside it.
    """
    tiles = -(-rows // config.rows)
    most = max(1, columns // (8 * config.block))
    return max(1, min(most, -(-8 * processors // max(tiles, 1))))


@dataclass(frozen=True)
class TokenParts:
    """How kernels/tokens.py divides tokens: ``width`` of them, or of a sequence, for a part, ``block`` at a time."""

    tokens: int
    sequences: int | None
    programs: int  # at most, where they take several parts each
    block: int
    warps: int

    @property
    def width(self) -> int:
        return self.block * max(1, -(-self.tokens // (self.programs * self.block)))

    @property
    def parts(self) -> int:
        if self.sequences is None:
            return max(1, -(-self.tokens // self.width))
        return self.sequences + 1 + self.tokens // self.width


def token_parts(tokens: int, sequences: int | None, processors: int, interpreted: bool) -> TokenParts:
    """Two programs a multiprocessor are what registers allow, have enough loads in flight, and leave few results."""
    if interpreted:
        return TokenParts(tokens, sequences, 4, 128, 1)
    return TokenParts(tokens, sequences, 2 * processors, 1024, 8)


# Elements of a tile and warps, by kernel: the default first, then what LOGITLESS_AUTOTUNE=1 also tries.
CANDIDATES: dict[str, tuple[tuple[int, int], ...]] = {
    "statistics": ((2048, 8), (1024, 4), (2048, 4), (4096, 8)),
    "pair_statistics": ((2048, 8), (1024, 4), (1024, 8)),
    "generic": ((1024, 4), (1024, 8)),
    "gradient": ((2048, 4), (1024, 4), (2048, 8), (4096, 8)),
}
