"""Metrics against the libraries that define them, and bootstrap intervals against simulated truth."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from itertools import zip_longest

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from tunesmith.base import InputError
from tunesmith.metrics import (
    METRICS,
    RowStatistics,
    bootstrap,
    intervals,
    mean_rows,
    metric,
    paired_bootstrap,
    perplexity_rows,
)
from tunesmith.metrics.text import TEXT_METRICS, UnicodeTokenizer

PREDICTIONS = [
    "The cat sat on the mat.",
    "A quick brown fox jumped over the lazy dogs!",
    "",
    "SELECT name FROM users WHERE id = 3",
    "x",
    "Die schönen Häuser stehen am Fluss .",
]
REFERENCES = [
    ["The cat is sitting on the mat.", "There is a cat on the mat."],
    ["The quick brown fox jumps over the lazy dog."],
    ["Nothing at all was said.", "", "Silence"],
    ["SELECT name FROM users WHERE id = 4"],
    ["y"],
    ["Die schönen Häuser standen am Fluss.", "Schöne Häuser am Fluss"],
]
INTERVAL = {"resamples": 400, "confidence": 0.95, "seed": 0}
UNIT = ("exact_match", "contains", "accuracy", "f1", "rouge1", "rouge2", "rougeL")

words = st.sampled_from(["the", "cat", "cats", "sat", "mats", "running", "runs", "a", "été", "猫", "1", "!", "Fox's"])
texts = st.lists(words, max_size=8).map(" ".join)
corpora = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=6)


def by_rank(references: list[list[str]]) -> list[tuple[str | None, ...]]:
    return list(zip_longest(*references))


def score(name: str, prediction: str, *references: str) -> float:
    return METRICS[name].rows([prediction], [references]).corpus()


# --- BLEU and chrF are sacrebleu's ---


@settings(max_examples=60, deadline=None)
@given(corpora)
def test_bleu_and_chrf_equal_sacrebleu(corpus: list[tuple[str, list[str]]]) -> None:
    predictions, references = [p for p, _ in corpus], [r for _, r in corpus]
    bleu = sacrebleu.corpus_bleu(predictions, by_rank(references)).score
    chrf = sacrebleu.corpus_chrf(predictions, by_rank(references)).score
    assert METRICS["bleu"].rows(predictions, references).corpus() == bleu
    assert METRICS["chrf"].rows(predictions, references).corpus() == chrf


def test_bleu_and_chrf_of_ragged_references_and_of_each_row() -> None:
    for name, corpus in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        rows = METRICS[name].rows(PREDICTIONS, REFERENCES)
        assert rows.corpus() == corpus(PREDICTIONS, by_rank(REFERENCES)).score > 10
        alone = [corpus([p], [[text] for text in r]).score for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
        assert rows.per_row().tolist() == alone


def test_a_resampled_corpus_has_sacrebleus_score_of_those_rows() -> None:
    drawn = [1, 1, 5, 0, 3, 1]
    for name, corpus in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        rows = METRICS[name].rows(PREDICTIONS, REFERENCES)
        counts = np.bincount(drawn, minlength=len(rows)).astype(float)
        expected = corpus([PREDICTIONS[i] for i in drawn], by_rank([REFERENCES[i] for i in drawn])).score
        assert float(rows.value(counts @ rows.values)) == expected


# --- ROUGE is rouge-score's on ASCII, and not blind beyond it ---

ascii_text = st.text(st.characters(max_codepoint=127), max_size=60)
ascii_words = st.lists(
    st.sampled_from(["running", "Ran", "studies", "study", "the", "a_b", "don't", "x-ray", "generalizations", "3.14"]),
    max_size=12,
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(ascii_text | ascii_words)
def test_ascii_tokens_are_rouge_scores_own(text: str) -> None:
    expected = DefaultTokenizer(use_stemmer=True).tokenize(text)
    assert UnicodeTokenizer().tokenize(text) == expected
    # symbols beyond ASCII stand between words, as they do for rouge-score
    assert UnicodeTokenizer().tokenize(f"— {text} 😀❤️") == expected


@settings(max_examples=60, deadline=None)
@given(ascii_words | ascii_text, st.lists(ascii_words | ascii_text, min_size=1, max_size=3))
def test_rouge_on_ascii_equals_rouge_score(prediction: str, references: list[str]) -> None:
    names = ["rouge1", "rouge2", "rougeL"]
    expected = RougeScorer(names, use_stemmer=True).score_multi(references, prediction)
    assert {name: score(name, prediction, *references) for name in names} == {n: expected[n].fmeasure for n in names}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Die schönen Häuser", ["die", "schönen", "häuser"]),
        ("Cafe\u0301s running", ["cafés", "run"]),
        ("今天天气abc 2020年", ["今", "天", "天", "气", "abc", "2020", "年"]),
        ("ラーメンだ。", ["ラ", "ー", "メ", "ン", "だ"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("Привет, мир_ты", ["привет", "мир", "ты"]),
        ("1️⃣ First – “quoted” ½ x²", ["1", "first", "quot", "x"]),
        ("\u0301 é", ["é"]),
        ("٣٤ كتاب", ["٣٤", "كتاب"]),
    ],
)
def test_tokens_beyond_ascii(text: str, tokens: list[str]) -> None:
    assert UnicodeTokenizer().tokenize(text) == tokens


def test_rouge_beyond_ascii_is_not_silently_zero() -> None:
    defaults = RougeScorer(["rouge1"], use_stemmer=True)
    assert defaults.score("今天天气很好", "今天天气很好")["rouge1"].fmeasure == 0
    assert score("rouge1", "今天天气很好", "今天天气很好") == 1
    assert score("rouge1", "今天天气很好", "今天天气不好") == pytest.approx(5 / 6)
    assert score("rougeL", "красивый дом", "дом красивый") == 0.5
    assert score("rouge2", "naïve café", "nai\u0308ve cafe\u0301") == 1


# --- small known cases ---


@pytest.mark.parametrize(
    ("name", "prediction", "references", "expected"),
    [
        ("exact_match", " a b\n", ["a b"], 1),
        ("exact_match", "A b", ["a b"], 0),
        ("exact_match", "a  b", ["a b"], 0),
        ("exact_match", "b", ["a", "b"], 1),
        ("exact_match", "", [" "], 1),
        ("accuracy", " Straße ", ["STRASSE"], 1),
        ("accuracy", "positive!", ["positive"], 0),
        ("contains", "It is the Cat, I think.", ["dog", "a cat"], 1),
        ("contains", "cats and dogs", ["cat"], 0),
        ("contains", "cat", [""], 0),
        ("f1", "The cat, sat.", ["cat sat"], 1),
        ("f1", "cat", ["a cat sat"], 2 / 3),
        ("f1", "cat cat", ["cat sat"], 0.5),
        ("f1", "dog", ["cat", "dog barks"], 2 / 3),
        ("f1", "the", [""], 1),
        ("f1", "", ["cat"], 0),
        ("f1", "cat", [""], 0),
        ("rouge1", "the cat", ["the cats sat"], 0.8),
        ("rouge2", "a b c", ["a b d"], 0.5),
        ("rougeL", "a c b", ["a b c"], 2 / 3),
        ("rougeL", "", ["a"], 0),
        ("bleu", "", ["a"], 0),
        ("chrf", "", ["a"], 0),
    ],
)
def test_known_values(name: str, prediction: str, references: list[str], expected: float) -> None:
    assert score(name, prediction, *references) == pytest.approx(expected)


def test_f1_equals_squads_definition() -> None:
    rows = METRICS["f1"].rows(["the big red dog ran", "no"], [["a red dog", "big dog ran fast"], ["yes"]])
    precision, recall = 3 / 4, 3 / 4
    assert rows.per_row() == pytest.approx([2 * precision * recall / (precision + recall), 0])
    assert rows.corpus() == pytest.approx(0.375)


# --- properties that every metric has ---


@settings(max_examples=40, deadline=None)
@given(corpora, st.randoms(use_true_random=False))
def test_bounds_order_and_more_references(corpus: list[tuple[str, list[str]]], random) -> None:
    shuffled = random.sample(corpus, len(corpus))
    for name, one in TEXT_METRICS.items():
        rows = one.rows([p for p, _ in corpus], [r for _, r in corpus])
        top = 1 if name in UNIT else 100
        for value in (rows.corpus(), *rows.per_row()):
            assert 0 <= value <= top * (1 + 1e-12)
        assert one.rows([p for p, _ in shuffled], [r for _, r in shuffled]).corpus() == pytest.approx(rows.corpus())
        if name in UNIT:
            fewer = one.rows([p for p, _ in corpus], [r[:1] for _, r in corpus])
            assert (fewer.per_row() <= rows.per_row()).all()
            assert rows.per_row().mean() == pytest.approx(rows.corpus())


@settings(max_examples=30, deadline=None)
@given(st.lists(texts.map(lambda t: f"{t} four words stand here"), min_size=1, max_size=5), texts)
def test_a_prediction_that_is_a_reference_scores_full_marks(predictions: list[str], other: str) -> None:
    for name, one in TEXT_METRICS.items():
        full = 1 if name in UNIT else 100
        assert one.rows(predictions, [[p] for p in predictions]).corpus() == pytest.approx(full)
        assert one.rows(predictions, [[other, p] for p in predictions]).corpus() == pytest.approx(full)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_at_all_is_legal(prediction: str, reference: str) -> None:
    for one in TEXT_METRICS.values():
        assert np.isfinite(one.rows([prediction], [[reference]]).corpus())


def test_every_metric_is_described_and_refuses_wrong_shapes() -> None:
    for name, one in TEXT_METRICS.items():
        assert (one.name, one.better) == (name, "higher")
        assert one.scale and one.doc
        with pytest.raises(ValueError, match="2 predictions"):
            one.rows(["a", "b"], [["a"]])
        with pytest.raises(ValueError, match="no predictions"):
            one.rows([], [])
        with pytest.raises(ValueError, match="row 1 has no reference"):
            one.rows(["a", "b"], [["a"], []])
        with pytest.raises(TypeError, match="not one string"):
            one.rows(["a"], ["a"])


def test_unknown_metric_names_the_nearest_and_all() -> None:
    assert metric("bleu") is METRICS["bleu"]
    with pytest.raises(InputError) as caught:
        metric("rogue1")
    assert "did you mean 'rouge1'" in caught.value.what
    assert all(name in str(caught.value.fix) for name in METRICS)


def test_importing_metrics_imports_no_heavy_library() -> None:
    heavy = {"sacrebleu", "rouge_score", "nltk", "torch"}
    code = f"import sys, tunesmith.metrics; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# --- perplexity and statistics ---


def test_perplexity_weighs_rows_by_their_tokens() -> None:
    rows = perplexity_rows([2.0, 30.0], [1, 9])
    assert rows.corpus() == pytest.approx(np.exp(3.2))
    assert rows.per_row() == pytest.approx(np.exp([2, 30 / 9]))
    assert perplexity_rows([0.0], [7]).corpus() == 1


def test_perplexity_of_a_diverged_model_stays_comparable_and_json_safe() -> None:
    good, bad = perplexity_rows([20.0] * 5, [10] * 5), perplexity_rows([1e5] * 5, [10] * 5)
    outcome = paired_bootstrap(good, bad, **INTERVAL)
    assert outcome.difference > 1e300
    json.dumps(asdict(outcome), allow_nan=False)


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        ([1.0], [0], "at least one token"),
        ([1.0, 2.0], [1], "one length"),
        ([1.0, float("nan")], [1, 1], "not finite, first row 1"),
        ([float("inf")], [1], "not finite"),
    ],
)
def test_perplexity_refuses(sums: list[float], counts: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity_rows(sums, counts)


def test_statistics_refuse_what_has_no_value() -> None:
    with pytest.raises(ValueError, match="no rows"):
        mean_rows([]).corpus()
    with pytest.raises(ValueError, match=r"\[n, k\]"):
        RowStatistics(np.zeros(3), lambda sums: sums)
    with pytest.raises(ValueError, match="1 of 2 rows"):
        mean_rows([1.0, float("inf")])


# --- intervals ---


@pytest.mark.parametrize("name", list(TEXT_METRICS))
def test_identical_systems_differ_by_exactly_nothing(name: str) -> None:
    rows = METRICS[name].rows(PREDICTIONS, REFERENCES)
    again = METRICS[name].rows(PREDICTIONS, REFERENCES)
    outcome = paired_bootstrap(rows, again, **INTERVAL)
    assert (outcome.difference, outcome.low, outcome.high, outcome.n) == (0, 0, 0, 6)
    assert outcome.base == outcome.tuned == rows.corpus()


def test_interval_is_reproducible_and_independent_of_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    base, tuned = mean_rows(rng.integers(0, 2, 37)), mean_rows(rng.integers(0, 2, 37))
    whole = paired_bootstrap(base, tuned, **INTERVAL)
    assert whole == paired_bootstrap(base, tuned, **INTERVAL)
    assert whole != paired_bootstrap(base, tuned, resamples=400, confidence=0.95, seed=1)
    for size in (1, 37 * 7):
        monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", size)
        assert paired_bootstrap(base, tuned, **INTERVAL) == whole


def test_swapping_the_systems_mirrors_the_interval() -> None:
    base = METRICS["chrf"].rows(PREDICTIONS, REFERENCES)
    tuned = METRICS["chrf"].rows([r[0] for r in REFERENCES], REFERENCES)
    one, other = paired_bootstrap(base, tuned, **INTERVAL), paired_bootstrap(tuned, base, **INTERVAL)
    assert one.low is not None and other.low is not None
    assert one.difference == -other.difference > 0
    assert one.low <= one.difference <= one.high
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_pairing_removes_what_both_systems_share() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(size=500)
    gain = rng.normal(0.1, 0.1, size=500)
    outcome = paired_bootstrap(mean_rows(hard), mean_rows(hard + gain), resamples=2000, confidence=0.95, seed=0)
    assert outcome.low is not None
    width = 2 * 1.96 * gain.std() / np.sqrt(500)
    assert outcome.high - outcome.low == pytest.approx(width, rel=0.1)
    alone = bootstrap(mean_rows(hard), resamples=2000, confidence=0.95, seed=0)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * hard.std() / np.sqrt(500), rel=0.1)


def test_coverage_of_a_difference_of_means() -> None:
    rng, covered = np.random.default_rng(3), 0
    for seed in range(300):
        base = rng.random(80) < 0.5
        tuned = np.where(rng.random(80) < 0.3, rng.random(80) < 0.9, base)
        outcome = paired_bootstrap(mean_rows(base), mean_rows(tuned), resamples=400, confidence=0.9, seed=seed)
        covered += outcome.low <= 0.3 * (0.9 - 0.5) <= outcome.high
    assert 0.86 < covered / 300 < 0.94


def test_coverage_of_a_ratio() -> None:
    rng, covered = np.random.default_rng(4), 0
    for seed in range(300):
        counts = rng.integers(1, 40, size=80)
        sums = rng.gamma(2.0, 0.5, size=80) * counts
        outcome = bootstrap(perplexity_rows(sums, counts), resamples=400, confidence=0.9, seed=seed)
        covered += outcome.low <= np.e <= outcome.high
    assert 0.85 < covered / 300 < 0.94


def test_no_interval_is_claimed_from_one_row() -> None:
    outcome = paired_bootstrap(mean_rows([0.0]), mean_rows([1.0]), **INTERVAL)
    assert (outcome.difference, outcome.low, outcome.high, outcome.n) == (1, None, None, 1)
    assert (bootstrap(mean_rows([0.5]), **INTERVAL).value, bootstrap(mean_rows([0.5]), **INTERVAL).low) == (0.5, None)


def test_no_interval_is_claimed_where_a_resample_has_no_value() -> None:
    ratio = RowStatistics(np.array([[1.0, 1.0], [0.0, 0.0]]), lambda sums: sums[..., 1] / sums[..., 0])
    outcome = bootstrap(ratio, **INTERVAL)
    assert (outcome.value, outcome.low, outcome.high) == (1, None, None)
    undefined = RowStatistics(np.zeros((2, 1)), lambda sums: sums[..., 0] * np.nan)
    with pytest.raises(ValueError, match="not a finite number"):
        bootstrap(undefined, **INTERVAL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resamples": 0}, "resamples"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": 95}, "confidence"),
    ],
)
def test_intervals_refuse_wrong_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap(mean_rows([0.0, 1.0]), **{**INTERVAL, **change})


def test_intervals_refuse_missing_and_unpaired_rows() -> None:
    with pytest.raises(ValueError, match="no rows"):
        bootstrap(mean_rows([]), **INTERVAL)
    with pytest.raises(ValueError, match="no rows"):
        paired_bootstrap(mean_rows([]), mean_rows([]), **INTERVAL)
    with pytest.raises(ValueError, match="base has 1, tuned has 2"):
        paired_bootstrap(mean_rows([1]), mean_rows([1, 0]), **INTERVAL)
