"""Warnings inside dfq's functions, which show and do not raise them, fail the tests too."""

from __future__ import annotations

import warnings

import pytest

_recorded: list[str] = []


def pytest_warning_recorded(warning_message: warnings.WarningMessage, nodeid: str) -> None:
    _recorded.append(f"{nodeid}: {warning_message.message}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _recorded and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _recorded:
        terminalreporter.write_line(f"WARNED {line}", red=True)
