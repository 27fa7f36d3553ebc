"""Demo data that needs no download: the running Python's own functions, each with a one-sentence summary.

The source files of the standard library are parsed, never imported. The first sentence of each docstring is put into
one house style, or its row is dropped: a verb in the third person first, one sentence of 4 to 20 words, no markup, no
trailing full stop. A base model does not write so by itself, which is what makes the style worth learning.
"""

from __future__ import annotations

import ast
import json
import os
import platform
import random
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.base import InputError
from tunesmith.files import write_text

INSTRUCTION = "Summarise this Python function in one sentence."
VALIDATION_ROWS = 60
TEST_ROWS = 200
FEWEST_TRAIN_ROWS = 1000
LARGEST_HELD_OUT_MODULE = 40
MOST_HELD_OUT_OF_MODULE = 10


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SKIPPED_DIRECTORIES = _words(
    "test tests idlelib lib2to3 site-packages dist-packages turtledemo pydoc_data ensurepip __pycache__"
)
WORDS = range(4, 21)
PIECES = 103
"""How much a prompt and its answer may hold together, in ``_pieces``. With the demo model's chat template around them,
such a row stays under 160 tokens."""

VERBS = _words(
    """
    accept acquire activate add adjust allocate allow analyze append apply arrange ask assemble assert assign
    associate assume attach attempt authenticate await begin bind block build byte-compile cache calculate call
    cancel capitalize capture cast catch center change check choose clean clear clone close collapse collect combine
    commit compare compile complete compose compress compute concatenate configure connect construct consume convert
    copy count create customize deactivate debug decide declare decode decompress decorate decrement define delegate
    delete deliver deregister derive describe deserialize destroy detach detect determine disable disassemble
    discard disconnect discover dispatch display divide draw dump duplicate emit emulate enable encode encrypt
    enqueue ensure enter enumerate erase escape establish evaluate examine exchange execute exit expand expect
    export extend extract fail feed fetch fill filter finalize find finish fire fix flash flatten flush fold forbid
    force forget fork format forward free freeze generate get give grab group guess handle hide highlight identify
    ignore implement import increment indent indicate inform inherit initialise initialize inject inquire insert
    inspect install instantiate instruct interpret interrupt intersect introspect invalidate invert invoke issue
    iterate join keep kill launch leave let limit link list listen load locate lock log look lower lowercase
    maintain make manage map mark match merge modify monitor move multiply negate normalize notify obtain open
    output override pack parse partition paste patch pause peek perform permit pickle place play plot pop populate
    post prepare prepend pretty-print prevent print process produce prompt propagate provide prune pull purge push
    put qualify query queue quit quote raise read reassemble rebuild receive recompile recompute reconstruct record
    recover redirect reduce refresh register reject release reload remember remove rename render reopen repeat
    replace reply report represent request require resample reserve reset resize resolve respond restart restore
    restrict resume retrieve retry return reverse revert rewind rewrite rotate round run save scale scan schedule
    scroll search seek select send separate serialize serve set shift show shuffle shut signal simplify simulate
    skip sleep solve sort spawn specify split start stop store strip subscribe substitute subtract suggest suppress
    suspend swap switch synchronize take tell terminate test throw toggle tokenize trace transfer transform
    translate transmit traverse treat trigger trim truncate try tune turn unbind undo uninstall unlink unload unlock
    unmap unpack unpickle unquote unregister unset unwrap update upgrade uppercase use validate verify visit wait
    wake walk warn wrap write yield zip
    """
)
# Right after one of these the word is a verb; "format string" or "list of names" begins with a noun.
AFTER_A_VERB = _words(
    """
    a an the all any each every some this that these those its their it them itself whether if one two more new
    given another both either None True False self
    """
)
ALSO_NOUNS = _words(
    """
    block cache call cast center change check clone copy count debug default display dump feed filter fix flash
    force fork format forward group guess handle hook import increment index input issue limit link list load lock
    log look map mark match output override page patch pause place plot post process prompt query queue quote
    range record reference repeat replay report request reserve reset round run scale scan search select sort
    split start stop store sum switch test trace transfer transform trigger use wait warp wrap write yield zip
    """
)
PHRASAL = {"lookup": "Looks up", "setup": "Sets up", "shutdown": "Shuts down", "cleanup": "Cleans up"}
# A verb behind one of these is an infinitive or belongs to another subject: "try to open and read the file".
GOVERNING = re.compile(
    r"\b(to|that|which|who|can|could|will|would|should|must|may|might|not|does|do|did|let|make|helps?|cannot|shall|if"
    r"|when|whether|while|until|unless|where|how|because|so|as|than|has|have|be|is|are|was|were)\b"
)
UNFIT = re.compile(
    r"\b(I|I'm|me|my|you|your|yours|we|us|our|let's|XXX|TODO|FIXME|deprecated|obsolete|below|above|following|follows"
    r"|please|etc|e\.g|i\.e|see|https?://|don't|hack|kludge|stub|internal use|override this|overrid(?:den|e in)"
    r"|backwards?.compatib\w+)\b|\.\.\.|->|>>>|=>|::|--",
    re.IGNORECASE,
)
MARKUP = (
    (re.compile(r":[\w:]+:`(?:~(?:\w+\.)*)?([^`<]+?)(?: <[^`]*>)?`"), r"\1"),
    (re.compile(r"``([^`]+)``"), r"\1"),
    (re.compile(r"`([^`']+)['`]"), r"\1"),
    (re.compile(r"(?<![\w*])\*\*?(\w[\w .]*?)\*\*?(?![\w*])"), r"\1"),
    (re.compile(r"\s+"), " "),
)
LEFT_HANGING = re.compile(r"\b(a|an|the|and|or|at|by|for|from|in|of|on|to|with|as|that|which|is|are|like)$")
QUOTE = re.compile(r"'(?!\w)|(?<!\w)'")
SENTENCE_END = re.compile(r"(?<!e\.g)(?<!i\.e)(?<!vs)(?<!cf)(?<!\betc)[.!?](?=\s|$)|\s--?\s")
OPENINGS = (
    re.compile(r"^internal(?:ly)?(?: use)?(?: helper| method| function)?\s?[:.]\s+", re.IGNORECASE),
    re.compile(
        r"^(?:an? |the |this )?(?:(?:simple|small|internal|private|convenience|common|class|static|main|low-level) )*"
        r"(?:(?:helper|utility|hook|callback) )?(?:function|method|helper|routine|utility|hook)s? (?:used )?to ",
        re.IGNORECASE,
    ),
    re.compile(r"^this (?:function|method|helper|routine|utility|coroutine|property) (?=\w+s )", re.IGNORECASE),
)


