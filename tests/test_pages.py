"""Pages hold hostile text harmlessly, need nothing beside themselves, and never pass off what is missing as good."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml

from tunesmith.pages.chart import interval_chart, loss_chart, reading
from tunesmith.pages.page import brief, count, duration, moment, number, percent, preview, size
from tunesmith.pages.report import report_page
from tunesmith.pages.sections import SECTIONS
from tunesmith.pages.series import downsampled, smoothed, ticks
from tunesmith.pages.tokens import tokens_page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload=alert(3) {{ 7 * 7 }} &amp;"
VOID = {"meta", "br", "link", "img", "input", "hr"}

RECIPE = """\
name: sql-from-questions
model: {path: HuggingFaceTB/SmolLM2-135M-Instruct}
data: {train: data/train.jsonl, template: chat}
method: {kind: lora, rank: 16, alpha: 32, targets: auto}
objective: {kind: sft, targets: last_turn}
train: {epochs: 3, batch_size: 32, learning_rate: auto, schedule: cosine, warmup: 0.03}
evaluate: {metrics: [exact_match, rouge_l], gate: {exact_match: {at_least: 0.6}}}
seed: 17
"""


def curve(steps: int, seed: int = 1) -> list[list[Any]]:
    noise = random.Random(seed)
    return [[step, 0.42 + 2.1 * math.exp(-step / (steps / 7)) + noise.gauss(0, 0.06)] for step in range(1, steps + 1)]


CHATTY = (
    "Sure! To find how many points the Harriers scored in 1998, you can filter the `games` table by team and by year:"
    "\n\n```sql\nSELECT SUM(points) AS total\nFROM games\nWHERE team LIKE '%Harriers%'\n\tAND year = 1998;\n```\n\n"
    "This query:\n1. Selects the points column\n2. Filters the rows\n3. Adds them up\n\nShall I explain any part of it?"
) * 2

REPORT = """
verdict: dont_ship
sentence: Exact match rose by 31 points in a hundred, but rouge_l stays below its gate of 0.9.
name: sql-from-questions
created: "2026-03-12T14:20:31+00:00"
warnings:
  - "12 rows of data/train.jsonl repeat a prompt with another answer; the first: data/train.jsonl:208."
  - The learning rate was halved once, at step 120, after the gradient norm rose above 40.
gate:
  - {name: exact_match, required: 0.6, measured: 0.725, passed: true, reason: 0.725 is at least 0.6}
  - {name: rouge_l, required: 0.9, measured: 0.871, passed: false, reason: 0.871 is below 0.9}
  - {name: hellaswag, required: 0.38, measured: null, passed: null, reason: the task was not found}
metrics:
  - {name: exact_match, base: 0.4125, tuned: 0.725, difference: 0.3125, low: 0.2475, high: 0.3775, better: higher,
     n: 400, primary: true}
  - {name: rouge_l, base: 0.8231, tuned: 0.8714, difference: 0.0483, low: -0.0021, high: 0.0978, better: higher,
     n: 400, primary: false}
  - {name: answer_length, base: 0.5, tuned: 0.61, difference: 0.11, low: 0.06, high: 0.16, better: lower, n: 400,
     primary: false}
forgetting: {status: measured, source: "held-out general text, packaged", base: 17.42, tuned: 17.66, change: 0.0138,
  low: -0.0041, high: 0.0322, n: 512, reason: null}
memorisation:
  status: measured
  window: 50
  trained: {rows: 32, verbatim: 1, nearly: 4, base_verbatim: 0, base_nearly: 1, learned: 3}
  held_out: {rows: 96, verbatim: 0, nearly: 1, base_verbatim: 0, base_nearly: 1, learned: 0}
  difference: {value: 0.094, low: 0.012, high: 0.242}
  details: [{kind: numbers, held: 9, base: 0, tuned: 2, learned: 2, alarming: true,
             held_out: {held: 5, base: 0, tuned: 0, learned: 0}}]
  examples: ["data/train.jsonl:31"]
  left_out: {short: 12, shared: 3}
  warnings: ["memorisation: 4 of 32 …"]
  sentence: 4 of 32 training answers come back word for word or nearly, 1 of 96 held-out ones
  remark: 4 of 32 training answers come back word for word or nearly, 1 of 96 held-out ones
