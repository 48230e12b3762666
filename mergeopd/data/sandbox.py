"""A Jinja sandbox for untrusted templates, which bounds their steps, values and output.

Every rendering has a budget of steps, so an endless loop or gigabytes of output end with an error, equal on
every machine. The syntax tree is rewritten before it is compiled, so that loops,
comparisons, slices and literals pass through filters of the sandbox; the environment intercepts filters,
tests, calls and operators. No value grows beyond `max_size`, and an operation is refused where the sizes of
its operands would allow more.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_SOURCE = 1 << 18  # characters of a template
_MAX_SIZE = 1_000_000  # characters and entries of one value
_MAX_STEPS = 20_000_000
_STEP = 10  # minimum cost of a call or loop iteration, in characters
_MAX_INT_BITS = 4096
_MAX_WIDTH = 100_000  # largest number in a formatting operation

_COUNTED, _SIZED, _JOINED = "counted by the sandbox", "sized by the sandbox", "joined by the sandbox"
# Removed: random text, and two filters that take more than linear time.
_NO_FILTERS, _NO_GLOBALS = ("pprint", "urlize"), ("lipsum",)
_CHEAP = ("length", "count", "first", "last", "default", "d")
_WIDTHS = {"center", "indent", "batch", "slice", "round", "truncate", "wordwrap", "tojson", "filesizeformat"}
_TEXT, _SEQUENCES = (str, bytes), (list, tuple, set, frozenset, range)
_OWNERS = (str, bytes, int, float, list, tuple, dict)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with bounds; raises `jinja2.TemplateError` if one is exceeded."""

    intercepted_binops = frozenset({"+", "*", "%", "**"})

    def __init__(self, **options: Any) -> None:
        # Constants would otherwise be computed while a template is compiled.
        super().__init__(optimized=False, **options)
        self._max_size = _MAX_SIZE
        self._steps_left = _MAX_STEPS
        self._weight = 1
        self.concat = self._concat  # type: ignore[method-assign]
        for name in _NO_FILTERS:
            del self.filters[name]
        for name in _NO_GLOBALS:
            del self.globals[name]

    def compiled(self, source: str) -> jinja2.Template:
        """Compile a template with bounds. Raises TemplateError."""
        if len(source) > _MAX_SOURCE:
            raise jinja2.TemplateError(f"the template has more than {_MAX_SOURCE:,} characters")
        self.filters = {
            name: filter_ if name in _CHEAP else self._bounded(name, filter_)
            for name, filter_ in self.filters.items()
        }
        self.tests = {name: self._bounded(name, test) for name, test in self.tests.items()}
        self.filters |= {_COUNTED: self._counted, _SIZED: self._sized, _JOINED: self._joined}
        tree = _Rewriter().visit(self.parse(source))
        tree.set_environment(self)
        self._weight = _num_nodes([tree])
        return self.from_string(tree)

    def render(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """Render a template with a new budget, which grows with the size of `values`."""
        self._max_size, self._steps_left = 1 << 62, 1 << 62
        given, _ = self._size(values)
        self._max_size = _MAX_SIZE + 4 * given
        self._steps_left = _MAX_STEPS + 100 * given
        return template.render(values)

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(callee, "__wrapped__", callee)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, _OWNERS):
            args = tuple(map(self._listed, args))
            if isinstance(owner, str) and getattr(method, "__name__", "") in ("format", "format_map"):
                self._check_format(owner, (*args, kwargs), nested="{" in re.sub(r"\{[^{}]*\}", "", owner))
            self._check_work(owner, args, kwargs, widths=True)
        else:
            runs_template = isinstance(callee, Macro | LoopContext | BlockReference)
            self._spend(self._weight if runs_template else _STEP)
        return self._checked(super().call(context, callee, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str | bytes):
            text = left if isinstance(left, str) else left.decode("latin-1")
            self._check_format(text, right, nested="*" in text)
        elif operator == "*":
            sequences = [value for value in (left, right) if isinstance(value, str | bytes | list | tuple)]
            factors = [value for value in (left, right) if isinstance(value, int)]
            if sequences and factors and self._paid(sequences[0]) * factors[0] > self._max_size:
                self._refuse_size()
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            self._check_int_bits(left.bit_length() * max(right, 0))
        return self._checked(super().call_binop(context, operator, left, right))

    def _concat(self, pieces: Iterable[str]) -> str:
        """Join the output of a template or of a block in it."""
        kept: list[str] = []
        length = 0
        for piece in pieces:
            self._spend(1 + len(piece))
            length += len(piece)
            if length > self._max_size:
                self._refuse_size()
            kept.append(piece)
        return "".join(kept)

    @jinja2.pass_context
    def _counted(self, context: Context, values: Any, weight: int) -> Any:
        """Charge for a loop over `values`, whose body has `weight` nodes."""
        if hasattr(values, "__len__") and not isinstance(values, Undefined):
            self._spend((_STEP + weight) * len(values))
            return values
        return values if isinstance(values, Undefined) else self._counting(values, _STEP + weight)

    def _counting(self, values: Iterable[Any], cost: int) -> Iterator[Any]:
        for value in values:
            self._spend(cost)
            yield value

    @jinja2.pass_context
    def _sized(self, context: Context, value: Any) -> Any:
        return self._checked(value)

    @jinja2.pass_context
    def _joined(self, context: Context, pieces: Sequence[Any]) -> str:
        self._checked(pieces)
        return "".join(map(str, pieces))

    def _bounded(self, name: str, function: Any) -> Callable[..., Any]:
        """Wrap a filter or test to check its operands and result."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            head, rest = args[:first], tuple(map(self._listed, args[first:]))
            if rest:
                if name == "format" and isinstance(rest[0], str):
                    self._check_format(rest[0], (rest[1:], kwargs), nested="*" in rest[0])
                self._check_work(rest[0], rest[1:], kwargs, widths=name in _WIDTHS)
            return self._checked(function(*head, *rest, **kwargs))

        return bounded

    def _listed(self, value: Any) -> Any:
        """Convert a generator to a list, because its size is not known."""
        return list(self._counting(value, _STEP)) if isinstance(value, Iterator) else value

    def _check_work(
        self, subject: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, widths: bool
    ) -> None:
        """Reject an operation whose time or result may be the product of its operands' sizes."""
        size = self._paid(subject)
        factor = 0
        for value in (*args, *kwargs.values()) if kwargs else args:
            factor += self._paid(value)
            if widths and isinstance(value, int):
                if abs(value) > _MAX_WIDTH:
                    self._refuse_size()
                factor += abs(value)
        if size * factor > 50 * self._max_size:
            self._refuse_size()

    def _check_int_bits(self, num_bits: int) -> None:
        if num_bits > _MAX_INT_BITS:
            self._refuse_size()

    def _check_format(self, text: str, values: Any, *, nested: bool) -> None:
        """Reject a format with a huge width, in the text or in `values`."""
        numbers = re.findall(r"\d+", text)
        if nested:
            numbers += re.findall(r"\d+", repr(values) if self._paid(values) < _MAX_WIDTH else "9" * 9)
        if any(len(number) > 6 for number in numbers) or sum(map(int, numbers)) > _MAX_WIDTH:
            self._refuse_size()

    def _checked(self, value: Any) -> Any:
        self._paid(value)
        return value

    def _paid(self, value: Any) -> int:
        """Charge for a value and return its characters and entries, which must be within bounds.

        A text costs its length; in a list, which is not copied, little more than 1.
        """
        if isinstance(value, str):
            size = cost = 1 + len(value)
        else:
            size, num_parts = self._size(value)
            cost = num_parts + size // 64
        if size > self._max_size:
            self._refuse_size()
        self._spend(cost)
        return size

    def _size(self, value: Any) -> tuple[int, int]:
        """Return characters plus entries of a value, and its entries; counting stops at the limit."""
        num_parts, num_characters, rest = 0, 0, [value]
        while rest and num_parts + num_characters <= self._max_size:
            part = rest.pop()
            num_parts += 1
            if isinstance(part, _TEXT):
                num_characters += len(part)
            elif isinstance(part, int):
                self._check_int_bits(part.bit_length())
            elif isinstance(part, dict):
                rest.extend(part)
                rest.extend(part.values())
            elif isinstance(part, _SEQUENCES):
                if len(part) > self._max_size:
                    self._refuse_size()
                rest.extend(part)
        return num_parts + num_characters, num_parts

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise jinja2.TemplateError("the template takes too many steps for the text it is given")

    def _refuse_size(self) -> None:
        raise jinja2.TemplateError("the template builds a value that is too large for the text it is given")


class _Rewriter(NodeTransformer):
    """Sends loops, comparisons, literals and slices through the filters of the sandbox."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """Rewrite the children of a node, then the node."""
        super().generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For():
                weight = nodes.Const(_num_nodes(node.body), lineno=node.lineno)
                node.iter = _filtered(node.iter, _COUNTED, weight)
            case nodes.Concat():
                return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)
            case nodes.Compare():
                # A comparison with a constant takes no longer than the length of the constant.
                constant = isinstance(node.expr, nodes.Const)
                for operand in node.ops:
                    if operand.op in ("in", "notin") or not (
                        constant or isinstance(operand.expr, nodes.Const)
                    ):
                        operand.expr = _filtered(operand.expr, _SIZED)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load") | nodes.Getitem(arg=nodes.Slice()):
                return _filtered(node, _SIZED)
        return node


def _filtered(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, node), name, list(args), [], None, None, lineno=node.lineno)


def _num_nodes(roots: Sequence[nodes.Node]) -> int:
    return sum(1 for root in roots for _ in root.find_all(nodes.Node)) + len(roots)
