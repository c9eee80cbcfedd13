"""What is known of a run's prompts before an engine starts: whether templates fit their models, and lengths."""

import json
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig, Sampling
from cluster.engines.config import Prompt as EnginePrompt
from cluster.engines.engine import prompt_ids
from cluster.errors import InputError
from cluster.log import stage_logger
from cluster.model_source import find_config
from generation.config.common import Role, SynthesisConfig
from generation.filters.reasoning import opened_by
from generation.method import Method, MethodInputs
from generation.requester import Requester, ServedModel
from generation.seed_tasks import SeedTask
from generation.serving import RoleModel
from generation.state import Timers
from generation.templates import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_PROPOSALS = 64  # first proposals whose prompts are rendered
NUM_SEEDS = 20_000  # likewise of the seeds that are answered: some seconds
Tokenizers = Mapping[Role, "PreTrainedTokenizerBase | None"]
log = stage_logger("synthesize")


def load_tokenizers(models: Mapping[Role, RoleModel]) -> Tokenizers:
    """The tokenizer of each role. None means that its engines are of another backend, which may do without one."""
    loaded: dict[ModelConfig, PreTrainedTokenizerBase | None] = {}
    for model in models.values():
        if model.source not in loaded:
            loaded[model.source] = _load_tokenizer(model)
    return {role: loaded[model.source] for role, model in models.items()}


def check_models(
    method: type[Method], models: Mapping[Role, RoleModel], tokenizers: Tokenizers
) -> dict[Role, RoleModel]:
    """The models, with the mark that their chat templates begin the assistant's turn with.

    Raises InputError if a role is asked in chats and its model has no chat template that can be rendered, or if that
    template does not read a variable that the recipe sets.
    """
    return {role: _check_chat_template(method, role, model, tokenizers[role]) for role, model in models.items()}


def check_prompts(
    config: SynthesisConfig,
    method: type[Method],
    models: Mapping[Role, RoleModel],
    tokenizers: Tokenizers,
    prompts: Mapping[str, Prompt],
    seeds: Sequence[SeedTask],
    seed: int,
) -> None:
    """Render what can be rendered before anything is generated.

    Raises InputError if the method cannot work with these seeds, if a template does not use what it is for, or if all
    prompts of a template leave the model no room. Single prompts that are too long are logged; they will be rejected.
    """
    _check_stop_tokens(config, models)
    lengths = _Lengths(models, tokenizers, getattr(config, "system_prompt", None))
    trial = method(config, MethodInputs(seeds, prompts, lengths.recorder, Timers(), seed))
    trial.check_seeds()
    if trial.num_wanted is None:
        _check_answers(prompts["answer"], trial, lengths)
    else:
        if "answer" in prompts and "instruction" not in prompts["answer"].uses:
            raise InputError(f"{prompts['answer'].path}: it does not use `instruction`, so all prompts are the same.")
        first = range(min(trial.max_proposals or NUM_PROPOSALS, config.max_concurrent_proposals, NUM_PROPOSALS))
        lengths.check(_first_request(trial.propose(number, ())) for number in first)
    shortest = min((task.instruction for task in seeds), key=len, default="x")
    for name, prompt in prompts.items():
        is_checked = "demonstrations" in prompt.variables or (name == "answer" and trial.num_wanted is None)
        if not is_checked and _role(name) in models:
            text = prompt.render(**{variable: _shortest(variable, shortest, config) for variable in prompt.variables})
            lengths.check([lengths.rendered(_role(name), prompt, text)])
    if lengths.faults:
        raise InputError("\n".join(dict.fromkeys(lengths.faults)))


def _check_answers(prompt: Prompt, method: Method, lengths: "_Lengths") -> None:
    """Check the prompts of the instructions that are there already."""
    instructions: set[tuple[str, str]] = set()  # with their inputs; the first two that differ
    texts: set[str] = set()  # likewise

    def requests() -> Iterator[_Request]:
        for number in range(min(method.max_proposals, NUM_SEEDS)):
            for draft in _first_request(method.propose(number, ())).items:
                text = prompt.render(instruction=draft.instruction, input=draft.input)
                for found, value in ((instructions, (draft.instruction, draft.input)), (texts, text)):
                    if len(found) < 2:
                        found.add(value)
                yield lengths.rendered("answerer", prompt, text)

    lengths.check(requests())
    shows_nothing = "instruction" not in prompt.uses and not any(input_text for _, input_text in instructions)
    if len(texts) == 1 and (len(instructions) > 1 or shows_nothing):
        raise InputError(
            f"{prompt.path}: it gives the same prompt for all instructions, because it does not show `instruction`, "
            "and no seed has an `input` of its own. Put {{ instruction }} into it."
        )


