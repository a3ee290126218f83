"""From a described problem to matrix products and row kernels: plan, walk, backward."""
