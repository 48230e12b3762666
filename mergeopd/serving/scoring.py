"""Wire formats for scores of given text: hidden states, and log-probabilities of chosen or likely tokens.

All log-probabilities are at temperature 1, over all rows of the server's model: prompts are scored before
any sampling setting applies. vLLM has two kinds of servers: a pooling server (`--runner pooling`) returns
hidden states, a generating one log-probabilities. SGLang's returns both.
"""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mergeopd.errors import ServingError
from mergeopd.serving import sglang, vllm
from mergeopd.serving.protocol import ServerFacts, check_version, command
from mergeopd.serving.transport import BadReply, Server, ServerPool

T = TypeVar("T")
Floats = NDArray[np.float32]
Ids = NDArray[np.int32]

POOLING = "/pooling"
_FACTS_S = 20.0
_OLDEST_FIXED_IDS = (0, 32)
_OLDEST_SGLANG = (0, 5, 18)
# A log-probability above 0 by more than rounding is not one.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class Exchange(Generic[T]):
    """A request, and the function that reads its reply: JSON, or bytes. The function raises BadReply."""

    path: str
    body: dict[str, Any]
    read: Callable[[Any], T]
    is_binary: bool = False


@dataclass(frozen=True, slots=True)
class Likely:
    """The k most probable tokens at each of n positions, `[n, k]`, and the given token's log-probability."""

    ids: Ids
    logprobs: Floats
    given: Floats


class ScoringApi(Protocol):
    """Requests for scores of one engine. `ids` are prompt and response; rows are those of `ids[start:]`."""

    @property
    def name(self) -> str:
        """The engine's name in cards."""

    @property
    def detokenize(self) -> tuple[str, str]:
        """Path that decodes token ids (`tokens`), and the key of the text in the reply."""

    async def facts(self, pool: ServerPool, server: Server) -> ServerFacts:
        """Return the facts of a server. Raises ServingError for one that cannot score."""

    def hidden(self, ids: Sequence[int], width: int) -> Exchange[Floats]:
        """Last hidden states after the final norm, `[len(ids), width]`."""

    def given(self, ids: Sequence[int], start: int) -> Exchange[Floats]:
        """Log-probabilities of the given tokens, `[n]`."""

    def likely(self, ids: Sequence[int], start: int, k: int) -> Exchange[Likely]:
        """The k most probable tokens at each position."""

    def chosen(self, ids: Sequence[int], start: int, rows: Sequence[Sequence[int]]) -> Exchange[Floats]:
        """Log-probabilities of the ids in `rows`, `[n, longest row]`; -inf behind the end of shorter rows."""


async def send(pool: ServerPool, make: Callable[[], Exchange[T]]) -> T:
    """Send a request to a server of the pool. The body exists only while a server works on it."""

    async def attempt(server: Server) -> T:
        return await send_to(pool, server, make())

    return await pool.balanced("", attempt)


async def send_to(pool: ServerPool, server: Server, one: Exchange[T]) -> T:
    """Send a request to one server, once."""
    get = pool.content if one.is_binary else pool.call
    return one.read(await get(server, one.path, one.body))