def _role(name: str) -> Role:
    """The role that gets the prompts of a template."""
    if name in ("judge", "row_judge", "equal"):
        return "judge"
    return "answerer" if name == "answer" else "writer"


def _shortest(variable: str, instruction: str, config: SynthesisConfig) -> object:
    """A short value for a variable of a template."""
    if variable == "data_format":
        return min(config.data_formats, key=len)
    values = {"instruction": instruction, "first": instruction, "second": instruction, "output": "x", "input": ""}
    return config.judge.rubric if variable == "rubric" else values[variable]


# -- lengths in tokens


@dataclass(frozen=True, slots=True)
class _Request:
    """What a model would get for the prompt `name`."""

    role: Role
    name: str
    prompt: EnginePrompt


class _Recorded(Exception):
    """Ends a method's work at its first request."""

    def __init__(self, request: _Request) -> None:
        self.request = request


class _Recorder(Requester):
    """Takes the requests of a method and sends none."""

    async def _request(self, role: Role, stage: str, rendered: EnginePrompt, prompt_name: str, *_: object) -> None:
        raise _Recorded(_Request(role, prompt_name, rendered))


def _first_request(work: Coroutine) -> Any:
    """The first request of a method's work, or what the work returns if it makes none."""
    try:
        work.send(None)
    except _Recorded as recorded:
        return recorded.request
    except StopIteration as done:
        return done.value
    raise AssertionError("a method waits for something else than a request")


class _Lengths:
    """Compares the lengths of prompts with what their models support. faults: the prompts that never fit."""

    def __init__(self, models: Mapping[Role, RoleModel], tokenizers: Tokenizers, system: str | None) -> None:
        served = {
            role: ServedModel(
                each.name, each.source, each.revision, None, each.form, chat_template_kwargs=each.chat_template_kwargs
            )
            for role, each in models.items()
        }
        self.recorder = _Recorder(served, log=None, seed=0)
        self.faults: list[str] = []
        self._models = models
        self._tokenizers = tokenizers
        self._system = system
        self._overhead: dict[Role, int] = {}  # tokens of an empty prompt

    def rendered(self, role: Role, prompt: Prompt, text: str) -> _Request:
        return _first_request(self.recorder.ask(role, "", prompt, text, Sampling(), system=self._system))

    def check(self, requests: Iterable[_Request]) -> None:
        """Note if none of these requests of one template leaves room for an answer, else log how many do not."""
        num_requests, too_long = 0, []
        for request in requests:
            num_requests += 1
            role, name, limit = request.role, request.name, max_model_len(self._models[request.role])
            if limit is not None and (length := self._num_tokens(request, limit)) >= limit:
                too_long.append(length)
        if not too_long:
            return
        model = self._models[role]
        room = f"{model.name} has room for {limit:,} tokens of prompt and answer (engine.max_model_len)"
        if len(too_long) == num_requests:
            self.faults.append(
                f"the prompt {name} has {min(too_long):,} tokens at least, and {room}. Raise engine.max_model_len if "
                f"the model supports more, shorten the prompt or its seeds, or set {model.recipe_key} to another model."
            )
        else:
            log.warning(
                f"{len(too_long)} of {num_requests} prompts {name} are too long, up to {max(too_long):,} tokens, and "
                f"{room}. They will be rejected as prompt_too_long."
            )

    def _num_tokens(self, request: _Request, limit: int) -> int:
        """The tokens of a prompt. One that is surely short enough counts as 0: a token is a byte at least."""
        prompt, tokenizer = request.prompt, self._tokenizers[request.role]
        if tokenizer is None:
            return 0
        kwargs = self._models[request.role].chat_template_kwargs
        if isinstance(prompt, str):
            texts, empty = [prompt], ""
        elif isinstance(prompt[0], dict):
            texts = [turn["content"] for turn in prompt]
            empty = [{**turn, "content": ""} for turn in prompt]
        else:
            return len(prompt)
        if request.role not in self._overhead:
            self._overhead[request.role] = len(prompt_ids(tokenizer, empty, kwargs))
        num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
        is_short = num_bytes + self._overhead[request.role] < limit
        return 0 if is_short else len(prompt_ids(tokenizer, prompt, kwargs))


