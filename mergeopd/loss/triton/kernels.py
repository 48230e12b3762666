# mypy: ignore-errors
"""Triton kernels over a chunk's raw logits: statistics, sums of divergences, and the logit gradient.

Each reads the logits `[models, rows, V]` (the student, then the teachers) once. A program handles `ROWS`
rows and `width` columns, `BLOCK` at a time, and applies bias, scale, soft cap and temperature as it reads.
Sums are kept for each lane and added up at the end: the only reductions in a loop are the two maxima.

Compiled for a GPU, or run by Triton's interpreter (TRITON_INTERPRET=1) on a CPU.
"""

import triton
import triton.language as tl

# Codes of the divergences. Triton reads globals only if they are `constexpr`.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
TVD = tl.constexpr(3)
SKEW_FORWARD_KL = tl.constexpr(4)
SKEW_REVERSE_KL = tl.constexpr(5)
CLIPPED_FORWARD_KL = tl.constexpr(6)
ALPHA = tl.constexpr(7)


@triton.jit
def expm1(x):
    """Compute `exp(x) - 1`, exact near 0: the rounding of u cancels in `(u - 1) / log u`."""
    u = tl.exp(x)
    less = u - 1.0
    is_plain = (less == 0.0) | (less == -1.0)
    log_u = tl.log(tl.where(is_plain, 2.0, u))
    return tl.where(less == 0.0, x, tl.where(less == -1.0, -1.0, less * (x / log_u)))


@triton.jit
def log1p(x):
    """Compute `log(1 + x)`, exact near 0; x > -1."""
    u = 1.0 + x
    less = u - 1.0
    ratio = tl.log(u) / tl.where(less == 0.0, 1.0, less)
    return tl.where(less == 0.0, x, ratio * x)


@triton.jit
def tanh(x):
    em = expm1(tl.minimum(tl.maximum(2.0 * x, -80.0), 80.0))
    return em / (em + 2.0)


