"""Docstrings of functions that share the description of their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def documented(texts: Mapping[str, str]) -> Callable[[_Function], _Function]:
    """Return a decorator that puts the texts where a docstring names them in braces."""

    def filled(function: _Function) -> _Function:
        if function.__doc__ is not None:
            function.__doc__ = inspect.cleandoc(function.__doc__)
            for name, text in texts.items():
                function.__doc__ = function.__doc__.replace(f"{{{name}}}", text.strip())
        return function

    return filled
