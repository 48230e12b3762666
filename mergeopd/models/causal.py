"""Causal language models from transformers: bodies without weights, and last hidden states.

A *body* is the transformer without its prediction head; its output is the hidden state after the final
norm. The head is applied in the loss and in sampling, over the true vocabulary only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mergeopd.errors import ModelError
from mergeopd.loss.heads import Head
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.decode import is_packed, plain
from mergeopd.models.experts import Part, part_of, published_shapes
from mergeopd.models.facts import ModelFacts, head_tensor
from mergeopd.models.layout import check_shapes, is_ignored
from mergeopd.models.quiet import without_warnings
from mergeopd.models.stored import stored_weights
from mergeopd.transfers import to_device
from mergeopd.types import Flags, TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def build_skeleton(folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of `folder` in evaluation mode, with parameters on the meta device and real buffers.

    `dtype` is the dtype of computation and overrides config.json; buffers may be rounded to it.

    Raises ModelError when transformers does not know the architecture. Code shipped with a checkpoint is
    never executed.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    # Torch's grouped products, transformers' default for experts, do not exist in float64.
    options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with init_empty_weights(include_buffers=False), without_warnings():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ModelError(f"{folder}: transformers cannot build this model: {reason}") from error
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    model.requires_grad_(False)
    return model.eval()


def parameter_parts(facts: ModelFacts, checkpoint: Checkpoint) -> dict[str, tuple[Part, ...]]:
    """Map parameters and buffers to the folder's weights that they are made of, by expert and rows.

    A tied head has no entry, since it is the embedding. Raises ModelError when the head's tensor is missing
    or ambiguous, or a weight cannot be decoded.
    """
    parts: dict[str, list[Part]] = {}
    for tensor in stored_weights(facts, checkpoint):
        if tensor != facts.head_name and not is_ignored(tensor):
            parameter, part = part_of(facts.model_type, tensor)
            parts.setdefault(parameter, []).append(part)
    parts[facts.head_parameter] = [Part(head_tensor(facts, checkpoint))]
    return {name: tuple(sorted(own, key=lambda p: (p.expert or 0, p.piece))) for name, own in parts.items()}


def check_fit(model: nn.Module, facts: ModelFacts, checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's tensors with those that its model expects, from headers only.

    Raises ModelError naming the first differences.
    """
    tied_head = {facts.head_name} if facts.tied else set()
    parameters = model.named_parameters(remove_duplicate=False)
    wanted = {name: tuple(p.shape) for name, p in parameters if name not in tied_head}
    buffers = {
        f"{prefix}.{leaf}" if prefix else leaf: tuple(buffer.shape)
        for prefix, module in model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and leaf not in module._non_persistent_buffers_set
    }
    given = {
        facts.head_parameter if name == facts.head_parameter else part.tensor: part.tensor
        for name, parts in parameter_parts(facts, checkpoint).items()
        for part in parts
    }
    required, optional = (published_shapes(facts.model_type, own, given) for own in (wanted, buffers))
    stored = stored_weights(facts, checkpoint)
    check_shapes(facts, {name: stored[weight].shape for name, weight in given.items()}, required, optional)


