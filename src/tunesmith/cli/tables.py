"""Plans, verdicts and figures as text."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from tunesmith.resolved import Memory, Parameters, Plan

WORDS = {"ship": "SHIP", "dont_ship": "DON'T SHIP", "no_difference": "NO DIFFERENCE SHOWN"}


def size(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def aligned(rows: list[list[str]], *, right: Collection[int] = ()) -> list[str]:
    """Rows with columns of equal width; those in ``right`` are set flush right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [cell.rjust(widths[at]) if at in right else cell.ljust(widths[at]) for at, cell in enumerate(row)]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]


def plan_lines(plan: Plan, model: str) -> list[str]:
    memory, workload, parameters = plan.memory, plan.workload, plan.parameters
    about = "about " if workload.estimated else ""
    share = parameters.trainable / max(1, parameters.total)
    rows = [
        ["model", f"{model}: {parameters.total:,} parameters, {parameters.trainable:,} trained ({share:.2%})"],
        *_part_rows(parameters),
        ["device", f"{plan.device}, arithmetic in {plan.dtype}, frozen weights in {plan.frozen_dtype}"],
        ["data", f"{about}{workload.rows:,} rows, {workload.tokens:,} tokens, {workload.targets:,} trained on"],
        ["", f"longest row {workload.longest:,} tokens, limit {plan.max_length:,}"],
        ["steps", f"{plan.steps:,} ({plan.epochs:.2f} epochs), {plan.warmup_steps} of them warmup"],
        *_memory_rows(memory),
        [
            "time",
            f"about {duration(plan.time.seconds)}: training {duration(plan.time.train_seconds)}, evaluation "
            f"{duration(plan.time.evaluate_seconds)} (from {plan.time.source})",
        ],
    ]
    lines = aligned(rows)
    if plan.resolved:
        lines += ["", "auto became"]
        lines += [f"  {line}" for line in aligned([[r.name, _value(r.value), r.reason] for r in plan.resolved])]
    lines += ["", *[f"note: {note}" for note in plan.notes]] if plan.notes else []
    return lines


def _part_rows(parameters: Parameters) -> list[list[str]]:
    if not parameters.parts:
        return []
    told = ", ".join(f"{name} {count:,}" for name, count in parameters.parts.items())
    return [["", told + (f"; the method adds {parameters.added:,}" if parameters.added > 0 else "")]]


