"""Time and memory of logitless against bare matrix products and its peers: ``pytest benchmarks/``."""
