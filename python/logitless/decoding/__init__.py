"""Quantities of decoding, analysis and data selection, all without gradient: rows of logits a chunk at a time, never
[tokens, V].

Where a quantity is a log-probability or a divergence per token, it is the engine's (:func:`logitless.logprobs`,
:func:`logitless.divergence`). What needs whole rows of several heads at once reads chunks of their scaled logits; G
below is one product of [N, H, V].
"""

from logitless.decoding.comparison import KLTrace, kl_tracing, peak, uscd_gate
from logitless.decoding.fusion import Fusion, dynamic_logits_fusion
from logitless.decoding.ghosts import GhostRadius, binary_ghost_radius, ghost_radius, ghost_step
from logitless.decoding.products import Guided, combine, guided
from logitless.decoding.selection import Surprisal, excess_loss, select_top, sequence_mean, surprisal
from logitless.decoding.steering import Steering, steer, svdecode, svdecode_chunks

__all__ = [
    "Fusion",
    "GhostRadius",
    "Guided",
    "KLTrace",
    "Steering",
    "Surprisal",
    "binary_ghost_radius",
    "combine",
    "dynamic_logits_fusion",
    "excess_loss",
    "ghost_radius",
    "ghost_step",
    "guided",
    "kl_tracing",
    "peak",
    "select_top",
    "sequence_mean",
    "steer",
    "surprisal",
    "svdecode",
    "svdecode_chunks",
    "uscd_gate",
]
