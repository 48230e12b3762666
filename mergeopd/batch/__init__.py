"""Rollouts to micro-batches: advantages, token weights, packing, the objective of a phase."""
