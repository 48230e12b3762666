"""Trains the tiny base and its domain experts that the quick start merges."""
