"""Seed tasks and evaluation rows of the toy world, in the formats that the pipeline reads.

    python -m toy_world.rows        # write assets/seed_tasks.jsonl and assets/eval.jsonl again

`assets/` also holds the prompts that the chat model was taught. Both models refer to this folder as `tunesmith/`.
"""

import json
import re
from pathlib import Path
from random import Random

from rapidfuzz.distance import LCSseq

from cluster.files import write_atomic
from toy_world.family import Phrasing, Task
from toy_world.world import SEEN_FAMILIES, UNSEEN_FAMILIES, recognize, seen_phrasings

ASSETS = Path(__file__).with_name("assets")
PROMPTS = ASSETS / "prompts"
SEED = 0
SEEDS_PER_FAMILY = 4
ROWS_PER_SEEN_FAMILY = 6
ROWS_PER_UNSEEN_FAMILY = 15
# Self-Instruct (Wang et al. 2022, section 2.2) keeps an instruction whose ROUGE-L to every other one is below this.
MAX_ROUGE_L = 0.7
SEEN_GROUP, UNSEEN_GROUP = "seen families, unseen phrasings", "unseen families"


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F-measure over lower-cased runs of letters and digits, as `rouge_score` computes it without a stemmer."""
    tokens = [re.findall(r"[a-z0-9]+", text.lower()) for text in (first, second)]
    return 2 * LCSseq.similarity(*tokens) / max(1, len(tokens[0]) + len(tokens[1]))


def seed_tasks(rng: Random) -> list[dict]:
    """Seeds of all seen families in seen phrasings. No two are closer than `MAX_ROUGE_L`."""
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
    found = recognize(task.instruction, task.input)
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


def asset_rows() -> dict[str, list[dict]]:
    """The rows of each JSON Lines file in `assets/`, by file name. Always the same."""
    rng = Random(SEED)
    return {"seed_tasks.jsonl": seed_tasks(rng), "eval.jsonl": evaluation_rows(rng)}


if __name__ == "__main__":
    for name, rows in asset_rows().items():
        write_atomic(ASSETS / name, "".join(json.dumps(row) + "\n" for row in rows))
