"""What a person sees of a run: events, `metrics.jsonl`, the terminal, the result."""
