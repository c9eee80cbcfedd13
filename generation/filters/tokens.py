"""Texts as tokens, for novelty."""

import string
import unicodedata

import regex

ALPHANUMERIC = (string.ascii_lowercase + string.digits).encode()
ROUGE_BYTES = bytes(byte if byte in ALPHANUMERIC else ord(" ") for byte in range(256))

# Scripts that put no space between words (UAX #29 leaves them to dictionaries): there a character with its marks is a
# token. Elsewhere a run of letters, digits and marks is one.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
UNICODE_WORD = regex.compile(rf"(?V1)[[{UNSPACED}]&&\p{{L}}]\p{{M}}*|[\w--[[{UNSPACED}]&&\p{{L}}]]+")


def rouge_tokens(text: str) -> list[str]:
    """The tokens that rouge_score sees: lower case, runs of a-z and 0-9. Text in other scripts has none."""
    return text.lower().encode("ascii", "replace").translate(ROUGE_BYTES).decode("ascii").split()


def unicode_tokens(text: str) -> list[str]:
    """Words of every script, compatible forms and cases made one."""
    return UNICODE_WORD.findall(unicodedata.normalize("NFKC", text).casefold())
