"""The estimator of gradient alignment on a task whose responses can all be enumerated.

Responses have at most four tokens over a vocabulary of five; one is correct if its ids and those of the prompt
add up to a multiple of three. The probabilities of success, the ideal gradients and their cosines are exact.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mergeopd.inspection.alignment import (
    Successes,
    Totals,
    alignment,
    difference,
    divide,
    draw_nodes,
    expected_length,
    ideal_gradient,
    mean_and_variance,
)

V, EOS, LONGEST = 5, 4, 4
NUM_PROMPTS, NUM_NODES, NUM_CONTINUATIONS = 24, 64, 2
PREFIXES = [prefix for size in range(LONGEST) for prefix in itertools.product(range(EOS), repeat=size)]
INDEX = {prefix: i for i, prefix in enumerate(PREFIXES)}


def reverse_kl_descent(log_S, log_T):
    f = log_T - log_S
    return np.exp(log_S) * (f - (np.exp(log_S) * f).sum(-1, keepdims=True))


class Task:
    """Every prefix of every prompt: log-probabilities `[prompts, prefixes, V]` and what follows from them."""

    def __init__(self, make_model):
        self.prompts = list(itertools.product(range(V), repeat=3))[::3]
        folders = [make_model(f"task{seed}", seed=seed, vocab=V, eos=EOS, spread=0.6) for seed in (1, 2)]
        self.log_S, self.log_T = (self._logprobs(folder) for folder in folders)
        self.probability = np.exp(self.log_S)
        self.success = np.zeros_like(self.probability)
        self.reach = np.zeros(self.probability.shape[:2])  # probability that a response passes the prefix
        self.reach[:, 0] = 1.0
        for prefix in reversed(PREFIXES):
            for token in range(V):
                response = (*prefix, token)
                self.success[:, INDEX[prefix], token] = (
                    [(sum(response) + sum(prompt)) % 3 == 0 for prompt in self.prompts]
                    if token == EOS or len(response) == LONGEST
                    else (self.probability * self.success).sum(-1)[:, INDEX[response]]
                )
        for prefix in PREFIXES[1:]:
            before = INDEX[prefix[:-1]]
            self.reach[:, INDEX[prefix]] = self.reach[:, before] * self.probability[:, before, prefix[-1]]
        self.ideal = ideal_gradient(self.probability, self.success)
        self.descent = reverse_kl_descent(self.log_S, self.log_T)
        self.is_fixed = np.array([[t == EOS or len(p) == LONGEST - 1 for t in range(V)] for p in PREFIXES])

    def _logprobs(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        longest = [prefix for prefix in PREFIXES if len(prefix) == LONGEST - 1]
        ids = torch.tensor([[*prompt, *prefix] for prompt in self.prompts for prefix in longest])
        with torch.no_grad():
            rows = model(ids).logits[:, -LONGEST:].log_softmax(-1).numpy()
        rows = rows.reshape(len(self.prompts), len(longest), LONGEST, V)
        logprobs = np.zeros((len(self.prompts), len(PREFIXES), V))
        for i, prefix in enumerate(longest):
            for size in range(LONGEST):
                logprobs[:, INDEX[prefix[:size]]] = rows[:, i, size]
        return logprobs

    def cosine(self, descent):
        def total(product):
            return (self.reach * product.sum(-1)).sum()

        return total(self.ideal * descent) / math.sqrt(total(self.ideal**2) * total(descent**2))

    def visited(self, prompt, random):
        """The prefixes of one sampled response."""
        prefix, nodes = (), []
        while len(prefix) < LONGEST and EOS not in prefix:
            nodes.append(INDEX[prefix])
            prefix = (*prefix, int(random.choice(V, p=self.probability[prompt, nodes[-1]])))
        return nodes

    def inspect(self, descents, random):
        """Totals for each descent direction, from one simulated inspection."""
        prompts = random.integers(len(self.prompts), size=NUM_PROMPTS)
        nodes = [(i, p, u) for i, p in enumerate(prompts) for _ in range(2) for u in self.visited(p, random)]
        group, p, u = np.array(nodes).T
        sizes = [expected_length(self.probability[p, u])]
        sizes += [np.linalg.norm(descent[p, u], axis=1) for descent in descents]
        drawn, weight = draw_nodes(sizes, np.zeros(len(p), int), NUM_NODES, random)
        means = np.zeros((2, len(drawn), V))
        for i, node in enumerate(drawn):
            counts = divide(self.probability[p[node], u[node]], self.is_fixed[u[node]], V * NUM_CONTINUATIONS)
            for token, num in enumerate(counts):
                rewards = random.random(num) < self.success[p[node], u[node], token]
                means[:, i, token] = mean_and_variance(rewards)
        successes = Successes(self.probability[p[drawn], u[drawn]], *means)

        def by_prompt(values, members):
            return np.bincount(group[members], values, NUM_PROMPTS)

        everything = np.arange(len(p))
        return [
            Totals(
                by_prompt(weight * successes.inner(descent[p[drawn], u[drawn]]), drawn),
                by_prompt(weight * successes.squared_length, drawn),
                by_prompt((descent[p, u] ** 2).sum(-1), everything),
                np.bincount(group[drawn], minlength=NUM_PROMPTS),
            )
            for descent in descents
        ]


@pytest.fixture(scope="module")
def task(make_model):
    return Task(make_model)


def exact(task, descent):
    """The totals without noise: every node once, weighted by its probability."""
    reach = task.reach

    def total(product):
        return (reach * product.sum(-1)).sum(1)

    zero = np.zeros_like(task.success)
    successes = Successes(task.probability, task.success, zero)
    inner, ideal = reach * successes.inner(descent), reach * successes.squared_length
    return Totals(inner.sum(1), ideal.sum(1), total(descent**2), np.full(len(inner), len(PREFIXES)))


def test_a_teacher_that_prefers_what_succeeds_is_aligned(task):
    teacher = task.log_S + 2.5 * task.success
    teacher -= np.log(np.exp(teacher).sum(-1, keepdims=True))
    assert alignment(exact(task, reverse_kl_descent(task.log_S, teacher))).value == pytest.approx(
        1.0, abs=1e-12
    )
    against = alignment(exact(task, reverse_kl_descent(task.log_S, 2 * task.log_S - teacher)))
    assert against.value == pytest.approx(-1.0, abs=1e-12)


def test_the_ideal_gradient_is_that_of_the_success_probability():
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    success = torch.linspace(0, 1, 7, dtype=torch.float64) ** 2
    [expected] = torch.autograd.grad((logits.softmax(0) * success).sum(), logits)
    actual = ideal_gradient(logits.softmax(0).detach().numpy(), success.numpy())
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-15)
    assert abs(actual.sum()) < 1e-15
    shifted = ideal_gradient(logits.softmax(0).detach().numpy(), success.numpy() + 3.0)
    np.testing.assert_allclose(shifted, actual, rtol=0, atol=1e-14)


def test_without_an_ideal_gradient_there_is_no_alignment(task):
    constant = Successes(task.probability, np.full_like(task.success, 0.25), np.zeros_like(task.success))
    assert np.abs(constant.inner(task.descent)).max() < 1e-15
    nothing = np.zeros(len(task.prompts))
    totals = Totals(nothing, nothing, (task.descent**2).sum((1, 2)), np.ones(len(nothing), int))
    assert alignment(totals).value is None


def test_means_and_intervals_over_repetitions(task):
    """Estimates are unbiased, and 95 % of the intervals contain the exact cosine, within binomial error."""
    noise = np.random.default_rng(5).normal(size=task.success.shape)
    descents = [
        task.descent,
        reverse_kl_descent(task.log_S, task.log_S + 1.5 * task.success + 0.3 * noise),
    ]
    truths = [task.cosine(descent) for descent in descents]
    assert abs(truths[0]) < 0.5 < truths[1] < 0.95
    random, repetitions = np.random.default_rng(11), 200
    covered, sums, differences = np.zeros(2), [], 0
    for _ in range(repetitions):
        totals = task.inspect(descents, random)
        for k, (own, truth) in enumerate(zip(totals, truths, strict=True)):
            estimate = alignment(own)
            assert estimate.low is not None
            assert estimate.high is not None
            covered[k] += estimate.low <= truth <= estimate.high
        sums.append([[t.inner.mean(), t.ideal.mean(), t.descent.mean(), t.cosine] for t in totals])
        between = difference(*totals)
        differences += between.low <= truths[0] - truths[1] <= between.high
    # Two responses to each prompt.
    expected = [
        [2 * t.inner.mean(), 2 * t.ideal.mean(), 2 * t.descent.mean()]
        for t in (exact(task, descent) for descent in descents)
    ]
    mean, error = np.mean(sums, axis=0), np.std(sums, axis=0, ddof=1) / math.sqrt(repetitions)
    assert (np.abs(mean[:, :3] - expected) < 4 * error[:, :3]).all()
    assert (np.abs(mean[:, 3] - truths) < 0.03).all()
    # At least 181 of 200 with a probability of 99.8 %, if 95 % are covered.
    assert covered.min() >= 181
    assert differences >= 181


def test_intervals_without_information(task):
    """No bounds from one prompt; all values where noise may be all of the ideal gradient."""
    one = Totals(*(np.array([x, 0.0]) for x in (0.1, 0.2, 0.3)), np.array([5, 0]))
    assert alignment(one).value is not None
    assert alignment(one).low is None
    weak = Totals(np.array([0.1, 0.1]), np.array([1.0, -0.9]), np.array([1.0, 1.0]), np.array([3, 3]))
    assert (alignment(weak).low, alignment(weak).high) == (-1.0, 1.0)


def test_continuations_are_divided_for_the_least_error():
    probability = np.array([0.6, 0.3, 0.1])
    matrix = np.diag(probability) - np.outer(probability, probability)
    error = {
        counts: sum((matrix[:, j] ** 2).sum() / n for j, n in enumerate(counts))
        for counts in itertools.product(range(2, 40), repeat=3)
        if sum(counts) == 40
    }
    best = min(error, key=error.get)
    assert np.abs(divide(probability, np.zeros(3, bool), 40) - best).max() <= 1
    assert divide(probability, np.array([True, False, False]), 40)[0] == 1
    assert divide(np.array([0.5, 0.5]), np.zeros(2, bool), 1).tolist() == [2, 2]


def test_drawn_nodes_stand_for_all():
    """Weighted sums over drawn nodes are unbiased for any sizes, within every stratum."""
    random = np.random.default_rng(3)
    sizes, values = random.exponential(size=50) ** 3, random.normal(size=50) + 1.0
    strata = np.repeat([0, 1], [40, 10])
    sums = []
    for _ in range(2000):
        drawn, weight = draw_nodes([sizes], strata, 12, random)
        assert np.bincount(strata[drawn]).tolist() == [12, 10]
        sums.append(np.bincount(strata[drawn], weight * values[drawn]))
    error = np.std(sums, axis=0) / math.sqrt(len(sums))
    assert (np.abs(np.mean(sums, axis=0) - np.bincount(strata, values)) < 4 * error).all()
