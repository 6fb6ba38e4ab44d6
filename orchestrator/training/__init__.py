"""One step, one block, one loop, checkpoints."""
