"""A worker extension for vLLM on CPUs: `--worker-extension-cls mergeopd_vllm_worker.CpuWeights`.

Runs in vLLM's processes and imports nothing of mergeopd; its folder must be on their PYTHONPATH.
"""

from __future__ import annotations

from typing import Any


class CpuWeights:
    """Methods for `/collective_rpc`.

    On a CPU, vLLM multiplies with packed copies of weights. `reload_weights` packs those of the layers that
    it loads; a head that is tied to the embedding is not loaded itself, and would stay that of the old
    weights (seen in vLLM 0.32).
    """

    model_runner: Any

    def pack_tied_head(self) -> int:
        """Pack the heads that are tied to an embedding again; return how many there are."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        heads = [m for m in self.model_runner.get_model().modules() if isinstance(m, ParallelLMHead)]
        for head in heads:
            head.quant_method.process_weights_after_loading(head)
        return len(heads)