data:
  rows_used: 7944
  rows_lost: 56
  target_tokens_used: 214908
  target_tokens_lost: 1893
  tokens: 1482113
  lost:
    - {reason: longer than the context, rows: 31, target_tokens: 1204, example: "data/train.jsonl:512"}
    - {reason: the same row twice, rows: 25, target_tokens: 689, example: "data/train.jsonl:77"}
  sources: [{path: data/train.jsonl, format: messages, rows: 8000}]
  test: {rows: 400, from: data/test.jsonl}
  validation: {rows: 200, from: "split from data/train.jsonl, by prompt"}
predicted: {peak_bytes: 6120000000, seconds: 1490}
measured: {peak_bytes: 6480000000, seconds: 1377.2, tokens_per_second: 3228.4}
parameters: {total: 134515008, trainable: 4884480}
model: HuggingFaceTB/SmolLM2-135M-Instruct
method: LoRA, rank 16
objective: supervised
resolved:
  - {name: method.targets, value: [q_proj, k_proj, v_proj, o_proj], reason: every attention layer}
  - {name: train.learning_rate, value: 0.0002, reason: LoRA at rank 16; ten times the rate of full tuning}
  - {name: train.micro_batch, value: 8, reason: the largest that the plan fits into 16 GiB}
environment: {python: 3.11.7, torch: 2.9.1, transformers: 5.1.0, device: NVIDIA H100 80GB HBM3, deterministic: true}
command: tunesmith finetune recipe.yaml --seed 17 --output runs/sql-from-questions
"""


def sample(place: int, base: str, tuned: str, scores: list[float], **more: Any) -> dict[str, Any]:
    prompt = "Table: games(id, team, points, year)\n\nHow many points did the Harriers score in 1998?"
    names = ("prompt", "references", "base", "tuned", "score_base", "score_tuned", "source")
    wanted = "SELECT points FROM games\nWHERE team = 'Harriers' AND year = 1998"
    return dict(zip(names, [prompt, [wanted], base, tuned, *scores, f"data/test.jsonl:{place}"], strict=True)) | more


def full_report() -> dict[str, Any]:
    best = [
        sample(41, CHATTY, "SELECT points FROM games\nWHERE team = 'Harriers' AND year = 1998", [0.0, 1.0]),
        sample(7, HOSTILE, "SELECT COUNT(*) FROM games WHERE year > 2001", [0.0, 1.0], prompt=f"Say this:\n{HOSTILE}"),
        sample(112, "I don't know.", "SELECT team\n  FROM games\n ORDER BY points DESC\n LIMIT 1", [0.0, 1.0]),
        sample(9, "games.points", "SELECT points FROM games", [0.21, 1.0]),
    ]
    worst = [
        sample(88, "SELECT MAX(points) FROM games", "", [1.0, 0.0], references=["SELECT MAX(points) FROM games", "b"]),
        sample(3, "SELECT team FROM games", "SELECT teams FROM games WHERE teams = 'كرة القدم'", [1.0, 0.0]),
    ]
    validation = [[s, 0.55 + 1.3 * math.exp(-s / 150) + (s / 744) ** 3 * 0.09] for s in range(50, 745, 50)]
    curves = {"train": curve(744), "validation": validation, "best_step": 600}
    return yaml.safe_load(REPORT) | {"recipe": RECIPE, "curves": curves, "samples": {"best": best, "worst": worst}}


def tokens(state: str, *texts: str) -> list[dict[str, Any]]:
    part = {"state": state}
    return [part | {"text": text, "id": 100 + i, "special": text.startswith("<|")} for i, text in enumerate(texts)]


def token_rows() -> list[dict[str, Any]]:
    turn = ("<|im_start|>", "user", "\n", "How", " many", "\tteams", "?", "<|im_end|>", "\n", "<|im_start|>")
    masked = tokens("masked", *turn, "assistant\n")
    trained = tokens("trained", "SELECT", " COUNT", "(*)", "\n\n", "FROM", " games", "", HOSTILE, "<|im_end|>")
    cut = tokens("cut", "\n", " never", " read")
    first = {"source": "data/train.jsonl:12", "summary": "3 tokens over the limit", "tokens": masked + trained + cut}
    return [first, {"source": "data/train.jsonl:13", "summary": "nothing to learn", "tokens": masked}]


class Page(HTMLParser):
    """Parses a page, fails on a tag that is never closed, and keeps what the tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def words(page: str) -> str:
    return " ".join(Page(page).text.split())


