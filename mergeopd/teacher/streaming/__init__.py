"""Teachers that score layer by layer: one layer's weights are in memory, and the next is being read."""