@dataclass(frozen=True, slots=True)
class VllmScoring:
    """Scores of vLLM. `hidden_states`: the server is a pooling server."""

    hidden_states: bool = False
    name: ClassVar[str] = "vllm"
    detokenize: ClassVar[tuple[str, str]] = ("/detokenize", "prompt")

    async def facts(self, pool: ServerPool, server: Server) -> ServerFacts:
        if not self.hidden_states:
            return await vllm.VllmApi(takes_weights=False).facts(pool, server)
        version = (await command(pool, server, "/version", None, timeout_s=_FACTS_S) or {}).get("version", "")
        check_version(server, "vLLM", version, vllm.OLDEST)
        document = await command(pool, server, "/openapi.json", None, timeout_s=_FACTS_S)
        routes = frozenset(document.get("paths", ()))
        if POOLING not in routes:
            raise ServingError(
                f"{server.url}: the server has no {POOLING}, which returns hidden states; start it with "
                f"{POOLING_FLAGS}"
            )
        card = (await command(pool, server, "/v1/models", None, timeout_s=_FACTS_S))["data"][0]
        return ServerFacts(version, routes, card.get("max_model_len"), card.get("root"))

    def hidden(self, ids: Sequence[int], width: int) -> Exchange[Floats]:
        body = {
            "task": "token_embed",
            "input": [list(ids)],
            "encoding_format": "bytes_only",
            "embed_dtype": "float32",
            "endianness": "little",
            "use_activation": False,
        }

        def read(content: bytes) -> Floats:
            if len(content) != 4 * len(ids) * width:
                raise BadReply(
                    f"{len(content)} bytes of hidden states for {len(ids)} tokens of width {width}"
                )
            return _finite(np.frombuffer(content, "<f4").reshape(len(ids), width), "a hidden state")

        return Exchange(POOLING, body, read, is_binary=True)

    def given(self, ids: Sequence[int], start: int) -> Exchange[Floats]:
        api = vllm.VllmApi(takes_weights=False)
        path, body = api.scoring(ids, start)
        return Exchange(path, body, lambda reply: np.array(api.scored(reply, ids, start), np.float32))

    def likely(self, ids: Sequence[int], start: int, k: int) -> Exchange[Likely]:
        path, body = vllm.VllmApi(takes_weights=False).scoring(ids, start)
        body["sampling_params"]["prompt_logprobs"] = k

        def read(reply: Any) -> Likely:
            rows = reply.get("prompt_logprobs") if isinstance(reply, dict) else None
            if not isinstance(rows, list) or len(rows) != len(ids):
                raise BadReply(f"log-probabilities at {len(rows or ())} of {len(ids)} tokens")
            try:
                given = [row[str(i)]["logprob"] for row, i in zip(rows[start:], ids[start:], strict=True)]
                # The given token is one more entry where it is not among the k.
                best = [_best(row, k) for row in rows[start:]]
            except (KeyError, TypeError, AttributeError) as error:
                raise BadReply(f"a token has no log-probability ({error!r})") from error
            pairs = np.array(best, np.float64).reshape(len(best), k, 2)
            return Likely(pairs[..., 0].astype(np.int32), _logprobs(pairs[..., 1]), _logprobs(given))

        return Exchange(path, body, read)

    def chosen(self, ids: Sequence[int], start: int, rows: Sequence[Sequence[int]]) -> Exchange[Floats]:
        path, body = vllm.VllmApi(takes_weights=False).scoring(ids, start)
        del body["sampling_params"]["prompt_logprobs"]
        body["sampling_params"] |= {
            "prompt_logprob_token_ids": [list(row) for row in rows],
            "prompt_logprob_start": start - 1,
        }
        shape = (len(ids) - start, max(map(len, rows)))

        def read(reply: Any) -> Floats:
            encoded = reply.get("prompt_token_id_logprobs") if isinstance(reply, dict) else None
            if not isinstance(encoded, str):
                raise BadReply("the reply has no log-probabilities of the requested ids")
            try:
                matrix = np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise BadReply(f"the log-probabilities cannot be read: {error}") from error
            if matrix.shape != shape:
                raise BadReply(f"log-probabilities of shape {list(matrix.shape)}, not {list(shape)}")
            is_asked = np.arange(shape[1]) < np.array([[len(row)] for row in rows])
            _logprobs(matrix[is_asked])
            values: Floats = matrix.astype(np.float32)
            return values

        return Exchange(path, body, read)


