"""An expert of another family: a Llama with a SentencePiece-like tokenizer, trained from random weights.

Apart from its parent's modules, so that its making changes no byte of the experts that share a base.
"""
