"""The page of a recipe with stages: each stage's verdict, and where its own page is."""

from __future__ import annotations

from typing import Any

from tunesmith.pages.page import number, render

VERDICTS = {"ship": "Ship", "dont_ship": "Don't ship", "no_difference": "No difference shown"}
FORMS = {"ship": "passed", "dont_ship": "failed", "no_difference": "calm"}


def chain_page(report: dict[str, Any]) -> str:
    """Renders what the stages of a recipe came to, to one HTML page that needs nothing but their own pages beside it.

    Args:
        report: as `report.json` of a chain has it.
    """
    stages = report["stages"]
    done = sum(stage["state"] == "done" for stage in stages)
    sentence = f"{done} of {len(stages)} stages are done."
    if report["stopped"] is not None:
        sentence = f"Stage {report['stopped']} did not pass its gate; the stages after it were not run."
    elif done == len(stages):
        sentence = f"All {done} stages are done. The last one: {report['sentence']}"
    return render(
        "chain.html.j2",
        name=report["name"],
        verdict=VERDICTS.get(report["verdict"], "Nothing is judged yet"),
        form=report["verdict"] or "no_difference",
        sentence=sentence,
        stages=[_stage(stage) for stage in stages],
    )


def _stage(stage: dict[str, Any]) -> dict[str, Any]:
    first = next(iter(stage["metrics"]), None)
    figures = None if first is None else f"{first['name']} {number(first['base'])} → {number(first['tuned'])}"
    return {
        **stage,
        "page": f"{stage['run']}/report.html" if stage["state"] == "done" else None,
        "shown": VERDICTS.get(stage["verdict"], stage["state"]),
        "form": FORMS.get(stage["verdict"], "unsure"),
        "figures": figures,
        "from": stage["starts_from"] or stage["model"],
    }
