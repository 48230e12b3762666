"""Output of a run: events, `metrics.jsonl`, the terminal, the report page, the result."""
