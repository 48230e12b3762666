"""Sizes of a language model from its config.json alone: parameters, operations, caches. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from mergeopd.errors import ModelError
from mergeopd.models.facts import ModelFacts, Weights, positive_int, read_config
from mergeopd.models.flops import ModelFlops
from mergeopd.models.layout import parameter_shapes
from mergeopd.models.residency import layer_of
from mergeopd.planner.mixtures import Counts, layer_counts

ITEMSIZE: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_UNGATED = frozenset(("apertus", "arcee", "nemotron", "phi", "starcoder2"))
_HEAD_NORMS = frozenset(("apertus", "exaone4", "gemma3_text", "olmoe", "qwen3", "qwen3_moe"))


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model.

    `body_matrices` and `body_vectors` count the parameters without embedding and head; of a mixture of
    experts, `active_matrices` those that one token uses. `head_size` is that of keys; `ffn` is the size that
    one token uses. `runs` is None, or why mergeopd cannot load the model today.
    """

    folder: Path
    model_type: str
    hidden: int
    layers: int
    heads: int
    groups: int
    head_size: int
    ffn: int
    vocab: int
    tied: bool
    stored: str
    stored_bytes: float
    max_positions: int
    body_matrices: int
    active_matrices: int
    body_vectors: int
    is_gated: bool = True
    has_head_norms: bool = False
    kv_numbers: int = 0
    """Numbers that a layer caches for one token."""
    layer: int = 0
    """Parameters of the largest layer."""
    experts: int = 0
    per_token: int = 0
    """Experts of a layer, and those that one token uses; 0 for a dense model."""
    shared_ffn: int = 0
    """Size of the expert that all tokens use."""
    runs: str | None = None
    is_packed: bool = False
    """Whether quantised weights stay in memory as they are stored."""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path, weights: Weights = "float") -> ModelShape:
        """Read `folder`/config.json, of a model whose `weights` are used so.

        Raises ModelError when there is none, or sizes are missing from it.
        """
        path, config = folder / "config.json", text_config(read_config(folder))
        model_type = str(config.get("model_type"))
        try:
            facts: ModelFacts | None = ModelFacts.read(folder, weights)
            runs = None
        except ModelError as error:
            facts, runs = None, str(error).partition("; known:")[0]
        hidden, heads = (positive_int(path, config, key) for key in ("hidden_size", "num_attention_heads"))
        head_size = config.get("head_dim") or hidden // heads
        groups = config.get("num_key_value_heads") or heads
        if facts is not None and model_type in ("phi", "stablelm"):
            head_size = hidden // heads
        own = config | {"head_dim": head_size, "num_key_value_heads": groups}
        if facts is not None:
            counts = _known_counts(facts, own)
        else:
            counts = layer_counts(path, own)
        tied = facts.tied if facts is not None else bool(config.get("tie_word_embeddings", False))
        return cls(
            folder=folder,
            model_type=model_type,
            hidden=hidden,
            layers=positive_int(path, config, "num_hidden_layers"),
            heads=heads,
            groups=groups,
            head_size=head_size,
            ffn=counts.ffn,
            vocab=positive_int(path, config, "vocab_size"),
            tied=tied,
            stored=stored_dtype(config),
            stored_bytes=stored_bytes(config),
            max_positions=int(config.get("max_position_embeddings") or 32768),
            body_matrices=counts.matrices,
            active_matrices=counts.active,
            body_vectors=counts.vectors,
            is_gated=model_type not in _UNGATED,
            has_head_norms=model_type in _HEAD_NORMS or bool(config.get("use_qk_norm")),
            kv_numbers=counts.kv_numbers or 2 * groups * head_size,
            layer=counts.layer or -(-(counts.matrices + counts.vectors) // int(config["num_hidden_layers"])),
            experts=counts.experts,
            per_token=counts.per_token,
            shared_ffn=counts.shared,
            runs=runs,
            is_packed=facts is not None and facts.quantization is not None and facts.quantization.is_packed,
            config=own,
        )

    @property
    def query_size(self) -> int:
        return self.heads * self.head_size

    @property
    def key_size(self) -> int:
        return self.groups * self.head_size

    @property
    def body(self) -> int:
        """Parameters of the layers and the last norm."""
        return self.body_matrices + self.body_vectors

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return self.body + self.embedding * (1 if self.tied else 2)

    @property
    def active(self) -> int:
        """Parameters that one token uses, head included, embedding not unless it is the head."""
        return self.active_matrices + self.body_vectors + self.embedding

    @property
    def without_head(self) -> int:
        """Parameters of a teacher's body: without a head of its own."""
        return self.body + self.embedding

    @property
    def stored_body_bytes(self) -> float:
        """Bytes of a teacher's body in the files; what is quantised are its matrices."""
        return self.body_matrices * self.stored_bytes + self._rest * self.stored_head_bytes

    @property
    def stored_head_bytes(self) -> int:
        """Bytes of a weight in the files that is not quantised, such as one of the head."""
        return ITEMSIZE[self.stored]

    def body_bytes(self, dtype: str) -> float:
        """Return the bytes of a teacher's body in memory."""
        return self.body_matrices * self.matrix_bytes(dtype) + self._rest * ITEMSIZE[dtype]

    def matrix_bytes(self, dtype: str) -> float:
        """Return the bytes of a weight of the layers in memory; experts are put together unpacked."""
        return self.stored_bytes if self.is_packed and not self.is_mixture else ITEMSIZE[dtype]

    def is_copied(self, dtype: str) -> bool:
        """Whether a body is made of its files by copies: decoded, of another precision, or by expert."""
        is_decoded = self.stored_bytes != self.stored_head_bytes and not self.is_packed
        return is_decoded or self.stored != dtype or self.is_mixture

    @property
    def _rest(self) -> int:
        return self.without_head - self.body_matrices

    def quantized(self) -> ModelShape:
        """Return the model with 8 bits for each weight of its matrices, in files and memory."""
        return replace(self, stored_bytes=1.0, is_packed=True)

    @property
    def is_mixture(self) -> bool:
        return self.active_matrices < self.body_matrices

    @property
    def flops(self) -> ModelFlops:
        """Operations of its passes."""
        return ModelFlops(
            per_token=2 * self.active_matrices,
            per_position=4 * self.layers * self.query_size,
            per_logits=2 * self.embedding,
        )

    def kv_bytes(self, dtype: str) -> int:
        """Return the bytes that the cache of keys and values has for one token."""
        return self.layers * self.kv_numbers * ITEMSIZE[dtype]

    def saved_numbers(self, dtype: str) -> tuple[float, float]:
        """Return the numbers that autograd keeps for a token: of one layer, and of the last norm.

        Those of transformers' Llama and Qwen3 with torch's fused attention: inputs and outputs of the norms
        (which compute in float32), of the projections, of attention and of the feed-forward network.
        """
        wide = 4 / ITEMSIZE[dtype] if dtype in ("bfloat16", "float16") else 1.0
        hidden, query, key = self.hidden, self.query_size, self.key_size
        norms = 2 * ((2 + wide) * hidden + wide)
        head_norms = (1 + wide) * (query + key) + wide * (self.heads + self.groups)
        attention = 2 * query + 2 * key + wide * self.heads
        feed_forward = (4 if self.is_gated else 2) * self.ffn
        of_layer = norms + attention + feed_forward + (head_norms if self.has_head_norms else 0)
        return of_layer + self._routed_numbers(wide), (1 + wide) * hidden + wide

    def _routed_numbers(self, wide: float) -> float:
        """Return what a layer of experts keeps besides: a token's copies for its experts and their outputs.

        And its probabilities of all experts, in float32, their weights, and the gate of a shared expert.
        """
        routed = self.per_token * (2 * self.hidden + 1) + wide * self.experts
        return routed + (self.hidden + 1 if self.shared_ffn else 0)

    def read_matrices(self, tokens: float) -> float:
        """Return the parameters of the matrices that a pass reads; of experts, those that its tokens use."""
        if not self.per_token or self.per_token == self.experts:
            return self.active_matrices
        share = self.per_token / self.experts
        more: float = (1 - (1 - share) ** tokens - share) / (1 - share)
        return self.active_matrices + max(more, 0.0) * (self.body_matrices - self.active_matrices)

    def smallest_side(self, tokens: float) -> float:
        """Return the smallest side of the products of a pass of `tokens` tokens."""
        if not self.per_token:
            return min(tokens, self.hidden)
        size = (self.ffn - self.shared_ffn) / self.per_token
        return min(tokens * self.per_token / self.experts, size, self.hidden)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a config, which multimodal models nest."""
    inner = config.get("text_config")
    return dict(inner) if isinstance(inner, dict) and "hidden_size" in inner else dict(config)


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype of the weights in the files, as config.json says; float32 if it does not."""
    written = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return written if written in ITEMSIZE else "float32"


def stored_bytes(config: Mapping[str, Any]) -> float:
    """Return the bytes of a weight in the files; of quantised ones without their scales."""
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict) and quantised:
        method = str(quantised.get("quant_method", ""))
        bits = quantised.get("bits") or (4 if "4" in method else 8)
        return float(bits) / 8
    return float(ITEMSIZE[stored_dtype(config)])


