"""Images for pretraining and evaluation: where they come from, how they are decoded, split, ordered and batched."""
