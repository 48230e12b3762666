"""HTTP of inference servers: vLLM and SGLang generate, score and take weights."""
