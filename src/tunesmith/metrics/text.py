"""Metrics that compare a prediction with one or more references, by name.

With several references the best one counts, except for BLEU and chrF, which have multi-reference definitions of their
own. An empty prediction or reference is a text like any other.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tunesmith.metrics.statistics import RowStatistics, mean_rows

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric as SacrebleuMetric

References = Sequence[Sequence[str]]
"""For each row its references, one or more; rows may have different numbers of them."""


@dataclass(frozen=True)
class Metric:
    """A named way to compare predictions with references.

    Attributes:
        name: the key in `METRICS`.
        better: whether more or less of it is better.
        scale: the range and what its ends mean.
        doc: what it measures, its normalisation and its source, for people.
        rows: ``rows(predictions, references)`` with n predictions and, for each, one or more references gives the
            statistics ``[n, k]``. Raises ValueError for unequal lengths, no rows or a row without references, and
            TypeError for a row whose references are one bare string.
    """

    name: str
    better: Literal["higher", "lower"]
    scale: str
    doc: str
    rows: Callable[[Sequence[str], References], RowStatistics]


def perplexity_rows(nll_sums: ArrayLike, token_counts: ArrayLike) -> RowStatistics:
    """Perplexity: exp(sum of negative log-likelihoods / sum of tokens) over all rows; lower is better, 1 at best.

    It saturates at the largest float instead of becoming infinite, so that a diverged model still compares as worse.

    Args:
        nll_sums: ``[n]``, each row's negative log-likelihood summed over its tokens, in nats, finite.
        token_counts: ``[n]``, how many tokens each sum runs over, at least 1.

    Raises:
        ValueError: unequal lengths, a sum that is not finite, or a count below 1 (a resample of such rows alone would
            have no value).
    """
    sums, counts = np.asarray(nll_sums, dtype=np.float64), np.asarray(token_counts, dtype=np.float64)
    if sums.shape != counts.shape or sums.ndim != 1:
        raise ValueError(f"perplexity needs two lists of one length, not shapes {sums.shape} and {counts.shape}")
    empty = np.flatnonzero(counts < 1)
    if empty.size:
        raise ValueError(f"perplexity needs at least one token in every row; row {empty[0]} has {counts[empty[0]]:g}")
    return RowStatistics(np.stack([counts, sums], axis=-1), _perplexity)


def _perplexity(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(np.minimum(sums[..., 1] / sums[..., 0], np.log(np.finfo(np.float64).max)))


def bits_per_byte_rows(nll_sums: ArrayLike, byte_counts: ArrayLike) -> RowStatistics:
    """Bits per byte: negative log-likelihoods in bits over bytes of text, over all rows; lower is better, 0 at best.

    Unlike perplexity per token it compares models with different vocabularies (Gao et al. 2020, The Pile, section 3.1).

    Args:
        nll_sums: ``[n]``, each text's negative log-likelihood in nats, its end included, finite.
        byte_counts: ``[n]``, bytes of each text in UTF-8, at least 1.

    Raises:
        ValueError: as `perplexity_rows`.
    """
    stat = perplexity_rows(nll_sums, byte_counts)
    return RowStatistics(stat.values, _bits_per_byte)


def _bits_per_byte(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    return sums[..., 1] / sums[..., 0] / np.log(2)


def check_rows(predictions: Sequence[str], references: References) -> None:
    """Raises ValueError or TypeError for what is no list of predictions with references each."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(references)} rows of references")
    if not predictions:
        raise ValueError("there are no predictions to score")
    for row, texts in enumerate(references):
        # a string is a sequence of strings to the type checker too, and would be scored letter by letter
        if isinstance(texts, str):
            raise TypeError(f"row {row}: the references must be a list of strings, not one string")
        if not texts:
            raise ValueError(f"row {row} has no reference")


# --- a score for each pair of texts, the best reference of a row counts ---


def _best_of(score: Callable[[str, str], float], predictions: Sequence[str], references: References) -> RowStatistics:
    check_rows(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return mean_rows([max(score(prediction, text) for text in texts) for prediction, texts in pairs])


def _exact_match(prediction: str, reference: str) -> float:
    return float(prediction.strip() == reference.strip())


def _accuracy(prediction: str, reference: str) -> float:
    return float(prediction.strip().casefold() == reference.strip().casefold())


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _f1(prediction: str, reference: str) -> float:
    predicted, wanted = _squad_tokens(prediction), _squad_tokens(reference)
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted))


def _contains(prediction: str, reference: str) -> float:
    said, wanted = _squad_tokens(prediction), _squad_tokens(reference)
    if not wanted:
        return float(not said)
    places = range(len(said) - len(wanted) + 1)
    return float(any(said[at : at + len(wanted)] == wanted for at in places))


