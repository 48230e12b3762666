"""mergeopd: merge many expert language models into one student by on-policy distillation."""

__version__ = "0.1.0"
