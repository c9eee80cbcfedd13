"""Words of texts in any script."""

import regex

# Scripts without spaces between words (UAX #29 leaves their word boundaries to dictionaries). In these a character with
# its marks stands for a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
UNSPACED_CHARACTER = regex.compile(rf"(?V1)[[{UNSPACED}]&&\p{{L}}]\p{{M}}*")
_WORD = regex.compile(rf"{UNSPACED_CHARACTER.pattern}|[\S--[[{UNSPACED}]&&\p{{L}}]]+")


def split_words(text: str) -> list[str]:
    """The words of a text: what white space separates, and each character of a script without it."""
    if text.isascii() or not UNSPACED_CHARACTER.search(text):
        return text.split()
    return [word for word in _WORD.findall(text) if any(map(str.isalnum, word))]
