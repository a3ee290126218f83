"""Triton's interpreter keeps bfloat16 as uint16: ``tl.dot`` multiplies the bit patterns, and casts truncate.

Both are known and declined upstream (triton-lang/triton issue 11584). Tests correct them, and one test notices when
upstream does.
"""

from __future__ import annotations

import numpy as np


def correct_bfloat16() -> None:
    """Makes products of bfloat16 those of their values, and casts to bfloat16 round to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "corrected"):
        return
    dot, convert = builder.create_dot, interpreter._convert_float

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def convert_float(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
        return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)

    builder.create_dot, interpreter._convert_float, builder.corrected = create_dot, convert_float, True
