"""Mask plans: which tokens are visible, decoded and thrown, as pure functions of (seed, step, block)."""
