"""A process that synthesizes with scripted engines, for tests that kill it:

python -m tests.generation.drive_synthesis MODEL_FOLDER RUN_FOLDER NUM_INSTRUCTIONS NUM_REPLICAS
"""

import sys
from pathlib import Path

from cluster.config import ModelConfig
from cluster.engines.config import EngineConfig
from cluster.errors import TunesmithError
from cluster.run.rundir import RunDir
from generation.config.methods import SelfInstructConfig
from generation.synthesize import run
from tests.fakes import scripted


def synthesize(model: Path, run_root: Path, num_instructions: int, engine: EngineConfig, **fields: object) -> dict:
    """The stage as the tests run it, in this process. fields: of the config, more or others."""
    config = SelfInstructConfig(
        **{
            "num_instructions": num_instructions,
            "max_concurrent_proposals": 16,
            "rows_per_shard": 40,
            "checkpoint_seconds": 0.2,
            **fields,
        }
    )
    return run(config, ModelConfig(path=str(model)), engine, RunDir(run_root), seed=7)


def main() -> None:
    model, run_root, num_instructions, num_replicas = sys.argv[1:]
    engine = scripted(num_replicas=int(num_replicas), max_num_seqs=8)
    try:
        synthesize(Path(model), Path(run_root), int(num_instructions), engine)
    except TunesmithError as error:
        print(f"{type(error).__name__}: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
