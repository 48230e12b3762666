"""Rollouts: the engines that write answers. `local` samples inside the training process."""