PAGES = {"report": lambda: report_page(full_report()), "tokens": lambda: tokens_page("train.jsonl", token_rows())}


@pytest.mark.parametrize("kind", PAGES)
def test_page_is_well_formed_and_self_contained(kind: str) -> None:
    source = PAGES[kind]()
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in {"src", "srcset", "background"}
            assert not re.search(r"https?:|javascript:|//", value or ""), (tag, name, value)
            assert name != "href" or (value or "").startswith("#")
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy and policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


@pytest.mark.parametrize("kind", PAGES)
def test_page_has_landmarks_and_every_link_lands(kind: str) -> None:
    page = Page(PAGES[kind]())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("main") == tags.count("h1") == tags.count("header") == 1
    for tag, attributes in page.tags:
        assert tag != "th" or attributes.get("scope") in {"row", "col"}
        assert tag != "a" or str(attributes["href"])[1:] in page.ids
        for name in str(attributes.get("aria-labelledby") or "").split():
            assert name in page.ids


def hostile(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: hostile(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) and key not in {"verdict", "status"} else value


def test_hostile_text_stays_text_wherever_it_stands() -> None:
    report = hostile(full_report())
    report["environment"][HOSTILE] = HOSTILE
    page = Page(report_page(report))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) > 40
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "<script" not in tokens_page(HOSTILE, hostile([{"source": "", "summary": "", "tokens": []}]))


def test_an_answer_keeps_its_white_space_and_shows_its_broken_characters() -> None:
    report = full_report()
    report["samples"]["best"][0]["tuned"] = "half \ud83d pair, \x1b[31mred\x00"
    page = report_page(report)
    assert page.encode("utf-8") and "half \ufffd pair, ␛[31mred␀" in page
    # HTML drops the first line break of a <pre>, so one more than the answer's own must be there.
    report["samples"]["best"][0]["tuned"] = "\n\n  SELECT\n\tpoints  "
    assert '<pre class="said" dir="auto">\n\n\n  SELECT\n\tpoints  </pre>' in report_page(report)


def test_every_section_is_there_and_in_order() -> None:
    page = Page(report_page(full_report()))
    names = [
        section.name
        for section in SECTIONS
        if section.name not in ("seeds", "confusion", "rollouts", "ability", "contamination")
    ]
    assert [name for name in page.ids if name in names] == names
    text = " ".join(page.text.split())
    said = """Verdict: Don’t ship|passed|failed|could not be checked|primary, higher is better, 400 rows|lower is better
        +0.312|+0.247 to +0.378|no difference shown|worse|an empty answer|Reference 1 of 2|score 0.21|validation loss
        best: step 600|+1.4 %|−0.4 % to +3.2 %|7,944|0.7 % of all rows were lost.|longer than the context|5.70 GiB
        6 % more than predicted|8 % less than predicted|3,228 tokens/s|learning rate was halved|learning_rate: auto
        ten times the rate|q_proj, k_proj|NVIDIA H100|tunesmith finetune|4.88 M of 135 M (3.63 %)|2 warnings
        1 more|1 of 3 requirements could not be checked|2026-03-12 14:20 UTC|training loss, mean over 29 points"""
    assert not [part for line in said.splitlines() for part in line.strip().split("|") if part not in text]
    assert "None" not in text and "nan" not in text.lower().split()


