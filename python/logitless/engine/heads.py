"""Heads at work: where chunks of logits come from, and where their gradients go. All matrix products are here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.backends import Chunk, Factors
from logitless.engine import products
from logitless.engine.memory import empty, padded
from logitless.engine.problem import ABSENT, HeadSpec

GAIN_TARGET = 32.0  # the largest upstream gradient of float16: 65504 is far above, and 6e-8 far below what it scales


@dataclass(frozen=True)
class Tile:
    """Some rows and some columns; ``group``: the rows whose low-precision gradients are multiplied together."""

    rows: slice
    columns: slice
    group: slice

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def of(self, buffer: Tensor) -> Tensor:
        """Room for the tile in a buffer."""
        rows, columns = self.size
        return buffer if buffer.shape == (rows, columns) else buffer[:rows, :columns]

    def at(self, matrix: Tensor) -> Tensor:
        """The tile of a matrix."""
        return matrix if matrix.shape == self.size else matrix[self.rows, self.columns]


class Head:
    """What linear and dense heads share: the scaling of a chunk, and rows that are left out."""

    def __init__(self, spec: HeadSpec, tensors: list[Tensor], index: Tensor | None, dtype: torch.dtype) -> None:
        first = tensors[spec.inputs[0]]
        self.spec, self.index, self.dtype, self.device = spec, index, dtype, first.device
        self.tokens = first.shape[0]
        self.rows = self.tokens if index is None else index.numel()
        self.inner = None if spec.softcap is None else spec.scale / spec.softcap
        scale = spec.softcap or spec.scale
        if spec.temperatures == ABSENT:
            self._temperature = None
            self.outer = torch.full((self.rows,), scale / spec.temperature, dtype=dtype, device=first.device)
        else:
            given = _select(tensors[spec.temperatures], index).double()
            self._temperature = torch.where(given > 0, given, torch.nan)  # poisons the row, see check_values
            self.outer = (scale / self._temperature).to(dtype)
        self.bias: Tensor | None = None
        self.gain: Tensor | None = None

    @property
    def temperature(self) -> Tensor:
        """[rows], float64."""
        if self._temperature is not None:
            return self._temperature
        return torch.full((self.rows,), self.spec.temperature, dtype=torch.float64, device=self.device)

    def amplified(self, gradients):
        """Gradients, or a list of those, times the gain with which this head's are computed."""
        if self.gain is None or gradients is None:
            return gradients
        return [g * self.gain for g in gradients] if isinstance(gradients, list) else gradients * self.gain

    def stashed(self, tile: Tile, z: Tensor, fill: bool) -> Chunk:
        """A chunk whose raw products are kept in ``z``; ``fill``: form them there."""
        if fill:
            self.multiply(tile, z)
        return self._chunk(z, tile)

    def _chunk(self, z: Tensor, tile: Tile) -> Chunk:
        bias = None if self.bias is None else self.bias[tile.columns]
        return Chunk(z, bias, self.inner, self.outer if tile.size[0] == self.rows else self.outer[tile.rows])


