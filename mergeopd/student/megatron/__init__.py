"""The student on megatron-core: tensor, pipeline and data parallel. Megatron is touched in here alone."""
