"""Settings of experiment trackers, which get the numbers of a run beside metrics.jsonl."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator

from mergeopd.config.values import Flag, Name, NonEmptyText, Strict, kind_shorthand

_PROJECT = "mergeopd"
_Tag = Annotated[str, Field(min_length=1, max_length=64)]


class Wandb(Strict):
    """Weights & Biases. Requires `pip install 'mergeopd[wandb]'`, and `wandb login` or WANDB_API_KEY unless
    `offline`.
    """

    kind: Literal["wandb"] = Field(description="kind of tracker")
    project: Name = Field(default=_PROJECT, description="project of the run")
    entity: NonEmptyText | None = None
    """user or team that owns the project; default: that of the account"""
    group: NonEmptyText | None = Field(default=None, description="group of runs that belong together")
    tags: tuple[_Tag, ...] = Field(default=(), description="tags of the run")
    offline: Flag = False
    """write to `wandb/` in the run folder only, as with WANDB_MODE=offline; `wandb sync` uploads it"""


class Mlflow(Strict):
    """MLflow. Requires `pip install 'mergeopd[mlflow]'`."""

    kind: Literal["mlflow"] = Field(description="kind of tracker")
    experiment: NonEmptyText = Field(default=_PROJECT, description="experiment of the run")
    url: NonEmptyText | None = None
    """tracking server or database, such as `http://host:5000` or `sqlite:///mlflow.db`; default:
    MLFLOW_TRACKING_URI, else `mlflow.db` in the current folder"""
    tags: dict[Name, str] | None = Field(default=None, description="tags of the run, by key")

    @field_validator("url")
    @classmethod
    def _without_password(cls, url: str | None) -> str | None:
        if url is not None and urlsplit(url).password is not None:
            raise ValueError(
                "a password does not belong in a recipe: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or the whole MLFLOW_TRACKING_URI"
            )
        return url


class Trackio(Strict):
    """Trackio: a local database under TRACKIO_DIR, default `~/.cache/huggingface/trackio`; a Space if
    TRACKIO_SPACE_ID is set. Requires `pip install 'mergeopd[trackio]'`.
    """

    kind: Literal["trackio"] = Field(description="kind of tracker")
    project: Name = Field(default=_PROJECT, description="project of the run")
    group: NonEmptyText | None = Field(default=None, description="group of runs that belong together")


class TensorBoard(Strict):
    """TensorBoard: event files in `tensorboard/` of the run folder. Requires
    `pip install 'mergeopd[tensorboard]'`.
    """

    kind: Literal["tensorboard"] = Field(description="kind of tracker")


Tracker = Annotated[Wandb | Mlflow | Trackio | TensorBoard, Field(discriminator="kind")]
TrackerOrKind = Annotated[
    Tracker,
    BeforeValidator(
        kind_shorthand,
        json_schema_input_type=Literal["wandb", "mlflow", "trackio", "tensorboard"] | Tracker,
    ),
]
