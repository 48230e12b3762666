"""Render chat templates as transformers does, without importing it.

The environment is that of transformers: a sandbox with trimmed blocks, loop controls, `tojson`,
`raise_exception`, `strftime_now` and the `{% generation %}` tag.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro

from mergeopd.data.sandbox import BoundedSandbox
from mergeopd.errors import DataError
from mergeopd.types import Message


class ChatTemplate:
    """A compiled template. `name` is used in errors; `now` is the clock of `strftime_now`.

    `arguments` are further variables, such as `enable_thinking`. Raises DataError if the source is not a
    template.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        name: str = "chat template",
        now: Callable[[], datetime] = datetime.now,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.arguments = dict(arguments)
        self.name = name
        self._sandbox = sandbox(now)
        with not_a_template(name):
            self._template = self._sandbox.compiled(source)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads, without the functions of its environment."""
        names = meta.find_undeclared_variables(self._sandbox.parse(self.source))
        return frozenset(names) - set(self._sandbox.globals)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template renders content that is a list of text parts; others get their text."""
        mark = "any text"
        message = Message("user", mark, {"role": "user", "content": [{"type": "text", "text": mark}]})
        try:
            text = self._render([message], (), add_generation_prompt=True, with_parts=True)
        except Exception:  # noqa: BLE001  templates may raise anything
            return False
        return mark in text and "'type'" not in text and '"type"' not in text

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """Render a conversation, by default with the generation prompt; `tools` are JSON schemas.

        Raises DataError if the template rejects the conversation (an unsupported role, say) or fails.
        """
        has_parts = any(isinstance(message.fields.get("content"), list) for message in messages)
        try:
            return self._render(
                messages,
                tools,
                add_generation_prompt=add_generation_prompt,
                with_parts=has_parts and self.takes_parts,
            )
        except Exception as error:
            roles = ", ".join(message.role for message in messages)
            kind = "" if type(error) is jinja2.TemplateError else f"{type(error).__name__}: "
            is_null = any("content" in one.fields and one.fields["content"] is None for one in messages)
            hint = "; templates get no content where it is null: try an empty text" if is_null else ""
            raise DataError(
                f"{self.name}: cannot render a conversation ({roles}): {kind}{error}{hint}"
            ) from error

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        with_parts: bool,
    ) -> str:
        values = {
            "messages": [_as_template_sees(message, with_parts) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
            **self.arguments,
        }
        return self._sandbox.render(self._template, values)


def _as_template_sees(message: Message, with_parts: bool) -> dict[str, Any]:
    """Return the keys of a message as transformers passes them: without nulls, reasoning by its two names."""
    if not message.fields:
        return {"role": message.role, "content": message.content}
    fields = {key: value for key, value in message.fields.items() if value is not None}
    if isinstance(fields.get("content"), list) and not with_parts:
        fields["content"] = message.content
    if message.reasoning is None:
        return fields
    return {"thinking": message.reasoning, **fields, "reasoning_content": message.reasoning}


@contextmanager
def not_a_template(name: str) -> Iterator[None]:
    """Convert errors while a template called `name` is compiled to DataError."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{name}:{error.lineno}: not a Jinja template: {error.message}") from error
    except RecursionError as error:
        raise DataError(f"{name}: nested too deeply for a Jinja template") from error
    except Exception as error:  # Python's compiler rejects some of the code that Jinja generates
        raise DataError(f"{name}: not a Jinja template: {error}") from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training masks; here it renders its content.

    A call block, so that variables set inside are local.
    """

    tags = {"generation"}  # noqa: RUF012  the type that jinja2 declares

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)`, without the type's other attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _SafeNamespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that begin with an underscore, which can be used to escape a sandbox."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # namespaces that contain each other could have any length


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have the attribute {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and &, which are ordinary characters in a prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def sandbox(
    now: Callable[[], datetime], undefined: type[jinja2.Undefined] = jinja2.Undefined
) -> BoundedSandbox:
    """Create the environment of one template; `undefined` is the type of unknown names."""
    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, undefined=undefined, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: now().strftime(format)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _SafeNamespace
    return environment
