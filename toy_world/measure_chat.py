"""Measure the chat model in every form that it was taught. The program of the toy world checks the answers.

    python -m toy_world.measure_chat --model models/world-chat

Transformers computes in float32. Decoding is greedy, except for evolution and lists (temperature 1.0, top_p 0.95) and
Magpie (temperature 1.0, top_p 1.0).
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toy_world import evolution
from toy_world.chat_documents import DATA_FORMATS, EVOLVE, OPERATIONS, TEMPLATES, chat, draw_request
from toy_world.chat_documents import equal as equal_document
from toy_world.evolution import Request, read_request
from toy_world.family import Phrasing
from toy_world.world import draw_task, held_out_phrasings, recognize, seen_phrasings, unseen_phrasings

USER = "<|im_start|>user\n"
BATCH_SIZE = 64
DRAWN = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "top_k": 0}
GREEDY = {"do_sample": False}


@dataclass
class Writer:
    """The model as a function from text to text."""

    folder: Path

    def __post_init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def continue_(self, prompts: list[str], max_new_tokens: int, how: dict) -> list[str]:
        """The continuation of each prompt, up to the end of a turn. A batch holds prompts of about equal length."""
        answers: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            batch = self.tokenizer([prompts[number] for number in chosen], return_tensors="pt", padding=True)
            ids = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                **how,
            )
            texts = self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            answers |= dict(zip(chosen, texts, strict=True))
        return [answers[number] for number in range(len(prompts))]

    def reply(self, messages: list[str], how: dict = GREEDY, max_new_tokens: int = 48) -> list[str]:
        return self.continue_([chat(message, "") for message in messages], max_new_tokens, how)


def share(hits: int, total: int) -> str:
    return f"{100 * hits / max(1, total):5.1f} %  of {total}"


def answers(writer: Writer, rng: Random) -> None:
    groups: tuple[tuple[str, tuple[Phrasing, ...], int], ...] = (
        ("seen phrasings", seen_phrasings(), 4),
        ("held-out phrasings", held_out_phrasings(), 8),
        ("unseen families", unseen_phrasings(), 12),
    )
    for name, phrasings, count in groups:
        requests = [Request(phrasing.task(rng)) for phrasing in phrasings for _ in range(count)]
        _report_answers(writer, name, requests)
    evolved = [
        request for request in (draw_request(rng, 1.0) for _ in range(900)) if request.steps or request.data_format
    ]
    _report_answers(writer, "evolved tasks", evolved)


def _report_answers(writer: Writer, name: str, requests: list[Request]) -> None:
    replies = writer.reply([request.text for request in requests])
    right = Counter(r.family for r, reply in zip(requests, replies, strict=True) if reply.strip() == r.output)
    total = Counter(request.family for request in requests)
    print(f"answers, {name}: {share(right.total(), total.total())}")
    worst = sorted(total, key=lambda family: right[family] / total[family])[:6]
    print("   weakest: " + ", ".join(f"{family} {100 * right[family] / total[family]:.0f} %" for family in worst))


def is_changed_as_named(name: str, before: Request, after: Request, data_format: str) -> bool:
    """Whether an operation did what its prompt asks for, and nothing else."""
    same_slots = before.task.slots == after.task.slots and before.family == after.family
    if name in ("add_constraints", "add_reasoning"):
        known = OPERATIONS[name]
        possible = {made.text for seed in range(8) if (made := known(Random(seed), before))}
        return after.text in possible
    if name == "deepen":
        is_longer = len(after.task.slots["c"].split()) > len(before.task.slots["c"].split())
        is_larger = int(after.task.slots.get("n", 0)) > int(before.task.slots.get("n", 0))
        return after.family == before.family and after.steps == before.steps and (is_longer or is_larger)
    if name == "concretize":
        return same_slots and not after.task.phrasing.takes_input
    if name == "complicate_input":
        return same_slots and after.data_format == data_format
    return after.family != before.family


def evolutions(writer: Writer, rng: Random, count: int) -> None:
    generic = tuple(phrasing for phrasing in seen_phrasings() if phrasing.takes_input)
    for name, operation in OPERATIONS.items():
        cases: list[tuple[Request, str]] = []
        while len(cases) < count:
            request = Request(draw_task(rng, generic)) if name == "concretize" else draw_request(rng)
            if changed := operation(rng, request):
                cases.append((request, changed.data_format or rng.choice(tuple(DATA_FORMATS))))
        takes_format = name == "complicate_input"
        prompts = [
            EVOLVE[name].render(instruction=request.text, **({"data_format": kind} if takes_format else {}))
            for request, kind in cases
        ]
        after = [read_request(reply) for reply in writer.reply(prompts, DRAWN)]
        known = [(case, request) for case, request in zip(cases, after, strict=True) if request]
        good = sum(is_changed_as_named(name, before, request, kind) for (before, kind), request in known)
        print(f"{name}: of the world {share(len(known), count)}; changed as named {share(good, count)}")


def equal(writer: Writer, rng: Random, count: int) -> None:
    documents = [equal_document(rng) for _ in range(count)]
    prompts, labels = zip(*(document.rsplit("\n", 1) for document in documents), strict=True)
    replies = writer.continue_([f"{prompt}\n" for prompt in prompts], 12, GREEDY)
    for label in ("Equal", "Not equal"):
        replied = [reply for reply, truth in zip(replies, labels, strict=True) if truth == label]
        print(f"equal, truly {label}: right {share(replied.count(label), len(replied))}")


def judge(writer: Writer, rng: Random, count: int) -> None:
    requests = [draw_request(rng) for _ in range(2 * count)]
    outputs = [request.output for request in requests[:count]]
    outputs += [evolution.wrong_answer(rng, request) for request in requests[count:]]
    prompts = [
        TEMPLATES["judge"]["judge"].render(instruction=request.text, input="", output=output, rubric="")
        for request, output in zip(requests, outputs, strict=True)
    ]
    scores = [int(reply) if reply in tuple("12345") else 0 for reply in writer.reply(prompts, max_new_tokens=4)]
    truth = [evolution.score_answer(request.output, output) for request, output in zip(requests, outputs, strict=True)]
    print(f"judge, right answers get 5: {share(scores[:count].count(5), count)}")
    print(f"judge, wrong answers get less than 5: {share(count - scores[count:].count(5), count)}")
    for score in range(1, 5):
        given = [s for s, t in zip(scores, truth, strict=True) if t == score]
        print(
            f"   truly {score}: mean {sum(given) / max(1, len(given)):.2f}, 5 for {share(given.count(5), len(given))}"
        )


def magpie(writer: Writer, count: int) -> None:
    torch.manual_seed(0)
    drawn = writer.continue_([USER] * count, 64, DRAWN | {"top_p": 1.0})
    requests = [request for text in drawn if (request := read_request(text))]
    taught = [request for request in requests if not request.task.phrasing.held_out]
    families = Counter(request.family for request in taught)
    print(
        f"magpie, turns that are tasks of the world: {share(len(requests), count)}, taught {share(len(taught), count)}"
    )
    print(f"   families: {len(families)}, most frequent {families.most_common(3)}, different texts {len(set(drawn))}")
    replies = writer.reply([request.text for request in requests])
    right = sum(reply == request.output for request, reply in zip(requests, replies, strict=True))
    print(f"   answers to them that are right: {share(right, len(requests))}")


def parse_alpaca(text: str, first: int) -> list[tuple[str, str, str]]:
    """Items of a continued list, split by the published marks. An item without all marks in order is left out."""
    found = []
    for number, item in enumerate(f"{first}. Instruction:{text}".split("###"), first):
        pattern = rf"\s*{number}\. Instruction:(.*){number}\. Input:(.*){number}\. Output:(.*)"
        if match := re.fullmatch(pattern, item, re.DOTALL):
            found.append(tuple(part.strip() for part in match.groups()))
    return found


def lists(writer: Writer, rng: Random, count: int) -> None:
    def ask(prompts: list[str], max_new_tokens: int) -> list[str]:
        return writer.continue_(prompts, max_new_tokens, DRAWN)

    def demonstration() -> dict[str, str]:
        task = draw_task(rng, seen_phrasings())
        return {"instruction": task.instruction, "input": task.input, "output": task.output}

    prompts = [
        TEMPLATES["alpaca"]["tasks"].render(demonstrations=[demonstration() for _ in range(3)], num_tasks=8)
        for _ in range(count)
    ]
    items = [item for text in ask(prompts, 450) for item in parse_alpaca(text, 4)]
    tasks = [(recognize(instruction, given.replace("<noinput>", "")), output) for instruction, given, output in items]
    known = [(task, output) for task, output in tasks if task]
    right = sum(task.output == output for task, output in known)
    print(f"alpaca: items parsed per request {len(items) / count:.1f}; of the world {share(len(known), len(items))}")
    print(f"   outputs of those that are right: {share(right, len(known))}")
    shown = [[draw_task(rng, seen_phrasings()).instruction for _ in range(5)] for _ in range(count)]
    template = TEMPLATES["instruction_wild"]["instructions"]
    texts = ask([template.render(demonstrations=five, language="English") for five in shown], 250)
    lines = [line for text in texts for line in re.split(r"\n?\d+\. ", f"6. {text.strip()}") if line.strip()]
    count_known = sum(_is_instruction(line) for line in lines)
    print(f"instruction_wild: per request {len(lines) / count:.1f}; of the world {share(count_known, len(lines))}")


def _is_instruction(line: str) -> bool:
    generic = any(p.takes_input and p.pattern.fullmatch(line.strip()) for p in seen_phrasings())
    return generic or recognize(line) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300, help="cases of each measurement other than answers")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    writer, rng, count = Writer(arguments.model), Random(arguments.seed), arguments.count
    torch.manual_seed(arguments.seed)
    steps: tuple[Callable[[], None], ...] = (
        lambda: answers(writer, rng),
        lambda: evolutions(writer, rng, count),
        lambda: equal(writer, rng, 2 * count),
        lambda: judge(writer, rng, count),
        lambda: magpie(writer, count),
        lambda: lists(writer, rng, count // 6),
    )
    for step in steps:
        step()


if __name__ == "__main__":
    main()
