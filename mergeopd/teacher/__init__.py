"""Teachers: weights loaded for one pass, cached hidden states, heads shared by checkpoint."""
