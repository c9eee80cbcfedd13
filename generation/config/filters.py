"""What a user says about filters: a list in a recipe, each entry a `type` and what it needs to know.

A filter reads the named `fields` of a draft: instruction, input or output. An output that is not written yet is passed
over. Filters are asked in the order of the list, and the first that objects decides.
"""

import string
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from cluster.config import StrictModel

FieldName = Literal["instruction", "input", "output"]

# Self-Instruct, `bootstrap_instructions.py`: tasks that a language model cannot do.
BLACKLIST = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps"),
    *("draw", "plot", "go to"),
)
# Stanford Alpaca, `generate_instruction.py`: the same and more media.
ALPACA_BLACKLIST = (*BLACKLIST, "video", "audio", "music", "flowchart", "diagram")

# Pieces of the prompts of Self-Instruct, Alpaca and Evol-Instruct; a rewriter that leaks them copied instead of wrote
# (Evol-Instruct, Xu et al., 2023, fourth rule of elimination).
PROMPT_MARKERS = (
    *("Instruction:", "Input:", "Output:", "Class label:", "Example 1", "<noinput>", "###"),
    *("#Given Prompt#", "#Rewritten Prompt#", "#Created Prompt#", "#New Prompt#"),
    *("given prompt", "rewritten prompt", "created prompt", "new prompt"),
)
# What assistants say of themselves; "as an ai" and two more are those of h2o-wizardlm's `wizardlm.py`.
REFUSALS = (
    *("as an ai", "ai assistant", "how can i assist", "as a language model", "as a large language model"),
    *("i'm unable to", "i am unable to", "i cannot assist", "i can't assist", "i cannot help", "i can't help"),
)
# English function words. Left out on purpose, because each is a whole answer to many tasks: no, not, a, i.
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
    """A filter that reads some fields."""

    fields: tuple[FieldName, ...] = Field(("instruction",), min_length=1, description="fields of a draft that it reads")


class EmptyConfig(FieldsConfig):
    """Reject a field of nothing but white space."""

    type: Literal["empty"] = "empty"