def assembled(
    parts: Mapping[str, Sequence[Part]],
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    copy: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters made of a folder's tensors, each when the last of its tensors has come.

    A parameter that is one tensor is not copied if it has this device and dtype, unless `copy` is set.
    """
    places = {part.tensor: (name, part) for name, own in parts.items() for part in own}
    unfinished: dict[str, tuple[Tensor, int]] = {}
    for tensor, values in tensors:
        name, part = places[tensor]
        if part.expert is None:
            yield name, values if is_packed(values) else values.to(device=device, dtype=dtype, copy=copy)
            continue
        if name not in unfinished:
            last = parts[name][-1]
            shape = (1 + (last.expert or 0), (1 + last.piece) * len(values), *values.shape[1:])
            unfinished[name] = torch.empty(shape, device=device, dtype=dtype), len(parts[name])
        whole, missing = unfinished.pop(name)
        whole[part.expert, part.rows(len(values))] = plain(values)
        if missing == 1:
            yield name, whole
        else:
            unfinished[name] = whole, missing - 1


def head_of(
    facts: ModelFacts, weights: Mapping[str, Tensor], vocab: range, weight_grad: Tensor | None = None
) -> Head:
    """Return the prediction head among weights by parameter name, whose rows score the token ids `vocab`."""
    bias = weights[facts.head_bias_name] if facts.head_bias_name else None
    scale, softcap = facts.logit_scale, facts.softcap
    weight, start = weights[facts.head_parameter], vocab.start
    return Head(weight, bias, scale, softcap, len(vocab), start, weight_grad)


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Replace parameters (without a copy) and buffers by `weights` of the same full names."""
    modules = dict(model.named_modules())
    for name, tensor in weights.items():
        module_name, _, leaf = name.rpartition(".")
        module = modules[module_name]
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
            continue
        parameter = module.get_parameter(leaf)
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def empty(model: nn.Module) -> None:
    """Move every parameter back to the meta device, so that its memory can be freed."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[leaf] = nn.Parameter(meta, requires_grad=parameter.requires_grad)


def response_hidden(
    body: nn.Module,
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    device: torch.device,
    trained: Sequence[Flags | None] | None = None,
    *,
    packing: bool = False,
) -> Tensor:
    """Compute the hidden states that predict trained response tokens, `[tokens, d]`, responses in order.

    The state after `prompt + response[:t]` predicts `response[t]`; there is a row for every t flagged in
    `trained` (one flag per token; None, as a whole or for a response: every t). Sequences are padded on the
    right, which causal attention never reads, so no mask is needed. With `packing` they form one row without
    padding, and positions that begin again keep them apart. Every prompt must have a token. Rows keep their
    gradient when the body's parameters require one.
    """
    positions = {}
    if packing:
        ids, starts, rows = packed(prompts, responses, trained)
        positions = {"position_ids": to_device(starts, device)}
    else:
        ids, rows = padded(prompts, responses, trained)
    hidden = body(input_ids=to_device(ids, device), **positions, use_cache=False).last_hidden_state
    rows_ND: Tensor = hidden.flatten(0, 1).index_select(0, to_device(rows, device))
    return rows_ND


def padded(
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    trained: Sequence[Flags | None] | None = None,
    *,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return token ids `[B, width]`, padded with zeros on the right, and positions `[N]` in `[B * width]`.

    The positions are those that predict trained tokens, see `response_hidden`. `width` is a multiple of
    `multiple`.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    width = -(-max(lengths) // multiple) * multiple
    ids = np.zeros((len(lengths), width), np.int64)
    rows = []
    flags = [None] * len(lengths) if trained is None else trained
    for i, (prompt, response, own) in enumerate(zip(prompts, responses, flags, strict=True)):
        ids[i, : len(prompt)] = prompt
        ids[i, len(prompt) : lengths[i]] = response
        places = np.arange(len(response)) if own is None else np.flatnonzero(own)
        rows.append(i * width + len(prompt) - 1 + places)
    return torch.from_numpy(ids), torch.from_numpy(np.concatenate(rows))


def packed(
    prompts: Sequence[TokenIds],
    responses: Sequence[TokenIds],
    trained: Sequence[Flags | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return token ids and positions `[1, T]` of the sequences in one row, and rows as `padded` does.

    transformers masks a row whose positions begin again by blocks: no token attends to another sequence.
    """
    ids, rows, starts = [], [], []
    begin = 0
    flags = [None] * len(prompts) if trained is None else trained
    for prompt, response, own in zip(prompts, responses, flags, strict=True):
        length = len(prompt) + len(response)
        places = np.arange(len(response)) if own is None else np.flatnonzero(own)
        ids += [prompt, response]
        rows.append(begin + len(prompt) - 1 + places)
        starts.append(np.arange(length))
        begin += length
    parts = (np.concatenate(column).astype(np.int64) for column in (ids, starts, rows))
    ids_T, starts_T, rows_N = (torch.from_numpy(part) for part in parts)
    return ids_T[None], starts_T[None], rows_N


def pick_device() -> torch.device:
    """Return the first GPU if torch sees one, else the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _log.debug("device %s, %d CPU threads", device, torch.get_num_threads())
    return device
