"""Start vLLM's server on a machine without a GPU with its newer model runner; the arguments are vLLM's.

Only this runner returns log-probs of given ids per position (`prompt_logprob_token_ids`). It needs Triton
with a CPU backend, which is not published. Triton's interpreter runs the kernels instead: slowly, and it
fails at those of top-p sampling. The server's child processes are spawned, so they import this file first.
"""

from __future__ import annotations

import os
import runpy
from types import SimpleNamespace

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}

from triton.backends import backends

# vLLM asks for the backend's presence alone.
backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False), compiler=None))

if __name__ == "__main__":
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
