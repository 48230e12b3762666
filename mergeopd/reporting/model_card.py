"""Write the model card of an export, README.md, from the run folder, and the recipe beside it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from ruamel.yaml import YAML

from mergeopd import __version__
from mergeopd.messages import joined, shown
from mergeopd.recipe.controls import CONTROLS
from mergeopd.recipe.loss_terms import TERMS
from mergeopd.reporting.events import Note, Reporter
from mergeopd.reporting.page.run_data import RunData, load_run
from mergeopd.reporting.result import Estimate, Result
from mergeopd.storage import run_layout
from mergeopd.storage.folders import MODEL_CARD, write_atomic

RECIPE = "mergeopd_recipe.yaml"
_HUB_CACHE = re.compile(r"models--(?P<owner>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)/?$")
_PATH_KEYS = {"model", "card", "tokenizer", "source", "template", "schema_file"}
# Identifiers of the Hugging Face hub; it knows others as `other` with a name.
_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "mpl-2.0", "unlicense", "odc-by"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail"),
    *("gpl-3.0", "lgpl-3.0", "agpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma"),
}


@dataclass(frozen=True, slots=True)
class CardModel:
    """A model that a run used. `title` is its hub id, or the name of its folder without private parents."""

    title: str
    hub_id: str | None
    revision: str | None
    fingerprint: str | None
    licence: str | None

    @classmethod
    def of(cls, folder: str, fingerprint: str | None, licence: str | None) -> CardModel:
        """Describe the model in a folder; without `licence`, it is that of the folder's own model card."""
        hub = _HUB_CACHE.search(Path(folder).as_posix())
        hub_id = f"{hub['owner']}/{hub['name']}" if hub else None
        title = hub_id or Path(folder).name
        revision = hub["revision"] if hub else None
        return cls(title, hub_id, revision, fingerprint, licence or folder_licence(Path(folder)))


def write_model_card(run: Path, export: Path, notes: Reporter) -> None:
    """Write the card of a run's student into `export`. A failure becomes a note and does not end the run."""
    try:
        write_atomic(export / MODEL_CARD, model_card(load_run(run)))
    except Exception as error:  # noqa: BLE001 - a card must not end the run
        notes.emit(Note(f"{MODEL_CARD} was not written: {error or type(error).__name__}"))


def model_card(data: RunData) -> str:
    """Return the card: metadata for the Hugging Face hub, then what was made of what, and what it reached."""
    document, plan = data.document, data.plan
    if document is None:
        raise ValueError(f"{run_layout.PLAN} is missing or damaged")
    digests, licences = document["files"], document.get("licences", {})
    student = CardModel.of(plan["student"]["model"], digests.get(plan["student"]["model"]), None)
    teachers = {
        name: CardModel(teacher["api"]["model"], None, None, None, licences.get(name))
        if teacher.get("api")
        else CardModel.of(teacher["model"], digests.get(teacher["model"]), licences.get(name))
        for name, teacher in plan["teachers"].items()
        if teacher["student"] is None
    }
    models = (student, *teachers.values())
    licence = common_licence([model.licence for model in models])
    metadata = _metadata(data, student, licence)
    text: str = _template().render(
        name=plan["name"],
        data=data,
        document=document,
        plan=plan,
        result=data.result,
        control=_control(data.folder),
        student=student,
        teachers=teachers,
        selves=[name for name, teacher in plan["teachers"].items() if teacher["student"] is not None],
        domains={name: _domains(plan, name) for name in plan["teachers"]},
        licence=licence,
        phases=[_phase(phase) for phase in plan["phases"]],
        is_on_policy=_is_on_policy(plan),
        decoding=_decoding(plan["evaluation"]["suites"]) if data.result else [],
        rows=list(_rows(data.result)) if data.result else [],
        kinds=[kind.replace("_", " ") for kind in data.result.kinds] if data.result else [],
        titles={model.key: model.title for model in data.result.models} if data.result else {},
        has_template=_has_template(data),
        folder=_shown_export(data.folder),
        recipe=RECIPE,
    )
    return f"---\n{metadata}\n---\n\n{text}"


def _control(folder: Path) -> str | None:
    """Return the title of the control that a run folder belongs to, if any."""
    names = {folder.name} if folder.parent.name == run_layout.CONTROLS else set()
    return next((title for control, title in CONTROLS.items() if control in names), None)


def common_licence(licences: list[str | None]) -> str | None:
    """Return the licence that all inputs have; None where one is unknown, or they differ."""
    names = {None if licence is None else licence.strip().lower().replace(" ", "-") for licence in licences}
    return names.pop() if len(names) == 1 else None


