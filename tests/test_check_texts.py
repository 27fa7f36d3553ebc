"""Personal data, encoding, script and language, text of benchmarks."""

from __future__ import annotations

import json

import pytest

from checking import checked, exchange, exchanges, found, one, text_row
from tunesmith.data.check.finding import counted, quoted, share
from tunesmith.data.check.language import script_of
from tunesmith.data.check.masking import masked, private_parts


@pytest.mark.parametrize(
    ("text", "sort", "shown"),
    [
        ("write to jane.doe@evilcorp.org today", "e-mail address", "j…@e….org"),
        ("J.Doe+x@mail.firma.co.uk.", "e-mail address", "J…@m….uk"),
        ("call +49 30 1234567 now", "phone number", "+49…67"),
        ("call +14155552671.", "phone number", "+14…71"),
        ("(+44 20 7946 0958)", "phone number", "+44…58"),
        ("call (415) 273-9164 or so", "phone number", "(41…64"),
        ("415-273-9164", "phone number", "415…64"),
        ("Tel. 030 / 4423 8871", "phone number", "030…71"),
        ("06 12 43 98 71", "phone number", "06 …71"),
        ("card 4111 1111 1111 1111, thanks", "card number", "…1111"),
        ("5500005555555559", "card number", "…5559"),
        ("3782-822463-10005", "card number", "…0005"),
        ("DE89 3704 0044 0532 0130 00", "IBAN", "DE…00"),
        ("GB82WEST12345698765432", "IBAN", "GB…32"),
        ("key AKIAIOSFODNN7EXAMPLE", "access key", "AKIA…"),
    ],
)
def test_personal_data_is_found_and_masked(text: str, sort: str, shown: str):
    assert [(part.sort, part.shown) for part in private_parts(text)] == [(sort, shown)]
    assert shown in masked(text)
    assert shown in one(checked([exchange("Hello there", text)]), "personal-data").instances[0].what


@pytest.mark.parametrize(
    "text",
    [
        "mail me@example.com or you@docs.example.org or x@host.test",
        "git@github.com:owner/name.git",
        "@decorator\ndef f(x): return x @ y",
        "call 212-555-0134 or +1 212 555 0134",
        "on 2024-05-17 12:30:45, from 01/02/2023 to 03-04-2024, 01 02 2023",
        "192.168.100.200 and 10.0.0.1:8080",
        "version 1.2.3.4-567, v10.20.30",
        "ISO 9001:2015, ISO/IEC 27001:2013, RFC 2606",
        "SELECT a FROM t WHERE id = 1234567890 AND x = '0012345678'",
        "table: 1-1000181-1",
        "3.14159265358979 and -0.000123456789 and 1e-10 and +1.23456789",
        "0.4111111111111111",
        "4111 1111 1111 1112",
        "1234 5678 9012 3456 7890",
        "DE89 3704 0044 0532 0130 01",
        "ISBN 0-306-40615-2, ISBN 978-3-16-148410-0",
        "01 02 03 04 05 06",
        "population 1,234,567,890 in 1990",
        "2 + 3456789012 = x",
        "0 1 0 1 0 1 0 1 0 1",
        "550e8400-e29b-41d4-a716-446655440000",
        "2023-01-01T00:00:00.000000+0000",
    ],
)
def test_what_only_looks_like_personal_data(text: str):
    assert private_parts(text) == []


def test_personal_data_is_counted_by_sort():
    rows = exchanges([("a", "x@corp.io, y@corp.io"), ("b", "nothing"), ("c", "+49 30 1234567")])
    finding = one(checked(rows), "personal-data")
    assert finding.title == (
        "2 rows (67 %) hold what looks like personal data or access keys: 2 e-mail addresses, 1 phone number"
    )
    assert finding.level == "warning"
    assert finding.instances[0].what == "e-mail address x…@c….io and 1 more"
    assert "corp.io" not in json.dumps(finding.as_json())


