"""Heads at work: where chunks of logits come from, and where their gradients go. All matrix products are here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from logitless.backends import Chunk
from logitless.engine.memory import empty
from logitless.engine.problem import ABSENT, HeadSpec


@dataclass(frozen=True)
class Tile:
    """Some rows and some columns."""

    rows: slice
    columns: slice

    @property
    def size(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start


class Head:
    """What linear and dense heads share: the scaling of a chunk, and rows that are left out."""

    def __init__(self, spec: HeadSpec, tensors: list[Tensor], index: Tensor | None, dtype: torch.dtype) -> None:
        first = tensors[spec.inputs[0]]
        self.spec, self.index, self.dtype, self.device = spec, index, dtype, first.device
        self.tokens = first.shape[0]
        self.rows = self.tokens if index is None else index.numel()
        self.inner = None if spec.softcap is None else spec.scale / spec.softcap
        if spec.temperatures == ABSENT:
            temperature = torch.full((self.rows,), spec.temperature, dtype=torch.float64, device=first.device)
        else:
            temperature = _select(tensors[spec.temperatures], index).double()
            temperature = torch.where(temperature > 0, temperature, torch.nan)  # poisons the row, see check_values
        self.temperature = temperature
        self.outer = ((spec.softcap or spec.scale) / temperature).to(dtype)
        self.bias: Tensor | None = None

    def stashed(self, tile: Tile, z: Tensor, fill: bool) -> Chunk:
        """A chunk whose raw products are kept in ``z``; ``fill``: form them there."""
        if fill:
            self.multiply(tile, z)
        return self._chunk(z, tile)

    def _chunk(self, z: Tensor, tile: Tile) -> Chunk:
        bias = None if self.bias is None else self.bias[tile.columns]
        return Chunk(z, bias, self.inner, self.outer[tile.rows])


class LinearHead(Head):
    """hidden [n, H] and weight [V, H]; low-precision inputs are upcast, ``upcast`` columns of the weight at a time."""

    buffered = True

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
        z = buffer[: tile.size[0] * tile.size[1]].view(tile.size)
        self.multiply(tile, z)
        return self._chunk(z, tile)

    def multiply(self, tile: Tile, out: Tensor) -> None:
        hidden = self._hidden(tile.rows)
        for columns, weight in self._weights(tile.columns):
            torch.mm(hidden, weight.t(), out=out[:, columns])

    def open_gradients(self, wants: tuple[bool, ...], single_row_block: bool) -> None:
        """``single_row_block``: every column of the weight's gradient is complete after one tile."""
        hidden, weight, bias = wants
        shape, device = (self.rows, self.hidden.shape[1]), self.device
        self.hidden_grad = empty(shape, self.dtype, device) if hidden else None
        self.rounds_pieces = self.low and single_row_block  # then the weight's gradient needs no float32 sums
        shape = (self.padded, self.weight.shape[1])
        dtype = self.weight.dtype if self.rounds_pieces else self.dtype
        self.weight_grad = empty(shape, dtype, device) if weight else None
        self.bias_grad = torch.zeros(self.padded, dtype=self.dtype, device=device) if bias else None

    def gradient_buffer(self, tile: Tile, buffer: Tensor) -> Tensor:
        """Where the gradient of a tile is to be written before :meth:`accumulate`."""
        return buffer[: tile.size[0] * tile.size[1]].view(tile.size)

    def accumulate(self, tile: Tile, gradient: Tensor) -> None:
        """Adds the gradient of a tile of raw products; the first tile of a row or column range comes first."""
        if self.hidden_grad is not None:
            out = self.hidden_grad[tile.rows]
            for columns, weight in self._weights(tile.columns):
                out.addmm_(gradient[:, columns], weight, beta=0 if columns.start + tile.columns.start == 0 else 1)
        if self.weight_grad is not None and self.rounds_pieces:
            hidden = self._hidden(tile.rows)
            for columns, absolute in _pieces(tile.columns, self.upcast):
                piece = self._scratch(absolute)
                self.weight_grad[absolute] = torch.mm(gradient[:, columns].t(), hidden, out=piece)
        elif self.weight_grad is not None:
            out = self.weight_grad[tile.columns]
            out.addmm_(gradient.t(), self._hidden(tile.rows), beta=0 if tile.rows.start == 0 else 1)
        if self.bias_grad is not None:
            self.bias_grad[tile.columns] += gradient.sum(0)

    def gradients(self) -> list[Tensor]:
        """Those asked for, in the order and types of the inputs."""
        found = []
        if self.hidden_grad is not None:
            found.append(_restore(self.hidden_grad.to(self.hidden.dtype), self.index, self.tokens))
        if self.weight_grad is not None:
            self.weight_grad[self.columns if self.rows else 0 :] = 0
            found.append(self.weight_grad.to(self.weight.dtype))
        if self.bias_grad is not None:
            found.append(self.bias_grad.to(self.weight.dtype))
        return found

    def _hidden(self, rows: slice) -> Tensor:
        return self.hidden[rows].to(self.dtype)

    def _weights(self, columns: slice):
        """(columns relative to the tile, their weight in the compute type)."""
        if not self.low:
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
    """Materialised logits [n, V]: chunks are views where the type allows, and gradients are written in place."""

    def __init__(self, spec: HeadSpec, tensors: list[Tensor], index: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(spec, tensors, index, dtype)
        self.logits = tensors[spec.inputs[0]]
        self.padded = self.logits.shape[1]
        self.columns = self.padded if spec.vocab_size is None else spec.vocab_size
        self.buffered = self.logits.dtype != dtype or index is not None or self.logits.stride(-1) != 1

    def chunk(self, tile: Tile, buffer: Tensor | None) -> Chunk:
        if not self.buffered:
            return self._chunk(self.logits[tile.rows, tile.columns], tile)
        z = buffer[: tile.size[0] * tile.size[1]].view(tile.size)
        self.multiply(tile, z)
        return self._chunk(z, tile)

    def multiply(self, tile: Tile, out: Tensor) -> None:
        if self.index is None:
            out.copy_(self.logits[tile.rows, tile.columns])
        else:
            for row, source in enumerate(self.index[tile.rows].tolist()):  # row by row: no second copy of the tile
                out[row].copy_(self.logits[source, tile.columns])

    def open_gradients(self, wants: tuple[bool, ...], single_row_block: bool) -> None:
        self.logits_grad = None
        if wants[0]:
            self.logits_grad = empty(tuple(self.logits.shape), self.logits.dtype, self.device)
            if self.index is not None:
                self.logits_grad.zero_()
            self.logits_grad[:, self.columns :] = 0

    def gradient_buffer(self, tile: Tile, buffer: Tensor | None) -> Tensor:
        if not self.buffered:
            return self.logits_grad[tile.rows, tile.columns]
        return buffer[: tile.size[0] * tile.size[1]].view(tile.size)

    def accumulate(self, tile: Tile, gradient: Tensor) -> None:
        if not self.buffered:
            return  # written in place
        if self.index is None:
            self.logits_grad[tile.rows, tile.columns] = gradient
        else:
            for row, target in enumerate(self.index[tile.rows].tolist()):
                self.logits_grad[target, tile.columns] = gradient[row]

    def gradients(self) -> list[Tensor]:
        return [] if self.logits_grad is None else [self.logits_grad]


def make_head(
    spec: HeadSpec, tensors: list[Tensor], index: Tensor | None, dtype: torch.dtype
) -> LinearHead | DenseHead:
    return (LinearHead if spec.linear else DenseHead)(spec, tensors, index, dtype)


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
