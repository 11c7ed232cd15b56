"""Types of command-line arguments: what argparse calls to read one, and whose errors it tells."""

import argparse
from collections.abc import Callable
from typing import Any


def positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least 1, got {number}")
    return number


def numbers(kind: type) -> Callable[[str], list[Any]]:
    """Positive ones, with commas."""

    def parse(text: str) -> list[Any]:
        found = [kind(part) for part in text.split(",")]
        if min(found) <= 0:
            raise ValueError
        return found

    parse.__name__ = "list of positive numbers"  # argparse's word for it in errors
    return parse


def words(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Some of these, with commas."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        if set(found) - set(choices):
            raise argparse.ArgumentTypeError(f"of {', '.join(choices)}, with commas, got {text!r}")
        return found

    return parse
