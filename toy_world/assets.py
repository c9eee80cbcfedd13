"""What lies beside the world's model: seed tasks and evaluation rows, in the formats the pipeline reads."""

import re
from random import Random

from rapidfuzz.distance import LCSseq

from toy_world.family import Phrasing, Task
from toy_world.world import SEEN_FAMILIES, UNSEEN_FAMILIES, recognise, seen_phrasings

SEEDS_PER_FAMILY = 4
ROWS_PER_SEEN_FAMILY = 6
ROWS_PER_UNSEEN_FAMILY = 15
# Self-Instruct (Wang et al. 2022, section 2.2) keeps an instruction whose ROUGE-L to every other one is below this.
MAX_ROUGE_L = 0.7
SEEN_GROUP, UNSEEN_GROUP = "seen families, unseen phrasings", "unseen families"


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F-measure over lower-cased runs of letters and digits, as `rouge_score` counts without its stemmer."""
    tokens = [re.findall(r"[a-z0-9]+", text.lower()) for text in (first, second)]
    return 2 * LCSseq.similarity(*tokens) / max(1, len(tokens[0]) + len(tokens[1]))


def seed_tasks(rng: Random) -> list[dict]:
    """Seeds over all seen families in seen phrasings, mutually novel."""
    tasks: list[Task] = []
    phrasings = list(seen_phrasings())
    rng.shuffle(phrasings)
    for phrasing in phrasings:
        task = phrasing.task(rng)
        same_family = sum(other.phrasing.family is phrasing.family for other in tasks)
        alike = any(rouge_l(task.instruction, other.instruction) > MAX_ROUGE_L for other in tasks)
        if same_family < SEEDS_PER_FAMILY and not alike:
            tasks.append(task)
    return [_seed_row(number, task) for number, task in enumerate(tasks)]


def _seed_row(number: int, task: Task) -> dict:
    return {
        "id": f"seed_task_{number}",
        "name": task.phrasing.family.name.replace(" ", "_"),
        "instruction": task.instruction,
        "instances": [{"input": task.input, "output": task.output}],
        "is_classification": task.phrasing.is_classification,
    }


def evaluation_rows(rng: Random) -> list[dict]:
    """Rows whose phrasing, or whose whole family, is in no document and no seed."""
    rows = []
    for families, group, count in (
        (SEEN_FAMILIES, SEEN_GROUP, ROWS_PER_SEEN_FAMILY),
        (UNSEEN_FAMILIES, UNSEEN_GROUP, ROWS_PER_UNSEEN_FAMILY),
    ):
        for family in families:
            held_out = [phrasing for phrasing in family.phrasings if phrasing.held_out]
            rows += [_evaluation_row(len(rows) + index, group, held_out, index, rng) for index in range(count)]
    return rows


def _evaluation_row(number: int, group: str, held_out: list[Phrasing], index: int, rng: Random) -> dict:
    task = held_out[index % len(held_out)].task(rng)
    found = recognise(task.instruction, task.input)
    if found is None or found.output != task.output:
        raise ValueError(f"{task.instruction!r} asks for two different answers")
    return {
        "id": f"world_{number}",
        "task": task.phrasing.family.name,
        "group": group,
        "instruction": task.instruction,
        "input": task.input,
        "references": [task.output],
        "metric": "exact_match",
    }
