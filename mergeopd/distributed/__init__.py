"""The processes of a run: rendezvous, launch, and collectives over Python objects and tensors."""
