"""The tool `calculator`: exact arithmetic on bounded numbers."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction

from mergeopd.environment.protocol import Tools, schema

_MAX_LENGTH = 1000
_MAX_BITS = 4096
_DIGITS = 12
_BINARY: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculator() -> Tools:
    """Create the environment."""
    text = {"type": "string", "description": "an arithmetic expression, such as (17 + 4) * 2 / 3"}
    parameters = {"type": "object", "properties": {"expression": text}, "required": ["expression"]}
    description = "Compute an arithmetic expression exactly."
    return Tools({"calculator": schema("calculator", description, parameters)}, {"calculator": calculate})


def calculate(expression: str) -> str:
    """Return the value of an expression: an integer, or a decimal of twelve digits.

    Raises ValueError for other syntax and for numbers of more than 4,096 bits, ZeroDivisionError.
    """
    if not isinstance(expression, str) or len(expression) > _MAX_LENGTH:
        raise ValueError(f"the expression must be text of at most {_MAX_LENGTH} characters")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an arithmetic expression: {expression!r}") from error
    except ZeroDivisionError as error:
        raise ZeroDivisionError("division by zero") from error
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.{_DIGITS}g}"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return _bounded(Fraction(Decimal(repr(number))))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(Fraction(_BINARY[type(op)](_value(left), _value(right))))
    raise ValueError(f"only numbers and + - * / // % ** are computed, not {type(node).__name__}")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("exponents must be integers")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > _MAX_BITS:
        raise ValueError("the result is too large")
    return base**exponent.numerator


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ValueError("the result is too large")
    return value