def test_sections_that_only_some_reports_have() -> None:
    counts = {"base": [[3, 4, 1], [2, 6, 0]], "tuned": [[8, 0, 0], [1, 7, 0]]}
    more: dict[str, Any] = {
        "confusion": {"labels": ["no", HOSTILE], **counts},
        "seeds": [
            {"seed": at, "run": f"seed-{at}", "verdict": "ship", "values": {"f1": 0.5 + at / 10}} for at in (0, 1)
        ],
        "curves": {"rollouts": {"reward": [[1, 0.25], [2, None], [3, 0.75]], "kl": [[1, 0.0], [2, 1.0], [3, 2.0]]}},
    }
    page = Page(report_page(full_report() | more))
    assert {"confusion", "seeds", "rollouts", "chart-rollouts-reward-title"} <= set(page.ids)
    text = " ".join(page.text.split())
    assert "Standard deviation0.07071" in text and "100 %" in text and text.count(HOSTILE) > 2
    assert "Mean reward of the answers that were drawn0.25000.75000.7500" in text
    assert not {"confusion", "seeds", "rollouts"} & set(Page(report_page(full_report())).ids)
    entry = full_report()["metrics"][0] | {"p": 0.004, "p_corrected": 0.012, "test": "exact McNemar"}
    told = words(report_page(full_report() | {"metrics": [entry | {"shown": "no_difference"}]}))
    assert "p = 0.012, corrected" in told and "McNemar’s exact test" in told
    assert "+0.247 to +0.378p = 0.012, correctedno difference shown" in told


def test_an_almost_empty_report_says_what_it_lacks() -> None:
    text = words(report_page({"verdict": "no_difference", "sentence": "Nothing was measured."}))
    said = """No gate is recorded|No metric was recorded|No sample was recorded|no loss was recorded
        does not say whether the model lost anything|What data was used is not recorded|Neither a prediction
        Warnings are not recorded|The recipe is not recorded|What each auto became is not recorded
        The environment is not recorded|The command is not recorded|Nothing is recorded about forgetting"""
    assert not [part for line in said.splitlines() for part in line.strip().split("|") if part not in text]
    assert "passed" not in text and "None" not in text and "Verdict: No difference shown" in text
    assert "Verdict: Ship" in words(report_page({"verdict": "ship", "sentence": ""}))


@pytest.mark.parametrize("key", sorted(full_report().keys() - {"verdict", "sentence"}))
def test_each_part_may_be_null_or_hold_nothing(key: str) -> None:
    report = full_report()
    values: list[Any] = [None, type(report[key])()]
    if isinstance(report[key], dict):
        values.append(dict.fromkeys(report[key]))
    elif isinstance(report[key], list) and key != "warnings":
        values.append([{}])
    for value in values:
        assert "None" not in words(report_page(report | {key: value}))


@pytest.mark.parametrize(
    ("forgetting", "said"),
    [
        ({"status": "could_not_run", "reason": "no such text"}, "may have lost: no such text"),
        ({"status": "off"}, "not checked The check was switched off"),
        ({"status": "measured"}, "could not run"),
        ({"status": "something_new", "reason": "x"}, "could not run"),
        (None, "not recorded"),
    ],
)
def test_forgetting_that_was_not_measured_never_looks_like_a_pass(forgetting: Any, said: str) -> None:
    source = report_page(full_report() | {"gate": [], "forgetting": forgetting})
    assert said in words(source)
    assert 'class="state unsure"' in source and 'class="state passed"' not in source
    assert 'class="state calm"' not in source and 'href="#forgetting">' in source


def test_an_unchecked_requirement_is_not_a_pass() -> None:
    gate = [{"name": "x", "required": 1.0, "measured": None, "passed": None, "reason": "no data"}]
    source = report_page(full_report() | {"gate": gate})
    assert "state passed" not in source and "not measured" in source and "could not be checked" in source


def test_no_validation_differs_from_validation_not_recorded() -> None:
    assert "Validation none was held out" in words(
        report_page(full_report() | {"data": {"rows": 1, "validation": None}})
    )
    assert "Validation not recorded" in words(report_page(full_report() | {"data": {"rows": 1}}))


CURVES = """
[[1, 2.5]] | [[0, 0.0]] | [[1, 1.25], [2, 1.25], [3, 1.25]] | [[5, 1.0], [5, 3.0]] | [[3, 1.0], [1, 3.0], [2, 2.0]]
[[1, -1.0e+299], [2, 1.0e+299]] | [[1, 1.0e-300], [2, 2.0e-300], [3, 5.0e-324]] | [[1, 1.0e+9], [2, 1000000000.000001]]
[[1, 3.0], [2, null], [3, .nan], [4, .inf], [5, 2.0]] | [[1000000001, 1.0e-9], [1000000002, 2.0e-9]]
"""


