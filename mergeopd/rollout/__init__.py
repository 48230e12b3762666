"""Rollout engines. `local` samples inside the training process."""
