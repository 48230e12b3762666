"""Facts of reward models: sequence classifiers with one label, whose head is `score`."""

from __future__ import annotations

from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.facts import ModelFacts, read_config

SCORE = "score.weight"
_SUFFIX = "ForSequenceClassification"


def score_tensor(facts: ModelFacts, checkpoint: Checkpoint) -> str:
    """Return the name of a reward model's head `[1, hidden_size]`; reads config.json and headers only.

    Raises ModelError for a model that is no sequence classifier, or has more labels than one.
    """
    path, config = facts.folder / "config.json", read_config(facts.folder)
    architectures = config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if not str(architecture).endswith(_SUFFIX):
        raise ModelError(
            f"{path}: not a reward model: the architecture is {architecture or 'not named'}; "
            f"name the folder of a sequence classifier (*{_SUFFIX}) with one label"
        )
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if num_labels != 1:
        raise ModelError(
            f"{path}: not a reward model: it has {num_labels} labels (id2label), and a reward model has one"
        )
    if SCORE not in checkpoint.tensors:
        raise ModelError(
            f"{facts.folder}: the checkpoint has no tensor {SCORE!r}, the head of a reward model; "
            "fetch the files again"
        )
    shape, expected = checkpoint.tensors[SCORE].shape, (1, facts.hidden_size)
    if shape != expected:
        raise ModelError(
            f"{facts.folder}: {SCORE!r} has shape {list(shape)}, config.json says {list(expected)}; "
            "config.json and the weights are not of one checkpoint"
        )
    return SCORE
