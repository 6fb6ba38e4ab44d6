"""Which tokens are visible, decoded and thrown: index tensors, pure functions of (seed, step, block)."""