class _Unfit(ValueError):
    """Why a docstring cannot be put into the house style."""


class _Row(NamedTuple):
    group: str
    name: str
    prompt: str
    completion: str


def house_style(docstring: str) -> str:
    """Returns the docstring's first sentence in the house style, for example ``Returns the number of open files``.

    Raises:
        ValueError: the sentence does not fit the rules; the message names the rule.
    """
    sentence = _first_sentence(docstring)
    for pattern, replacement in MARKUP:
        sentence = pattern.sub(replacement, sentence)
    for opening in OPENINGS:
        sentence = opening.sub("", sentence, count=1)
    clauses = sentence.split("; ")
    sentence = clauses[0] + "".join(f" and {clause}" for clause in clauses[1:] if clause.split(" ")[0] in VERBS)
    sentence = re.sub(r"\s*\([^()]*\)$", "", sentence.strip(" .,:;")).strip(" .,:;")
    if re.match(r"(True|False) (if|when|iff)\b", sentence):
        sentence = f"Return {sentence}"
    sentence = re.sub(r"\b(true|false|none)(?= (?:if|when|iff|on|otherwise)\b)", lambda m: m[0].capitalize(), sentence)
    sentence = re.sub(r"\biff\b", "if and only if", sentence)
    if UNFIT.search(sentence):
        raise _Unfit("speaks to the reader or of other text")
    if re.search(r"[`*|\\<>{}=@~^#\[\]:]", sentence) or not sentence.isascii():
        raise _Unfit("markup or code in the sentence")
    if sentence.count("(") != sentence.count(")") or len(QUOTE.findall(sentence)) % 2 or sentence.count('"') % 2:
        raise _Unfit("unbalanced brackets or quotes")
    if LEFT_HANGING.search(sentence):
        raise _Unfit("ends without its object")
    sentence = _third_person(sentence)
    if len(sentence.split()) not in WORDS:
        raise _Unfit("too few or too many words")
    return sentence


