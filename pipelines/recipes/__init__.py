"""Recipes: complete settings in YAML, each with its source."""
