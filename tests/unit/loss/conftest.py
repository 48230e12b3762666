"""The reference of `tests/support/loss_reference.py` as one object."""

from types import SimpleNamespace

import loss_reference
import pytest


@pytest.fixture
def reference():
    return SimpleNamespace(
        loss=loss_reference.naive_loss,
        problem=loss_reference.make_problem,
        gradients=loss_reference.gradients,
        logprobs=loss_reference.logprobs,
        divergence=loss_reference.divergence,
        entropy=loss_reference.entropy,
        overlap=loss_reference.overlap,
    )