@triton.jit
def finished(
    raw, bias, factors, column, V, model,
    BIASED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Apply bias, scale, soft cap and temperature. Returns tempered logits and the slope of the cap.

    `factors [models, 2]`: the factor before the cap, and the one after it; 0 for a model without a cap.
    """
    x = raw
    if BIASED:
        x += tl.load(bias + model * V + column, mask=column < V, other=0.0)
    x *= tl.load(factors + 2 * model)
    slope = x * 0.0 + 1.0
    if CAPPED:
        after = tl.load(factors + 2 * model + 1)
        bent = tanh(x)
        slope = tl.where(after > 0.0, 1.0 - bent * bent, 1.0)
        x = tl.where(after > 0.0, bent * after, x)
    return x, slope


@triton.jit
def density(
    mass_S, mass_T, log_ratio,
    KIND: tl.constexpr, PARAMETER: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Return an entry's part of the divergence, and `p_S * g` up to a multiple of `p_S`.

    Formulas and their forms near equality are those of `loss/divergence.py` and `loss/pointwise.py`.
    """
    if KIND == FORWARD_KL:
        value = -mass_T * log_ratio
        direction = -mass_T
    elif KIND == REVERSE_KL:
        value = mass_S * log_ratio
        direction = value
    elif KIND == JSD:
        excess = log1p(PARAMETER * expm1(tl.minimum(-log_ratio, BOUND)))
        direction = mass_S * excess * (PARAMETER - 1.0)
        value = direction - PARAMETER * mass_T * (tl.maximum(log_ratio, -BOUND) + excess)
    elif KIND == TVD:
        sign = tl.where(log_ratio > 0.0, 0.5, tl.where(log_ratio < 0.0, -0.5, 0.0 * log_ratio))
        value = sign * (mass_S - mass_T)
        direction = sign * mass_S
    elif KIND == SKEW_FORWARD_KL:
        ratio = expm1(tl.minimum(tl.maximum(log_ratio, -BOUND), BOUND)) * (1.0 - PARAMETER)
        value = -mass_T * log1p(ratio)
        direction = mass_S / (1.0 + ratio) * (PARAMETER - 1.0)
    elif KIND == SKEW_REVERSE_KL:
        ratio = expm1(tl.minimum(tl.maximum(-log_ratio, -BOUND), BOUND)) * (1.0 - PARAMETER)
        log_part = -log1p(ratio)
        value = mass_S * log_part
        direction = mass_S * (log_part - PARAMETER / (1.0 + ratio))
    elif KIND == CLIPPED_FORWARD_KL:
        entry = -mass_T * log_ratio
        value = tl.minimum(entry, PARAMETER)
        direction = tl.where(entry < PARAMETER, -mass_T, 0.0)
    else:
        power = expm1(PARAMETER * tl.minimum(tl.maximum(-log_ratio, -BOUND), BOUND)) * mass_S
        value = power * (-1.0 / (PARAMETER * (1.0 - PARAMETER)))
        direction = power * (-1.0 / PARAMETER)
    return value, direction


@triton.jit
def load_centred(
    logits, bias, factors, centre, place, inside, column, V,
    model, BIASED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Load logits, finished and minus their row's centre, and the cap's slope; 0 outside."""
    raw = tl.load(logits + place, mask=inside, other=0.0)
    z, slope = finished(raw, bias, factors, column, V, model, BIASED, CAPPED)
    return tl.where(inside, z - centre, 0.0), slope


@triton.jit
def statistics_kernel(
    logits, bias, factors, columns, moments, pairs, sampled,
    n, V, model_stride, width,
    PAIRED: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum up the student and teacher `program_id(0)`, in columns `program_id(2)` of `width` each.

    moments `[parts, models, 3, n]`: the largest logit m, `sum e^(z - m)` and `sum (z - m) e^(z - m)`.
    pairs `[parts, K, 2, n]`: the difference of both models' centred logits, summed under the student's
    `e^(z - m)` and under the teacher's. sampled `[models, n]`: the logits in `columns [n]`; -1 for none.
    """
    teacher = tl.program_id(0) + 1
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(2) * width
    is_row = row < n
    start = row.to(tl.int64)[:, None] * V
    dtype = logits.dtype.element_ty
    lane = tl.arange(0, BLOCK)[None, :]
    zero = tl.zeros([ROWS, BLOCK], dtype)
    top_S = tl.full([ROWS], float("-inf"), dtype)
    top_T = top_S
    mass_S, moment_S, cross_S = zero, zero, zero
    mass_T, moment_T, cross_T = zero, zero, zero
    for first in range(begin, tl.minimum(begin + width, V), BLOCK):
        column = first + lane
        inside = is_row[:, None] & (column < V)
        raw = tl.load(logits + start + column, mask=inside, other=0.0)
        z_S, _ = finished(raw, bias, factors, column, V, 0, BIASED, CAPPED)
        new_S = tl.maximum(top_S, tl.max(tl.where(column < V, z_S, float("-inf")), 1))
        # The centre moves: earlier sums are scaled, and their centred logits shifted.
        shift_S = tl.where(first == begin, 0.0, top_S - new_S)[:, None]
        scale_S = tl.exp(shift_S)
        z_S = tl.where(inside, z_S - new_S[:, None], 0.0)
        e_S = tl.where(inside, tl.exp(z_S), 0.0)
        moment_S = (moment_S + shift_S * mass_S) * scale_S + e_S * z_S
        if PAIRED:
            raw = tl.load(logits + teacher * model_stride + start + column, mask=inside, other=0.0)
            z_T, _ = finished(raw, bias, factors, column, V, teacher, BIASED, CAPPED)
            new_T = tl.maximum(top_T, tl.max(tl.where(column < V, z_T, float("-inf")), 1))
            shift_T = tl.where(first == begin, 0.0, top_T - new_T)[:, None]
            scale_T = tl.exp(shift_T)
            z_T = tl.where(inside, z_T - new_T[:, None], 0.0)
            e_T = tl.where(inside, tl.exp(z_T), 0.0)
            moment_T = (moment_T + shift_T * mass_T) * scale_T + e_T * z_T
            ratio, shift = z_S - z_T, shift_S - shift_T
            cross_S = (cross_S + shift * mass_S) * scale_S + e_S * ratio
            cross_T = (cross_T + shift * mass_T) * scale_T + e_T * ratio
            mass_T = mass_T * scale_T + e_T
            top_T = new_T
        mass_S = mass_S * scale_S + e_S
        top_S = new_S
    num_models = tl.num_programs(0) + (1 if PAIRED else 0)
    at = tl.load(columns + row, mask=is_row, other=-1)
    has_label = is_row & (at >= begin) & (at < begin + width)
    at = tl.maximum(at, 0)
    place = row.to(tl.int64) * V + at
    own = moments + tl.program_id(2) * num_models * 3 * n + row
    if teacher == 1:
        tl.store(own, top_S, mask=is_row)
        tl.store(own + n, tl.sum(mass_S, 1), mask=is_row)
        tl.store(own + 2 * n, tl.sum(moment_S, 1), mask=is_row)
        raw = tl.load(logits + place, mask=has_label, other=0.0)
        z_S, _ = finished(raw, bias, factors, at, V, 0, BIASED, CAPPED)
        tl.store(sampled + row, z_S, mask=has_label)
    if PAIRED:
        own += 3 * teacher * n
        tl.store(own, top_T, mask=is_row)
        tl.store(own + n, tl.sum(mass_T, 1), mask=is_row)
        tl.store(own + 2 * n, tl.sum(moment_T, 1), mask=is_row)
        raw = tl.load(logits + teacher * model_stride + place, mask=has_label, other=0.0)
        z_T, _ = finished(raw, bias, factors, at, V, teacher, BIASED, CAPPED)
        tl.store(sampled + teacher * n + row, z_T, mask=has_label)
        own = pairs + (tl.program_id(2) * tl.num_programs(0) + teacher - 1) * 2 * n + row
        tl.store(own, tl.sum(cross_S, 1), mask=is_row)
        tl.store(own + n, tl.sum(cross_T, 1), mask=is_row)


@triton.jit
def terms_kernel(
    logits, bias, factors, centres, per_mass, offsets, terms,
    n, V, model_stride, width,
    KIND: tl.constexpr, PARAMETER: tl.constexpr, BOUND: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum up one divergence from teacher `program_id(0)`, in columns `program_id(2)` of `width` each.

    centres, per_mass `[models, n]`: p = e^(z - centre) * per_mass; offsets `[K, n]` are subtracted from the
    centred log-ratio. terms `[parts, K, 2, n]`: the divergence and the sum of its direction.
    """
    teacher = tl.program_id(0) + 1
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(2) * width
    is_row = row < n
    start = row.to(tl.int64)[:, None] * V
    lane = tl.arange(0, BLOCK)[None, :]
    centre_S = tl.load(centres + row, mask=is_row, other=0.0)[:, None]
    centre_T = tl.load(centres + teacher * n + row, mask=is_row, other=0.0)[:, None]
    per_S = tl.load(per_mass + row, mask=is_row, other=0.0)[:, None]
    per_T = tl.load(per_mass + teacher * n + row, mask=is_row, other=0.0)[:, None]
    offset = tl.load(offsets + (teacher - 1) * n + row, mask=is_row, other=0.0)[:, None]
    value = tl.zeros([ROWS, BLOCK], logits.dtype.element_ty)
    direction = value
    for first in range(begin, tl.minimum(begin + width, V), BLOCK):
        column = first + lane
        inside = is_row[:, None] & (column < V)
        z_S, _ = load_centred(
            logits, bias, factors, centre_S, start + column, inside, column, V, 0, BIASED, CAPPED
        )
        z_T, _ = load_centred(
            logits + teacher * model_stride, bias, factors, centre_T, start + column, inside, column, V,
            teacher, BIASED, CAPPED,
        )  # fmt: skip
        own_value, own_direction = density(
            tl.exp(z_S) * per_S, tl.exp(z_T) * per_T, (z_S - z_T) - offset, KIND, PARAMETER, BOUND
        )
        value += tl.where(inside, own_value, 0.0)
        direction += tl.where(inside, own_direction, 0.0)
    own = terms + (tl.program_id(2) * tl.num_programs(0) + teacher - 1) * 2 * n + row
    tl.store(own, tl.sum(value, 1), mask=is_row)
    tl.store(own + n, tl.sum(direction, 1), mask=is_row)


@triton.jit
def gradient_kernel(
    logits, bias, factors, centres, per_mass, offsets, columns, push, pull, at_label, gradient,
    n, V, model_stride, width, K, gradient_stride,
    KINDS: tl.constexpr, PARAMETERS: tl.constexpr, BOUND: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the derivative by the student's raw logits, columns `program_id(1)`, in the dtype of `gradient`.

    It is `slope * (sum_kd push[k, d] direction_kd - pull p_S + at_label at the sampled token)`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * width
    is_row = row < n
    start = row.to(tl.int64)[:, None] * V
    lane = tl.arange(0, BLOCK)[None, :]
    centre_S = tl.load(centres + row, mask=is_row, other=0.0)[:, None]
    per_S = tl.load(per_mass + row, mask=is_row, other=0.0)[:, None]
    pull_n = tl.load(pull + row, mask=is_row, other=0.0)[:, None]
    label_n = tl.load(at_label + row, mask=is_row, other=0.0)[:, None]
    at = tl.load(columns + row, mask=is_row, other=-1)[:, None]
    out = gradient + row.to(tl.int64)[:, None] * gradient_stride
    for first in range(begin, tl.minimum(begin + width, V), BLOCK):
        column = first + lane
        inside = is_row[:, None] & (column < V)
        z_S, slope = load_centred(
            logits, bias, factors, centre_S, start + column, inside, column, V, 0, BIASED, CAPPED
        )
        mass_S = tl.exp(z_S) * per_S
        total = tl.where(column == at, label_n, 0.0) - pull_n * mass_S
        for k in range(K):
            centre_T = tl.load(centres + (k + 1) * n + row, mask=is_row, other=0.0)[:, None]
            per_T = tl.load(per_mass + (k + 1) * n + row, mask=is_row, other=0.0)[:, None]
            offset = tl.load(offsets + k * n + row, mask=is_row, other=0.0)[:, None]
            z_T, _ = load_centred(
                logits + (k + 1) * model_stride, bias, factors, centre_T, start + column, inside, column, V,
                k + 1, BIASED, CAPPED,
            )  # fmt: skip
            mass_T = tl.exp(z_T) * per_T
            log_ratio = (z_S - z_T) - offset
            for d in tl.static_range(len(KINDS)):
                _, direction = density(mass_S, mass_T, log_ratio, KINDS[d], PARAMETERS[d], BOUND)
                factor = tl.load(push + (k * len(KINDS) + d) * n + row, mask=is_row, other=0.0)[:, None]
                total += factor * direction
        tl.store(out + column, (total * slope).to(gradient.dtype.element_ty), mask=inside)
