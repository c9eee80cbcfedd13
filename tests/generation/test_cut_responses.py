"""In every method a text that was cut is a rejected row, and what is complete before the cut is kept."""

import re

import pytest

from cluster.engines.config import Completion, GenerationRequest, Sample
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
from generation.methods import METHODS
from generation.request_log import RequestLog
from tests.generation.harness import SEEDS, CoroutinePool, drive, prompt_text
from tests.generation.test_magpie import CHATML, make_model  # noqa: F401  a fixture

CONFIGS: dict[str, SynthesisConfig] = {
    config.method: config
    for config in (
        SelfInstructConfig(num_instructions=9, max_requests=1, include_seed_tasks=False),
        AlpacaConfig(num_instructions=9, max_requests=1),
        InstructionWildConfig(num_instructions=9, max_requests=1),
        EvolInstructConfig(max_instructions=1, num_rounds=1, include_originals=False),
        MagpieConfig(num_instructions=9, max_requests=1),
        AnswerOnlyConfig(max_instructions=1),
        RejectionSamplingConfig(max_instructions=1),
    )
}
assert CONFIGS.keys() == METHODS.keys()
# What the writer says first, the instructions kept of it, and what is rejected.
CUT = {
    "self_instruct": (" Name two rivers that flow.\n10. Name a lake in", 1, "Name a lake in"),
    "alpaca": (
        " Name two rivers that flow.\n4. Input:\nN/A\n4. Output:\nElbe, Po\n5. Instruction: Name a lake in",
        1,
        "5. Instruction: Name a lake in",
    ),
    "instruction_wild": (" Name two rivers that flow.\n7. Name a lake in", 1, "Name a lake in"),
    "evol_instruct": ("Name two rivers that", 1, "Name two rivers that"),
    "magpie": ("Name two rivers that", 0, "Name two rivers that"),
    "answer_only": ("Apples are", 1, "Apples are"),
    "rejection_sampling": ("Apples are", 1, "Apples are"),
}


class CutPool(CoroutinePool):
    """Cuts the first kind of answer, by max_tokens or at a stop string; the others are complete."""

    def __init__(self, text: str, finish_reason: str, stop_reason: str | None) -> None:
        super().__init__(answer=lambda request: "")
        self._sample = Sample(text, finish_reason, 5, (), stop_reason=stop_reason)

    async def generate(self, request: GenerationRequest) -> Completion:
        self.requests.append(request)
        is_first = len(self.requests) == 1
        text = "5" if request.sampling.structured else "No" if is_question(request) else "Output: Elbe and Po"
        sample = self._sample if is_first else Sample(text, "stop", 3)
        return Completion(request.request_id, (sample,) * request.sampling.n, 3)


def is_question(request: GenerationRequest) -> bool:
    return not isinstance(request.prompt, list) and prompt_text(request).endswith("classification?")


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    ("finish_reason", "stop_reason", "detail"),
    [("length", None, ""), ("stop", "20.", "at the stop string '20.'")],
)
def test_a_cut_response_is_a_rejected_row(tmp_path, make_model, method, finish_reason, stop_reason, detail):  # noqa: F811
    text, num_accepted, rest = CUT[method]
    source = make_model(CHATML) if method == "magpie" else None
    pool = CutPool(text, finish_reason, stop_reason)
    made = drive(tmp_path, pool, CONFIGS[method], source=source)
    cut = [row for row in made.rejected if row["reason"] == "truncated_response"]
    assert {(row["detail"], row["output"] or row["instruction"]) for row in cut} == {(detail, rest)}
    assert len(made.instructions) == num_accepted
    assert {row["finish_reason"] for row in made.rows} <= {"stop"}
    assert bool(made.rows) is (method in ("self_instruct", "alpaca", "instruction_wild"))
    with RequestLog(tmp_path / "requests") as log:  # what ended the text is on the disk
        assert log.get(pool.requests[0].request_id)["samples"][0]["stop_reason"] == stop_reason


@pytest.mark.parametrize(
    ("text", "stop_reason", "was_cut"),
    [
        ("It was in March 20", "20.", True),
        ("Here is my ", "Task:", True),
        ("One.\nTwo.\n", "20.", False),  # the next line began with it
        ("One.\n", "Task:", False),
        ("", "Example 6", False),
        ("One.", "\n20.", False),
        ("One.", "\n\n", False),
        ("One.", "###", False),
        ("One.", "<|im_end|>", False),
        ("One.", 50256, False),
        ("One.", None, False),
    ],
)
def test_a_stop_string_of_a_word_or_number_cuts_a_text_inside_a_line_alone(text, stop_reason, was_cut):
    assert Sample(text, "stop", 3, (), stop_reason=stop_reason).was_cut is was_cut


def test_no_default_stop_string_counts_inside_a_line():
    for config in CONFIGS.values():
        for name in type(config).model_fields:
            stops = getattr(getattr(config, name), "stop", ())
            assert all(re.match(r"\W", stop) for stop in stops)


def test_the_stop_string_of_a_whole_text_is_a_column(tmp_path):
    pool = CutPool("Apples are red.", "stop", "\n\n")
    made = drive(tmp_path, pool, AnswerOnlyConfig(max_instructions=2), seeds=SEEDS[:2])
    assert [row["stop_reason"] for row in made.rows] == ["\n\n", None]
