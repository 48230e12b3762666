"""Teachers: weights brought in for their turn, hidden states kept, heads fetched by checkpoint."""
