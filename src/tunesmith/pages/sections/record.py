"""What it takes to know how a report came about: warnings, settings, the environment, the command."""

from __future__ import annotations

from markupsafe import Markup

from tunesmith.pages.page import fragment
from tunesmith.pages.sections.section import Part, Section


def warnings(report: Part) -> Markup:
    """Everything that the run warned of."""
    return fragment("sections/warnings.html.j2", report=report)


def warned(report: Part) -> str | None:
    """How many warnings there are."""
    number = len(report["warnings"] or [])
    return f"{number} warning{'s' if number > 1 else ''}" if number else None


def settings(report: Part) -> Markup:
    """The recipe, and what each `auto` in it became."""
    return fragment("sections/settings.html.j2", report=report)


def environment(report: Part) -> Markup:
    """Machine and packages."""
    return fragment("sections/environment.html.j2", report=report)


def command(report: Part) -> Markup:
    """How to do it again."""
    return fragment("sections/command.html.j2", report=report)


WARNINGS = Section("warnings", "Worth knowing", warnings, warned)
SETTINGS = Section("settings", "Settings", settings)
ENVIRONMENT = Section("environment", "Environment", environment)
COMMAND = Section("command", "Do it again", command)
