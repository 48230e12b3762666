"""The teacher's tokens in the student's pieces, against loops over tokens and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from mergeopd.loss import JSD, ForwardKL, Head, Hidden
from mergeopd.loss.cross_tokenizer import Groups, Pieces, PieceTable, bridge_loss

V_S, D_S, D_T = 7, 5, 6
# Spellings in the student's tokens: one, two, three; one that stands for no text.
SPELLED = [(0,), (1,), (0, 1), (0, 1, 2), (0, 3), (4,), (4, 0), (), (5, 5), (6,)]
WIDTH = 3
TABLE = torch.tensor([[*s, *[-1] * (WIDTH - len(s))] for s in SPELLED])
# Whether each group goes on where the one before it ends.
FOLLOWS = [False, True, False, True, True, True, True, True, True, True]
# (student's tokens, teacher's tokens): several on either side, on both, and another cut of the same text.
GROUPS = [
    ((0, 1, 2), (3,)),
    ((4,), (5,)),
    ((0,), (0,)),
    ((0, 1), (2,)),
    ((5,), (8, 9)),
    ((1, 2), (1, 6)),
    ((3, 0), (4,)),
    ((6,), (9,)),
    ((0, 5), (9,)),
    ((0, 5, 5, 0), (3,)),
]
NUM_S, NUM_T = sum(len(s) for s, _ in GROUPS), sum(len(t) for _, t in GROUPS)


def jsd(q_S: Tensor, q_T: Tensor, beta: float) -> Tensor:
    m = beta * q_T + (1 - beta) * q_S
    teacher = torch.where(q_T > 0, q_T * (q_T.clamp_min(1e-300) / m).log(), 0.0)
    return beta * teacher.sum() + (1 - beta) * (q_S * (q_S / m).log()).sum()


def forward_kl(q_S: Tensor, q_T: Tensor) -> Tensor:
    return torch.where(q_T > 0, q_T * (q_T.clamp_min(1e-300) / q_S).log(), 0.0).sum()


def naive(log_S: Tensor, log_T: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`[G]`: row by row and token by token."""
    values, at_S, at_T = [], 0, 0
    begun: list[
        tuple[Tensor, tuple[int, ...], Tensor]
    ] = []  # the teacher there, what was written since, its chance
    for (own, other), goes_on in zip(GROUPS, FOLLOWS, strict=True):
        p_T = log_T[at_T].exp()
        first = torch.zeros(V_S, dtype=torch.float64)
        for token, spelling in enumerate(SPELLED):
            if spelling:
                first[spelling[0]] += p_T[token]
        chain = sum(log_T[at_T + i, token] for i, token in enumerate(other)).exp()
        if SPELLED[other[0]]:
            first[SPELLED[other[0]][0]] -= chain
        first = first.clamp_min(0.0)
        first[own[0]] += chain
        begun = begun if goes_on else []
        longer = torch.zeros_like(first)
        for p_then, written, chance in begun:
            for token, spelling in enumerate(SPELLED):
                if len(spelling) > len(written) and spelling[: len(written)] == written:
                    longer[spelling[len(written)]] += p_then[token] / chance
        first = (first + longer) / (1.0 + longer.sum())
        begun = [(p, (*written, *own), chance * chain) for p, written, chance in [*begun, (p_T, (), 1.0)]]
        rows = [distance(log_S[at_S].exp(), first)]
        for position in range(1, len(own) if len(other) == 1 else 1):
            later = torch.zeros(V_S, dtype=torch.float64)
            for token, spelling in enumerate(SPELLED):
                if token == other[0]:
                    later[own[position]] += p_T[token]  # as the student cut it
                elif len(spelling) > position and spelling[:position] == own[:position]:
                    later[spelling[position]] += p_T[token]
            if later.sum() > 0:
                rows.append(distance(log_S[at_S + position].exp(), later / later.sum()))
        values.append(sum(rows) / len(rows))
        at_S, at_T = at_S + len(own), at_T + len(other)
    return torch.stack(values)


def column(sizes: list[int]) -> tuple[Tensor, Tensor]:
    num = torch.tensor(sizes)
    return num.cumsum(0) - num, num


