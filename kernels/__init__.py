"""Triton kernels, and nothing else: ``logitless.backends.triton`` launches them.

They meet the contract of :mod:`logitless.backends`, whose names they use. Rows are split over programs in *parts* of
their columns; a program handles a tile of ``ROWS`` rows and walks over its columns ``BLOCK`` at a time. Numbers per row
come in one float32 matrix [K, rows] a kernel, so that a launch takes few pointers. Portable Triton only: no libdevice,
no inline assembly, and no contraction of a product and a sum unless it says ``fma``, so that a scaled logit is rounded
the same way wherever it is computed.
"""
