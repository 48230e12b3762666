"""The overlap of likely tokens: golden vectors, brute force over sets, ends, and no effect on the loss."""

import pytest
import torch

from mergeopd.loss import (
    ForwardKL,
    Head,
    Hidden,
    ReverseKL,
    Sampled,
    Support,
    fused_loss,
    observe,
)

KL = (ReverseKL(),)
# Appendix A of the methods.
Z_S = [2.0, 1.0, 0.0, -1.0, 0.5]
Z_T = [1.0, 1.5, -0.5, 0.0, -1.0]


def measure(logits_S, targets, k, *, rows=None, divergences=KL, **options):
    """The statistics of logits `[N, V]`; `targets` are targets, or logits."""
    eye = torch.eye(logits_S.shape[1], dtype=logits_S.dtype)
    rows = torch.arange(len(logits_S)) if rows is None else rows
    made = [Hidden(t, Head(eye)) if isinstance(t, torch.Tensor) else t for t in targets]
    labels = torch.zeros(len(logits_S), dtype=torch.int64)
    _, stats = fused_loss(
        logits_S,
        Head(eye),
        made,
        labels,
        lambda stats, rows: stats.logprob_S,
        divergences=divergences,
        overlap_rows=rows,
        overlap_k=k,
        **options,
    )
    return stats


def numbers(overlap, teacher=0):
    own = (overlap.ratio, overlap.advantage, overlap.mass_S, overlap.mass_T)
    return torch.stack([part[teacher] for part in own], 1)


def test_golden_vectors():
    z_S, z_T = (torch.tensor([z], dtype=torch.float64) for z in (Z_S, Z_T))
    stats = measure(z_S, [z_T], 3)
    assert stats.overlap.ratio.item() == pytest.approx(2 / 3)
    assert stats.overlap.advantage.item() == pytest.approx(-0.128702, abs=1e-6)
    # The student's top 2 and the teacher's, with their masses in the appendix.
    assert stats.overlap.mass_S.item() == pytest.approx(0.770145, abs=1e-6)
    assert stats.overlap.mass_T.item() == pytest.approx(0.784791, abs=1e-6)
    assert (stats.entropy_T[0] - stats.entropy_S).abs().item() == pytest.approx(0.054039, abs=1e-6)


@pytest.mark.parametrize("k", [1, 5, 16, 400])
@pytest.mark.parametrize("support", [None, Support(3, "union", "tail")])
def test_equals_sets_by_hand_on_the_chosen_tokens(reference, k, support, monkeypatch):
    """Two teachers, a temperature, and chunks that end between and within the rows of a buffer."""
    monkeypatch.setattr("mergeopd.loss.overlap.rows_in_cache", lambda *_: 3)
    generator = torch.Generator().manual_seed(3)
    z_S, *z_T = torch.randn(3, 23, 150, generator=generator, dtype=torch.float64) * 3
    rows = torch.tensor([0, 2, 3, 4, 5, 6, 7, 13, 22])
    stats = measure(z_S, z_T, k, rows=rows, support=support, temperature=1.5, chunk_rows=6)
    for teacher, logits in enumerate(z_T):
        wanted = [reference.overlap(z_S[i], logits[i], min(k, 150), 1.5) for i in rows.tolist()]
        torch.testing.assert_close(
            numbers(stats.overlap, teacher), torch.tensor(wanted).double(), equal_nan=True
        )


def test_identical_and_disjoint_models():
    generator = torch.Generator().manual_seed(4)
    z_S = torch.randn(5, 40, generator=generator)
    same = measure(z_S, [z_S.clone()], 16)
    ones = torch.ones(1, 5)
    assert torch.equal(same.overlap.ratio, ones)
    torch.testing.assert_close(same.overlap.advantage, 0 * ones, rtol=0, atol=1e-7)
    assert torch.equal(same.entropy_T[0], same.entropy_S)
    low, high = torch.full((5, 20), -50.0), torch.randn(5, 20, generator=generator)
    other = measure(torch.cat([low, high], 1), [torch.cat([high, low], 1)], 16).overlap
    assert not torch.stack([other.ratio, other.mass_S, other.mass_T]).any()
    assert other.advantage.isnan().all()


def test_targets_with_the_teachers_likeliest_tokens_give_the_same_numbers():
    """Others give none: the student's top k say nothing about the teacher's."""
    generator = torch.Generator().manual_seed(5)
    z_S, z_T = torch.randn(2, 6, 60, generator=generator, dtype=torch.float64) * 2
    labels, head = torch.zeros(6, dtype=torch.int64), Head(torch.eye(60, dtype=torch.float64))
    exact = measure(z_S, [z_T], 16).overlap
    for top_k in (16, 30):
        known = observe(z_T, head, labels, top_k=top_k)
        found = measure(
            z_S, [known], 16, divergences=[ForwardKL()], support=Support(top_k, "teacher", "tail")
        )
        torch.testing.assert_close(numbers(found.overlap), numbers(exact), equal_nan=True)
    few, sampled = observe(z_T, head, labels, top_k=15), observe(z_T, head, labels)
    assert isinstance(sampled, Sampled)
    unknown = measure(z_S, [few, sampled, z_T], 16, divergences=())
    assert numbers(unknown.overlap, 0).isnan().all()
    assert numbers(unknown.overlap, 1).isnan().all()
    torch.testing.assert_close(numbers(unknown.overlap, 2), numbers(exact), equal_nan=True)


@pytest.mark.parametrize("support", [None, Support(4, "student", "tail")])
def test_loss_and_gradients_are_the_same_bit_by_bit(reference, support):
    problem = reference.problem(d_T=(7, 4), bias=True, softcap=6.0, dtype=torch.float32)

    def run(**options):
        loss, stats = fused_loss(
            problem.hidden,
            problem.head,
            problem.targets,
            problem.labels,
            lambda stats, rows: stats.divergence.sum((0, 1)) * problem.weights[rows],
            divergences=[ReverseKL(), ForwardKL()],
            support=support,
            chunk_rows=3,
            **options,
        )
        return loss.detach(), *reference.gradients(loss, problem), stats.divergence, stats.logprob_T

    with_overlap = run(overlap_rows=torch.arange(len(problem.labels)))
    assert all(map(torch.equal, run(), with_overlap))
