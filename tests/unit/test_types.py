"""Records with arrays: conversion, comparison and validation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mergeopd.rollout.protocol import Completion, GenerationRequest
from mergeopd.teacher.protocol import TeacherSequence
from mergeopd.types import Prompt, Rollout

PROMPT = Prompt("s:0", "s", "d", ())
FLAGS = (True, False, True)


def rollout(**changes: Any) -> Rollout:
    given = {"logprobs_behaviour": (-1.0, -2.0, -3.0), "trained": FLAGS, **changes}
    return Rollout(PROMPT, 0, (1, 2), (3, 4, 5), "student", "eos", **given)


def test_sequences_become_arrays_that_cannot_be_changed() -> None:
    one = rollout()
    for array, dtype in (
        (one.prompt_ids, np.int32),
        (one.response_ids, np.int32),
        (one.logprobs_behaviour, np.float64),
        (one.trained, np.bool_),
    ):
        assert isinstance(array, np.ndarray)
        assert array.dtype == dtype
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert one.trained_ids.tolist() == [3, 5]
    assert (one.num_trained, one.num_tokens) == (2, 5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_are_not_copied_and_keep_their_precision(dtype: type) -> None:
    ids, logprobs = np.array([3, 4, 5], np.int32), np.array([-0.1, -0.2, -0.3], dtype)
    one = Completion(ids, logprobs, "eos")
    kept = Rollout(PROMPT, 0, one.response_ids, one.response_ids, "student", "eos", one.logprobs)
    again = replace(kept, policy_version=3)
    for array in (one.response_ids, kept.response_ids, again.response_ids):
        assert np.shares_memory(array, ids)
    for array in (one.logprobs, kept.logprobs_behaviour, again.logprobs_behaviour):
        assert np.shares_memory(array, logprobs)
        assert array.dtype == dtype
    assert ids.flags.writeable


@pytest.mark.parametrize(
    ("one", "changes"),
    [
        (rollout(), {"response_ids": (3, 4, 6)}),
        (rollout(), {"response_ids": (3, 4), "trained": None}),
        (rollout(), {"logprobs_behaviour": (-1.0, -2.0, -3.5)}),
        (rollout(), {"logprobs_behaviour": None}),
        (rollout(), {"trained": None}),
        (rollout(), {"sample": 1}),
        (Completion((1, 2), (-1.0, -2.0), "eos"), {"logprobs": (-1.0, -2.5)}),
        (Completion((1, 2), (-1.0, -2.0), "eos"), {"finish": "stop"}),
        (GenerationRequest("p", 0, (1, 2)), {"prompt_ids": (1,)}),
        (TeacherSequence((1,), (2, 3)), {"trained": (True, False)}),
    ],
)
def test_records_with_equal_fields_are_equal(one: Any, changes: dict[str, Any]) -> None:
    assert one == replace(one)
    other = replace(one, **changes)
    assert one != other
    assert other == replace(one, **changes)
    assert one != "another type"


def test_there_is_one_flag_per_token() -> None:
    with pytest.raises(ValueError, match="3 flags for 2 response tokens"):
        replace(rollout(), response_ids=(1, 2))
