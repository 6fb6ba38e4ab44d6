"""Figures for the output directory and MLflow."""
