"""Folders of a teacher's targets for a fixed text: the manifest, and what it must agree with.

The format is described in docs/design/teachers.md. Importing this imports neither torch nor numpy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from mergeopd.data.renderer import Renderer
from mergeopd.errors import DataError, StorageError
from mergeopd.messages import shown
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import MANIFEST, write_atomic
from mergeopd.teacher.protocol import TargetSpec, TeacherSequence
from mergeopd.types import Message

FORMAT = "mergeopd-targets-1"
_HASHERS = 8


@dataclass(frozen=True, slots=True)
class TargetOrigin:
    """What targets are, and everything that they depend on besides their sequences.

    `fingerprint` is that of the checkpoint, `dtype` the precision of the forward pass. Distributions are over
    the first `vocab_size` ids. `tokenizer` and `template` are digests; the template's covers the teacher's
    own prompt and the date, if it shows one. `k` is None unless `kind` is `top_k`; `temperature` is 1 for
    hidden states, which serve every temperature.
    """

    teacher: str
    fingerprint: str
    dtype: str
    kind: Literal["hidden", "top_k"]
    k: int | None
    temperature: float
    vocab_size: int
    tokenizer: str
    template: str

    @classmethod
    def of(
        cls, teacher: TeacherPlan, renderer: Renderer, fingerprint: str, vocab_size: int, spec: TargetSpec
    ) -> TargetOrigin:
        """Describe the targets that a resolved teacher has now.

        `vocab_size` is that of the teachers without a bridge; one with a bridge has its own.
        """
        size = vocab_size if teacher.bridge is None else renderer.vocab_size
        assert spec.kind in ("hidden", "top_k")
        return cls(
            teacher=teacher.name,
            fingerprint=fingerprint,
            dtype=teacher.dtype,
            kind="hidden" if spec.kind == "hidden" else "top_k",
            # With hidden states, `k` only says that the student's top k would do.
            k=None if spec.k is None or spec.kind == "hidden" else min(spec.k, size),
            temperature=spec.temperature,
            vocab_size=size,
            tokenizer=renderer.tokenizer.digest,
            template=_template_digest(renderer),
        )

    @property
    def spec(self) -> TargetSpec:
        """The targets that are kept."""
        return TargetSpec(self.kind, self.temperature, self.k)

    def serves(self, needed: TargetSpec) -> bool:
        """Whether targets of another kind can be computed from these, without the teacher's body."""
        if self.kind == "hidden":
            return True
        if needed.kind != "top_k" or needed.temperature != self.temperature:
            return False
        if needed.k is None or self.k is None:
            return False
        return min(needed.k, self.vocab_size) <= self.k

    def differences(self, now: TargetOrigin) -> Iterator[str]:
        """Yield how the recipe's teacher differs from the one that was recorded."""
        if self.fingerprint != now.fingerprint:
            yield "other weights"
        if self.dtype != now.dtype:
            yield f"dtype {now.dtype} instead of {self.dtype}"
        if self.tokenizer != now.tokenizer:
            yield "another tokenizer"
        if self.template != now.template:
            yield "another chat template, `prompt`, `system`, or date that the template shows"
        if self.kind != "hidden" and self.vocab_size != now.vocab_size:
            yield f"distributions over {now.vocab_size} ids instead of {self.vocab_size}"


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of targets; `sha256` is that of the whole file."""

    file: str
    sequences: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of manifest.json."""

    format: str
    origin: TargetOrigin
    shards: tuple[Shard, ...]

    @property
    def num_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)


_MANIFEST = TypeAdapter(Manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, which completes the folder."""
    text = json.dumps(asdict(manifest), indent=1) + "\n"
    write_atomic(folder / MANIFEST, text, setting_of(manifest.origin.teacher))


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest; None if the folder has none. Raises StorageError for one that is damaged."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    with named_failures("read", file):
        content = file.read_bytes()
    remedy = "move the folder away and run `mergeopd targets` again"
    try:
        manifest = _MANIFEST.validate_json(content)
    except ValidationError as error:
        cause = error.errors()[0]
        where = ".".join(map(str, cause["loc"])) or "the file"
        raise StorageError(f"{file}: not a manifest of targets: {where}: {cause['msg']}; {remedy}") from error
    if manifest.format != FORMAT:
        raise StorageError(f"{file}: has format {manifest.format!r}, not {FORMAT!r}; {remedy}")
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or not shard.file.endswith(".safetensors"):
            raise StorageError(
                f"{file}: {shard.file!r} is not a .safetensors file of the same folder; {remedy}"
            )
    return manifest


def complete_manifest(folder: Path) -> Manifest:
    """Read the manifest. Raises StorageError if it is missing or damaged."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise StorageError(f"{shown(folder)} has no {MANIFEST}; `mergeopd targets RECIPE` writes it")
    return manifest


def check_sizes(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise StorageError for a shard that is missing or has another size."""
    for shard in shards:
        path = folder / shard.file
        if not path.is_file():
            raise StorageError(_fault(path, "is missing"))
        if (size := path.stat().st_size) != shard.bytes:
            raise StorageError(_fault(path, f"has {size} bytes instead of {shard.bytes}"))


def verify_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Read all shards; raise StorageError for one that differs from the manifest."""
    check_sizes(folder, shards)

    def digest(shard: Shard) -> str:
        path = folder / shard.file
        with named_failures("read", path), path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_HASHERS) as threads:
        for shard, actual in zip(shards, threads.map(digest, shards), strict=True):
            if actual != shard.sha256:
                fault = "is damaged: its SHA-256 differs from the manifest's"
                raise StorageError(_fault(folder / shard.file, fault))


def _fault(path: Path, fault: str) -> str:
    return f"{shown(path)} {fault}; delete it, and `mergeopd targets` writes its sequences again"


def sequence_key(sequence: TeacherSequence) -> bytes:
    """Return the digest by which a sequence is found: SHA-256 over lengths, ids and flags."""
    import numpy as np

    prompt, response = sequence.prompt_ids, sequence.response_ids
    flags = np.ones(len(response), np.uint8) if sequence.trained is None else sequence.trained
    digest = hashlib.sha256(np.array([len(prompt), len(response)], "<i4").tobytes())
    digest.update(prompt.astype("<i4").tobytes() + response.astype("<i4").tobytes())
    digest.update(flags.astype(np.uint8).tobytes())
    return digest.digest()


def covering(specs: Sequence[TargetSpec]) -> TargetSpec:
    """Return the smallest targets from which all of these can be computed."""
    temperatures = {spec.temperature for spec in specs}
    sizes = [spec.k for spec in specs if spec.kind == "top_k" and spec.k is not None]
    if len(temperatures) > 1 or len(sizes) < len(specs):
        return TargetSpec("hidden")
    return TargetSpec("top_k", temperatures.pop(), max(sizes))


def _template_digest(renderer: Renderer) -> str:
    template, own = renderer.template, renderer.teacher_prompt
    try:  # the date that a template shows is in no setting
        sample = template.render((Message("user", "?"),))
    except DataError:
        sample = ""
    prompt = None if own.prompt is None else own.prompt.source
    content = [template.source, template.arguments, own.system, prompt, sample]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def setting_of(teacher: str) -> str:
    """Return the key of the recipe that names a teacher's folder."""
    return f"teachers.{teacher}.targets"