def _first_sentence(docstring: str) -> str:
    lines = docstring.strip().splitlines() or [""]
    kept = [lines[0].strip()]
    for before, line in pairwise(lines):
        ends = not line.strip() or line.startswith((" ", "\t", "-", "*", "@", ":", ">>>"))
        # A short line before a capital is a title without a full stop.
        if ends or (line[0].isupper() and len(before) < 60):
            break
        kept.append(line.strip())
    paragraph = " ".join(kept)
    if paragraph.endswith((":", ",")):
        raise _Unfit("introduces a list")
    end = SENTENCE_END.search(paragraph)
    return paragraph[: end.start()] if end else paragraph


def _third_person(sentence: str) -> str:
    words = sentence.split(" ")
    first = words[0].lower().strip(",") if words else ""
    at = 0
    if first.endswith("ly") and first not in VERBS and len(words) > 1:
        at = 1
    following = words[at + 1] if len(words) > at + 1 else ""
    words[at] = _inflected_first(words[at], following)
    if following in THIRD_PERSON or words[at].endswith(f" {following}"):
        raise _Unfit("begins with the function's name")
    if following in {"and", "or"} and len(words) > at + 2:
        at += 2
        if words[at] not in VERBS - ALSO_NOUNS:
            raise _Unfit("a second verb of unclear form")
        words[at] = _inflected(words[at])
    for i in range(at + 1, len(words)):
        if words[i] in VERBS and _joined(words, i):
            following = words[i + 1] if i + 1 < len(words) else ""
            clear = following in AFTER_A_VERB or words[i] in {"return", "raise"}
            if not clear or GOVERNING.search(" ".join(words[at + 1 : i])):
                raise _Unfit("a second verb of unclear form")
            words[i] = _inflected(words[i])
    text = re.sub(r"(?<=, )(return|rais)e?s (?=\w)", r"\1ing ", " ".join(words))
    return text[:1].upper() + text[1:]


def _joined(words: list[str], i: int) -> bool:
    before = words[i - 1]
    if before.endswith("ly") or before in {"then", "also", "maybe"}:
        before = words[i - 2]
    return (
        before in {"and", "or", "but", "else", "then", "and/or"}
        or before.endswith((",", ";", "("))
        or words[i - 1] == "then"
    )


def _inflected_first(word: str, following: str) -> str:
    base = word.lower()
    if base in PHRASAL:
        return PHRASAL[base]
    if base in THIRD_PERSON:
        base = THIRD_PERSON[base]
    elif base not in VERBS:
        raise _Unfit("does not begin with a verb")
    if (
        base in ALSO_NOUNS
        and following not in AFTER_A_VERB
        and not (base in {"check", "wait", "search", "look", "test"} and following in ("for", "until", "that"))
    ):
        raise _Unfit("begins with a word that may be a noun")
    return _inflected(base)


