"""Settings of the filters. A recipe has lists of filters, and each entry has a `type` and its settings.

A filter reads the `fields` of a draft: instruction, input or output. It skips an output that is not written yet. The
filters of a list are applied in order, and the first rejection decides.
"""

import string
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from cluster.config import StrictModel

FieldName = Literal["instruction", "input", "output"]

# Words of tasks that a text model cannot do (Self-Instruct, `bootstrap_instructions.py`).
BLACKLIST = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to"),
)
# The same and more media (Stanford Alpaca, `generate_instruction.py`).
ALPACA_BLACKLIST = (*BLACKLIST, "video", "audio", "music", "flowchart", "diagram")

# Pieces of the prompts of Self-Instruct, Alpaca and Evol-Instruct. A model that writes one has copied its prompt
# (Evol-Instruct, Xu et al., 2023, elimination rule 4).
PROMPT_MARKERS = (
    *("Instruction:", "Input:", "Output:", "Class label:", "Example 1", "<noinput>", "###"),
    *("#Given Prompt#", "#Rewritten Prompt#", "#Created Prompt#", "#New Prompt#"),
    *("given prompt", "rewritten prompt", "created prompt", "new prompt"),
)
# Phrases of refusals and of assistants about themselves. "as an ai" and two more are from h2o-wizardlm (`wizardlm.py`).
# A person who declines an invitation is "unable to attend" and "can't help but smile", so the verbs are an assistant's.
REFUSALS = (
    *("as an ai", "ai assistant", "how can i assist", "as a language model", "as a large language model"),
    *("i cannot help you", "i can't help you", "i do not have access to", "i don't have access to"),
    *(
        f"{start} {verb}"
        for start in (
            "i cannot",
            "i can't",
            "i can not",
            "i'm unable to",
            "i am unable to",
            "i'm not able to",
            "i am not able to",
        )
        for verb in (
            *("assist", "help with", "fulfill", "comply", "provide", "access", "browse", "open", "generate", "create"),
            *("answer", "complete this", "do that", "see the", "view the", "write a", "engage in"),
        )
    ),
    *("sorry, but i can't", "sorry, but i cannot", "sorry, i can't", "sorry, i cannot", "i apologize, but i"),
    *("作为一个人工智能", "作为人工智能", "作为一个ai", "作为ai", "作为一个语言模型", "我是一个人工智能"),
    *("抱歉，我无法", "抱歉，我不能", "抱歉，但我", "对不起，我无法", "对不起，我不能", "对不起，但我", "我无法提供"),
    *("als ki-sprachmodell", "als ki-modell", "als künstliche intelligenz", "tut mir leid, aber ich kann"),
    *("en tant que modèle de langage", "en tant qu'ia", "en tant qu'assistant", "désolé, mais je ne peux"),
    *("como modelo de lenguaje", "lo siento, pero no puedo", "como modelo de linguagem", "desculpe, mas não posso"),
    *("как языковая модель", "как искусственный интеллект", "как ии", "извините, но я не могу"),
    *("aiとして", "言語モデルとして", "申し訳ありませんが、お答え", "ai 언어 모델로서", "죄송하지만"),
)
# How the reasoning of a model begins that no mark sets apart from its answer.
REASONING_BEGINNINGS = (
    *(f"{start} the user" for start in ("okay,", "okay, so", "ok,", "ok, so", "alright,", "hmm,")),
    *("the user wants me to", "the user is asking", "the user asks me", "we need to answer", "thinking process:"),
)
# English function words without `no`, `not`, `a` and `i`: each of these four is a whole answer to many tasks.
STOP_WORDS = (
    *("about", "above", "after", "again", "all", "also", "am", "an", "and", "any", "are", "as", "at", "be", "because"),
    *("been", "before", "being", "below", "between", "both", "but", "by", "can", "could", "did", "do", "does", "doing"),
    *("down", "during", "each", "few", "for", "from", "further", "had", "has", "have", "having", "he", "her", "here"),
    *("hers", "herself", "him", "himself", "his", "how", "if", "in", "into", "is", "it", "its", "itself", "just", "me"),
    *("more", "most", "my", "myself", "nor", "of", "off", "on", "once", "only", "or", "other", "our", "ours"),
    *("ourselves", "out", "over", "own", "same", "she", "should", "so", "some", "such", "than", "that", "the", "their"),
    *("theirs", "them", "themselves", "then", "there", "these", "they", "this", "those", "through", "to", "too"),
    *("under", "until", "up", "very", "was", "we", "were", "what", "when", "where", "which", "while", "who", "whom"),
    *("why", "will", "with", "would", "you", "your", "yours", "yourself", "yourselves"),
)


