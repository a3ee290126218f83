"""Triton's interpreter and bfloat16: what tests/interpreter.py corrects, and whether it still must."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from logitless.backends import triton

pytestmark = pytest.mark.skipif(triton.PROBLEM is not None, reason=str(triton.PROBLEM))

PROGRAM = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl

@triton.jit
def kernel(a, b, product, cast):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(product + at, tl.dot(x, y))
    tl.store(cast + at, (x.to(tl.float32) * y.to(tl.float32)).to(tl.bfloat16))

if sys.argv[1] == "corrected":
    sys.path.insert(0, sys.argv[2])
    import interpreter
    interpreter.correct_bfloat16()
torch.manual_seed(0)
a, b = torch.randn(2, 16, 16).bfloat16()
product, cast = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
kernel[1,](a, b, product, cast)
print(torch.allclose(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5), torch.equal(cast, a * b))
"""


@pytest.mark.parametrize(("how", "right"), [("corrected", "True True"), ("as it is", "False False")])
def test_bfloat16(tmp_path, how, right):
    """Where "as it is" turns out right, upstream has mended it: tests/interpreter.py can go then."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, str(program), how, here], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == right
