"""Experiment trackers: W&B, MLflow, Trackio and TensorBoard behind one reporter."""