class FieldsConfig(StrictModel):
    """A filter that reads some fields of a draft."""

    fields: tuple[FieldName, ...] = Field(("instruction",), min_length=1, description="fields that the filter reads")


class EmptyConfig(FieldsConfig):
    """Reject a field of white space alone."""

    type: Literal["empty"] = "empty"


class LengthConfig(FieldsConfig):
    """Reject a field with too few or too many words or characters.

    White space separates words. In scripts without it (Chinese, Japanese, Thai, Lao, Khmer, Burmese), each character
    counts as a word.
    """

    type: Literal["length"] = "length"
    min_words: int = Field(4, ge=0, description="minimum number of words (Self-Instruct's code: 4)")
    max_words: int | None = Field(
        150, ge=1, description="maximum number of words (Self-Instruct's code: 150). None means no limit"
    )
    min_characters: int = Field(0, ge=0, description="minimum number of characters")
    max_characters: int | None = Field(None, ge=1, description="maximum number of characters. None means no limit")

    @model_validator(mode="after")
    def _limits_leave_room(self) -> Self:
        for unit in ("words", "characters"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if high is not None and low > high:
                raise ValueError(f"min_{unit}={low} is larger than max_{unit}={high}, so no text can pass")
        return self


class BlacklistConfig(FieldsConfig):
    """Reject a field that contains one of these words as a whole word, in upper or lower case."""

    type: Literal["blacklist"] = "blacklist"
    words: tuple[str, ...] = Field(
        BLACKLIST,
        description="words or phrases. The default holds those of tasks that a text model cannot do (Self-Instruct's "
        "code)",
    )


class BeginsWithConfig(FieldsConfig):
    """Reject a field that begins with one of these texts."""

    type: Literal["begins_with"] = "begins_with"
    texts: tuple[str, ...] = Field(
        ("Write a program",), description="the beginnings (Self-Instruct's and Alpaca's code)"
    )
    ignore_case: bool = Field(False, description="ignore the difference of upper and lower case (released code: false)")


class FirstCharacterConfig(FieldsConfig):
    """Reject a field by its first character."""

    type: Literal["first_character"] = "first_character"
    reject_punctuation: bool = Field(
        True,
        description=f"reject a field that begins with one of {string.punctuation} (Self-Instruct's and Alpaca's code), "
        "or with a mark or symbol outside ASCII that opens nothing",
    )
    reject_non_ascii: bool = Field(
        False,
        description="reject a field that begins with a character outside ASCII (Self-Instruct's and Alpaca's code: "
        "true, which leaves little of most languages but English)",
    )


class TruncationConfig(StrictModel):
    """Reject a draft whose text was cut at max_tokens (as Self-Instruct's and Alpaca's code do)."""

    type: Literal["truncation"] = "truncation"


class FormatLeakageConfig(FieldsConfig):
    """Reject a field that contains a piece of a prompt, in upper or lower case.

    The default is to read the instruction alone, because "###" in an output can be a heading in Markdown.
    """

    type: Literal["format_leakage"] = "format_leakage"
    markers: tuple[str, ...] = Field(
        PROMPT_MARKERS, description="pieces of prompts (Self-Instruct, Alpaca and Evol-Instruct)"
    )


class ReasoningConfig(FieldsConfig):
    """Reject a field in which the reasoning of a model is left.

    Reasoning between marks such as <think> and </think> is taken off before any filter. What is left has a mark without
    its partner, or begins as reasoning does.
    """

    type: Literal["reasoning"] = "reasoning"
    fields: tuple[FieldName, ...] = Field(
        ("instruction", "output"), min_length=1, description="fields that the filter reads"
    )
    beginnings: tuple[str, ...] = Field(
        REASONING_BEGINNINGS, description="how reasoning without marks begins, in lower case"
    )


class RepeatsInstructionConfig(StrictModel):
    """Reject a row whose output is the instruction again. Case, punctuation and line breaks make no difference."""

    type: Literal["repeats_instruction"] = "repeats_instruction"
    min_similarity: float = Field(
        0.9,
        gt=0,
        le=1,
        description="an output is the instruction again if the share of characters that both have in the same order "
        "(rapidfuzz's ratio) is at least this (our choice)",
    )


class RefusalConfig(FieldsConfig):
    """Reject a field in which an assistant refuses or speaks about itself. Quotations do not count."""

    type: Literal["refusal"] = "refusal"
    fields: tuple[FieldName, ...] = Field(("output",), min_length=1, description="fields that the filter reads")
    phrases: tuple[str, ...] = Field(REFUSALS, description="phrases that mean a refusal in a text of any length")
    short_phrases: tuple[str, ...] = Field(("sorry",), description="phrases that mean a refusal in a short text only")
    max_words: int = Field(
        80,
        ge=0,
        description="a text with fewer words than this is short (Evol-Instruct: 80). 0 means that no text is short",
    )


class OnlyStopwordsConfig(FieldsConfig):
    """Reject a field of punctuation and stop words alone (Evol-Instruct, elimination rule 3)."""

    type: Literal["only_stopwords"] = "only_stopwords"
    fields: tuple[FieldName, ...] = Field(("output",), min_length=1, description="fields that the filter reads")
    stop_words: tuple[str, ...] = Field(STOP_WORDS, description="the stop words, in lower case")


class RepetitionConfig(FieldsConfig):
    """Reject a field that repeats itself: a large share of repeated n-grams, or one word too often in a row.

    The share is Gopher's (Rae et al., 2021, table A1): characters inside repeated n-grams, each counted once. The first
    occurrence of an n-gram does not count. In scripts without spaces a word is three characters.
    """

    type: Literal["repetition"] = "repetition"
    fields: tuple[FieldName, ...] = Field(("output",), min_length=1, description="fields that the filter reads")
    ngram_words: int = Field(5, ge=1, description="words in an n-gram (table A1: 5 to 10)")
    max_duplicate_share: float = Field(
        0.15, ge=0, le=1, description="maximum share of characters inside repeated n-grams (table A1: 0.15 for 5 words)"
    )
    min_words: int = Field(
        50, ge=1, description="texts with fewer words are not checked for n-grams (Gopher's documents: 50)"
    )
    max_run: int = Field(
        8,
        ge=1,
        description="maximum number of times that one word may occur in a row, in a text of any length (our choice)",
    )


class LanguageConfig(FieldsConfig):
    """Reject a field in a language that is not allowed. py3langid identifies the language. Short texts pass."""

    type: Literal["language"] = "language"
    allowed: tuple[str, ...] = Field(("en",), min_length=1, description="ISO 639-1 codes of the allowed languages")
    min_letters: int = Field(
        20, ge=1, description="texts with fewer letters pass, because their language is uncertain (our choice)"
    )


class SameAsInputConfig(StrictModel):
    """Reject a draft whose output equals its input, apart from white space around them (Self-Instruct's code)."""

    type: Literal["same_as_input"] = "same_as_input"


class NoveltyConfig(FieldsConfig):
    """Reject a draft whose ROUGE-L F to a seed or to an earlier draft is too high (Self-Instruct §2.2).

    Several fields are compared as one text.
    """

    type: Literal["novelty"] = "novelty"
    max_score: float = Field(
        0.7, ge=0, le=1, description="a draft with a higher ROUGE-L F is rejected (Self-Instruct §2.2: 0.7)"
    )
    tokenizer: Literal["rouge", "unicode"] = Field(
        "unicode",
        description="unicode reads words of every script. rouge reads only a-z and 0-9, as rouge_score does "
        "(Self-Instruct's and Alpaca's code), and so finds no two texts of another script alike",
    )
    num_nearest: int = Field(
        10, ge=0, description="nearest neighbors to store with each draft (Self-Instruct's code: 10)"
    )


class ExactDuplicateConfig(FieldsConfig):
    """Reject a draft that equals an earlier one, apart from case, white space and Unicode compatibility forms."""

    type: Literal["exact_duplicate"] = "exact_duplicate"
    fields: tuple[FieldName, ...] = Field(
        ("instruction", "input"), min_length=1, description="fields that the filter reads, as one text"
    )


class NearDuplicateConfig(FieldsConfig):
    """Reject a draft that shares most of its shingles with an earlier one.

    MinHash finds candidates, and their exact Jaccard similarity decides.
    """

    type: Literal["near_duplicate"] = "near_duplicate"
    fields: tuple[FieldName, ...] = Field(
        ("instruction", "input"), min_length=1, description="fields that the filter reads, as one text"
    )
    threshold: float = Field(
        0.8, gt=0, le=1, description="a draft with at least this Jaccard similarity is rejected (our choice)"
    )
    shingle_unit: Literal["character", "word"] = Field("character", description="unit of a shingle")
    shingle_size: int = Field(5, ge=1, description="units in a shingle (our choice, because instructions are short)")
    num_perm: int = Field(128, ge=8, description="permutations of MinHash (Broder, 1997). 128 is rensa's usual number")
    min_recall: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="minimum probability that a draft exactly at the threshold is found. Closer drafts are found more "
        "likely",
    )
    seed: int = Field(1, ge=0, description="seed of the permutations")


