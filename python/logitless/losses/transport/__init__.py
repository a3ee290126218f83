"""Optimal transport: between distributions over different vocabularies, between samples, and between sequences."""

from logitless.losses.transport.multilevel import multilevel_ot
from logitless.losses.transport.sinkhorn import mixture_weights, multi_cost, sinkd, wasserstein_dependency
from logitless.losses.transport.universal import gold, uld

__all__ = ["gold", "mixture_weights", "multi_cost", "multilevel_ot", "sinkd", "uld", "wasserstein_dependency"]
