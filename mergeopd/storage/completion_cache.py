"""Responses of models with constant weights, kept in files for later runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from mergeopd.distributed.communicator import Communicator
from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.storage.folders import write_atomic
from mergeopd.storage.lock import waiting
from mergeopd.types import Finish, Sampling, token_ids

FORMAT = 2
# Fraction of new responses after which the file is saved: limits both the loss at a kill and the rewrites.
_SAVED_SHARE = 0.05
_MAX_ID = np.iinfo(np.int32).max
_NO_LOGPROBS = np.zeros(0, np.float32)

Generate = Callable[
    [Sequence[GenerationRequest]], Iterator[tuple[Sequence[GenerationRequest], list[Completion]]]
]
"""Yields batches of requests with their responses; they need not be in the order of the requests."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What responses depend on, except for their prompts: weights (by fingerprint), precision, stop tokens,
    sampling and seed. `name` is part of the file's name, `vocab_size` limits token ids.
    """

    name: str
    fingerprint: str | None
    dtype: str
    eos_ids: Collection[int]
    vocab_size: int
    sampling: Sampling
    seed: int

    @property
    def file_name(self) -> str:
        circumstances = {
            "format": FORMAT,
            "weights": self.fingerprint,
            "dtype": self.dtype,
            "eos_ids": sorted(self.eos_ids),
            **asdict(self.sampling),
            "seed": self.seed,
        }
        digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{digest[:20]}.jsonl"

    def allows(self, completion: Completion) -> bool:
        """Whether ids, length and end of a response agree with the vocabulary and with the sampling."""
        ids, how = completion.response_ids, self.sampling
        if not 0 < len(ids) <= how.max_new_tokens or ids.max() >= self.vocab_size:
            return False
        ended = np.isin(ids, list(self.eos_ids))
        if completion.finish == "eos":
            return bool(ended[-1]) and not ended[:-1].any()
        reached = bool(how.stop) if completion.finish == "stop" else len(ids) == how.max_new_tokens
        return reached and not ended.any()


@dataclass(frozen=True)
class CompletionCache:
    """A folder of responses: a file for each `Origin`, a line for each rendered prompt and sample.

    A changed template or prompt therefore generates new responses. `note` gets a remark on damaged ones.
    """

    folder: Path
    ranks: Communicator
    note: Callable[[str], None]

    def complete(
        self, origin: Origin, requests: Sequence[GenerationRequest], generate: Generate
    ) -> list[Completion]:
        """Return a response to every request, in order; missing ones are generated and kept. Collective.

        Responses generated before an error or a request to stop are kept, too.
        """
        path = self.folder / origin.file_name
        known, num_discarded = self.ranks.run_on_first(lambda: _load(path, origin))
        if num_discarded:
            kept = "response" if num_discarded == 1 else "responses"
            self.note(f"discarded {num_discarded} damaged kept {kept} of {origin.name} in {path}")
        new = [request for request in requests if _line_key(request) not in known]
        if new:
            fresh: dict[str, Completion] = {}
            try:
                for batch, completions in generate(new):
                    fresh |= {_line_key(r): c for r, c in zip(batch, completions, strict=True)}
                    if len(fresh) >= _SAVED_SHARE * len(known):
                        known, fresh = self._keep(path, known, fresh), {}
            finally:
                known = self._keep(path, known, fresh)
        return [known[_line_key(request)] for request in requests]

    def _keep(
        self, path: Path, known: Mapping[str, Completion], fresh: Mapping[str, Completion]
    ) -> dict[str, Completion]:
        """Add responses, which all processes have, to the file; not collective. Returns all of this run's.

        Responses that another run has added meanwhile are ignored, since only one process would read them.
        """
        if self.ranks.is_first and fresh:
            with waiting(path, "text_cache"):
                _write(path, {**dict(filter(None, map(_parse, _lines(path)))), **fresh})
        return {**known, **fresh}


def _load(path: Path, origin: Origin) -> tuple[dict[str, Completion], int]:
    """Load the responses of a file; also return how many invalid lines were removed."""
    if not path.is_file():
        return {}, 0
    with waiting(path, "text_cache"):
        lines = _lines(path)
        parsed = [row for line in lines if (row := _parse(line)) is not None]
        known = {key: completion for key, completion in parsed if origin.allows(completion)}
        if len(known) < len(lines):
            _write(path, known)
    return known, len(lines) - len(known)


def _line_key(request: GenerationRequest) -> str:
    content = json.dumps([request.key, request.sample, request.prompt_ids.tolist()])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _write(path: Path, completions: Mapping[str, Completion]) -> None:
    lines = (f"{_line(key, completion)}\n" for key, completion in completions.items())
    write_atomic(path, "".join(lines), "text_cache")


def _line(key: str, completion: Completion) -> str:
    content = {"key": key, "ids": completion.response_ids.tolist(), "finish": completion.finish}
    return json.dumps({**content, "sha256": _digest(content)})


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parse(line: str) -> tuple[str, Completion] | None:
    """Parse key and response of a line; None if it is damaged or holds something else."""
    try:
        row = json.loads(line)
        content = {"key": row["key"], "ids": row["ids"], "finish": row["finish"]}
        whole = row == {**content, "sha256": row["sha256"]} and row["sha256"] == _digest(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    ids, finish = row["ids"], row["finish"]
    if not whole or finish not in get_args(Finish) or not isinstance(ids, list):
        return None
    if not all(type(i) is int and 0 <= i <= _MAX_ID for i in ids):
        return None
    return str(row["key"]), Completion(token_ids(ids), _NO_LOGPROBS, finish)