def _known_counts(facts: ModelFacts, config: Mapping[str, Any]) -> Counts:
    path, data, experts = facts.folder / "config.json", dict(config), facts.experts
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(facts, config).items():
        # Sizes that transformers takes from other keys than most models: heads times their size.
        of_keys = any(part in name for part in ("k_proj", "v_proj"))
        heads = config["num_key_value_heads" if of_keys else "num_attention_heads"]
        if None in shape and "self_attn" not in name:
            raise ModelError(
                f"{path}: does not determine the shape of {name}; fetch the model's own config.json"
            )
        shapes[name] = tuple(heads * config["head_dim"] if size is None else size for size in shape)
    by_layer = Counter[int | None]()
    for name, shape in shapes.items():
        by_layer[layer_of(name)] += prod(shape)
    layer = max(size for number, size in by_layer.items() if number is not None)
    matrices = sum(prod(shape) for shape in shapes.values() if len(shape) > 1)
    vectors = sum(prod(shape) for shape in shapes.values() if len(shape) == 1)
    if experts is None:
        ffn = positive_int(path, data, "intermediate_size")
        return Counts(matrices, matrices, vectors, ffn, layer=layer)
    of_experts = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    num_weights = sum(map(prod, of_experts.values()))
    active = matrices - num_weights + num_weights * experts.per_token // experts.count
    own = max((shape[-1] for name, shape in of_experts.items() if name.endswith("down_proj")), default=0)
    shared = config.get("shared_expert_intermediate_size") or 0
    return Counts(
        matrices,
        active,
        vectors,
        experts.per_token * own + shared,
        layer=layer,
        experts=experts.count,
        per_token=experts.per_token,
        shared=shared,
    )
