"""The Triton kernels: their cases in the interpreter, their code for a GPU, and where they are refused."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mergeopd.loss import fused_loss, kernel_choice

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
CASES = Path(__file__).with_name("interpreted")
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mergeopd.loss.triton import kernels, scorer

rows, block, warps = scorer._ON_DEVICE
types = dict.fromkeys(["n", "V", "model_stride", "width", "K", "gradient_stride"], "i32")
types |= {"columns": "*i64", "gradient": "*bf16"}
options = {"BIASED": True, "CAPPED": True, "ROWS": rows, "BLOCK": block, "BOUND": 80.0, "PAIRED": True}
options |= {"KIND": 2, "PARAMETER": 0.5, "KINDS": (1, 2), "PARAMETERS": (0.0, 0.5)}
for kernel in (kernels.statistics_kernel, kernels.terms_kernel, kernels.gradient_kernel):
    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): v for name, v in constants.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(kernel.__name__, len(made.asm["cubin"]) > 0)
"""


def run(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
def test_cases_in_the_interpreter():
    assert " passed" in run("-m", "pytest", "-p", "no:cacheprovider", str(CASES), TRITON_INTERPRET="1")


@needs_triton
def test_the_kernels_compile_for_a_gpu(tmp_path):
    printed = run("-c", COMPILE, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert printed.split() == ["statistics_kernel", "True", "terms_kernel", "True", "gradient_kernel", "True"]


def test_triton_is_refused_where_it_cannot_run(reference, monkeypatch):
    problem = reference.problem()

    def loss(kernel):
        return fused_loss(
            problem.hidden, problem.head, problem.targets, problem.labels, lambda stats, rows: stats.logprob_S,
            divergences=(), kernel=kernel,
        )[0]  # fmt: skip

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel_choice, "_has_triton", lambda: True)
    with pytest.raises(ValueError, match=r"kernel 'triton': it needs a GPU, .* device 'cpu'; use 'auto'"):
        loss("triton")
    monkeypatch.setattr(kernel_choice, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="kernel 'triton': it is not installed; pip install triton"):
        loss("triton")
    assert torch.isfinite(loss("auto"))
    assert [kernel_choice.choose_kernel("auto", device) for device in ("cpu", "cuda")] == ["torch", "torch"]
    monkeypatch.setattr(kernel_choice, "_has_triton", lambda: True)
    assert [kernel_choice.choose_kernel("auto", device) for device in ("cpu", "cuda")] == ["torch", "triton"]