FilterConfig = Annotated[
    EmptyConfig
    | LengthConfig
    | BlacklistConfig
    | BeginsWithConfig
    | FirstCharacterConfig
    | TruncationConfig
    | FormatLeakageConfig
    | ReasoningConfig
    | RefusalConfig
    | RepeatsInstructionConfig
    | OnlyStopwordsConfig
    | RepetitionConfig
    | LanguageConfig
    | SameAsInputConfig
    | NoveltyConfig
    | ExactDuplicateConfig
    | NearDuplicateConfig,
    Field(discriminator="type"),
]

# The heuristics of the released code, in its order.
SELF_INSTRUCT_FILTERS: tuple[FilterConfig, ...] = (
    EmptyConfig(),
    LengthConfig(),
    BlacklistConfig(),
    BeginsWithConfig(),
    FirstCharacterConfig(),
    NoveltyConfig(),
)
ALPACA_FILTERS: tuple[FilterConfig, ...] = (
    EmptyConfig(),
    LengthConfig(),
    BlacklistConfig(words=ALPACA_BLACKLIST),
    BeginsWithConfig(),
    FirstCharacterConfig(),
    NoveltyConfig(),
)
# What no row should be, whatever its method and its language. A looser share than Gopher's: songs and tables repeat.
ROW_FILTERS: tuple[FilterConfig, ...] = (
    ReasoningConfig(),
    RefusalConfig(short_phrases=()),
    RepeatsInstructionConfig(),
    RepetitionConfig(max_duplicate_share=0.5),
)
# Instructions of users in any language: reject only empty, long and known ones.
INSTRUCTION_WILD_FILTERS: tuple[FilterConfig, ...] = (
    EmptyConfig(),
    LengthConfig(min_words=1),
    NoveltyConfig(tokenizer="unicode"),
)
# Whole user turns: reject only truncated, empty and known ones (the released code removes near duplicates afterwards).
MAGPIE_FILTERS: tuple[FilterConfig, ...] = (
    TruncationConfig(),
    EmptyConfig(),
    LengthConfig(min_words=1, max_words=None),
    NearDuplicateConfig(),
)

FILTER_CONFIGS: dict[str, type[StrictModel]] = {
    config.model_fields["type"].default: config for config in get_args(get_args(FilterConfig)[0])
}
