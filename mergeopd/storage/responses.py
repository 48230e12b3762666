"""Files of graded responses, one Parquet file per evaluated model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mergeopd.storage.failures import named_failures
from mergeopd.storage.folders import write_atomic
from mergeopd.types import Finish


@dataclass(frozen=True, slots=True)
class EvaluatedResponse:
    """One graded response: a row of the file.

    `key` names the prompt (`"<source>:<row>"`), `prompt` is its text in the model's own template. `reward` is
    from 0 to 1; None where the verifier failed, with the reason in `failure`. `suite` is the row of the
    result that it counts for, "" in files of earlier versions.
    """

    domain: str
    source: str
    key: str
    sample: int
    prompt: str
    reference: str | None
    response: str
    reward: float | None
    failure: str | None
    finish: Finish
    num_tokens: int
    suite: str = ""


def write_responses(path: Path, rows: Sequence[EvaluatedResponse]) -> None:
    """Write rows to a Parquet file, atomically.

    Raises:
        StorageError: writing fails.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.int32()
    types = {"sample": number, "num_tokens": number, "reward": pa.float64()}
    schema = pa.schema([(field.name, types.get(field.name, text)) for field in fields(EvaluatedResponse)])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def read_responses(path: Path) -> list[EvaluatedResponse]:
    """Read a file of `write_responses`.

    Raises:
        StorageError: reading fails.
        ValueError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with named_failures("read", path):
        content = path.read_bytes()
    try:
        return [EvaluatedResponse(**row) for row in pq.read_table(io.BytesIO(content)).to_pylist()]
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
