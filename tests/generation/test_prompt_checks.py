"""What recipe, seeds, templates and tokenizer show is an error before an engine starts."""

import json
import logging
from pathlib import Path

import pytest

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig
from cluster.errors import InputError
from generation.config.common import SynthesisConfig
from generation.config.methods import (
    AlpacaConfig,
    AnswerOnlyConfig,
    EvolInstructConfig,
    InstructionWildConfig,
    MagpieConfig,
    RejectionSamplingConfig,
    SelfInstructConfig,
)
from generation.inputs import Inputs, load_inputs
from tests.generation.harness import PROMPT_FOLDER
from tests.tiny_model import make_tiny_model

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}<|assistant|>"
    "{% if not thinking is defined or thinking %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model without a chat template, for 512 tokens."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    """The same with a chat template that opens the reasoning."""
    folder = tmp_path_factory.mktemp("chat")
    make_tiny_model(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def load(model: Path, config: SynthesisConfig, max_model_len: int | None = 20_000) -> Inputs:
    return load_inputs(config, ModelConfig(path=str(model)), EngineConfig(max_model_len=max_model_len), seed=0)


def seeds(folder: Path, *rows: dict) -> str:
    (folder / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "seeds.jsonl")


def own_prompts(folder: Path, method: str, **texts: str) -> str:
    """The packaged prompts of a method, some of them with other texts."""
    copy = folder / "prompts"
    copy.mkdir()
    for path in (PROMPT_FOLDER / method).glob("*.jinja"):
        (copy / path.name).write_text(texts.get(path.stem, path.read_text()))
    return str(copy)


CONFIGS = [
    SelfInstructConfig(),
    AlpacaConfig(),
    InstructionWildConfig(),
    EvolInstructConfig(),
    MagpieConfig(),
    AnswerOnlyConfig(),
    RejectionSamplingConfig(),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_a_model_with_room_and_a_template_passes_and_one_token_is_too_little_for_all(chat, config):
    inputs = load(chat, config)
    marks = {model.form: model.reasoning_mark for model in inputs.models.values()}
    assert marks.items() <= {("chat", "<think>"), ("completion", "")}
    with pytest.raises(InputError, match=r"the prompt .* has [\d,]+ tokens at least, and .* has room for 3 tokens"):
        load(chat, config, max_model_len=3)


def test_a_prompt_that_is_longer_than_the_model_is_named_with_its_tokens(base, tmp_path):
    with pytest.raises(InputError, match=r"prompt self_instruct/\w+ has [\d,]+ tokens at least.* room for 512 tokens"):
        load(base, SelfInstructConfig(), max_model_len=None)


def test_single_prompts_that_are_too_long_are_counted(chat, tmp_path, caplog):
    path = seeds(tmp_path, {"instruction": "Say yes."}, {"instruction": "no " * 2000}, {"instruction": "Say so."})
    logging.getLogger("tunesmith.synthesize").propagate = True
    with caplog.at_level("WARNING"):
        load(chat, AnswerOnlyConfig(seeds=path), max_model_len=500)
    assert "1 of 3 prompts answer_only/answer are too long" in caplog.text


@pytest.mark.parametrize(
    ("config", "role"),
    [(AnswerOnlyConfig(), "answerer"), (InstructionWildConfig(), "answerer"), (EvolInstructConfig(), "writer")],
    ids=lambda each: getattr(each, "method", each),
)
def test_a_role_whose_model_has_no_chat_template_is_named_with_the_fix(base, config, role):
    with pytest.raises(InputError, match=rf"no chat template, and the {role} .*synthesize\.models\.writer\.form=compl"):
        load(base, config)
    plain = config.model_copy(
        update={
            "models": config.models.model_copy(
                update={"writer": config.models.writer.model_copy(update={"form": "completion"})}
            )
        }
    )
    load(base, plain)


def test_a_judge_that_is_not_asked_needs_no_template(base, tmp_path):
    config = {"seeds": seeds(tmp_path, {"instruction": "Say yes."}), "models": {"writer": {"form": "completion"}}}
    chosen = {"choose_by": "verifier", "verifier": "toy_world.world:score"}
    judge = {"models": {"writer": {"form": "completion"}, "judge": {"form": "chat"}}}
    load(base, RejectionSamplingConfig(**config | judge | chosen))
    with pytest.raises(InputError, match=r"the judge of rejection_sampling .*synthesize\.models\.judge\.form"):
        load(base, RejectionSamplingConfig(**config | judge))


def test_variables_of_the_chat_template_are_set_by_role_and_misspelt_ones_named(chat):
    def with_kwargs(**kwargs: object) -> AnswerOnlyConfig:
        return AnswerOnlyConfig(models={"writer": {"chat_template_kwargs": kwargs}})

    assert load(chat, with_kwargs(thinking=False)).models["answerer"].reasoning_mark == ""
    assert load(chat, with_kwargs(thinking=True)).models["answerer"].reasoning_mark == "<think>"
    assert load(chat, with_kwargs(thinking=False)).sha != load(chat, with_kwargs()).sha
    with pytest.raises(InputError, match=r"does not read thinkng; it reads thinking"):
        load(chat, with_kwargs(thinkng=False))
    plain = {"writer": {"form": "completion", "chat_template_kwargs": {"thinking": False}}}
    with pytest.raises(InputError, match="uses no chat template"):
        load(chat, AnswerOnlyConfig(models=plain))


@pytest.mark.parametrize(
    ("config", "texts", "missing"),
    [
        (AnswerOnlyConfig(), {"answer": "Answer this."}, "instruction"),
        (AnswerOnlyConfig(), {"answer": "Answer: {{ input }}"}, "instruction"),
        (InstructionWildConfig(), {"answer": "Answer: {{ input }}"}, "instruction"),
        (AnswerOnlyConfig(), {"answer": "{% if instruction %}Answer: {{ input }}{% endif %}"}, "instruction"),
        (SelfInstructConfig(), {"classify": "Is it?"}, "instruction"),
        (SelfInstructConfig(), {"instructions": "Write tasks."}, "demonstrations"),
        (EvolInstructConfig(), {"equal": "Is it {{ first }}?"}, "second"),
        (RejectionSamplingConfig(), {"judge": "Score {{ instruction }}"}, "output"),
    ],
    ids=lambda each: getattr(each, "method", None),
)
def test_a_template_that_does_not_show_what_it_is_for_is_refused(chat, tmp_path, config, texts, missing):
    path = seeds(tmp_path, {"instruction": "Say yes.", "output": "Yes."}, {"instruction": "Say no.", "output": "No."})
    prompts = own_prompts(tmp_path, config.method, **texts)
    with pytest.raises(InputError, match=rf"{next(iter(texts))}\.jinja: .*{missing}"):
        load(chat, config.model_copy(update={"prompts": prompts, "seeds": path}))


def test_a_template_of_the_input_alone_is_enough_if_seeds_have_one(chat, tmp_path):
    path = seeds(tmp_path, {"instruction": "Continue.", "input": "The sea is"}, {"instruction": "Continue."})
    load(chat, AnswerOnlyConfig(seeds=path, prompts=own_prompts(tmp_path, "answer_only", answer="{{ input }}")))


def test_a_stop_token_outside_the_vocabulary_is_named(chat):
    with pytest.raises(InputError, match=r"synthesize\.answer_sampling\.stop_token_ids: 5000 is not a token"):
        load(chat, AnswerOnlyConfig(answer_sampling={"stop_token_ids": [1, 5000]}))


def test_a_verifier_that_rejects_the_seeds_own_outputs_is_reported(chat, tmp_path, caplog):
    path = seeds(tmp_path, {"instruction": "Name the capital of Peru.", "output": "Lima."})
    config = RejectionSamplingConfig(seeds=path, choose_by="verifier", verifier="toy_world.world:score")
    logging.getLogger("tunesmith.synthesize").propagate = True
    with caplog.at_level("WARNING"):
        load(chat, config)
    assert "toy_world.world:score gives the outputs of the first 1 seeds 0 at most" in caplog.text