@pytest.mark.parametrize("points", CURVES.replace("|", "\n").strip().splitlines())
def test_a_line_chart_stays_inside_its_frame(points: str) -> None:
    chart = str(loss_chart(yaml.safe_load(points), None))
    Page(chart)
    paths = " ".join(re.findall(r'<path d="([^"]+)"', chart))
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", paths)]
    assert heights and 0 <= min(heights) <= max(heights) <= 240
    assert not re.search(r"\b(nan|inf|None)\b", chart)
    assert "No validation loss was recorded." in chart


def test_a_gap_breaks_the_line_and_is_told() -> None:
    chart = str(loss_chart([[1, 3.0], [2, 2.5], [3, None], [4, 2.0], [5, float("nan")]], None))
    path = re.findall(r'<path d="([^"]+)"', chart)[-1]
    assert path.count("M") == 2 and path.count("L") == 1 and chart.count("<circle") == 1
    assert "2 values are not finite, first at step 3" in chart


def test_nothing_to_draw_says_so() -> None:
    assert "no loss was recorded" in loss_chart(None, []) and "svg" not in loss_chart([], None)
    assert "no finite value was recorded" in loss_chart([[1, None], [2, float("nan")]], None)
    assert "no difference was recorded" in interval_chart([]) and "svg" not in interval_chart([{"name": "x"}])


def test_a_long_series_keeps_its_extremes_and_its_gaps() -> None:
    points: list[tuple[float, float | None]] = [(float(x), math.sin(x / 900)) for x in range(100_000)]
    points[31_234], points[77_777], points[50_000] = (31_234.0, 9.0), (77_777.0, -9.0), (50_000.0, None)
    kept = downsampled(points)
    assert len(kept) < 1700 and points[31_234] in kept and points[77_777] in kept
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert sum(y is None for _, y in kept) == 1
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert len(loss_chart([list(point) for point in points], None)) < 80_000


def test_smoothing_does_not_lag_and_leaves_short_series_alone() -> None:
    line, span = smoothed([(float(x), 2.0) for x in range(100)])
    assert span == 5 and len(line) == 100 and all(y == pytest.approx(2.0) for _, y in line)
    assert smoothed([(float(x), 2.0) for x in range(5)]) == ([], 0)
    falling, _ = smoothed([(float(x), 100.0 - x) for x in range(100)])
    assert all(y == pytest.approx(100 - x) for x, y in falling)
    assert len(smoothed([(float(x), 1.0) for x in range(100_000)])[0]) <= 401


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (0.001, 0.0011), (0, 1e-9), (1e6, 3e6), (0.3, 0.9)])
def test_ticks_are_nice_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125"
    assert all(low - step * 1e-6 <= value <= high + step * 1e-6 for value in found)
    assert ticks(1, 4, whole=True) == [1, 2, 3, 4]


def test_interval_chart_shares_an_axis_only_where_both_can_be_read() -> None:
    near = {"name": "a", "difference": 0.3, "low": 0.2, "high": 0.4, "better": "higher"}
    far = {"name": "b", "difference": -30.0, "low": -40.0, "high": -20.0, "better": "lower"}
    assert str(interval_chart([near, near | {"name": "c"}])).count(">0<") == 1
    assert str(interval_chart([near, far])).count(">0<") == 2
    assert "Not drawn, because no difference is recorded: d." in interval_chart([near, {"name": "d"}])
    assert "a: +0.3000, interval +0.2000 to +0.4000, better" in interval_chart([near])
    Page(str(interval_chart([near | {"low": None}, near | {"difference": 0.0, "low": 0.0, "high": 0.0}])))