class LengthConfig(FieldsConfig):
    """Reject a field of too few or too many words or characters. Words are what white space separates."""

    type: Literal["length"] = "length"
    min_words: int = Field(4, ge=0, description="words at least (Self-Instruct's code: 4)")
    max_words: int | None = Field(150, ge=1, description="words at most; none: no limit (Self-Instruct's code: 150)")
    min_characters: int = Field(0, ge=0, description="characters at least")
    max_characters: int | None = Field(None, ge=1, description="characters at most; none: no limit")

    @model_validator(mode="after")
    def _limits_leave_room(self) -> Self:
        for unit in ("words", "characters"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if high is not None and low > high:
                raise ValueError(f"min_{unit}={low} is more than max_{unit}={high}: nothing would pass")
        return self


class BlacklistConfig(FieldsConfig):
    """Reject a field with one of these words, as a whole word, in upper or lower case."""

    type: Literal["blacklist"] = "blacklist"
    words: tuple[str, ...] = Field(BLACKLIST, description="words of tasks that a text model cannot do (Self-Instruct)")


class BeginsWithConfig(FieldsConfig):
    """Reject a field that begins with one of these texts."""

    type: Literal["begins_with"] = "begins_with"
    texts: tuple[str, ...] = Field(("Write a program",), description="beginnings (Self-Instruct's and Alpaca's code)")
    ignore_case: bool = Field(False, description="upper and lower case are the same (published: they are not)")


class FirstCharacterConfig(FieldsConfig):
    """Reject a field that begins with a character of these kinds (Self-Instruct's and Alpaca's code: both)."""

    type: Literal["first_character"] = "first_character"
    reject_punctuation: bool = Field(True, description=f"one of {string.punctuation}")
    reject_non_ascii: bool = Field(True, description="one outside ASCII; false for other languages than English")


class TruncationConfig(StrictModel):
    """Reject a draft whose text was cut at the limit of tokens (Self-Instruct and Alpaca drop it too)."""

    type: Literal["truncation"] = "truncation"


class FormatLeakageConfig(FieldsConfig):
    """Reject a field with a piece of the prompt in it, in upper or lower case.

    By default the instruction alone is read: in an output, "###" is also how Markdown writes a heading.
    """

    type: Literal["format_leakage"] = "format_leakage"
    markers: tuple[str, ...] = Field(PROMPT_MARKERS, description="pieces of prompts (Evol-Instruct and others)")


class RefusalConfig(FieldsConfig):
    """Reject a field in which an assistant declines, or speaks of itself."""

    type: Literal["refusal"] = "refusal"
    fields: tuple[FieldName, ...] = Field(("output",), min_length=1, description="fields of a draft that it reads")
    phrases: tuple[str, ...] = Field(REFUSALS, description="phrases that are a refusal in a text of any length")
    short_phrases: tuple[str, ...] = Field(("sorry",), description="phrases that are one in a short text only")
    max_words: int = Field(80, ge=0, description="fewer words make a text short (Evol-Instruct: 80); 0: none is")


class OnlyStopwordsConfig(FieldsConfig):
    """Reject a field of nothing but punctuation and stop words (Evol-Instruct, third rule of elimination)."""

    type: Literal["only_stopwords"] = "only_stopwords"
    fields: tuple[FieldName, ...] = Field(("output",), min_length=1, description="fields of a draft that it reads")
    stop_words: tuple[str, ...] = Field(STOP_WORDS, description="words that say nothing, in lower case")


class RepetitionConfig(FieldsConfig):
    """Reject a field that repeats itself: too much of it inside repeated n-grams, or one word too often in a row.

    Gopher's rule (Rae et al., 2021, table A1): the share of characters inside duplicate n-grams, each character counted
    once. An n-gram is a duplicate where it has already occurred; its first occurrence does not count.
    """

    type: Literal["repetition"] = "repetition"
    fields: tuple[FieldName, ...] = Field(("output",), min_length=1, description="fields of a draft that it reads")
    ngram_words: int = Field(5, ge=1, description="words of an n-gram (table A1: 5 to 10)")
    max_duplicate_share: float = Field(0.15, ge=0, le=1, description="more is rejected (table A1: 0.15 for 5 words)")
    min_words: int = Field(50, ge=1, description="shorter texts are not judged by share (Gopher's documents: 50 words)")
    max_run: int = Field(8, ge=1, description="more of one word in a row is rejected at any length (our choice)")


class LanguageConfig(FieldsConfig):
    """Reject a field in a language that is not allowed, as py3langid sees it. Texts too short to tell pass."""

    type: Literal["language"] = "language"
    allowed: tuple[str, ...] = Field(("en",), min_length=1, description="ISO 639-1 codes")
    min_letters: int = Field(20, ge=1, description="texts of fewer letters pass")


class SameAsInputConfig(StrictModel):
    """Reject a draft whose output is its input, white space around them aside (Self-Instruct's code)."""

    type: Literal["same_as_input"] = "same_as_input"


class NoveltyConfig(FieldsConfig):
    """Reject what is close to anything remembered, seeds included: exact ROUGE-L F (Self-Instruct §2.2).

    Several fields are judged as one text.
    """

    type: Literal["novelty"] = "novelty"
    max_score: float = Field(0.7, ge=0, le=1, description="closer than this is rejected (Self-Instruct §2.2: 0.7)")
    tokenizer: Literal["rouge", "unicode"] = Field(
        "rouge", description="rouge: a-z and 0-9 only, as published; unicode: words of every script"
    )
    num_nearest: int = Field(10, ge=0, description="nearest ones stored with each draft (Self-Instruct's code: 10)")


class ExactDuplicateConfig(FieldsConfig):
    """Reject what equals something remembered, but for case, white space and compatible forms of characters."""

    type: Literal["exact_duplicate"] = "exact_duplicate"
    fields: tuple[FieldName, ...] = Field(
        ("instruction", "input"), min_length=1, description="fields of a draft that it reads, all together"
    )


class NearDuplicateConfig(FieldsConfig):
    """Reject what shares most of its shingles with something remembered: MinHash finds, exact Jaccard decides."""

    type: Literal["near_duplicate"] = "near_duplicate"
    fields: tuple[FieldName, ...] = Field(
        ("instruction", "input"), min_length=1, description="fields of a draft that it reads, all together"
    )
    threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity from which on two are the same (ours)")
    shingle_unit: Literal["character", "word"] = Field("character", description="what a shingle is made of")
    shingle_size: int = Field(5, ge=1, description="units of a shingle (ours; instructions are short)")
    num_perm: int = Field(128, ge=8, description="permutations of MinHash (Broder, 1997; 128 is rensa's usual)")
    min_recall: float = Field(
        0.9, gt=0, lt=1, description="probability at least that one exactly at the threshold is found; nearer ones more"
    )
    seed: int = Field(1, ge=0, description="of the permutations")


FilterConfig = Annotated[
    EmptyConfig
    | LengthConfig
    | BlacklistConfig
    | BeginsWithConfig
    | FirstCharacterConfig
    | TruncationConfig
    | FormatLeakageConfig
    | RefusalConfig
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
# Instructions of users in any language: only what is empty, overlong or known already.
INSTRUCTION_WILD_FILTERS: tuple[FilterConfig, ...] = (
    EmptyConfig(),
    LengthConfig(min_words=1),
    NoveltyConfig(tokenizer="unicode"),
)
# Whole turns of users: what was cut, is empty, or is known already (the released code removes near ones afterwards).
MAGPIE_FILTERS: tuple[FilterConfig, ...] = (
    TruncationConfig(),
    EmptyConfig(),
    LengthConfig(min_words=1, max_words=None),
    NearDuplicateConfig(),
)

FILTER_CONFIGS: dict[str, type[StrictModel]] = {
    config.model_fields["type"].default: config for config in get_args(get_args(FilterConfig)[0])
}
