"""Quantised copies of model folders in a cache, and how far each is from its original."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic
from mergeopd.types import TokenIds

# Changes with the way in which weights are converted or compared.
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Quantization:
    """A teacher's quantised weights beside its own, in one precision, on one sample.

    `forward_kl` is KL(own || quantised) and `logprob_gap` the mean distance of the sampled tokens'
    log-probabilities, both in nats per token over `num_tokens` tokens. `logprobs` are those of the quantised
    teacher. The sample is the canary of the card, or a text.
    """

    format: str
    dtype: str
    sample: Literal["canary", "text"]
    num_tokens: int
    forward_kl: float
    logprob_gap: float
    logprobs: tuple[float, ...]

    @property
    def text(self) -> str:
        """Return the divergence in words."""
        where = "its canary" if self.sample == "canary" else "a sample text"
        return (
            f"{self.forward_kl:.1e} nats per token from its own weights (forward KL over {self.num_tokens} "
            f"tokens of {where})"
        )


_RECORD = TypeAdapter(Quantization)


@dataclass(frozen=True, slots=True)
class QuantizedCopy:
    """The place of a copy in the cache, named by the fingerprint of the original weights."""

    cache: Path
    fingerprint: str
    format: Literal["int8", "float8"]

    @property
    def folder(self) -> Path:
        return self.cache / "quantized" / f"{self.fingerprint[:20]}-{self.format}-{_VERSION}"

    def read(self, key: str) -> Quantization | None:
        """Read what was measured under a `key`; None without it, without a copy, or if it is damaged.

        Raises StorageError if the disk fails.
        """
        path = self._file(key)
        if not (path.is_file() and self.folder.is_dir()):
            return None
        with named_failures("read", path, "text_cache"):
            content = path.read_bytes()
        try:
            return _RECORD.validate_json(content)
        except ValidationError:
            return None

    def write(self, key: str, measured: Quantization) -> None:
        """Keep what was measured. Raises StorageError if the disk fails."""
        write_atomic(self._file(key), json.dumps(asdict(measured), indent=1) + "\n", "text_cache")

    def _file(self, key: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{key[:16]}.json")


def sample_key(dtype: str, prompt: TokenIds, response: TokenIds, expected: Sequence[float] | None) -> str:
    """Return the key of a comparison: precision, sample, and the log-probabilities that a card expects."""
    content = [dtype, prompt.tolist(), response.tolist(), None if expected is None else list(expected)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
