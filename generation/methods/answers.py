"""How every method requests and checks an answer to an instruction."""

from cluster.engines.config import Sampling
from generation.filters import Draft, Rejection
from generation.method import MethodInputs
from generation.records import GenerationResult, RejectedRecord
from generation.requester import UNANSWERED


async def ask_for_answer(
    inputs: MethodInputs, draft: Draft, sampling: Sampling, system: str | None = None, replica: int = 0
) -> GenerationResult:
    """Request an answer from the answerer with the template `answer`."""
    prompt = inputs.prompts["answer"]
    text = prompt.render(instruction=draft.instruction, input=draft.input)
    return await inputs.requester.ask("answerer", "answer", prompt, text, sampling, replica, system)


def check_answer(draft: Draft, response: GenerationResult, sample: int = 0) -> RejectedRecord | None:
    """The rejected answer if it is missing, empty or cut at max_tokens; None if it can be a row."""
    written = response.completion.samples[sample]
    if written.finish_reason in UNANSWERED:
        why = Rejection(written.finish_reason)
    elif not written.text.strip():
        why = Rejection("empty_output")
    elif written.finish_reason == "length":
        why = Rejection("truncated_answer")
    else:
        return None
    rejected = Draft(draft.instruction, draft.input, written.text, written.finish_reason)
    return RejectedRecord("answer", why, response.request_id, sample, rejected)
