"""A calculator: arithmetic as Python writes it, with bounds on what it may grow to."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from forge_core.tools.base import ToolError

MOST_CHARACTERS = 200
"""Longest expression."""
MOST_DIGITS = 100
"""Largest whole number, in decimal digits."""
_CHARACTERS = re.compile(r"[0-9eE.+\-*/%() ]+")
"""Anything else Python's parser may have an opinion about, and print it."""
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left // right if _divides(right, left) else left / right,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, exponent: _power(base, exponent),
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str:
    """The value of an expression of numbers, `+ - * / // % **` and brackets.

    Whole numbers are exact, and so is a quotient that comes out even; others have twelve digits. Raises ToolError with
    a sentence.

    Example:
        assert calculate("(2 + 3) * 4 / 2") == "10"
    """
    if len(expression) > MOST_CHARACTERS:
        raise ToolError(f"the expression is longer than {MOST_CHARACTERS} characters")
    if not _CHARACTERS.fullmatch(expression):
        raise ToolError("only numbers, + - * / // % ** and brackets can be calculated")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError("this is no expression") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the number is too large") from None
    if isinstance(value, int):
        return str(value)
    return f"{value:.12g}"


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return _checked(value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _checked(_BINARY[type(op)](_value(left), _value(right)))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _checked(_UNARY[type(op)](_value(operand)))
    raise ToolError("this is no expression")


def _checked(value: Any) -> int | float:
    if isinstance(value, complex):
        raise ToolError("the result is no real number")
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        raise OverflowError
    if not math.isfinite(value):
        raise OverflowError
    return int(value) if isinstance(value, int) else float(value)


def _divides(right: int | float, left: int | float) -> bool:
    return isinstance(left, int) and isinstance(right, int) and right != 0 and left % right == 0


def _power(base: int | float, exponent: int | float) -> Any:
    # Before it is computed: 9**9**9 would take the machine.
    if abs(base) > 1 and abs(exponent) * math.log10(abs(base)) > MOST_DIGITS:
        raise OverflowError
    return base**exponent
