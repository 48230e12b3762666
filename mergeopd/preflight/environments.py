"""Check environments: that they can be built, and that templates render the replies of tools."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mergeopd.config.tree import Keys
from mergeopd.data.renderer import Renderer
from mergeopd.data.turns import ids_between, turn_message
from mergeopd.environment.episodes import opened, prompt_row
from mergeopd.environment.pool import EnvironmentPool, Request
from mergeopd.errors import DataError, EnvironmentFailed
from mergeopd.preflight.problems import Findings
from mergeopd.preflight.user_code import function_problem
from mergeopd.recipe.environments import (
    Environment,
    FunctionsEnvironment,
    HttpEnvironment,
    UserEnvironment,
)
from mergeopd.tool_calls import ParsedTurn, ToolCall, parse_tool_calls
from mergeopd.types import Message, Prompt

_CALL = ToolCall("tool", {"argument": "value"}, "call00000")
_REPLY = Message(
    "tool",
    "result",
    {"role": "tool", "name": _CALL.name, "tool_call_id": _CALL.id, "content": "result"},
)


@dataclass
class EnvironmentChecks:
    """Builds each environment once, in a process of its own, as the run will."""

    findings: Findings
    allow_code: Collection[str]
    _openings: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)

    def add_tools(
        self, place: Keys, environment: Environment, prompts: Sequence[Prompt]
    ) -> tuple[Prompt, ...]:
        """Return prompts with the tools that the environment has for all.

        Reports an environment that cannot be built, or fails on the first prompt.
        """
        opening = self._opening(place, environment, prompts[0])
        if opening is None or isinstance(environment, UserEnvironment | HttpEnvironment):
            return tuple(prompts)  # what these add depends on the prompt
        return tuple(opened(prompt, opening) for prompt in prompts)

    def templates(
        self,
        place: Keys,
        environment: Environment,
        prompt: Prompt,
        renderers: Mapping[str, Renderer],
    ) -> None:
        """Report models whose template does not render calls that can be read back, or replies of tools."""
        opening = self._opening(place, environment, prompt)
        if opening is None:
            return
        prompt = opened(prompt, opening)
        for model, renderer in renderers.items():
            turn = turn_message(ParsedTurn("", (_CALL,)), "")
            try:
                ids_between(prompt, [turn], [_REPLY], renderer.end_id, renderer)
                written = renderer.template.render((*prompt.messages, turn), tools=prompt.tools)
                before = renderer.template.render(prompt.messages, tools=prompt.tools)
            except DataError as error:
                self.findings.report(place, f"{model} cannot use tools: {error}")
                continue
            if not _is_read_back(written.removeprefix(before), renderer):
                self.findings.report(
                    place,
                    f"{renderer.template.name}: writes calls of {model} in a format that is not read back: "
                    "known are those of Hermes and Qwen, Llama 3, Mistral, and plain JSON",
                    "give the model a template with one of these formats",
                )

    def _missing(self, place: Keys, environment: Environment) -> bool:
        """Report functions that do not exist, before their modules are imported."""
        paths: Mapping[Keys, str] = {}
        if isinstance(environment, FunctionsEnvironment):
            paths = {(*place, "functions", i): path for i, path in enumerate(environment.functions)}
        elif isinstance(environment, UserEnvironment):
            paths = {(*place, "environment"): environment.environment}
        problems = {where: problem for where, path in paths.items() if (problem := function_problem(path))}
        for where, problem in problems.items():
            self.findings.report(where, *problem)
        return bool(problems)

    def _opening(self, place: Keys, environment: Environment, prompt: Prompt) -> dict[str, Any] | None:
        """Begin a response to a prompt; None, and a report, if the environment fails."""
        if self._missing(place, environment):
            return None
        key = environment.model_dump_json()
        if key not in self._openings:
            self._openings[key] = _open(environment, self.allow_code, prompt)
        opening = self._openings[key]
        if "failure" in opening:
            self.findings.report(place, opening["failure"])
            return None
        return opening


def _open(environment: Environment, allow_code: Collection[str], prompt: Prompt) -> dict[str, Any]:
    pool = EnvironmentPool({"": environment}, allow_code, 1)
    row = {"op": "reset", "source": "", "row": prompt_row(prompt)}
    try:
        (opening,) = pool.run([Request(episode, "", row) for episode in pool.new_episodes(1)])
    except EnvironmentFailed as error:
        return {"failure": str(error)}
    finally:
        pool.close()
    return opening


def _is_read_back(text: str, renderer: Renderer) -> bool:
    """Whether the call is found in what the template has written behind the generation prompt."""
    ends = [renderer.tokenizer.decode([i], skip_special_tokens=False) for i in renderer.eos_ids]
    cut = min((at for end in ends if end and (at := text.find(end)) >= 0), default=len(text))
    calls = parse_tool_calls(text[:cut]).calls
    return [replace(call, id=None) for call in calls] == [replace(_CALL, id=None)]