def test_quotations_are_short_masked_and_safe_for_a_terminal():
    assert quoted("write to jane@corp.io\nnow") == '"write to j…@c….io now"'
    assert quoted("\x1b[2Jred \u202eevil") == '"\\u001b[2Jred \\u202eevil"'
    assert len(quoted("word " * 100)) <= 62
    assert quoted("word " * 100).endswith('…"')


@pytest.mark.parametrize(
    ("text", "level", "words"),
    [
        ("Le cafÃ© est fermÃ©", "problem", "mojibake"),
        ("It isnâ€™t here", "problem", "mojibake"),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "problem", "mojibake"),
        ("nice ðŸ˜€ day", "problem", "mojibake"),
        ("caf\ufffd", "problem", "U+FFFD"),
        ("zero\u200bwidth", "problem", "cannot be seen"),
        ("user\u202e right to left", "problem", "cannot be seen"),
        ("tag\U000e0041\U000e0042", "problem", "cannot be seen"),
        ("bell\x07", "warning", "control characters"),
        ("nel\x9f", "warning", "control characters"),
        ("icon \ue000", "warning", "private use"),
        ("a &amp; b", "note", "HTML"),
        ("<p>text</p>", "note", "HTML"),
        ("cafe\u0301", "note", "NFC"),
    ],
)
def test_signs_of_a_damaged_text(text: str, level: str, words: str):
    finding = one(checked([exchange("Hello there", text)]), "encoding")
    assert finding.level == level
    assert words in finding.title
    assert finding.title.startswith("1 row (100 %) holds ")


def test_mojibake_says_what_was_meant():
    what = one(checked([text_row("Le cafÃ© est ouvert")]), "encoding").instances[0].what
    assert what == "\"Le cafÃ© est ouvert\" where 'é' was meant"


@pytest.mark.parametrize(
    "text",
    [
        "Café, naïve, Ångström, São Paulo, NÃO, «voilà», «CAFÉ», “CAFÉ”",
        "Привет, как дела?",
        "می‌خواهم",
        "family 👨‍👩‍👧 and flag 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "שלום\u200f!",
        "a < b and c > d && e",
        "line\n\ttab\r\nend\x0c",
        "R&D; AT&T",
    ],
)
def test_sound_texts(text: str):
    assert not found(checked([text_row(text)]), "encoding")


ENGLISH = (
    "The council answers questions that come up between the members and decides which proposals should move forward {}."
)
GERMAN = (
    "Der Ausschuss beantwortet die Fragen der Mitglieder und entscheidet, welche Vorschläge weiter verfolgt werden {}."
)


def test_a_row_in_another_script():
    rows = [text_row(ENGLISH.format(i), i) for i in range(30)] + [text_row("Совет отвечает на вопросы участников.", 99)]
    finding = next(f for f in found(checked(rows), "language") if "script" in f.title)
    assert finding.title == "1 row (3.2 %) is not in the script of the others: Latin 97 %, Cyrillic 3.2 %"
    assert (finding.level, finding.instances[0].source) == ("warning", "rows.jsonl:99")


def test_a_row_in_another_language():
    rows = [text_row(ENGLISH.format(i), i) for i in range(30)] + [text_row(GERMAN.format(1), 99)]
    finding = one(checked(rows), "language")
    assert finding.title == "1 row (3.2 %) is not in the language of the others: en 97 %, de 3.2 %"
    assert finding.instances[0].what.startswith('de: "Der Ausschuss')


def test_two_languages_that_are_meant_are_a_note():
    rows = [text_row((ENGLISH, GERMAN)[i % 2].format(i), i) for i in range(40)]
    finding = one(checked(rows), "language")
    assert (finding.level, finding.title) == ("note", "the rows are written in several languages: de 50 %, en 50 %")


