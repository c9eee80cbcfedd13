"""A verifier for answers to tasks of the small world: `synthesize.verifier=toy_world.verifier:score`."""

from toy_world.world import recognise, verify


def score(instruction: str, input_text: str, output: str, reference: str) -> float:
    """1 if the instruction is a task of this world and `output` its answer, else 0. The answer is computed anew."""
    task = recognise(instruction, input_text)
    return float(task is not None and verify(task, output))
