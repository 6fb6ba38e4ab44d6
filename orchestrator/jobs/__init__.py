"""Composition: one job prepares, searches, trains, evaluates, exports and records."""
