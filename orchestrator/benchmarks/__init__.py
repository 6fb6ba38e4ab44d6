"""Serves pipelines/benchmark.py and pipelines/ablation.py; nothing imports it."""
