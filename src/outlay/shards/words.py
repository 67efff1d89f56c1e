"""Words of a text as every scorer counts them, and texts named by what they say."""

from __future__ import annotations

import hashlib
import re
import unicodedata

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def words_of(text: str) -> list[str]:
    """Words, compatibility-normalized (NFKC) and case-folded; an inner apostrophe joins."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


def content_of(text: str) -> bytes:
    """A 128-bit hash of a text's words: equal for texts that differ in case and punctuation."""
    return hashlib.blake2b(" ".join(words_of(text)).encode(), digest_size=16).digest()
