"""When two answers count as the same, and how texts are compared without being kept.

| rule         | same                                                                       |
| ------------ | -------------------------------------------------------------------------- |
| `exact`      | equal text; white space at the ends does not count                         |
| `normalised` | equal after compatibility forms, case, runs of white space and punctuation |
|              | at the ends are made alike: for answers that are judged, not compared      |
"""

import hashlib
import string
import unicodedata

from gearfall.core.errors import InvalidRequest

EXACT, NORMALISED = "exact", "normalised"
RULES = (EXACT, NORMALISED)
_KEY_BYTES = 8


def parse_rule(name: str, *, param: str) -> str:
    """Return `name` if it is a rule, else raise InvalidRequest naming `param`."""
    if name not in RULES:
        raise InvalidRequest(f"{param} {name!r} is not one of {', '.join(RULES)}", param=param)
    return name


def answer_key(text: str, rule: str) -> str:
    """Return 16 hex digits, equal for texts that are the same by `rule`, else but for chance not.

    No secret: a short text can be guessed from it.
    """
    compared = _normalised(text) if rule == NORMALISED else text.strip()
    return hashlib.blake2b(compared.encode("utf-8", "replace"), digest_size=_KEY_BYTES).hexdigest()


def _normalised(text: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.strip(string.punctuation + " ")
