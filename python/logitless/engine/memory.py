"""Large buffers."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_OWN_MAPPING = 32 << 20  # from here on glibc gives an allocation a mapping of its own, so that the advice ends with it


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, with huge pages asked for on Linux CPUs.

    A fresh buffer of 200 MB costs 50 ms of page faults with pages of 4 KiB, 15 ms with huge ones: without this, first
    touches of the chunk and of the gradient take as long as the row kernels.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    size = tensor.numel() * tensor.element_size()
    if device.type == "cpu" and size > _OWN_MAPPING and sys.platform == "linux":
        start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        length = (tensor.data_ptr() + size - start) // _HUGE_PAGE * _HUGE_PAGE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)  # only advice
    return tensor


def alignment(device: torch.device) -> int:
    """Bytes that the rows of a buffer begin at multiples of: on a GPU, products and kernels read such rows faster."""
    return 1 if device.type == "cpu" else 64


def padded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer of matrices with aligned rows."""
    *others, columns = shape
    multiple = max(1, alignment(device) // dtype.itemsize)
    return empty((*others, -(-columns // multiple) * multiple), dtype, device)[..., :columns]


def _libc() -> ctypes.CDLL:
    global _LIBC
    if _LIBC is None:
        _LIBC = ctypes.CDLL(None, use_errno=True)
    return _LIBC


_LIBC: ctypes.CDLL | None = None
