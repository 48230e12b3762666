"""Reduction of a teacher's hidden states to a few numbers per token."""

from __future__ import annotations

import torch
from torch import Tensor

from mergeopd.loss.buffers import Workspace
from mergeopd.loss.checks import check_inputs, check_vocabulary, require_finite, require_labels
from mergeopd.loss.heads import Head, Projection
from mergeopd.loss.slicing import compute_dtype, rows_in_cache, rows_in_chunk, slices
from mergeopd.loss.softmax import Softmaxes, entropy_and_logprob
from mergeopd.loss.support import Members, top_ids
from mergeopd.loss.targets import Sampled, TopK
from mergeopd.loss.top_k import log_tail_mass


@torch.no_grad()
def observe(
    hidden_ND: Tensor,
    head: Head,
    labels_N: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    chunk_rows: int | None = None,
    workspace: Workspace | None = None,
) -> Sampled | TopK:
    """Reduce a model's hidden states to a `TopK` or `Sampled` target of `fused_loss`; no gradient.

    hidden_ND   its last hidden states `[N, d]`; float64 computes in float64, others in float32
    head        its whole head (not a shard)
    labels_N    sampled token ids, int64
    top_k       keep its k most probable tokens (at most the vocabulary), as `Support(of="teacher")` with this
                k would choose them from the hidden states; None: only the sampled token
    chunk_rows  tokens per matrix product; None chooses by device. Memory is about `chunk_rows * V` elements
    workspace   buffers to reuse over calls

    Raises ValueError for shapes or labels that do not fit, ArithmeticError for NaN or inf.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, must be at least 1; None keeps the sampled token alone")
    dtype = compute_dtype(hidden_ND)
    if chunk_rows is None:
        chunk_rows = rows_in_chunk(hidden_ND.device, len(head.vocab), dtype)
    check_inputs(hidden_ND, head, (), labels_N, temperature, chunk_rows)
    require_labels(labels_N, check_vocabulary(labels_N, head, (), None)[1], head.vocab, None)
    workspace = Workspace() if workspace is None else workspace
    model = Projection("observed", head, hidden_ND, temperature, dtype, workspace)
    softmaxes = Softmaxes(model, (), head.vocab, None, labels_N)
    num, k = hidden_ND.shape[0], min(top_k or 0, len(head.vocab))
    logprob, entropy = hidden_ND.new_empty(2, num, dtype=dtype)
    ids = labels_N.new_empty(num, k)
    logprobs, log_tail = logprob.new_empty(num, k), torch.empty_like(logprob)
    on_cpu = hidden_ND.device.type == "cpu"
    for rows in slices(0, num, chunk_rows):
        raw = model.raw_logits(rows)
        block_rows = rows_in_cache(len(head.vocab), dtype) if on_cpu else raw.shape[0]
        for part in slices(0, raw.shape[0], block_rows):
            tokens = slice(rows.start + part.start, rows.start + part.stop)
            block = softmaxes.begin([raw[part]], tokens, with_grad=False)
            log_mass, entropies, picked = entropy_and_logprob(torch.stack(block.sums).unsqueeze(0))
            logprob[tokens], entropy[tokens] = picked[0], entropies[0]
            if k:
                [centred], [mass] = block.logits, block.masses
                ids[tokens] = top_ids([centred], k, head.vocab, None)[0]
                columns = ids[tokens] - head.vocab.start
                logprobs[tokens] = centred.gather(1, columns) - log_mass[0].unsqueeze(1)
                tail = Members.locate(ids[tokens], head.vocab).sum_outside(mass)
                log_tail[tokens] = log_tail_mass(tail) - log_mass[0]
        require_finite(logprob[rows] + entropy[rows], rows, "the logits")
    return Sampled(logprob, entropy) if top_k is None else TopK(ids, logprobs, logprob, entropy, log_tail)


@torch.no_grad()
def top_logits(
    hidden_ND: Tensor, head: Head, k: int, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the k largest logits of a head, or of a shard of it, at each of N positions, the largest first.

    Returns token ids and tempered logits `[N, k]` (fewer where the head has fewer rows), and the log of the
    sum of all exponentials `[N]`. The log-probability of a token is its logit minus that sum, which is to be
    added over the shards.
    """
    dtype, num_rows = compute_dtype(hidden_ND), len(head.vocab)
    model = Projection("observed", head, hidden_ND, temperature, dtype, Workspace())
    ids, logits, log_mass = [], [], []
    for rows in slices(0, hidden_ND.shape[0], rows_in_chunk(hidden_ND.device, num_rows, dtype)):
        block = model.raw_logits(rows)
        model.finish_logits(block)
        values, columns = block.topk(min(k, num_rows), dim=1)
        ids.append(columns + head.vocab.start)
        logits.append(values)
        log_mass.append(block.logsumexp(1))
    return torch.cat(ids), torch.cat(logits), torch.cat(log_mass)
