"""The fused loss's work between its matrix products, in Triton."""