@pytest.mark.parametrize("chunk_rows", [4, 256])
@pytest.mark.parametrize(
    ("divergence", "distance"),
    [(ForwardKL(), forward_kl), (JSD(0.2), partial(jsd, beta=0.2)), (JSD(0.5), partial(jsd, beta=0.5))],
)
def test_value_and_gradient_are_those_of_the_definition(divergence, distance, chunk_rows) -> None:
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = noise(NUM_S, D_S).requires_grad_(), noise(V_S + 1, D_S).requires_grad_()
    hidden_T, weight_T = noise(NUM_T, D_T), noise(len(SPELLED), D_T)
    sizes = [len(s) for s, _ in GROUPS], [len(t) for _, t in GROUPS]
    groups = Groups(*column(sizes[0]), *column(sizes[1]), torch.tensor(FOLLOWS))
    labels_S = torch.tensor([token for s, _ in GROUPS for token in s])
    labels_T = torch.tensor([token for _, t in GROUPS for token in t])
    weight_G = noise(len(GROUPS)).abs()
    loss, stats = bridge_loss(
        hidden,
        Head(weight, num_valid=V_S),
        Hidden(hidden_T, Head(weight_T)),
        groups,
        labels_S,
        labels_T,
        Pieces(PieceTable(TABLE, V_S), divergence),
        weight_G,
        temperature=1.5,
        chunk_rows=chunk_rows,
    )
    loss.backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    log_S = (hidden @ weight[:V_S].T / 1.5).log_softmax(-1)
    expected = naive(log_S, (hidden_T @ weight_T.T / 1.5).log_softmax(-1), distance)
    (weight_G * 1.5**2 * expected).sum().backward()
    assert torch.allclose(stats.value, expected.detach(), atol=1e-12)
    assert torch.allclose(found[0], hidden.grad, atol=1e-12)
    assert torch.allclose(found[1], weight.grad, atol=1e-12)


def test_a_student_that_has_the_teachers_distribution_has_nothing_to_learn() -> None:
    """Teacher tokens of two pieces: the student's two rows are marginal and conditional, whatever the beta."""
    joint = torch.tensor(
        [[0.1, 0.3], [0.2, 0.4]], dtype=torch.float64
    )  # of the first and second piece, 0 or 1
    table = PieceTable(torch.tensor([[a, b] for a in (0, 1) for b in (0, 1)]), 2)
    one = torch.ones(1, 1, dtype=torch.float64)
    for a in (0, 1):
        for b in (0, 1):
            rows = torch.stack([joint.sum(1), joint[a] / joint[a].sum()]).log()
            hidden = torch.eye(2, dtype=torch.float64).requires_grad_()
            _, stats = bridge_loss(
                hidden,
                Head(rows.T.contiguous()),
                Hidden(one, Head(joint.reshape(4, 1).log())),
                Groups(*column([2]), *column([1])),
                torch.tensor([a, b]),
                torch.tensor([2 * a + b]),
                Pieces(table, JSD(0.3)),
                torch.ones(1, dtype=torch.float64),
            )
            assert float(stats.value[0]) == pytest.approx(0.0, abs=1e-14)


def test_a_token_that_would_have_covered_the_boundary_is_not_forgotten() -> None:
    """The teacher writes "ab" as one token (0.6) or "a" (0.4), then ends; a student that does the same wrote "a"."""
    a, b, end = 0, 1, 2
    table = PieceTable(torch.tensor([[a, -1], [a, b], [end, -1]]), 3)
    teacher = torch.tensor([[0.4, 0.6, 1e-12], [1e-12, 1e-12, 1.0]], dtype=torch.float64).log()
    student = torch.tensor([[1.0, 1e-12, 1e-12], [1e-12, 0.6, 0.4]], dtype=torch.float64).log()
    values = {}
    for follows in (None, torch.tensor([False, True])):
        _, stats = bridge_loss(
            torch.eye(2, dtype=torch.float64).requires_grad_(),
            Head(student.T.contiguous()),
            Hidden(torch.eye(2, dtype=torch.float64), Head(teacher.T.contiguous())),
            Groups(*column([1, 1]), *column([1, 1]), follows),
            torch.tensor([a, end]),
            torch.tensor([0, 2]),
            Pieces(table, ForwardKL()),
            torch.ones(2, dtype=torch.float64),
        )
        values[follows is None] = stats.value.tolist()
    assert values[False] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert values[True] == pytest.approx([0.0, -math.log(0.4)], abs=1e-6)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 7]], "reach from 0 to 7"),
        ([[-1, 0]], "pieces must precede"),
        ([[-2, -1]], "reach from -2"),
    ],
)
def test_tables_that_do_not_fit_are_refused(ids: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PieceTable(torch.tensor(ids), 7)