@dataclass(frozen=True, slots=True)
class SglangScoring:
    """Scores of SGLang. It has no log-probabilities at other ids for each position."""

    hidden_states: bool = False
    name: ClassVar[str] = "sglang"
    detokenize: ClassVar[tuple[str, str]] = ("/v1/detokenize", "text")

    async def facts(self, pool: ServerPool, server: Server) -> ServerFacts:
        facts = await sglang.SglangApi().facts(pool, server)
        check_version(server, "SGLang", facts.version, _OLDEST_SGLANG)
        return facts

    def hidden(self, ids: Sequence[int], width: int) -> Exchange[Floats]:
        path, body = sglang.SglangApi().scoring(ids, len(ids))
        # States of cached tokens are not returned: a key of its own keeps a request from the others' cache.
        body |= {"return_logprob": False, "return_hidden_states": True, "extra_key": uuid.uuid4().hex}
        body["sampling_params"]["max_new_tokens"] = 1

        def read(reply: Any) -> Floats:
            states = _meta(reply).get("hidden_states")
            if not isinstance(states, list) or not states:
                raise BadReply("the reply has no hidden states")
            try:
                matrix = np.array(states[0], np.float32)
            except (ValueError, TypeError) as error:
                raise BadReply(f"the hidden states cannot be read: {error}") from error
            if matrix.shape != (len(ids), width):
                raise BadReply(
                    f"hidden states of shape {list(matrix.shape)} for {len(ids)} tokens of width {width}"
                )
            return _finite(matrix, "a hidden state")

        return Exchange(path, body, read)

    def given(self, ids: Sequence[int], start: int) -> Exchange[Floats]:
        api = sglang.SglangApi()
        path, body = api.scoring(ids, start)
        return Exchange(path, body, lambda reply: np.array(api.scored(reply, ids, start), np.float32))

    def likely(self, ids: Sequence[int], start: int, k: int) -> Exchange[Likely]:
        api = sglang.SglangApi()
        path, body = api.scoring(ids, start)
        body |= {"top_logprobs_num": k, "return_flat_raw_top_logprobs": True}
        body["return_flat_raw_top_logprobs_b64"] = True
        num = len(ids) - start

        def read(reply: Any) -> Likely:
            given = np.array(api.scored(reply, ids, start), np.float32)
            meta = _meta(reply)
            rows, width = meta.get("input_top_logprobs_shape") or (0, 0)
            if (rows, width) != (num, k):
                raise BadReply(f"{width} likely tokens at {rows} positions, not {k} at {num}")
            values, best = _decoded(meta, "val", "float32"), _decoded(meta, "idx", "int32")
            if len(values) != num * k or len(best) != num * k:
                raise BadReply(f"{len(values)} log-probabilities of {num * k} likely tokens")
            return Likely(best.astype(np.int32).reshape(num, k), _logprobs(values.reshape(num, k)), given)

        return Exchange(path, body, read)

    def chosen(self, ids: Sequence[int], start: int, rows: Sequence[Sequence[int]]) -> Exchange[Floats]:
        # `capabilities` offers this for vLLM alone, so `check` refuses the recipe before.
        raise ServingError(
            "SGLang returns log-probabilities of one list of ids for all positions, not of the student's "
            "likeliest ones; serve the teacher with vLLM, or with `hidden_states: true`"
        )


POOLING_FLAGS = (
    "--runner pooling --convert embed --pooler-config "
    """'{"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": false}'"""
)


def scoring_api(engine: str, *, hidden_states: bool) -> ScoringApi:
    """Return the scoring protocol of an engine."""
    return VllmScoring(hidden_states) if engine == "vllm" else SglangScoring(hidden_states)


def _best(row: dict[str, Any], k: int) -> list[tuple[int, float]]:
    ranked = sorted(row.items(), key=lambda entry: entry[1]["rank"])[:k]
    if len(ranked) != k or ranked[-1][1]["rank"] > k:
        raise BadReply(f"{len(ranked)} likely tokens of {k}")
    return [(int(token), entry["logprob"]) for token, entry in ranked]


def _meta(reply: Any) -> dict[str, Any]:
    meta = reply.get("meta_info") if isinstance(reply, dict) else None
    if not isinstance(meta, dict):
        raise BadReply("the reply has no scores")
    return meta


def _decoded(meta: dict[str, Any], what: str, dtype: str) -> NDArray[Any]:
    encoded = meta.get(f"input_top_logprobs_{what}_flat_b64")
    told = meta.get(f"input_top_logprobs_{what}_flat_b64_dtype")
    if not isinstance(encoded, str) or told != dtype:
        raise BadReply(f"the likely tokens are missing, or {told!r} instead of {dtype}")
    try:
        return np.frombuffer(base64.b64decode(encoded), np.dtype(dtype).newbyteorder("<"))
    except ValueError as error:
        raise BadReply(f"the likely tokens cannot be read: {error}") from error


def _logprobs(values: Any) -> Floats:
    logprobs = _finite(np.asarray(values, np.float32), "a log-probability")
    if logprobs.size and float(logprobs.max()) > _ROUNDING:
        raise BadReply(f"a log-probability is {float(logprobs.max())!r}, more than 0")
    return logprobs


def _finite(values: Floats, what: str) -> Floats:
    if not np.isfinite(values).all():
        raise BadReply(f"{what} is NaN or infinite")
    return values
