"""Output of a run in the terminal."""
