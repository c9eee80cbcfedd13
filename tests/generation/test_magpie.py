"""Magpie: the chat template up to the user's turn, draws that differ, and instructions kept once."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.config import ModelConfig
from cluster.engines.config import GenerationRequest
from cluster.errors import InputError
from generation.config.methods import MagpieConfig
from generation.methods.magpie import user_turn_opening
from tests.generation.harness import CoroutinePool, drive

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "<|begin|>[INST] {{ system }}{{ messages[-1].content }} [/INST]"
)
ALPACA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "### Instruction:\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}\n\n### Response:\n{% endif %}"
)
OWN_TOKENS = ("<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot_id|>")


@pytest.fixture
def make_model(tmp_path):
    """A function that writes a folder with a byte tokenizer and a chat template."""

    def make(template: str | None) -> ModelConfig:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in OWN_TOKENS])
        # As in Llama-3, the end of a turn is no token with a part of its own: only the end of the text is.
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
        fast.chat_template = template
        folder = tmp_path / "model"
        fast.save_pretrained(folder)
        (folder / "config.json").write_text("{}")
        return ModelConfig(path=str(folder))

    return make


def opening(model: ModelConfig, system: str | None = None) -> tuple[str, list[str], tuple[str, ...]]:
    """What comes before the user's turn, the tokens and the text that end it, all as text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model.path)
    found = user_turn_opening(model, system)
    return tokenizer.decode(found.token_ids), tokenizer.convert_ids_to_tokens(found.stop_token_ids), found.stop


@pytest.mark.parametrize(
    ("template", "before", "stop_tokens", "stop"),
    [
        (CHATML, "<|im_start|>user\n", ["<|im_end|>"], ()),
        (LLAMA_3, "<|begin|><|head|>user<|/head|>\n\n", ["<|eot_id|>"], ()),
        (LLAMA_2, "<|begin|>[INST]", [], ("[/INST]",)),
        (ALPACA, "### Instruction:\n", [], ("\n### Response:",)),
    ],
)
def test_the_opening_of_a_users_turn_and_what_ends_it(make_model, template, before, stop_tokens, stop):
    assert opening(make_model(template)) == (before, stop_tokens, stop)


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (CHATML, "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"),
        (LLAMA_2, "<|begin|>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n"),
    ],
)
def test_a_system_prompt_comes_before_the_users_turn(make_model, template, before):
    assert opening(make_model(template), "Be kind.")[0] == before


def test_tokens_of_the_template_are_single_tokens(make_model):
    found = user_turn_opening(make_model(CHATML))
    assert len(found.token_ids) == 1 + len("user\n")


def test_a_template_that_ends_with_the_users_words_leaves_the_end_to_the_end_of_text(make_model):
    assert opening(make_model("User: {{ messages[0].content }}")) == ("User:", [], ())


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (None, None, r"no chat template.*Set synthesize\.models\.writer\.path to an aligned model"),
        (ALPACA, "Be kind.", "cannot be rendered: no system turn"),
        ("User: {{ messages[0].content | upper }}", None, "changes the user's text"),
        ("{{ messages[0].content }}</s>", None, "has no text before the user turn"),
    ],
)
def test_a_model_that_cannot_be_drawn_from_is_named_with_the_fix(make_model, template, system, message):
    with pytest.raises(InputError, match=message):
        user_turn_opening(make_model(template), system)


# -- the method


def magpie(folder: Path, source: ModelConfig, pool: CoroutinePool, **fields: object):
    return drive(folder / "run", pool, MagpieConfig(**fields), seeds=[], source=source)


def is_draw(request: GenerationRequest) -> bool:
    return isinstance(request.prompt[0], int)


class Aligned(CoroutinePool):
    """Says one text after another as the user, by the number of the draw, and answers each."""

    def __init__(self, *turns: str | tuple[str, str]) -> None:
        seeds: dict[int, int] = {}

        def reply(request: GenerationRequest) -> str | tuple[str, str]:
            if not is_draw(request):
                return f"An answer to {request.prompt[-1]['content']}"
            return turns[seeds.setdefault(request.sampling.seed, len(seeds)) % len(turns)]

        super().__init__(answer=reply)


