# Every target sets up the environment first. If it is up to date, that takes no time.
PYTHON ?= python3
BIN := .venv/bin
THEN := $(addprefix make ,$(firstword $(filter-out setup,$(MAKECMDGOALS))))

.PHONY: help setup demo demo-english english-model test test-all chaos reference lint base-model chat-model bench bench-synthesis bench-training bench-launch clean-demo

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: ## Make .venv and install everything for a machine without a GPU
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is missing. On Debian or Ubuntu: sudo apt install $(notdir $(PYTHON))-dev $(notdir $(PYTHON))-venv" >&2; exit 2; }
	@$(PYTHON) launcher/bootstrap.py cpu dev --then "$(THEN)"

demo: setup ## Run the demo: a small model instructs itself and is tuned (minutes); ARGS="key=value --run-dir DIR"
	@$(BIN)/tunesmith run recipes/demo/self_instruct.yaml $(ARGS)

RUN ?= runs/english
demo-english: setup ## Run the demo with a real model, in English: SmolLM2 (93 MB, got once); RUN=DIR ARGS="key=value"
	@model="$$($(BIN)/python -m english.model)" && \
		$(BIN)/tunesmith run recipes/english.yaml model.path="$$model" --run-dir $(RUN) $(ARGS)
	@$(BIN)/tunesmith show $(RUN)

english-model: setup ## Get SmolLM2, the real model of the tests and of the English demo (93 MB, once)
	@$(BIN)/python -m english.model

test: setup ## Run the tests, in two processes
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: setup ## Run all tests, including those that `make test` leaves out because they take long
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m ""

SEED ?= 1
MINUTES ?= 30
chaos: setup ## Test random faults on a real Slurm (needs root); SEED=7 MINUTES=30
	@$(BIN)/python -m tests.slurm.chaos --seed $(SEED) --minutes $(MINUTES)

reference: setup ## Write docs/reference.md from the commands and the keys of a recipe
	@$(BIN)/python -m docs.generate_reference

lint: setup ## Check the style of the code
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: bench-synthesis bench-training bench-launch ## Run all benchmarks

bench-synthesis: ## Measure synthesis against raw vLLM, ray.data.llm, rouge_score and datasets (75 minutes)
	@$(PYTHON) launcher/bootstrap.py cpu dev bench
	@$(BIN)/python -m tests.benchmarks.synthesis --sides raw pool stage ray.data.llm "ray.data.llm, defaults"
	@$(BIN)/python -m tests.benchmarks.synthesis --sides "raw, its own processes" stage
	@$(BIN)/python -m tests.benchmarks.synthesis --model english --requests 64 --rounds 3 --sides raw pool stage --lengths "mixed (8-160)"
	@$(BIN)/python -m tests.benchmarks.synthesis --model english --requests 64 --rounds 3 --sides "raw, its own processes" stage --lengths "mixed (8-160)"
	@$(BIN)/python -m tests.benchmarks.job
	@$(BIN)/python -m tests.benchmarks.novelty
	@$(BIN)/python -m tests.benchmarks.storage

bench-training: ## Measure training and saving against TRL and bare PyTorch loops (20 minutes)
	@$(PYTHON) launcher/bootstrap.py cpu dev bench
	@$(BIN)/python -m tests.benchmarks.training
	@for tuning in full lora; do for precision in fp32 bf16; do $(BIN)/python -m tests.benchmarks.training --model english \
		--max-seq-len 1024 --tuning $$tuning --precision $$precision --sides ours "bare packed" "trl packed" || exit; done; done
	@$(BIN)/python -m tests.benchmarks.saving

bench-launch: setup ## Measure the time from sbatch to the first step, on a Slurm of two nodes (needs root; 5 minutes)
	@$(BIN)/python -m tests.benchmarks.launch

base-model: setup ## Train the base model of the toy world again (half an hour on 2 cores)
	@$(BIN)/python -m toy_world.build base-data --out runs/base-model/world
	@$(BIN)/tunesmith train recipes/demo/base_model.yaml
	@$(BIN)/python -m toy_world.build base-model --weights runs/base-model/checkpoints/step_005136/weights --out models/world-base

chat-model: setup ## Tune the chat model of the toy world again (half an hour on 2 cores)
	@$(BIN)/python -m toy_world.build chat-data --base models/world-base --out runs/chat-model/world
	@$(BIN)/tunesmith train recipes/demo/chat_model.yaml
	@$(BIN)/python -m toy_world.build chat-model --weights runs/chat-model/checkpoints/step_002200/weights --out models/world-chat

clean-demo: ## Remove the demo's run folder
	rm -rf runs/demo