def max_model_len(model: RoleModel) -> int | None:
    """Tokens of prompt and answer that the engines of a model support at most. None means that it is not known."""
    if model.engine.max_model_len is not None:
        return model.engine.max_model_len
    config = _read_config(model)
    length = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor", 1) if isinstance(scaling, dict) else 1
    return int(length * max(1, factor)) if isinstance(length, int) else None


def _read_config(model: RoleModel) -> dict:
    """What the model's config.json says of its text part; empty if the file is not on this machine yet."""
    path = find_config(model.source)
    config = json.loads(path.read_text()) if path else {}
    return config.get("text_config", config)


def _check_stop_tokens(config: SynthesisConfig, models: Mapping[Role, RoleModel]) -> None:
    """Raise InputError for a stop token that is not in the vocabulary: the engine would refuse every request."""
    samplings = {name: value for name, value in config if isinstance(value, Sampling) and value.stop_token_ids}
    for name, sampling in samplings.items():
        role: Role = {"answer_sampling": "answerer", "judge_sampling": "judge", "equality_sampling": "judge"}.get(
            name, "writer"
        )
        if role not in models:
            continue
        size, highest = _read_config(models[role]).get("vocab_size"), max(sampling.stop_token_ids)
        if isinstance(size, int) and highest >= size:
            raise InputError(
                f"synthesize.{name}.stop_token_ids: {highest} is not a token of {models[role].name}, which has {size:,}"
                " tokens."
            )


# -- chat templates


def _load_tokenizer(model: RoleModel) -> "PreTrainedTokenizerBase | None":
    source, is_vllm = model.source, model.engine.backend == EngineConfig().backend
    if not is_vllm and not any(Path(source.path).glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not is_vllm:
            return None
        raise InputError(f"{source.path}: cannot load its tokenizer: {str(error).splitlines()[0]}") from error


def _check_chat_template(
    method: type[Method], role: Role, model: RoleModel, tokenizer: "PreTrainedTokenizerBase | None"
) -> RoleModel:
    """Check that the model can be asked in chats, if it will be."""
    if model.form != "chat":
        if model.chat_template_kwargs:
            raise InputError(
                f"{model.recipe_key}.chat_template_kwargs: the {role} of {method.NAME} has the form completion, which "
                "uses no chat template. Set form=chat, or remove them."
            )
        return model
    if tokenizer is None:
        return model
    if not tokenizer.chat_template:
        raise InputError(
            f"{model.recipe_key}: {model.name} has no chat template, and the {role} of {method.NAME} is asked in chats."
            f" Set {model.recipe_key}.form=completion to send plain prompts, put a chat_template.jinja into the "
            "model's folder, or take a model that is tuned for chats."
        )
    if unread := sorted(set(model.chat_template_kwargs) - _template_variables(tokenizer)):
        raise InputError(
            f"{model.recipe_key}.chat_template_kwargs: the chat template of {model.name} does not read "
            f"{', '.join(unread)}; it reads {', '.join(sorted(_template_variables(tokenizer))) or 'no variable'}."
        )
    turns = [{"role": "user", "content": "x"}]
    return replace(model, reasoning_mark=opened_by(_render_chat(tokenizer, turns, model)))


def _template_variables(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The variables that a chat template reads, without those that every template gets."""
    from transformers.utils.chat_template_utils import _get_template_variables

    given = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
    return set(_get_template_variables(tokenizer.get_chat_template())) - given - set(tokenizer.special_tokens_map)


def _render_chat(tokenizer: "PreTrainedTokenizerBase", turns: list[dict[str, str]], model: RoleModel) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **model.chat_template_kwargs
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InputError(f"{model.name}: its chat template cannot be rendered: {error}.") from error