def _memory_rows(memory: Memory) -> list[list[str]]:
    """The largest phase, what training needs by component, and the other phases."""
    while_doing = f" while {memory.peak_phase}" if memory.peak_phase else ""
    training = next((phase.parts for phase in memory.phases if phase.name == "training"), None)
    if training is None:
        training = {name: getattr(memory, name) for name in ("weights", "gradients", "optimizer", "activations")}
    parts = ", ".join(f"{name} {size(count)}" for name, count in training.items())
    rows = [["memory", f"{size(memory.peak_bytes)} at the peak{while_doing}"], ["", f"training: {parts}"]]
    others = [f"{phase.name} {size(phase.total)}" for phase in memory.phases if phase.name != "training"]
    rows += [["", f"other phases: {', '.join(others)}"]] if others else []
    return [*rows, *([["", f"counted as: {memory.convention}"]] if memory.convention else [])]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def report_lines(report: dict[str, Any]) -> list[str]:
    """The verdict as it is printed at the end of a run."""
    lines = [f"{WORDS[report['verdict']]}  {report['sentence']}", ""]
    if report["metrics"]:
        rows = [["metric", "base", "tuned", "difference", "interval", "rows", "better"]]
        for entry in report["metrics"]:
            low, high = entry["low"], entry["high"]
            span = "none" if low is None else f"{low:+.4f} … {high:+.4f}"
            rows.append(
                [
                    entry["name"],
                    f"{entry['base']:.4f}",
                    f"{entry['tuned']:.4f}",
                    f"{entry['difference']:+.4f}",
                    span,
                    str(entry["n"]),
                    entry["better"],
                ]
            )
        lines += aligned(rows, right={1, 2, 3, 5})
    if prompted := report.get("prompted"):
        figures = ", ".join(f"{entry['name']} {entry['value']:.4f}" for entry in prompted)
        lines.append(f"the base with the teacher's prompt: {figures}")
    if preference := report.get("preference"):
        lines.append(preference["sentence"])
    for task in report["tasks"]:
        for entry in task["metrics"][:1]:
            low, high = entry["low"], entry["high"]
            span = "none" if low is None else f"{low:+.4f} … {high:+.4f}"
            figures = f"{entry['base']:.4f} → {entry['tuned']:.4f} ({entry['difference']:+.4f}, interval {span})"
            lines.append(f"task {task['name']}: {entry['name']} {figures}, {task['rows']} rows")
    forgetting = report["forgetting"]
    if forgetting["status"] == "measured":
        lines.append(
            f"general text ({forgetting['source']}): perplexity {forgetting['base']:.3f} → "
            f"{forgetting['tuned']:.3f} ({forgetting['change']:+.1%})"
        )
    else:
        lines.append(f"forgetting was not measured: {forgetting.get('reason', '')}")
    lines += ability_lines(report)
    lines += memorisation_lines(report.get("memorisation"))
    data, predicted, measured = report["data"], report["predicted"], report["measured"]
    lines.append(
        f"data: {data['rows_used']:,} rows used, {data['rows_lost']:,} lost; {data['target_tokens_used']:,} "
        f"target tokens used, {data['target_tokens_lost']:,} lost"
    )
    lines.append(
        f"memory: {size(predicted['peak_bytes'])} predicted, {size(measured['peak_bytes'])} measured; time: "
        f"{duration(predicted['seconds'])} predicted, {duration(measured['seconds'])} measured"
    )
    for check in report["gate"]:
        state = {True: "passed", False: "failed", None: "could not be checked"}[check["passed"]]
        measured_text = "" if check["measured"] is None else f", measured {check['measured'] + 0.0:+.4g}"
        lines.append(f"gate {check['name']} {check['required']:+.4g}{measured_text}: {state}")
    lines += [f"warning: {text}" for text in report["warnings"]]
    return lines


def ability_lines(report: dict[str, Any]) -> list[str]:
    """What a report says of general ability: a line a benchmark, and the divergence from the base."""
    lines = []
    for entry in report.get("benchmarks") or []:
        span = "none" if entry["low"] is None else f"{entry['low']:+.4f} … {entry['high']:+.4f}"
        figures = f"{entry['base']:.4f} → {entry['tuned']:.4f} ({entry['difference']:+.4f}, interval {span})"
        lines.append(f"benchmark {entry['name']} ({entry['skill']}): {entry['metric']} {figures}, {entry['n']} items")
    divergence = report.get("divergence") or {}
    if divergence.get("status") == "measured":
        ends = "" if divergence["low"] is None else f" ({divergence['low']:.4f} … {divergence['high']:.4f})"
        lines.append(
            f"KL from the base on {divergence['n']} general prompts: {divergence['value']:.4f}{ends} nats a token"
        )
    for entry in report.get("contamination") or []:
        for example in entry["examples"]:
            lines.append(f"seen in training: {entry['name']} {example['item']}, in {example['source']}")
    return lines + [f"note: {note}" for note in report.get("benchmark_notes") or []]


def memorisation_lines(section: dict[str, Any] | None) -> list[str]:
    """What the probe found, in one line and one for each kind of detail that it met."""
    if section is None or section["status"] != "measured":
        return [] if section is None else [f"memorisation was not measured: {section['reason']}"]
    lines = [f"memorisation: {section['sentence']}"]
    for entry in section["details"]:
        others = entry["held_out"]
        beside = f"; of held-out answers {others['tuned']} of {others['held']}" if others["held"] else ""
        lines.append(
            f"  {entry['kind']} that prompts do not hold: {entry['tuned']} of {entry['held']} come back from training "
            f"answers, {entry['base']} from the base{beside}"
        )
    return lines
