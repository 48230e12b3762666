"""Two tokenizers onto each other, by the bytes that tokens stand for. Neither torch nor transformers."""
