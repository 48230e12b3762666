"""Prediction of a run's memory, time and bytes from its plan and the hardware."""
