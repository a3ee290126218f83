"""Matrix products with a float32 result of low-precision operands, which are never rounded on the way.

On CUDA devices cuBLAS does that by itself (``out_dtype``); elsewhere operands are upcast, which costs their size.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

PIECE = 32 << 20  # bytes of a product that is added in a step of its own: about what a second-level cache holds


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b. ``out`` has the type of the operands, or float32 where those are lower."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif a.device.type != "cuda":
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _adds(a.dtype, a.device.index):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        step = max(1, PIECE // (out.shape[1] * out.element_size()))
        for start in range(0, out.shape[0], step):
            out[start : start + step] += torch.mm(a[start : start + step], b, out_dtype=out.dtype)


@functools.lru_cache
def _adds(dtype: torch.dtype, index: int | None) -> bool:
    """Whether addmm takes a float32 sum beside low-precision operands: not every release of torch does."""
    device = torch.device("cuda", index)
    low, total = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
    try:
        torch.addmm(total, low, low, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 9).all())
