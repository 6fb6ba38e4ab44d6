"""Local decoders: tokens of one block to predictions of its masked tokens."""
