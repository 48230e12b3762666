"""The student under training; `torch` is the reference backend."""
