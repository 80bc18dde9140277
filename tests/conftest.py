"""What the whole suite says at its end."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """At which levels of processor the laws of the native kernel ran (tests/ssm/test_cpu_laws.py)."""
    passed = terminalreporter.stats.get("passed", ())
    for name, words in (("level", "laws of the native kernel held at"), ("level not here", "not run here")):
        found = sorted({text for report in passed for key, text in report.user_properties if key == name})
        if any(found):
            terminalreporter.write_line(f"{words}: {', '.join(found)}")
