"""Students: the model that learns. `torch` is the reference backend."""
