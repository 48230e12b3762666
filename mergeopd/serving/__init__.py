"""Inference servers: start them, talk to them over HTTP. Nothing here imports torch."""
