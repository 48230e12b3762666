"""Check that the APIs of teachers can be used: key, address, model."""

from __future__ import annotations

from collections.abc import Mapping

from mergeopd.config.suggest import closest
from mergeopd.config.tree import Keys
from mergeopd.errors import ServingError
from mergeopd.messages import joined
from mergeopd.preflight.problems import Findings
from mergeopd.recipe.plan import TeacherPlan
from mergeopd.recipe.text_api import TextApi
from mergeopd.teacher.api import endpoint

_LISTED = 5


def check_apis(findings: Findings, teachers: Mapping[str, TeacherPlan]) -> None:
    """Report keys that are not set, APIs that cannot be reached, and models that they do not have.

    Nothing is generated: an API is asked for the names of its models, unless its card has `probe: false`.
    """
    for name, teacher in teachers.items():
        if teacher.api is not None:
            _check(findings, ("teachers", name, "card", "api"), teacher.api)


def _check(findings: Findings, place: Keys, api: TextApi) -> None:
    key = f" and the key in {api.api_key_env}" if api.api_key_env else ""
    findings.notes.append(f"teacher '{place[1]}' is behind an API: prompts{key} are sent to {api.url}")
    try:
        address = endpoint(api)
    except ServingError as error:
        remedy = f"set it in the shell, as in `export {api.api_key_env}=...`; it is not written to any file"
        findings.report((*place, "api_key_env"), str(error), remedy)
        return
    if not api.probe:
        return
    try:
        models = address.models()
    except ServingError as error:
        remedy = "start the server, or correct `url`; `probe: false` in the card leaves this check out"
        if "key" in str(error):
            remedy = (
                f"correct the key in {api.api_key_env}"
                if api.api_key_env
                else "name its variable as `api_key_env`"
            )
        findings.report((*place, "url"), str(error), remedy)
        return
    if models is None or _has(models, api.model):
        return
    near = closest(api.model, models)
    some = joined([repr(model) for model in models[:_LISTED]], "and")
    more = f" and {len(models) - _LISTED} more" if len(models) > _LISTED else ""
    known = (
        f"did you mean '{near}'?" if near else f"its models are {some}{more}" if models else "it lists none"
    )
    findings.report(
        (*place, "model"),
        f"{api.url} has no model '{api.model}'",
        f"{known}; `probe: false` in the card leaves this check out",
    )


def _has(models: list[str], model: str) -> bool:
    """Whether a model is listed; some APIs list it in a folder (`models/NAME`), or without its variant."""
    base = model.partition(":")[0]
    return any(listed in (model, base) or listed.endswith(f"/{model}") for listed in models)