def write_recipe(folder: Path, document: Mapping[str, Any], plan_hash: str) -> None:
    """Write the recipe as run into an export: without private folders, equal wherever it ran."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 120
    content = {key: value for key, value in document.items() if key not in ("text_cache", "memory")}
    yaml.dump({**_public(content), "output": f"runs/{document['name']}"}, text)
    head = (
        f"# The recipe of this model, with what it extends and overrides; mergeopd {__version__}, plan "
        f"{plan_hash[:16]}.\n# Absolute paths are shortened to their last part.\n"
    )
    (folder / RECIPE).write_text(head + text.getvalue(), encoding="utf-8")


def _public(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _public(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_public(item, key) for item in value]
    if key in _PATH_KEYS and isinstance(value, str) and os.path.isabs(os.path.expanduser(value)):
        return CardModel.of(value, None, "").title
    return value


def _metadata(data: RunData, student: CardModel, licence: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=f"{name}-held-out",
            dataset_name=f"{name}, held-out prompts",
            metric_type="accuracy",
            metric_name=f"accuracy (n = {row.num_prompts}, 95 % interval {_interval(merged)})",
            metric_value=round(merged.value, 4),
        )
        for name, row in (data.result.suites.items() if data.result else ())
        if (merged := row.accuracy.get("merged")) is not None and merged.value is not None
    ]
    known = licence is None or licence in _LICENCES
    has_base = student.hub_id is not None
    card = ModelCardData(
        base_model=student.hub_id,
        base_model_relation="finetune" if has_base else None,
        eval_results=results or None,
        library_name="transformers",
        license=licence if known else "other",
        license_name=None if known else licence,
        model_name=data.plan["name"],
        pipeline_tag="text-generation",
        tags=["mergeopd", "distillation", *(["on-policy-distillation"] if _is_on_policy(data.plan) else [])],
    )
    return card.to_yaml()


def folder_licence(folder: Path) -> str | None:
    """Return the licence that a model folder's own card states."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(folder / MODEL_CARD) or {}
    except Exception:  # noqa: BLE001 - another's file, which may be missing or anything
        return None
    name = metadata.get("license")
    name = metadata.get("license_name", name) if name == "other" else name
    return name if isinstance(name, str) else None


def _domains(plan: Mapping[str, Any], teacher: str) -> list[str]:
    return sorted({source["domain"] for source in plan["sources"] if teacher in source["teachers"]})


def _is_on_policy(plan: Mapping[str, Any]) -> bool:
    return any(phase["text"] not in ("teacher", "dataset") for phase in plan["phases"])


def _phase(phase: Mapping[str, Any]) -> str:
    """Describe a phase: updates, prompts, text, teachers, loss."""
    text, loss = phase["text"], phase["loss"]
    if isinstance(text, Mapping):
        fraction = text["on_policy_fraction"]
        if isinstance(fraction, Mapping):
            fraction = f"{fraction['start']:g} to {fraction['end']:g}"
        origin = f"responses of the student (fraction {fraction}), the others from the {text['otherwise']}"
    else:
        origins = {
            "student": "responses of the student itself (on-policy)",
            "teacher": "responses of the teachers",
            "dataset": "text of the data set",
        }
        origin = origins[text]
    terms = [_term(key, loss[key]) for key in TERMS if loss.get(key)]
    sources, teachers = phase.get("prompts"), phase.get("teachers")
    drawn = f" of {joined(list(sources), 'and')}" if sources else ""
    taught = f"; teachers: {_names(teachers)}" if teachers else ""
    return (
        f"`{phase['name']}`: {phase['updates']:,} updates, {phase['prompts_per_round']} prompts{drawn} a "
        f"round, on {origin}{taught}; loss: {joined([term for term in terms if term], 'and')}"
    )


def _names(teachers: Mapping[str, float]) -> str:
    return joined(
        [name if weight == 1 else f"{name} x {weight:g}" for name, weight in teachers.items()], "and"
    )


def _term(key: str, value: Any) -> str:
    weight, title = value.get("weight", value) if isinstance(value, Mapping) else value, TERMS[key].title
    if isinstance(value, Mapping) and value.get("teachers"):
        title += f" to {_names(value['teachers'])}"
    if isinstance(weight, Mapping):
        return f"{title} x {weight['start']:g} to {weight['end']:g}"
    if not weight:
        return ""
    return title if weight == 1 else f"{title} x {weight:g}"


def _decoding(suites: Sequence[Mapping[str, Any]]) -> list[str]:
    """Describe how responses were generated, once for all suites if they agree."""
    by_text: dict[str, list[str]] = {}
    for suite in suites:
        text = f"at most {suite['max_new_tokens']} tokens"
        if suite["temperature"]:
            sampled = f"at temperature {suite['temperature']} and top_p {suite['top_p']}"
            how = f"mean of {suite['samples']} responses to each prompt, sampled {sampled}, {text}"
        else:
            how = f"greedy decoding, {text}"
        by_text.setdefault(how, []).append(suite["name"])
    if len(by_text) == 1:
        return [f"{how[0].upper()}{how[1:]}." for how in by_text]
    return [f"- {joined(names, 'and')}: {how}." for how, names in by_text.items()]


def _rows(result: Result) -> Iterator[tuple[str, str, list[str]]]:
    """Yield suite, number of prompts and cells, the means last."""
    for name, row in result.suites.items():
        cells = [_cell(estimate) for estimate in result.headline(name).values()]
        yield name, f"{row.num_prompts:,}", [*cells, _cell(row.recovered)]
    if len(result.suites) > 1:
        means = [_cell(result.mean.get(kind)) for kind in result.kinds]
        yield "mean", "", [*means, _cell(result.mean_recovered)]


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or estimate.value is None:
        return "-"
    interval = _interval(estimate)
    return f"{100 * estimate.value:.1f}" + (f" ({interval})" if interval else "")


def _interval(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"


def _has_template(data: RunData) -> bool:
    """Whether the exported tokenizer has a chat template."""
    if data.plan["student"]["template"] is not None:
        return True
    folder = Path(data.plan["student"]["model"])
    own = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        return True
    return own.is_file() and '"chat_template"' in own.read_text(encoding="utf-8")


def _shown_export(run: Path) -> str:
    """Return the export's path for commands; a placeholder for one that would name private folders."""
    path = shown(run / run_layout.EXPORT)
    return "path/to/export" if os.path.isabs(path) else path


@cache
def _template() -> Any:
    text = (files("mergeopd.reporting") / "assets" / "model_card.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    environment.filters["joined"] = lambda words: joined(list(words), "and")
    return environment.from_string(text)
