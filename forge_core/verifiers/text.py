"""Verifiers that look at the text: equal, equal in content, equal as a number, of a form, of a length."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable
from fractions import Fraction

import regex

from forge_core.config.verifiers import FormatParams, LengthParams, NumericParams, RegexParams
from forge_core.environments.base import Prompt
from forge_core.verifiers.base import Response

MATCH_SECONDS = 2.0
"""Time of one search; a response that makes it take longer does not match."""
_ARTICLES = regex.compile(r"\b(a|an|the)\b")
_NUMBER = regex.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:\s*/\s*[-+]?\d+(?:\.\d+)?)?\s*\\?%?"
)
_LONGEST_NUMBER = 64
"""Characters of a number at most: Python takes ever longer for more digits."""

Score = Callable[[Prompt, Response], float]


def extractor(pattern: str | None) -> Callable[[str], str | None]:
    """What finds an answer in a text: the last match, or its first group; without a pattern all of it."""
    if pattern is None:
        return str.strip
    compiled = regex.compile(pattern, flags=regex.DOTALL)

    def extract(text: str) -> str | None:
        try:
            matches = list(compiled.finditer(text, timeout=MATCH_SECONDS))
        except TimeoutError:
            return None
        if not matches:
            return None
        found = matches[-1]
        return str(found.group(1) or "" if compiled.groups else found.group()).strip()

    return extract


def compared(
    is_same: Callable[[str, str], bool], extract: str | None, extract_reference: str | None
) -> Score:
    """1 where the answer in a response is the same as the reference, else 0; without a reference always 0."""
    of_response, of_reference = extractor(extract), extractor(extract_reference)

    def score(prompt: Prompt, response: Response) -> float:
        given, wanted = of_response(response.text), of_reference(prompt.answer)
        return float(given is not None and bool(wanted) and is_same(given, str(wanted)))

    return score


def is_exact(given: str, wanted: str) -> bool:
    """Equal, character by character."""
    return given == wanted


def is_normalised(given: str, wanted: str) -> bool:
    """Equal but for case, articles, punctuation, blanks and forms of Unicode, as SQuAD's evaluation does it."""
    return _normal(given) == _normal(wanted)


def _normal(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = folded.translate(str.maketrans("", "", string.punctuation))
    words = _ARTICLES.sub(" ", bare).split()
    return " ".join(words) or folded.strip()


def numeric(params: NumericParams) -> Callable[[str, str], bool]:
    """Whether the last numbers of two texts are as near as the parameters allow."""

    def is_near(given: str, wanted: str) -> bool:
        left, right = last_number(given), last_number(wanted)
        if left is None or right is None:
            return False
        allowed = max(Fraction(params.absolute), abs(right) * Fraction(params.relative))
        return abs(left - right) <= allowed

    return is_near


def last_number(text: str) -> Fraction | None:
    """The last number of a text: `1,234`, `-.5`, `1e-3`, `1/2`, `50%`; None if there is none."""
    found = None
    try:
        for match in _NUMBER.finditer(text, timeout=MATCH_SECONDS):
            if any(map(str.isdigit, match.group())):
                found = match.group()
    except TimeoutError:
        return None
    if found is None or len(found) > _LONGEST_NUMBER:
        return None
    bare = found.replace(",", "").replace("\\", "").strip()
    is_percentage = bare.endswith("%")
    above, _, below = bare.removesuffix("%").partition("/")
    try:
        number = Fraction(above.strip()) / Fraction(below.strip() or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return number / 100 if is_percentage else number


def matches(params: RegexParams) -> Score:
    """1 where the pattern is found."""
    compiled = regex.compile(params.pattern, flags=regex.DOTALL)
    find = compiled.fullmatch if params.whole else compiled.search

    def score(prompt: Prompt, response: Response) -> float:
        text = response.text.strip() if params.whole else response.text
        try:
            return float(find(text, timeout=MATCH_SECONDS) is not None)
        except TimeoutError:
            return 0.0

    return score


def has_form(params: FormatParams) -> Score:
    """1 where a response is made of the elements, each once, and nothing else."""

    def score(prompt: Prompt, response: Response) -> float:
        rest = response.text.strip()
        for tag in params.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if not rest.startswith(opening):
                return 0.0
            inner, closed, rest = rest.removeprefix(opening).partition(closing)
            marks = (mark for each in params.tags for mark in (f"<{each}>", f"</{each}>"))
            if not closed or not inner.strip() or any(mark in inner for mark in marks):
                return 0.0
            rest = rest.strip()
        return float(not rest)

    return score


def soft_overlong(params: LengthParams, max_tokens: int) -> Score:
    """0 as far as max_tokens - overlong_tokens, -1 from max_tokens on, on a line between: DAPO, Yu et al. 2025, arXiv
    2503.14476, equation 13."""
    longest, soft = params.max_tokens or max_tokens, params.overlong_tokens

    def score(prompt: Prompt, response: Response) -> float:
        beyond = len(response.token_ids) - (longest - soft)
        return -min(max(beyond / soft, 0.0), 1.0) or 0.0

    return score
