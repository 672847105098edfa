"""Where chat templates run: jinja2's immutable sandbox, with bounds on time and memory.

The sandbox keeps a template from what it must not touch, not from running forever or filling the memory. Here a
rendering has SECONDS of processor time, and no operation of it may make much of little: repeat, pad, join or replace
beyond LARGEST characters or items.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, ClassVar

from jinja2 import TemplateError
from jinja2.compiler import CodeGenerator
from jinja2.nodes import Concat
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2.0
LARGEST = 1 << 25
_MOST_BITS = 1 << 12  # of a whole number
_WIDE = re.compile(r"\d{6}|\*|\{[^{}]*\{")  # a width of a format that is long, or comes from elsewhere


class Generator(CodeGenerator):
    """Has `a ~ b` done by the environment."""

    def visit_Concat(self, node: Concat, frame: Any) -> None:
        """What jinja2's own does, by `BoundedSandbox.joined`."""
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox, which refuses operations that would make too much. Raises TemplateError."""

    code_generator_class = Generator
    intercepted_binops: ClassVar[frozenset[str]] = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters = {name: _bounded(function) for name, function in self.filters.items()}

    def joined(self, parts: tuple[Any, ...]) -> str:
        """`a ~ b`: the parts, as text."""
        texts = list(map(str, parts))
        _check(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation of two values, if what it makes is not too large."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "+" and not numbers:
            _check(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "*":
            _check(0 if numbers else _size(left) * _size(right))
            _check_bits(left.bit_length() + right.bit_length() if numbers else 0)
        elif operator == "**" and numbers:
            _check_bits(left.bit_length() * abs(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *arguments: Any, **named: Any) -> Any:
        """A call, if what it makes is not too large."""
        method = getattr(function, "__wrapped__", function)  # the sandbox puts its own around `format`
        receiver = getattr(method, "__self__", None)
        if isinstance(receiver, str) and getattr(method, "__name__", "").startswith("format"):
            _check_format(receiver)
        _check_product(receiver, *arguments, *named.values())
        return super().call(context, function, *arguments, **named)


@contextmanager
def limited_time() -> Iterator[None]:
    """Raises TemplateError in the block once this thread has used SECONDS of processor time in it.

    It is looked at before each line of Python that runs: of a template, and of what it calls.
    """
    end = time.thread_time() + SECONDS

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise TemplateError(f"takes more than {SECONDS:g} seconds")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter, if what it makes is not too large."""
    @functools.wraps(function)
    def bounded(*arguments: Any, **named: Any) -> Any:
        _check_product(*arguments, *named.values())
        if function.__name__ == "do_format":
            _check_format(str(arguments[0]))
        return function(*arguments, **named)

    return bounded


def _size(value: Any) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 1


def _check_product(*values: Any) -> None:
    """What a function makes of one value by another has at most the product of their sizes."""
    first, second, *_ = [*sorted((max(1, _size(value)) for value in values), reverse=True), 1, 1]
    _check(first * second)


def _check(size: int) -> None:
    if size > LARGEST:
        raise TemplateError("makes too much of what it is given")


def _check_bits(bits: int) -> None:
    if bits > _MOST_BITS:
        raise TemplateError("computes numbers that are too large")


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise TemplateError("has a format that is too wide")
