"""Rules for the instances of a task: an input, which may be empty, and an output.

The rules are those of Self-Instruct's released code (Wang et al., 2023; `prepare_for_finetuning.py`), in their
order.
"""

from dataclasses import dataclass

from generation.filters.drafts import Rejection


@dataclass(frozen=True, slots=True)
class Instance:
    """One input (may be empty) and the output it asks for."""

    input: str
    output: str


def check_instance(instance: Instance) -> Rejection | None:
    """Why this instance is rejected, or None."""
    if instance.input == instance.output:
        return Rejection("input_equals_output")
    if not instance.output:
        return Rejection("empty_output")
    if instance.input.endswith(":") or instance.output.endswith(":"):
        return Rejection("ends_with_colon")
    return None


def check_instances(
    instances: list[Instance], drop_contradictions: bool = True
) -> list[tuple[Instance, Rejection | None]]:
    """Each instance of one task with why it is rejected, or None.

    If one input has two different outputs, no instance can be trusted: all are rejected if `drop_contradictions`.
    """
    decisions: list[tuple[Instance, Rejection | None]] = []
    outputs: dict[str, set[str]] = {}
    seen: set[Instance] = set()
    for instance in instances:
        rejection = check_instance(instance)
        if rejection is None and instance in seen:
            rejection = Rejection("duplicate_instance")
        if rejection is None:
            seen.add(instance)
            outputs.setdefault(instance.input, set()).add(instance.output)
        decisions.append((instance, rejection))
    contradiction = next((text for text, found in outputs.items() if text and len(found) > 1), None)
    if contradiction is None or not drop_contradictions:
        return decisions
    why = Rejection("contradicting_outputs", f"input {contradiction!r} has {len(outputs[contradiction])} outputs")
    return [(instance, rejection or why) for instance, rejection in decisions]