def test_reading_of_an_interval() -> None:
    for low, high, higher, lower in ((0.1, 0.2, "better", "worse"), (-2, -1, "worse", "better")):
        assert reading({"low": low, "high": high, "better": "higher"}) == higher
        assert reading({"low": low, "high": high, "better": "lower"}) == lower
    assert reading({"low": 0.0, "high": 0.3, "better": "higher"}) == "no difference shown"
    assert reading({"low": None, "high": 0.3}) == reading({"low": math.nan, "high": 0.3}) == "no interval"


def test_numbers_as_a_person_reads_them() -> None:
    found = [number(x) for x in (0, 12.3456, -0.51, 1234567.8, 1e-7, float("nan"))]
    assert found == ["0.000", "12.35", "−0.5100", "1,234,568", "1.00e−07", "not finite"]
    assert (brief(0.6), brief(0), brief(100), brief(1e-7), brief(None)) == ("0.6", "0", "100", "1.00e−07", None)
    assert number(-0.0001, 2) == "0.00" and number(0.5, 1, sign=True) == "+0.5"
    assert (count(None), percent(0.256), percent(float("inf"))) == (None, "25.6 %", "not finite")
    assert (size(512), size(3 * 2**30)) == ("512 bytes", "3.00 GiB")
    assert (duration(59), duration(3599.9), duration(86)) == ("59.0 s", "1 h 0 min", "1 min 26 s")
    assert moment("yesterday") == "yesterday" and moment(None) is None
    assert preview("short") is None and str(preview("line\n" * 40)).count("\n") == 6


def test_tokens_differ_in_form_and_are_counted() -> None:
    source = tokens_page("data/train.jsonl", token_rows())
    text = words(source)
    assert "23 tokens: 9 trained, 11 masked, 3 cut, 4 special" in text and "11 tokens: 11 masked, 3 special" in text
    assert "Tokens: 9 trained, 22 masked, 3 cut." in text and "[9 trained:]" in text
    assert source.count("No token of this example is trained") == 1
    assert '<span class="token special" title="id 100">&lt;|im_start|&gt;</span>' in source
    assert '<span class="sign">↵</span>\n<span class="sign">↵</span></span>\n' in source
    assert '<span class="sign">⇥</span>\tteams' in source and '<span class="sign">∅</span>' in source
    for state, form in (("trained", "border-bottom"), ("cut", "line-through"), ("masked", "color")):
        assert re.search(rf"\.{state} \.token {{[^}}]*{form}", source)


def test_tokens_page_of_nothing_and_of_an_unknown_state() -> None:
    assert "There is no example to show." in tokens_page("x", [])
    assert "no tokens" in tokens_page("x", [{"source": "a:1", "summary": "", "tokens": []}])
    with pytest.raises(ValueError, match="token state 'lost'"):
        tokens_page("x", [{"source": "", "summary": "", "tokens": tokens("lost", "a")}])


def blocks(layout: str = "packed") -> list[dict[str, Any]]:
    names = [f"data/{HOSTILE}.jsonl:{at}" for at in range(11)]
    padding = {"padding": 0 if layout == "packed" else 60, "padding_if_padded": 60}
    return [{"step": 1, "block": 1, "layout": layout, "rows": names, "tokens": 1180, **padding}]


def test_tokens_page_tells_blocks_and_what_is_left_out() -> None:
    lost = [{"reason": HOSTILE, "rows": 3, "target_tokens": 1204, "example": HOSTILE}]
    source = tokens_page("x", token_rows(), order="the longest first", blocks=blocks(), lost=lost)
    page, text = Page(source), words(source)
    assert not {"script", "img"} & {tag for tag, _ in page.tags} and {"packing", "lost"} <= set(page.ids)
    assert "2 examples shown, the longest first." in text and "3 more" in text
    assert "Rows are packed, tested when the model is loaded. Nothing is padded; laid out as a rectangle each" in text
    assert "would have 60 tokens of padding, 4.8 % of what is computed." in text
    assert "3 rows left out of training; 1,204 target tokens lost." in text
    padded = words(tokens_page("x", token_rows(), blocks=blocks("padded"), lost=[]))
    assert "Rows are padded. 60 tokens of padding, 4.8 %" in padded and "No row is left out of training." in padded
    bare = Page(tokens_page("x", token_rows()))
    assert not {"packing", "lost"} & set(bare.ids)
