"""Inspection of teachers, tokenizers and finished runs."""
