"""Reward models: sequence classifiers that score responses, one after the other in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergeopd.batch.packing import length_batches
from mergeopd.data.renderer import Renderer
from mergeopd.data.scored_text import scored_ids
from mergeopd.errors import DataError, ModelError
from mergeopd.models.causal import DTYPES, empty, padded
from mergeopd.recipe.verifiers import RewardModelVerifier
from mergeopd.reward.grading import OnProgress, Submission
from mergeopd.reward.pool import Grade
from mergeopd.types import TokenIds

_log = logging.getLogger(__name__)
_Key = tuple[Path, str, int]


@dataclass(frozen=True, slots=True)
class RewardModel:
    """The reward model of one source: its folder, its renderer and the verifier's settings."""

    folder: Path
    renderer: Renderer
    settings: RewardModelVerifier


@dataclass(frozen=True)
class RewardModels:
    """The reward models of a recipe, by the name of the source. Each is in memory while it scores only."""

    by_source: Mapping[str, RewardModel]
    device: torch.device

    def grade(self, submissions: Sequence[Submission], on_progress: OnProgress) -> list[Grade]:
        """Return the grade of each response, whose source must have a reward model.

        A conversation that the model's template or context does not hold has no reward, and neither has one
        whose score is not finite. Raises ModelError for a model that cannot be loaded.
        """
        grades: dict[int, Grade] = {}
        sequences: dict[_Key, dict[int, TokenIds]] = {}
        for index, one in enumerate(submissions):
            model = self.by_source[one.source]
            try:
                ids = scored_ids(model.renderer, one.messages, one.tools)
            except DataError as error:
                grades[index] = Grade(None, str(error))
                continue
            key: _Key = (model.folder, model.settings.dtype, model.settings.max_tokens)
            sequences.setdefault(key, {})[index] = ids
        for key, own in sequences.items():
            on_progress(len(grades))
            scores = _scores(*key, list(own.values()), self.device, lambda n: on_progress(len(grades) + n))
            for index, score in zip(own, scores, strict=True):
                scale = self.by_source[submissions[index].source].settings.scale
                grades[index] = _grade(score, scale)
        return [grades[index] for index in range(len(submissions))]


def _grade(score: float, scale: float) -> Grade:
    if not math.isfinite(score):
        return Grade(None, f"the score of the reward model is {score}")
    # tanh, since exp overflows.
    return Grade(0.5 + 0.5 * math.tanh(0.5 * score / scale))


@torch.no_grad()
def _scores(
    folder: Path,
    dtype: str,
    max_tokens: int,
    sequences: Sequence[TokenIds],
    device: torch.device,
    on_progress: Callable[[int], None],
) -> list[float]:
    """Load a reward model, score token sequences in batches of at most `max_tokens`, and release it."""
    model = _load(folder, dtype, device)
    scores: dict[int, float] = {}
    try:
        pad_id = model.config.pad_token_id
        for batch in length_batches([len(ids) for ids in sequences], max_tokens):
            own = [sequences[i] for i in batch]
            # Padded on the right, which causal attention never reads.
            ids, _ = padded([ids[:0] for ids in own], own, [np.zeros(len(ids), np.bool_) for ids in own])
            hidden = model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
            last = torch.tensor([_last(ids, pad_id) for ids in own], device=device)
            rows = hidden[torch.arange(len(own), device=device), last]
            scores |= zip(batch, model.score(rows)[:, 0].double().tolist(), strict=True)
            on_progress(len(scores))
    finally:
        empty(model)
    return [scores[i] for i in range(len(sequences))]


def _last(ids: TokenIds, pad_id: int | None) -> int:
    """Return the position that is scored: the last that is not padding, even if the text ends with it.

    This is the position that sequence classifiers of transformers are trained at.
    """
    places = np.flatnonzero(ids != (-1 if pad_id is None else pad_id))
    return int(places[-1]) if len(places) else 0


def _load(folder: Path, dtype: str, device: torch.device) -> Any:
    from transformers import AutoModelForSequenceClassification

    _log.debug("loading the reward model %s", folder)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            device_map={"": device},
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{folder}: transformers cannot load this reward model: {reason}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ModelError(f"{folder}: the reward model's weights lack {missing}; fetch the files again")
    return model.eval()
