"""Cases of `test_triton.py`, which runs them in a process with TRITON_INTERPRET=1: Triton reads it once."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
