"""The student on megatron-core: tensor, pipeline and data parallel. Only this package imports Megatron."""
