"""Untrusted templates end within bounds, and ordinary ones render as with Jinja alone."""

from __future__ import annotations

import resource
from datetime import datetime
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mergeopd.data.chat_template import ChatTemplate
from mergeopd.data.sandbox import BoundedSandbox
from mergeopd.errors import DataError
from mergeopd.types import Message

GREETING = (Message("user", "hello"),)

DOUBLE = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = OP %}{% endfor %}{{ ns.x }}"
NEST = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = OP %}{% endfor %}{{ ns.x }}"

HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}{% endset %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    *(DOUBLE.replace("OP", op) for op in (
        "ns.x ~ ns.x", "ns.x + ns.x", "ns.x * 2", "ns.x.replace('a', ns.x)", "ns.x|replace('b', ns.x)", "ns.x.join([ns.x] * 9)",
        "[ns.x, ns.x]|join(ns.x)", "'%s%s' % (ns.x, ns.x)", "'{0}{0}'.format(ns.x)", "'%s%s'|format(ns.x, ns.x)",
        "ns.x|upper ~ ns.x", "[ns.x, ns.x]|tojson", "ns.x|e ~ ns.x|e",
    )),
    *(NEST.replace("OP", op) for op in (
        "[ns.x, ns.x]", "(ns.x, ns.x)", "{'a': ns.x, 'b': ns.x}", "ns.x + ns.x", "ns.x * 2", "[ns.x] * 2", "dict(a=ns.x, b=ns.x)",
        "dict.fromkeys(range(9999), ns.x)", "[ns.x, ns.x]|list", "[ns.x, ns.x]|string",
    )),
    "{% set ns = namespace(x=namespace()) %}{% for i in range(60) %}{% set y = namespace(x=[ns.x, ns.x]) %}{% set ns.x = y %}{% endfor %}{{ ns.x }}{{ 0 * 'a' }}{{ 'a' * 10**12 }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (1000000000, 1) }}", "{{ '%1000000000d'|format(1) }}", "{{ '%.1000000000f' % 1.5 }}",
    "{{ '{:1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 1000000000) }}", "{{ '{0:{1}}'.format(1, 1000000000) }}", "{{ '{x:{w}}'.format_map({'x': 1, 'w': 999999999}) }}",
    "{{ 'a'.center(1000000000) }}", "{{ 'a'.ljust(1000000000) }}", "{{ 'a'.zfill(1000000000) }}", "{{ ('\t' * 9999).expandtabs(1000000000) }}",
    "{{ ('\t' * 999999).expandtabs(99999) }}", "{{ 'a'|center(1000000000) }}", "{{ ('a\n' * 99999)|indent(99999) }}", "{{ 'a'|indent(1000000000, true) }}",
    "{{ [1]|batch(1000000000, 'x')|list }}", "{{ [1]|slice(1000000000)|list }}", "{{ [1]|tojson(indent=1000000000) }}", "{{ 1.5|round(100000000) }}",
    "{{ lipsum(n=10000000) }}", "{{ 'a' * 10000000000 }}", "{{ [1] * 10000000000 }}", "{{ 10000000000 * 'a' }}", "{{ 9 ** 999999999 }}", "{{ (5).to_bytes(1000000000, 'big') }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}", "{{ range(99999)|map('string')|join('x' * 99999) }}", "{{ 'x'|map('replace', 'x', 'y' * 999999)|join * 999 }}",
    "{% for i in range(99999) %}{{ i in range(99999)|list }}{% endfor %}",
    "{% set a = ['x' * 900000] %}{% set b = ['x' * 900000] %}{% for i in range(99999) %}{{ a == b }}{% endfor %}",
    "{% set a = 'x' * 900000 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "{% set a = 'x' * 900000 %}{% for i in range(99999) %}{{ a|length }}{% endfor %}", "{% set a = 'x' * 900000 %}{% macro f() %}{% for i in range(99999) %}{{ a ~ i }}{% endfor %}{% endmacro %}{{ f() }}",
    "{% set a = 'x' * 900000 %}{% for i in range(9999) %}{{ a }}{% endfor %}",
    "{% for i in range(99999) %}" + "{{ i }}" * 9999 + "{% endfor %}", "{% macro f() %}" + "{{ 1 }}" * 9999 + "{% endmacro %}{% for i in range(99999) %}{{ f() }}{% endfor %}",
    "{% for i in range(20) %}" * 20 + "x" + "{% endfor %}" * 20, "{% for i in range(20) %}" * 40 + "x" + "{% endfor %}" * 40,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "9" * 5000 + " }}", "{{ 'a' }}" * 40_000, "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{{ messages|map('tojson')|list * 9999999 }}", "{{ (messages * 999)|map('tojson')|join(messages|tojson * 999) }}",
    "{{ ([[1] * 999] * 999)|sum(start=[])|length * 'x' * 999999 }}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory():
    """Templates that build more than 2 GiB end the test, not the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: source[:60])
def test_a_hostile_template_ends_with_an_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergeopd.data.sandbox._MAX_STEPS", 2_000_000)  # a tenth: this tests quicker
    with pytest.raises(DataError) as caught:
        ChatTemplate(source, {}).render(GREETING)
    assert "MemoryError" not in str(caught.value)


ORDINARY = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{{ m.content[1:-1] }}{% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m['content']|upper|trim|replace('E', 'ee') }}{% endfor %}",
    "{% for m in messages|selectattr('role', 'equalto', 'user') %}{{ loop.first }}{{ loop.length }}{{ m.content }}{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k ~ '=' ~ v ~ 3 ~ none ~ missing }}{% endfor %}{{ messages[0]|dictsort }}",
    "{% set ns = namespace(n=0, l=[]) %}{% for i in range(5) %}{% set ns.n = ns.n + i * 2 %}{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.n }}{{ ns.l }}",
    "{% macro f(x, y=2) %}<{{ x }}{{ y }}{{ caller() if caller else '' }}>{% endmacro %}{{ f(1) }}{% call f(1, y=3) %}in{% endcall %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }};{% endfor %}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x * 3 }}{{ 'a' in x }}{{ 1 < 2 < 3 }}{{ 2 ** 10 % 7 }}{{ 7 // 2 }}{{ -3 }}{{ 'a' 'b' }}",
    "{{ '%05.2f|%s' % (3.14159, 'x') }}{{ '{:>8}|{x}'.format('r', x=2) }}{{ 'a,b'.split(',')|join('-') }}{{ 'x'|center(9) }}{{ [3, 1]|sort|first }}",
    "{{ {'a': [1, (2, 'x')]}|tojson(indent=2) }}{{ 'a\nb'|indent(4) }}{{ [1, 2, 3, 4]|batch(3, 0)|list }}{{ 1700000000|default(0) }}{{ missing|default('d') }}",
    "{% filter upper %}abc{% endfilter %}{% block b %}{{ messages[-1].content }}{% endblock %}{% for a, (b, c) in [(1, (2, 3))] %}{{ a + b + c }}{% endfor %}",
    "{{ '%d' % 1700000000 }}{{ (1, 2) == (1, 2) }}{{ [1, 2][::-1] }}{{ missing is defined }}{{ messages is sequence }}{{ messages|length > 1 and 'y' or 'n' }}",
]  # fmt: skip


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates_render_as_in_jinja(source: str) -> None:
    values = {"messages": [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "yes"}]}
    sandbox = BoundedSandbox()
    expected = ImmutableSandboxedEnvironment().from_string(source).render(values)
    assert sandbox.render(sandbox.compiled(source), values) == expected


def test_long_conversations_have_the_steps_they_need() -> None:
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.strip().replace('x', 'y') ~ '\n' }}"
        "{{ 'last' if m.content == messages[-1].content }}{{ (messages|map(attribute='role')|list)[loop.index0] }}{% endfor %}"
    )
    messages = tuple(Message(("user", "assistant")[i % 2], f"{i} " + "x" * 20_000) for i in range(300))
    assert len(ChatTemplate(source, {}).render(messages)) > 6_000_000


def test_each_rendering_has_its_own_steps() -> None:
    template = ChatTemplate(
        "{% for i in range(90000) %}{{ i }}{% endfor %}", {}, now=lambda: datetime(2026, 1, 1)
    )
    assert len({template.render(GREETING) for _ in range(5)}) == 1