def _squad_tokens(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


# --- ROUGE ---


def _rouge(name: str, predictions: Sequence[str], references: References) -> RowStatistics:
    from rouge_score.rouge_scorer import RougeScorer

    check_rows(predictions, references)
    scorer = RougeScorer([name], tokenizer=UnicodeTokenizer())
    pairs = zip(predictions, references, strict=True)
    return mean_rows([scorer.score_multi(texts, prediction)[name].fmeasure for prediction, texts in pairs])


_SPACELESS = re.compile(
    "["
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\u3100-\u312f\u31a0-\u31bf"  # kana, Bopomofo
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "]"
)
_VARIATION_SELECTOR = re.compile("[\ufe00-\ufe0f]")
_TOKEN = re.compile("w[wm]*|cm*")


class UnicodeTokenizer:
    """rouge-score's tokenizer with stemming, extended to letters beyond ASCII, which rouge-score drops in silence.

    A text whose letters, marks and digits are all ASCII gives exactly rouge-score's tokens. Words with other letters
    are kept whole, in lower case, composed (NFC), with their combining marks and unstemmed, since the Porter stemmer
    knows English only. Scripts written without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) give one token a
    character, as sacrebleu's zh tokenizer does for Chinese. Symbols and emoji are dropped as rouge-score drops them.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        # nltk's stemmer takes 30 µs a word and would be nearly all of ROUGE's time
        self._default = lru_cache(maxsize=2**16)(DefaultTokenizer(use_stemmer=True).tokenize)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of ``text``, in order."""
        composed = unicodedata.normalize("NFC", text.lower())
        kinds = "".join(map(_kind, composed))
        words = [composed[match.start() : match.end()] for match in _TOKEN.finditer(kinds)]
        return [token for word in words for token in (self._default(word) if word.isascii() else [word])]


@lru_cache(maxsize=2**16)
def _kind(character: str) -> Literal["w", "c", "m", " "]:
    """Part of a word, a word by itself, a mark on the character before it, or none of these."""
    category = unicodedata.category(character)
    # the selector behind an emoji digit is formally a mark, and would make it another word than the digit
    if category in ("Mn", "Mc") and not _VARIATION_SELECTOR.match(character):
        return "m"
    if _SPACELESS.match(character) and category[0] in "LN":
        return "c"
    return "w" if category[0] == "L" or category == "Nd" else " "


# --- BLEU and chrF ---


def _bleu(predictions: Sequence[str], references: References) -> RowStatistics:
    from sacrebleu.metrics.bleu import BLEU

    # force only keeps sacrebleu from warning about text that looks tokenized
    return _sacrebleu(BLEU(force=True), predictions, references)


def _chrf(predictions: Sequence[str], references: References) -> RowStatistics:
    from sacrebleu.metrics.chrf import CHRF

    return _sacrebleu(CHRF(), predictions, references)


def _sacrebleu(scorer: SacrebleuMetric, predictions: Sequence[str], references: References) -> RowStatistics:
    check_rows(predictions, references)
    # sacrebleu wants the first references of all rows, then the second ones …, and None where a row has no more
    by_rank = list(zip_longest(*references))
    # the methods that sacrebleu's own significance tests are made of; no public one gives chrF's statistics
    statistics = scorer._extract_corpus_statistics(predictions, by_rank)
    return RowStatistics(np.array(statistics, dtype=np.float64), partial(_sacrebleu_value, scorer))


def _sacrebleu_value(scorer: SacrebleuMetric, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    flat = sums.reshape(-1, sums.shape[-1]).tolist()
    return np.array([scorer._compute_score_from_stats(row).score for row in flat]).reshape(sums.shape[:-1])


_UNIT = "0 to 1"
_PERCENT = "0 to 100"
_ROUGE_SOURCE = (
    "F-measure with Porter stemming (Lin, 2004; library rouge-score). Equal to rouge-score on ASCII text; other "
    "letters make words, or single characters in scripts without spaces. A text without letters and digits scores 0."
)

TEXT_METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric(
            "exact_match",
            "higher",
            f"{_UNIT}: the share of rows that match",
            "The prediction equals a reference after white space at both ends is stripped; case, punctuation, inner "
            "white space and Unicode form count.",
            partial(_best_of, _exact_match),
        ),
        Metric(
            "accuracy",
            "higher",
            f"{_UNIT}: the share of rows with the right label",
            "The predicted label equals a reference after stripping white space and folding case.",
            partial(_best_of, _accuracy),
        ),
        Metric(
            "f1",
            "higher",
            f"{_UNIT}: mean over rows",
            "F1 of the shared words after lower-casing and removing ASCII punctuation and English articles (Rajpurkar "
            "et al., 2016; SQuAD 2.0's script: two texts without words match). Words are what stands between white "
            "space, so it is coarse for scripts without spaces: use chrf there.",
            partial(_best_of, _f1),
        ),
        Metric(
            "contains",
            "higher",
            f"{_UNIT}: the share of rows whose prediction contains a reference",
            "The words of a reference stand in the prediction, in one piece, after the normalisation of f1; for facts "
            "that models tell in sentences (Mallen et al., 2023). It rewards saying much.",
            partial(_best_of, _contains),
        ),
        Metric(
            "rouge1", "higher", f"{_UNIT}: mean over rows", f"Shared words, {_ROUGE_SOURCE}", partial(_rouge, "rouge1")
        ),
        Metric(
            "rouge2",
            "higher",
            f"{_UNIT}: mean over rows",
            f"Shared word pairs, {_ROUGE_SOURCE}",
            partial(_rouge, "rouge2"),
        ),
        Metric(
            "rougeL",
            "higher",
            f"{_UNIT}: mean over rows",
            f"Longest common subsequence of words, {_ROUGE_SOURCE}",
            partial(_rouge, "rougeL"),
        ),
        Metric(
            "bleu",
            "higher",
            f"{_PERCENT}: of the corpus, not a mean over rows",
            "Precision of one to four words with a brevity penalty (Papineni et al., 2002; library sacrebleu, its "
            "defaults: tokenizer 13a, exponential smoothing). Without one prediction of four words it is 0 even when "
            "all are right. Scripts without spaces are not split: use chrf there.",
            _bleu,
        ),
        Metric(
            "chrf",
            "higher",
            f"{_PERCENT}: of the corpus, not a mean over rows",
            "F2 of one to six characters (Popović, 2015; library sacrebleu, its defaults). Works for every script.",
            _chrf,
        ),
    )
}
"""Every metric that compares texts as they are, by name."""
