"""The `slurm:` section of a recipe: what its jobs ask of Slurm."""

from pydantic import Field

from cluster.config import StrictModel


class JobConfig(StrictModel):
    """What one job asks for. Empty fields are left to Slurm, or to the section above."""

    nodes: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    cpus_per_task: int | None = Field(None, ge=1, description="CPUs of the one task that runs on each node")
    memory: str | None = Field(None, pattern=r"^[0-9]+[KMGT]?$", description="of each node, as sbatch's --mem takes it")
    time: str | None = Field(None, description="limit, as sbatch's --time takes it: minutes, H:M:S or D-H:M:S")
    partition: str | None = Field(None, pattern=r"^[A-Za-z0-9_.,-]+$")
    account: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    qos: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$")
    exclusive: bool | None = None
    exclude: str | None = Field(None, pattern=r"^[A-Za-z0-9_.,\[\]-]+$", description="nodes never to run on")
    options: tuple[str, ...] = Field((), description="further options of sbatch, such as --constraint=h100")


class SlurmConfig(JobConfig):
    """What the jobs of a run ask for, and what differs for single stages."""

    synthesize: JobConfig = JobConfig()
    train: JobConfig = JobConfig()
    export: JobConfig = JobConfig()
    evaluate: JobConfig = JobConfig()