RIVERS = tuple(f"{verb} the {thing}?" for verb in ("Where is", "How long is") for thing in ("Elbe", "Nile", "Po"))


def test_users_turns_are_drawn_again_and_again_and_answered(tmp_path, make_model):
    source = make_model(CHATML)
    pool = Aligned(*(f"\n{text} " for text in RIVERS))
    made = magpie(tmp_path, source, pool, num_instructions=6)
    assert sorted(made.turns()) == sorted((text, f"An answer to {text}") for text in RIVERS)
    draws = [request for request in pool.requests if is_draw(request)]
    expected = user_turn_opening(source)
    for request in draws:
        assert tuple(request.prompt) == expected.token_ids
        assert request.sampling.stop_token_ids == expected.stop_token_ids
        assert (request.sampling.temperature, request.sampling.top_p, request.sampling.max_tokens) == (1.0, 1.0, 2048)
    assert len({request.sampling.seed for request in draws}) == len({r.request_id for r in draws}) == len(draws)
    answers = [request for request in pool.requests if not is_draw(request)]
    assert {request.sampling.temperature for request in answers} == {0.0}
    assert all([turn["role"] for turn in request.prompt] == ["user"] for request in answers)
    assert {row["task"] for row in made.rows} == {row["id"] for row in made.instructions}


def test_what_is_drawn_twice_is_kept_once(tmp_path, make_model):
    made = magpie(tmp_path, make_model(CHATML), Aligned(*RIVERS), num_instructions=50, max_requests=20)
    assert len(made.instructions) == len(set(made.turns())) == 6
    assert [row["reason"] for row in made.rejected] == ["near_duplicate"] * 14
    assert made.driver.stopped_because == "max_requests=20 reached"


def test_without_filters_equal_draws_are_rows_of_their_own(tmp_path, make_model):
    made = magpie(tmp_path, make_model(CHATML), Aligned("Where?"), num_instructions=5, instruction_filters=())
    assert len(made.rows) == len({row["id"] for row in made.rows}) == 5


def test_turns_that_are_cut_empty_or_not_answered_for_are_rejected(tmp_path, make_model):
    pool = Aligned(("Where is the", "length"), "  ", ("", "engine_died"), RIVERS[0])
    made = magpie(tmp_path, make_model(CHATML), pool, max_requests=4, max_concurrent_proposals=1)
    assert {(row["kind"], row["reason"]) for row in made.rejected} == {
        ("response", "truncated_response"),
        ("instruction", "empty"),
        ("response", "engine_died"),
    }
    assert len(made.rows) == 1


def test_a_system_prompt_steers_both_the_question_and_the_answer(tmp_path, make_model):
    source = make_model(CHATML)
    pool = Aligned(*RIVERS)
    magpie(tmp_path, source, pool, num_instructions=2, system_prompt="Speak of rivers.")
    expected = user_turn_opening(source, "Speak of rivers.").token_ids
    assert all(tuple(request.prompt) == expected for request in pool.requests if is_draw(request))
    system = {"role": "system", "content": "Speak of rivers."}
    assert all(request.prompt[0] == system for request in pool.requests if not is_draw(request))


def test_stops_of_the_recipe_are_kept_beside_those_of_the_template(tmp_path, make_model):
    pool = Aligned(*RIVERS)
    magpie(tmp_path, make_model(ALPACA), pool, num_instructions=1, instruction_sampling={"stop": ["END"]})
    assert pool.requests[0].sampling.stop == ("END", "\n### Response:")


def test_a_writer_without_a_template_is_named_before_anything_is_asked(tmp_path, make_model):
    pool = Aligned(*RIVERS)
    with pytest.raises(InputError, match="no chat template"):
        magpie(tmp_path, make_model(None), pool)
    assert pool.requests == []
