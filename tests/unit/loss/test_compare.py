"""Comparison of two models: golden vectors, degenerate pairs, and heads against plain float64 softmaxes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from mergeopd.loss.compare import Comparison, compare, compare_teachers
from mergeopd.loss.heads import Head, Hidden

Z_S, Z_T = [2.0, 1.0, 0.0, -1.0, 0.5], [1.0, 1.5, -0.5, 0.0, -1.0]
HEAD = Head(torch.eye(5, dtype=torch.float64))


def of(*logits: list[float]) -> Hidden:
    return Hidden(torch.tensor(logits, dtype=torch.float64), HEAD)


def compared(first: list[float], second: list[float], k: int) -> dict[str, float]:
    result = compare(of(first), of(second), torch.tensor([0]), k=k)
    return {f.name: getattr(result, f.name)[0].item() for f in fields(Comparison)[:10]}


def test_golden_vectors() -> None:
    """Appendix A of the methods, to its six digits."""
    found = compared(Z_S, Z_T, k=3)
    assert found["overlap"] == pytest.approx(0.666667, abs=1e-6)
    assert found["advantage"] == pytest.approx(-0.128702, abs=1e-6)
    assert abs(found["entropy_S"] - found["entropy_T"]) == pytest.approx(0.054039, abs=1e-6)
    assert found["reverse_kl"] == pytest.approx(0.299944, abs=1e-6)
    assert found["forward_kl"] == pytest.approx(0.321778, abs=1e-6)
    assert found["logprob_T"] - found["logprob_S"] == pytest.approx(-0.641977, abs=1e-6)
    assert found["mass_S"] == pytest.approx(0.563021 + 0.207124, abs=1e-6)
    assert found["mass_T"] == pytest.approx(0.296290 + 0.488500, abs=2e-6)


def test_two_teachers_of_the_golden_vectors() -> None:
    weights = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    second = [0.0, 0.0, 2.0, 0.0, 0.0]
    found = compare_teachers(of(Z_S), of(Z_T), of(second), torch.tensor([0]), weights)
    assert found.floor.item() == pytest.approx(0.246317, abs=1e-6)
    gradients = []
    for teacher in (Z_T, second):
        logits = torch.tensor(Z_S, dtype=torch.float64, requires_grad=True)
        log_p, log_q = logits.log_softmax(0), torch.tensor(teacher, dtype=torch.float64).log_softmax(0)
        (log_p.exp() * (log_p - log_q)).sum().backward()
        gradients.append(logits.grad)
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    assert found.cosine.item() == pytest.approx(cosine.item(), abs=1e-12)


def test_one_teacher_twice_agrees_with_itself_and_has_no_floor() -> None:
    weights = torch.ones(1), torch.ones(1)
    found = compare_teachers(of(Z_S), of(Z_T), of(Z_T), torch.tensor([0]), weights)
    assert found.cosine.item() == pytest.approx(1.0)
    assert found.floor.item() == pytest.approx(0.0, abs=1e-12)
    same = compare_teachers(of(Z_S), of(Z_S), of(Z_T), torch.tensor([0]), weights)
    assert same.cosine.isnan().all()  # the student has nothing to learn from itself


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identical_models(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 3 * torch.randn(40, 8, generator=generator, dtype=dtype)
    model = Hidden(hidden, Head(torch.randn(30, 8, generator=generator, dtype=dtype)))
    found = compare(model, model, torch.zeros(40, dtype=torch.long))
    for name in ("reverse_kl", "forward_kl", "advantage"):
        assert getattr(found, name).eq(0.0).all(), name
    assert found.overlap.eq(1.0).all()
    assert torch.equal(found.entropy_S, found.entropy_T)


def test_disjoint_models_have_no_overlap_and_no_advantage() -> None:
    found = compared([9.0, 8.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 8.0, 9.0], k=2)
    assert found["overlap"] == found["mass_S"] == found["mass_T"] == 0.0
    assert found["advantage"] != found["advantage"]


@pytest.mark.parametrize("k", [5, 16])
def test_a_k_of_the_whole_vocabulary_overlaps_fully(k: int) -> None:
    found = compared(Z_S, Z_T, k=k)
    assert found["overlap"] == 1.0
    assert found["mass_S"] == pytest.approx(1.0)
    assert found["advantage"] == pytest.approx(-0.299944 / 5, abs=1e-6)  # minus the reverse KL, over 5 tokens


@pytest.mark.parametrize("chunk_rows", [1, 7, 512, None])
def test_heads_with_bias_scale_cap_and_padding_against_float64(chunk_rows: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    num, valid, k = 300, 40, 4
    head_S = Head(
        torch.randn(42, 6, generator=generator), torch.randn(42, generator=generator), 0.5, 4.0, valid
    )
    head_T = Head(torch.randn(48, 9, generator=generator), scale=1.5, num_valid=valid)
    student = Hidden(torch.randn(num, 6, generator=generator), head_S)
    teacher = Hidden(torch.randn(num, 9, generator=generator), head_T)
    labels = torch.randint(valid, (num,), generator=generator)
    found = compare(student, teacher, labels, k=k, num_candidates=3, chunk_rows=chunk_rows)

    raw = 0.5 * (student.hidden.double() @ head_S.weight[:valid].double().T + head_S.bias[:valid].double())
    log_p = (4.0 * torch.tanh(raw / 4.0)).log_softmax(1)
    log_q = (1.5 * teacher.hidden.double() @ head_T.weight[:valid].double().T).log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    expected = {
        "reverse_kl": (p * (log_p - log_q)).sum(1),
        "forward_kl": (q * (log_q - log_p)).sum(1),
        "entropy_S": -(p * log_p).sum(1),
        "entropy_T": -(q * log_q).sum(1),
        "logprob_S": log_p[torch.arange(num), labels],
        "logprob_T": log_q[torch.arange(num), labels],
    }
    rows = []
    for row in range(num):
        common = sorted(set(p[row].topk(k).indices.tolist()) & set(q[row].topk(k).indices.tolist()))
        a, b = p[row, common], q[row, common]
        each = a / a.sum() * ((b / b.sum()).log() - (a / a.sum()).log())
        rows.append((len(common) / k, each.mean().item(), a.sum().item(), b.sum().item()))
    for name, column in zip(
        ("overlap", "advantage", "mass_S", "mass_T"), zip(*rows, strict=True), strict=True
    ):
        expected[name] = torch.tensor(column, dtype=torch.float64)
    assert expected["advantage"].isnan().any()  # both cases occur
    for name, values in expected.items():
        got = getattr(found, name).double()
        torch.testing.assert_close(got, values, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    assert torch.equal(found.ids_T, log_q.topk(3).indices)
    torch.testing.assert_close(found.logprobs_S.double(), log_p.topk(3).values, rtol=1e-4, atol=1e-5)


def test_no_tokens_and_inputs_that_do_not_fit() -> None:
    none = compare(
        Hidden(torch.empty(0, 5, dtype=torch.float64), HEAD),
        Hidden(torch.empty(0, 5, dtype=torch.float64), HEAD),
        torch.empty(0, dtype=torch.long),
    )
    assert none.reverse_kl.shape == (0,)
    with pytest.raises(ValueError, match="scores token ids"):
        compare(of(Z_S), Hidden(torch.ones(1, 5), replace(HEAD, num_valid=4)), torch.tensor([0]))
    with pytest.raises(ArithmeticError, match="not finite"):
        compare(of(Z_S), of([float("nan")] * 5), torch.tensor([0]))
