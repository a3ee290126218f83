"""The token kernels in CUDA C++ (csrc/cuda/tokens.cu), for float32 tokens on an NVIDIA GPU.

One launch forward, two where a value takes sums over its sequence, and one backward; nothing waits for the device.

**Streams.** The block that comes last is told by a ticket, a counter that is 0 between calls. Calls on one stream come
one after the other and share theirs; each stream has its own.

**CUDA graphs.** All other memory is allocated per call: of a captured call it is in the graph's pool, and results,
derivatives and the state for backward stay where they are from replay to replay. A captured call has a ticket there
too, which each replay sets to 0 (a node of the graph, 1 us): so a graph may be replayed on another stream than it was
captured on, beside calls on that one. What is read on the host are sizes alone, and a graph serves any values of mask,
offsets and denominator. As ever, call once before capturing: CUDA loads kernels when they are first launched.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from logitless.backends import cuda
from logitless.backends.cuda import supports  # noqa: F401 (the same inputs are)
from logitless.ops.tokens.kernels import Call
from logitless.ops.tokens.recipe import Recipe

_SPREADING = ("sequence-mean", "sequence-sum", "geometric")  # levels whose ratio's derivative runs back through a sum
State = tuple[Tensor | None, ...]  # results, slopes, through, workspace, offsets: see csrc/cuda/tokens.h


@functools.lru_cache(maxsize=256)
def _compiled(kind: type, recipe: Recipe):
    return kind(recipe)


@functools.cache
def _ticket_of(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def _ticket(device: torch.device, stream: int) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _ticket_of(device, stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def forward(call: Call, wanted: bool) -> tuple[Tensor, State | None]:
    recipe, device, size = call.recipe, call.inputs[0].device, call.inputs[0].numel()
    new = functools.partial(torch.empty, device=device)
    compiled, queue = _compiled(cuda._kernels.TokenRecipe, recipe), cuda._queue(device)
    sizes = {"tokens": size, "sequences": call.sequences}
    results = new(len(recipe.results), dtype=torch.float64)
    slopes = new(len(recipe.gradients), size, dtype=torch.float32) if wanted else None
    through = new(size, dtype=torch.bool) if wanted and recipe.ratio.level in _SPREADING else None
    doubles = cuda._kernels.token_workspace(compiled, device=queue["device"], **sizes)
    workspace = new(doubles, dtype=torch.float64)
    ticket = _ticket(device, queue["stream"])
    cuda._kernels.tokens(
        compiled,
        **queue,
        **sizes,
        inputs=[(x.data_ptr(), x.dim() == 2) for x in call.inputs],
        mask=_address(call.mask),
        offsets=_address(call.offsets),
        denominator=_address(call.denominator),
        results=results.data_ptr(),
        slopes=_address(slopes),
        through=_address(through),
        workspace=workspace.data_ptr(),
        ticket=ticket.data_ptr(),
    )
    return results, (results, slopes, through, workspace, call.offsets) if wanted else None


def backward(recipe: Recipe, state: State, upstream: Tensor) -> tuple[Tensor, ...]:
    results, slopes, through, workspace, offsets = state
    out = torch.empty_like(slopes)
    cuda._kernels.tokens_backward(
        _compiled(cuda._kernels.TokenRecipe, recipe),
        **cuda._queue(slopes.device),
        tokens=slopes.shape[1],
        sequences=0 if offsets is None else offsets.numel() - 1,
        offsets=_address(offsets),
        results=results.data_ptr(),
        slopes=slopes.data_ptr(),
        through=_address(through),
        workspace=workspace.data_ptr(),
        upstream=upstream.data_ptr(),
        out=out.data_ptr(),
    )
    return out.unbind()
