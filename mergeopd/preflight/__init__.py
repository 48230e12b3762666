"""Preflight: check what a plan names (models, prompts, parallelism, memory) before weights are read."""
