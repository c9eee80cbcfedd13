"""Is a text new? Exact ROUGE-L against everything remembered, as in Self-Instruct (Wang et al., 2023, §2.2).

With the tokenizer "rouge", scores equal those of Google's rouge_score without stemming, bit for bit. It reads only a-z
and 0-9, so text in other scripts is never similar to anything. The tokenizer "unicode" reads every script.
"""

from collections.abc import Sequence

from generation.config.filters import NoveltyConfig
from generation.filters.drafts import Decision, Draft, Rejection, joined_fields
from generation.filters.rouge_index import RougeIndex, rouge_tokens, unicode_tokens

TOKENIZERS = {"rouge": rouge_tokens, "unicode": unicode_tokens}


class Novelty:
    """Rejects a text that is closer than `max_score` to any text remembered."""

    def __init__(self, config: NoveltyConfig) -> None:
        self.fields = config.fields
        self._config = config
        self._index = RougeIndex(TOKENIZERS[config.tokenizer])

    def decide(self, draft: Draft) -> Decision:
        text = joined_fields(self.fields, draft)
        if text is None:
            return Decision(None)
        config = self._config
        # If no neighbors are stored, finding one that is too close is enough, and a high `min_score` makes that fast.
        min_score = 0.0 if config.num_nearest else config.max_score
        nearest = tuple(self._index.nearest(text, max(1, config.num_nearest), min_score))
        stored = nearest[: config.num_nearest]
        if nearest and nearest[0].score > config.max_score:
            why = Rejection("not_novel", f"ROUGE-L {nearest[0].score:.3f} to {nearest[0].id}")
            return Decision(why, stored)
        return Decision(None, stored)

    def remember_texts(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        self._index.add_many(ids, texts)