class LinearHead(Head):
    """hidden [n, H] and weight [V, H] of some type, and products in the compute type.

    With ``low_products`` low-precision operands are multiplied as they are: gradients of logits are rounded once to
    that type, into a buffer that holds those of a whole group of rows, so that the weight's float32 gradient is read
    and written once a group. Those for float16 are computed times a power of two, the *gain*: they would underflow.
    Otherwise low-precision inputs are upcast, ``upcast`` columns of the weight at a time.
    """

    buffered = True
    low_products = False

    def __init__(self, spec: HeadSpec, tensors: list[Tensor], index: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(spec, tensors, index, dtype)
        hidden, weight, bias = (None if place == ABSENT else tensors[place] for place in spec.inputs)
        self.padded = weight.shape[0]
        self.columns = weight.shape[0] if spec.vocab_size is None else spec.vocab_size
        self.hidden = _select(hidden, index)
        self.weight = weight[: self.columns]
        self.bias = None if bias is None else bias[: self.columns].to(dtype)
        self.low = weight.dtype != dtype
        self.upcast = self.columns
        self._upcast_buffer: Tensor | None = None

    def chunk(self, tile: Tile, buffer: Tensor) -> Chunk:
        """The logits of a tile, multiplied into ``buffer``."""
        z = tile.of(buffer)
        self.multiply(tile, z)
        return self._chunk(z, tile)

    @property
    def factors(self) -> Factors:
        """What a kernel that forms the product itself needs."""
        hidden = self.hidden if self.hidden.stride(1) == 1 else self.hidden.contiguous()
        weight = self.weight if self.weight.stride(1) == 1 else self.weight.contiguous()
        return Factors(hidden, weight, self.bias, self.inner, self.outer)

    def multiply(self, tile: Tile, out: Tensor) -> None:
        hidden = self._hidden(tile.rows)
        for columns, weight in self._weights(tile.columns):
            products.multiply(hidden, weight.t(), out[:, columns])

    def open_gradients(
        self, wants: tuple[bool, ...], single_group: bool, shape: tuple[int, int], upstream: list[Tensor]
    ) -> None:
        """``single_group``: every column of the weight's gradient is complete after one group of rows.

        ``shape`` is that of the largest gradient of a group; ``upstream`` are the gradients of the terms, per row.
        """
        hidden, weight, bias = wants
        self.operand = None
        if self.low and self.low_products and any(wants):
            self.operand = padded(shape, self.weight.dtype, self.device)
            if self.weight.dtype == torch.float16:
                largest = sum(u.abs() for u in upstream).amax() if self.rows else upstream[0].new_zeros(())
                self.gain = torch.exp2(torch.floor(torch.log2(GAIN_TARGET / largest.clamp(min=1e-30))))
        shape, device = (self.rows, self.hidden.shape[1]), self.device
        self.hidden_grad = empty(shape, self.dtype, device) if hidden else None
        self.rounds_pieces = self.low and single_group and self.gain is None  # then it needs no float32 sums
        shape = (self.padded, self.weight.shape[1])
        dtype = self.weight.dtype if self.rounds_pieces else self.dtype
        self.weight_grad = empty(shape, dtype, device) if weight else None
        self.bias_grad = torch.zeros(self.padded, dtype=self.dtype, device=device) if bias else None

    def gradient_buffer(self, tile: Tile, buffer: Tensor) -> Tensor:
        """Where the gradient of a tile is to be written before :meth:`accumulate`."""
        if self.operand is None:
            return tile.of(buffer)
        rows = slice(tile.rows.start - tile.group.start, tile.rows.stop - tile.group.start)
        return self.operand[rows, : tile.size[1]]

    def accumulate(self, tile: Tile, gradient: Tensor) -> None:
        """Adds the gradient of a tile of raw products; the first tile of a row or column range comes first."""
        rows = tile.rows
        if self.operand is not None:
            rows = tile.group
            if tile.rows.stop < rows.stop:
                return  # more of the group is to come
            gradient = self.operand[: rows.stop - rows.start, : tile.size[1]]
        if self.hidden_grad is not None:
            out = self.hidden_grad[rows]
            for columns, weight in self._weights(tile.columns):
                products.multiply(gradient[:, columns], weight, out, add=columns.start + tile.columns.start > 0)
        if self.weight_grad is not None and self.rounds_pieces and self.operand is None:
            hidden = self._hidden(rows)
            for columns, absolute in _pieces(tile.columns, self.upcast):
                piece = self._scratch(absolute)
                self.weight_grad[absolute] = torch.mm(gradient[:, columns].t(), hidden, out=piece)
        elif self.weight_grad is not None:
            out = self.weight_grad[tile.columns]
            products.multiply(gradient.t(), self._hidden(rows), out, add=rows.start > 0)
        if self.bias_grad is not None:
            self.bias_grad[tile.columns] += gradient.sum(0, dtype=self.dtype)

    def gradients(self) -> list[Tensor]:
        """Those asked for, in the order and types of the inputs."""
        found = []
        self.operand = None
        if self.gain is not None:
            for gradient in (self.hidden_grad, self.weight_grad, self.bias_grad):
                if gradient is not None:
                    gradient /= self.gain
        if self.hidden_grad is not None:
            found.append(_restore(self.hidden_grad.to(self.hidden.dtype), self.index, self.tokens))
        if self.weight_grad is not None:
            self.weight_grad[self.columns if self.rows else 0 :] = 0
            found.append(self.weight_grad.to(self.weight.dtype))
        if self.bias_grad is not None:
            found.append(self.bias_grad.to(self.weight.dtype))
        return found

    def _hidden(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows]
        return hidden if self.low_products else hidden.to(self.dtype)

    def _weights(self, columns: slice):
        """(columns relative to the tile, their weight in the compute type)."""
        if not self.low or self.low_products:
            yield slice(0, columns.stop - columns.start), self.weight[columns]
            return
        for piece, absolute in _pieces(columns, self.upcast):
            yield piece, self._scratch(absolute).copy_(self.weight[absolute])

    def _scratch(self, columns: slice) -> Tensor:
        """Room for the upcast weight of some columns: one buffer for all, touched once."""
        if self._upcast_buffer is None:
            self._upcast_buffer = empty((min(self.upcast, self.columns), self.weight.shape[1]), self.dtype, self.device)
        return self._upcast_buffer[: columns.stop - columns.start]


class DenseHead(Head):
    """Materialised logits [n, V]: chunks are views where the backend takes the type, gradients are written in place."""

    def __init__(
        self, spec: HeadSpec, tensors: list[Tensor], index: Tensor | None, dtype: torch.dtype, direct: bool
    ) -> None:
        super().__init__(spec, tensors, index, dtype)
        self.logits = tensors[spec.inputs[0]]
        self.padded = self.logits.shape[1]
        self.columns = self.padded if spec.vocab_size is None else spec.vocab_size
        same = direct or self.logits.dtype == dtype
        self.buffered = not same or index is not None or self.logits.stride(-1) != 1

    def chunk(self, tile: Tile, buffer: Tensor | None) -> Chunk:
        if not self.buffered:
            return self._chunk(tile.at(self.logits), tile)
        z = tile.of(buffer)
        self.multiply(tile, z)
        return self._chunk(z, tile)

    def multiply(self, tile: Tile, out: Tensor) -> None:
        if self.index is None:
            out.copy_(self.logits[tile.rows, tile.columns])
        elif self.device.type != "cpu":  # where a loop over rows would wait for their numbers
            out.copy_(self.logits[:, tile.columns].index_select(0, self.index[tile.rows]))
        else:
            for row, source in enumerate(self.index[tile.rows].tolist()):  # row by row: no second copy of the tile
                out[row].copy_(self.logits[source, tile.columns])

    def open_gradients(
        self, wants: tuple[bool, ...], single_group: bool, shape: tuple[int, int], upstream: list[Tensor]
    ) -> None:
        self.logits_grad = None
        if wants[0]:
            self.logits_grad = empty(tuple(self.logits.shape), self.logits.dtype, self.device)
            if self.index is not None:
                self.logits_grad.zero_()
            if self.columns < self.padded:
                self.logits_grad[:, self.columns :] = 0

    def gradient_buffer(self, tile: Tile, buffer: Tensor | None) -> Tensor:
        if not self.buffered:
            return tile.at(self.logits_grad)
        return tile.of(buffer)

    def accumulate(self, tile: Tile, gradient: Tensor) -> None:
        if not self.buffered:
            return  # written in place
        if self.index is None:
            self.logits_grad[tile.rows, tile.columns] = gradient
        elif self.device.type != "cpu":
            of_columns, rows = self.logits_grad[:, tile.columns], self.index[tile.rows]
            of_columns.index_copy_(0, rows, gradient.to(of_columns.dtype))
        else:
            for row, target in enumerate(self.index[tile.rows].tolist()):
                self.logits_grad[target, tile.columns] = gradient[row]

    def gradients(self) -> list[Tensor]:
        return [] if self.logits_grad is None else [self.logits_grad]


class GatheredHead(Head):
    """A linear head of which every row has K columns of its own: no product, but K rows of the weight for each.

    Chunks hold what is capped already, since columns that do not exist are -inf for the softmax whatever the cap. The
    weight's gradient is summed at the end, by token of the vocabulary: in one order, without atomics.
    """

    buffered = True
    low_products = False
    upcast = 0
    BLOCK = 1 << 19  # elements of gathered weights at a time: they stay in the second-level cache

    def __init__(self, spec: HeadSpec, tensors: list[Tensor], index: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(spec, tensors, index, dtype)
        hidden, self.weight, bias = (None if place == ABSENT else tensors[place] for place in spec.inputs)
        self.hidden = _select(hidden, index)
        self.bias_vector = None if bias is None else bias.to(dtype)
        ids = _select(tensors[spec.ids], index)
        self.ids, self.exists = ids.clamp(min=0), ids >= 0
        self.columns = ids.shape[1]
        self.capped_inner, self.inner = self.inner, None

    def chunk(self, tile: Tile, buffer: Tensor) -> Chunk:
        z = tile.of(buffer)
        self.multiply(tile, z)
        return self._chunk(z, tile)

    def multiply(self, tile: Tile, out: Tensor) -> None:
        for rows, weight in self._weights(tile):
            z = out[rows.start - tile.rows.start : rows.stop - tile.rows.start]
            torch.bmm(weight, self.hidden[rows, :, None].to(self.dtype), out=z[:, :, None])
        ids, exists = self.ids[tile.rows, tile.columns], self.exists[tile.rows, tile.columns]
        if self.bias_vector is not None:
            out += self.bias_vector[ids]
        if self.capped_inner is not None:
            torch.tanh(out.mul_(self.capped_inner), out=out)
        # A row without any column (a token that does not count) is one column of logit 0.
        nothing = ~exists.any(-1) & (tile.columns.start == 0)
        out.masked_fill_(~exists, -torch.inf)
        out[:, 0] = torch.where(nothing, 0, out[:, 0])

    def _chunk(self, z: Tensor, tile: Tile) -> Chunk:
        if self.slope is not None:
            self.slope[tile.rows, tile.columns] = self.capped_inner * (1 - z * z)
        return super()._chunk(z, tile)

    slope: Tensor | None = None
    _gathered: Tensor | None = None

    def open_gradients(
        self, wants: tuple[bool, ...], single_group: bool, shape: tuple[int, int], upstream: list[Tensor]
    ) -> None:
        self.wants = wants
        self.hidden_grad = empty((self.rows, self.hidden.shape[1]), self.dtype, self.device) if wants[0] else None
        self.logits_grad = empty((self.rows, self.columns), self.dtype, self.device) if any(wants[1:]) else None
        if self.capped_inner is not None:
            self.slope = empty((self.rows, self.columns), self.dtype, self.device)

    def gradient_buffer(self, tile: Tile, buffer: Tensor) -> Tensor:
        return tile.of(buffer)

    def accumulate(self, tile: Tile, gradient: Tensor) -> None:
        if self.slope is not None:
            gradient *= self.slope[tile.rows, tile.columns]
        gradient.masked_fill_(~self.exists[tile.rows, tile.columns], 0)
        if self.logits_grad is not None:
            self.logits_grad[tile.rows, tile.columns] = gradient
        if self.hidden_grad is None:
            return
        if self.weight.dtype == self.dtype:
            part = _bags(self.ids[tile.rows, tile.columns], None, self.weight, gradient)
            self._add(tile, tile.rows, part)
            return
        for rows, weight in self._weights(tile):
            part = gradient[rows.start - tile.rows.start : rows.stop - tile.rows.start, None]
            self._add(tile, rows, torch.bmm(part, weight)[:, 0])

    def _add(self, tile: Tile, rows: slice, part: Tensor) -> None:
        if tile.columns.start == 0:
            self.hidden_grad[rows] = part
        else:
            self.hidden_grad[rows] += part

    def gradients(self) -> list[Tensor]:
        found = []
        if self.hidden_grad is not None:
            found.append(_restore(self.hidden_grad.to(self.hidden.dtype), self.index, self.tokens))
        if self.logits_grad is not None:
            order = self.ids.reshape(-1).argsort(stable=True)
            ids, rows = self.ids.reshape(-1)[order], order // self.columns
            values = self.logits_grad.reshape(-1)[order]
            vocabulary = torch.arange(self.weight.shape[0], device=self.device)
            starts = torch.searchsorted(ids, vocabulary)
            tables = (self.hidden.to(self.dtype), torch.ones(self.rows, 1, dtype=self.dtype, device=self.device))
            for want, table in zip(self.wants[1:], tables, strict=True):
                if want:
                    found.append(_bags(rows, starts, table, values).to(self.weight.dtype))
            if self.wants[2]:
                found[-1] = found[-1][:, 0]
        return found

    def _weights(self, tile: Tile):
        """(rows, their gathered weights [rows, columns, H] in the compute type), some rows at a time."""
        width = max(1, (tile.columns.stop - tile.columns.start) * self.weight.shape[1])
        step = max(1, self.BLOCK // width)
        for start in range(tile.rows.start, tile.rows.stop, step):
            rows = slice(start, min(start + step, tile.rows.stop))
            ids = self.ids[rows, tile.columns]
            if self._gathered is None or len(self._gathered) < ids.numel():
                self._gathered = self.weight.new_empty(ids.numel(), self.weight.shape[1])
            into = self._gathered[: ids.numel()]
            torch.index_select(self.weight, 0, ids.reshape(-1), out=into)
            yield rows, into.view(*ids.shape, -1).to(self.dtype)


def make_head(
    spec: HeadSpec, tensors: list[Tensor], index: Tensor | None, dtype: torch.dtype, direct: bool
) -> LinearHead | DenseHead | GatheredHead:
    """``direct``: the backend reads and writes low-precision logits."""
    if spec.ids != ABSENT:
        return GatheredHead(spec, tensors, index, dtype)
    return LinearHead(spec, tensors, index, dtype) if spec.linear else DenseHead(spec, tensors, index, dtype, direct)


def _bags(ids: Tensor, starts: Tensor | None, table: Tensor, factors: Tensor) -> Tensor:
    """Sums of factors times rows of a table: per row of ``ids``, or of the flat ids from each start to the next."""
    return torch.nn.functional.embedding_bag(ids, table, starts, mode="sum", per_sample_weights=factors)


def _pieces(columns: slice, width: int):
    """(relative slice, absolute slice) of at most ``width`` columns each."""
    for start in range(columns.start, columns.stop, width):
        stop = min(start + width, columns.stop)
        yield slice(start - columns.start, stop - columns.start), slice(start, stop)


def _select(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


def _restore(tensor: Tensor, index: Tensor | None, tokens: int) -> Tensor:
    """Rows that were left out come back as zeros."""
    if index is None:
        return tensor
    full = tensor.new_zeros((tokens, *tensor.shape[1:]))
    full[index] = tensor
    return full