def test_short_rows_code_and_queries_have_no_language():
    rows = [text_row(ENGLISH.format(i), i) for i in range(10)]
    rows += exchanges([("Wo?", "Hier."), ("q", "SELECT a, b FROM t WHERE c = 'Deutschland'"), ("12 + 30", "42")])
    assert not found(checked(rows), "language")


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello", "Latin"),
        ("123 …", ""),
        ("Ελλάδα", "Greek"),
        ("これは日本語の文章です", "Japanese"),
        ("这是中文", "Han"),
        ("한국어", "Hangul"),
        ("हिन्दी", "Devanagari"),
        ("x = 1 # комментарий к этой строке", "Cyrillic"),
    ],
)
def test_script(text: str, script: str):
    assert script_of(text) == script


QUESTION = "A man is sitting on a roof and he starts pulling up roofing pieces one by one until dusk"
SHORT = "Which planet is closest to the sun"


def test_text_of_a_benchmark_is_found():
    rows = exchanges(
        [
            ("Continue.", f"So: {QUESTION.upper().replace(' ', '  ')}, then."),
            ("Quiz me", f"Well, {SHORT.lower()}? Mercury."),
            ("Which planet is closest to the moon?", "Earth"),
        ]
    )
    checks = checked(rows, benchmarks=[("hella", [SHORT + " of all", QUESTION]), ("arc", [SHORT, "Why so?"])])
    finding = one(checks, "benchmark-overlap")
    assert finding.title == (
        "2 training rows hold text of a benchmark: hella 1, arc 1; 1 of 2 items of arc has fewer than 6 words and "
        "cannot be looked for"
    )
    assert (finding.level, finding.rows, finding.of) == ("problem", 2, 3)
    assert [(i.source, i.other) for i in finding.instances] == [("rows.jsonl:1", "hella:2"), ("rows.jsonl:2", "arc:1")]
    assert finding.instances[0].what.startswith('13 words in a row of hella:2: "a man is sitting on a roof')
    assert finding.instances[1].what == f'7 words in a row of arc:1: "{SHORT.lower()}"'
    assert checks.flagged() == {"benchmark-overlap": [0, 1]}


def test_twelve_of_the_words_or_held_out_rows_do_not_count():
    twelve = " ".join(QUESTION.split()[:12])
    checks = checked([exchange("Hm", f"{twelve} else")], [exchange("Hm", QUESTION)], benchmarks=[("hella", [QUESTION])])
    assert not found(checks, "benchmark-overlap")


def test_the_benchmarks_own_wording_does_not_count():
    instruction = "The following are multiple choice questions with answers about a subject that you know well"
    items = [f"{instruction} item {n} {'abcdefghijklmnop'[n]} end" for n in range(12)]
    checks = checked([exchange("Hm", f"{instruction} and so on")], benchmarks=[("mmlu", items)])
    assert not found(checks, "benchmark-overlap")


def test_items_that_cannot_be_looked_for_are_said():
    finding = one(checked([exchange("Hm", "Yes")], benchmarks=[("boolq", ["Is it?", QUESTION])]), "benchmark-overlap")
    assert (finding.level, finding.rows) == ("note", 0)
    assert finding.title == "1 of 2 items of boolq has fewer than 6 words and cannot be looked for"


def test_problems_come_first_and_everything_is_json():
    rows = exchanges([("a &amp; b", "x@corp.io"), ("c", "Le cafÃ©"), ("d", "TODO")])
    findings = checked(rows).findings()
    levels = [finding.level for finding in findings]
    assert levels == sorted(levels, key=("problem", "warning", "note").index)
    assert json.loads(json.dumps([finding.as_json() for finding in findings]))[0]["instances"][0]["source"]


def test_only_twenty_instances_are_kept_and_all_are_counted():
    finding = one(checked([text_row(f"bell\x07 {i}", i) for i in range(50)]), "encoding")
    assert (finding.rows, len(finding.instances)) == (50, 20)
    assert [i.source for i in finding.instances][:2] == ["rows.jsonl:0", "rows.jsonl:1"]


def test_numbers_in_titles():
    assert counted(1, "row") == "1 row"
    assert counted(1204, "class", "classes") == "1,204 classes"
    assert [share(0, 10), share(1, 10_000), share(1, 100), share(1, 3)] == ["0.0 %", "under 0.1 %", "1.0 %", "33 %"]
