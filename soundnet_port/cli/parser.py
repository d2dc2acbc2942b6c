"""An argument parser whose errors are one line, with the nearest choice where something is misspelled."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from soundnet_port.cli.reporting import MISUSE

Run = Callable[[argparse.Namespace], int]
AddCommand = Callable[..., argparse.ArgumentParser]
"""Adds a command: (name, run, summary, description="", examples="", resumable=False)."""


class Parser(argparse.ArgumentParser):
    """A parser for the program, and one for each command."""

    def error(self, message: str) -> NoReturn:
        """Exit with one line and the code for misuse."""
        self._fail(message, f"see '{self.prog} --help'")

    def _fail(self, message: str, hint: str) -> NoReturn:
        self.exit(MISUSE, f"{self.prog}: {' '.join(message.split())}; {hint}\n")

    def _fail_unknown(self, kind: str, word: str, choices: Iterable[str], hint: str = "") -> NoReturn:
        nearest = difflib.get_close_matches(word, list(choices), 1, cutoff=0.7)
        hint = f"did you mean '{nearest[0]}'?" if nearest else hint or f"see '{self.prog} --help'"
        self._fail(f"unknown {kind} '{word}'", hint)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse, and refuse what is unknown here, where the command's options are known."""
        arguments = list(sys.argv[1:] if args is None else args)
        self._check_options(arguments)
        parsed, unknown = super().parse_known_args(arguments, namespace)
        if unknown:
            self.error(f"unexpected argument '{unknown[0]}'")
        return parsed, unknown

    def _check_options(self, arguments: Sequence[str]) -> None:
        """Refuse unknown long options before argparse misses whatever else a misspelled one leaves out."""
        options = self._option_string_actions
        for argument in arguments:
            if argument == "--" or (self._subparsers and not argument.startswith("-")):
                return
            name = argument.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in options):
                self._fail_unknown("option", name, options)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        if action.option_strings:
            kind = f"value of {action.option_strings[-1]}"
            self._fail_unknown(kind, str(value), choices, f"choose from {', '.join(choices)}")
        self._fail_unknown("command", str(value), choices)