def _inflected(verb: str) -> str:
    if verb.endswith(("s", "x", "z", "ch", "sh", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


THIRD_PERSON = {_inflected(verb): verb for verb in VERBS}


def write_demo_data(directory: Path, seed: int = 0) -> dict[str, Any]:
    """Writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` of prompt and completion into ``directory``.

    The same Python and seed give the same bytes. All functions of one module stand on one side, and no prompt and no
    answer (case and white space folded) stands on two.

    Returns:
        ``python`` (its version), ``modules``, the number of rows of each file, and ``dropped``: functions with a
        docstring that were left out, counted by reason.

    Raises:
        InputError: this Python carries too little source code of its standard library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    dropped: Counter[str] = Counter()
    groups: dict[str, list[_Row]] = defaultdict(list)
    for row in _distinct(_rows(root, dropped), dropped):
        groups[row.group].append(row)
    sides = _sides(groups, random.Random(seed), dropped)
    if len(sides["train"]) < FEWEST_TRAIN_ROWS or len(sides["test"]) < TEST_ROWS:
        raise InputError(
            f"this Python's standard library gives only {len(sides['train'])} training rows",
            where=root,
            fix="Use a Python that carries its standard library as .py files, or pass data of your own.",
        )
    directory.mkdir(parents=True, exist_ok=True)
    for side, rows in sides.items():
        lines = [
            json.dumps({"completion": row.completion, "prompt": row.prompt}, ensure_ascii=False, sort_keys=True)
            for row in rows
        ]
        write_text(directory / f"{side}.jsonl", "\n".join(lines) + "\n")
    return {
        "python": platform.python_version(),
        "modules": len(groups),
        **{side: len(rows) for side, rows in sides.items()},
        "dropped": dict(dropped.most_common()),
    }


def _rows(root: Path, dropped: Counter[str]) -> Iterator[_Row]:
    for path in _sources(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            dropped["file cannot be parsed"] += 1
            continue
        for node in _functions(tree):
            docstring = ast.get_docstring(node)
            if docstring is None:
                continue
            try:
                completion = house_style(docstring)
                group = _group(path.relative_to(root).parts[0])
                yield _Row(group, node.name, _prompt(node, completion), completion)
            except _Unfit as reason:
                dropped[str(reason)] += 1


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields every function below ``node``, outer ones first; ``ast.walk`` would visit the expressions too."""
    for field in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            yield from _functions(child)


def _sources(root: Path) -> Iterator[Path]:
    for directory, below, files in os.walk(root):
        # Pruned here and not filtered later: site-packages can hold a hundred times the files of the library itself.
        below[:] = sorted(set(below) - SKIPPED_DIRECTORIES)
        yield from (Path(directory, name) for name in sorted(files) if name.endswith(".py"))


def _group(name: str) -> str:
    """Returns one name for the twins among modules, such as ``decimal`` and ``_pydecimal``."""
    name = name.removesuffix(".py").lstrip("_").removeprefix("py")
    return "path" if name in {"ntpath", "posixpath", "genericpath", "pathlib"} else name


def _prompt(node: ast.FunctionDef | ast.AsyncFunctionDef, completion: str) -> str:
    node.body = node.body[1:]
    if all(isinstance(s, ast.Pass | ast.Raise) or ast.unparse(s) == "..." for s in node.body):
        raise _Unfit("no body to summarise")
    lines = ast.unparse(node).splitlines()
    room = PIECES - _pieces(completion)
    signature = next(i for i, line in enumerate(lines) if line.startswith(("def ", "async def "))) + 1
    kept: list[str] = []
    for line in lines:
        room -= _pieces(line)
        if room < 0:
            break
        kept.append(line)
    if len(kept) <= signature:
        raise _Unfit("signature and first line too long")
    if len(kept) < len(lines):
        kept.append("    ...")
    return INSTRUCTION + "\n\n" + "\n".join(kept)


def _pieces(text: str) -> int:
    """Returns about how many tokens ``text`` has; the demo model's tokenizer makes at most 1.2 times as many."""
    return len(re.findall(r"[A-Z]?[a-z]{1,7}|[A-Z]{1,3}|\d|[^\w\s]{1,3}|_|[^\W\d_]", text)) + 1


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _distinct(rows: Iterator[_Row], dropped: Counter[str]) -> Iterator[_Row]:
    seen: set[tuple[str | None, str]] = set()
    for row in rows:
        keys = {(None, _folded(row.prompt)), (row.name, _folded(row.completion))}
        if keys & seen:
            dropped["duplicate"] += 1
        else:
            yield row
        seen |= keys


def _sides(groups: dict[str, list[_Row]], rng: random.Random, dropped: Counter[str]) -> dict[str, list[_Row]]:
    """Gives whole modules to test and validation, then the rest to train, and drops what another side has."""
    # A large package would fill the held-out rows with one subject.
    names = sorted(name for name, rows in groups.items() if len(rows) <= LARGEST_HELD_OUT_MODULE)
    rng.shuffle(names)
    sides: dict[str, list[_Row]] = {}
    taken: set[str] = set()
    seen: set[str] = set()
    for side, wanted in (("test", TEST_ROWS), ("validation", VALIDATION_ROWS)):
        pool: list[_Row] = []
        while names and len(pool) < wanted:
            name = names.pop()
            taken.add(name)
            fresh: list[_Row] = []
            for row in rng.sample(groups[name], len(groups[name])):
                if len(fresh) < MOST_HELD_OUT_OF_MODULE and not _keys(row) & seen:
                    fresh.append(row)
                    seen |= _keys(row)
            pool += fresh
        sides[side] = rng.sample(pool, min(wanted, len(pool)))
    dropped["module held out"] += sum(len(groups[name]) for name in taken) - sum(map(len, sides.values()))
    rest = [row for name, rows in sorted(groups.items()) if name not in taken for row in rows]
    sides["train"] = [row for row in rest if not _keys(row) & seen]
    dropped["also in the held-out rows"] += len(rest) - len(sides["train"])
    rng.shuffle(sides["train"])
    return sides


def _keys(row: _Row) -> set[str]:
    return {_folded(row.prompt), _folded(row.completion)}
