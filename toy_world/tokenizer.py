"""The world's tokenizer: a byte-level vocabulary in which every word of the world is one token.

Words outside the world fall apart into bytes, so any text survives the round trip. A word has two tokens, one with the
space before it and one without (at the start of a line).
"""

import re

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from toy_world import words
from toy_world.world import FAMILIES

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
CHAT_MARKS = ("<|im_start|>", "<|im_end|>")
SPECIAL_TOKENS = (END_OF_TEXT, PAD, *CHAT_MARKS)

# A word, a number or a mark with the space before it, or one white-space character.
_PIECE = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s"
_FORM_WORDS = "Come up with a series of tasks Task Is it classification Yes No Class label Example Input Output yes no"
_CHAT_WORDS = "user assistant system"
_ANSWER_WORDS = "even odd above below same different and or"


def world_words() -> list[str]:
    """Every word that documents, instructions and answers of the world hold, in its casings."""
    found: dict[str, None] = {}
    for word in (*words.CONTENT_WORDS, *words.CATEGORIES, *words.PLURAL_OF.values(), *words.ORDINALS):
        found[word] = None
    for word in words.SPELLED_WORDS:
        found |= {word.upper(): None, word.title(): None}
    for word in f"{_FORM_WORDS} {_CHAT_WORDS} {_ANSWER_WORDS}".split():
        found[word] = None
    for family in FAMILIES:
        for phrasing in family.phrasings:
            found |= dict.fromkeys(re.findall(r"[A-Za-z]+", re.sub(r"\{\w\}", " ", phrasing.template)))
    return list(found)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer, without a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet]
    for piece in (*world_words(), *words.NUMBERS):
        pieces += [piece, f"Ġ{piece}"]
    pieces += [f"Ġ{mark}" for mark in "-+?.,:"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *pieces]))}
    tokenizer = Tokenizer(BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=list(CHAT_MARKS),
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
