"""Processes of a run: launcher, rendezvous, and collectives over Python objects and tensors."""
