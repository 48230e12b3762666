"""`mergeopd check` must answer in about a second: what it needs may not load the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import mergeopd.data.draw, mergeopd.data.prompts, mergeopd.data.chat_template
import mergeopd.models.checkpoint, mergeopd.models.facts, mergeopd.models.tokenizer
import mergeopd.reward.verifiers
heavy = {"torch", "transformers", "datasets", "pyarrow", "jsonschema", "numpy", "safetensors"}
print(*sorted(heavy & sys.modules.keys()))
"""


def test_no_heavy_library_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_aligning_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, mergeopd.align.vocab; print(*sorted({'torch', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
