# What the scripts of the stages share. They set $shown to what `scontrol show job` shows. Then:
#
#     source "$(dirname "${original%%.sbatch*}")/attempt.sh"
#     run_attempt launcher.job.supervisor STAGE RECIPE [key=value ...]
#
# The code is that of the project which this file is part of. Python is that of a virtual environment:
# $TUNESMITH_PYTHON, or .venv/bin/python in the folder where sbatch was called, or in the project.
#
# The job gets your environment (sbatch's default, --export=ALL): that is how HF_TOKEN and the like arrive. Never write
# a secret into the command line, which `scontrol show job` shows to everybody. With --export=NONE set HOME and PATH.
#
# Why the scripts say --no-requeue: a requeued job may begin while its first attempt, on a node that is cut off from the
# network, still writes. The attempts of a job that `tunesmith run --on slurm` has submitted own the run one at a time.
#
# Why the scripts say --signal=B: without B: every process would get the signal, helpers like data loaders included.

# If sbatch was called inside another job (salloc, srun --pty), the environment has variables of that job. Slurm has
# replaced those that every job has. Those by which srun asks for something are left out: without them srun gives a step
# all memory and GPUs of its own job. Those that only some jobs have are kept if $shown has them.
unset ${!SLURM_STEP@} ${!SLURM_MEM_PER_@} ${!SLURM_CPUS_PER_@} ${!SLURM_GPUS_PER_@} ${!SLURM_NTASKS@} ${!SLURM_TRES_@} \
    ${!SLURM_CPU_BIND@} ${!SLURM_HET@} ${!SRUN_@} ${!PMI@} SLURM_NPROCS SLURM_GPUS SLURM_GRES SLURM_HOSTFILE \
    SLURM_EXCLUSIVE SLURM_EXACT SLURM_OVERLAP SLURM_TIMELIMIT SLURM_EXPORT_ENV RANK LOCAL_RANK GROUP_RANK WORLD_SIZE \
    LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT TUNESMITH_FENCING_TOKEN TUNESMITH_HOSTS TUNESMITH_CODE
cpus_per_task=$(sed -n 's|.*CPUs/Task=\([0-9]*\).*|\1|p' <<<"$shown")
[ "${cpus_per_task:-1}" -gt 1 ] && export SLURM_CPUS_PER_TASK=$cpus_per_task
[[ $shown == *Restarts=0* ]] && unset SLURM_RESTART_COUNT
grep -q 'Tres.*gpu\|TRES=.*gres/gpu' <<<"$shown" || unset SLURM_GPUS_ON_NODE

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ $project == *:* ]]; then
    echo "error: $project: Python splits a path at a colon. Move the project to a folder without one." >&2
    exit 2
fi
for python in "${TUNESMITH_PYTHON:-}" "$SLURM_SUBMIT_DIR/.venv/bin/python" "$project/.venv/bin/python"; do
    [ -x "$python" ] && break
done
if [ ! -x "$python" ]; then
    echo "error: no Python found. Submit from the project's folder, or set TUNESMITH_PYTHON=/path/to/python." >&2
    exit 2
fi
export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"

# Run the supervisor of this job and exit with its exit code. A job that was submitted with --requeue is requeued if the
# supervisor wants another attempt (75), or if a signal has killed it (above 128).
run_attempt() {
    local module=$1 code supervisor=
    shift
    # A shell waits for a command in the foreground before it runs a trap, so the supervisor runs in the background.
    trap '[ -n "$supervisor" ] && kill -USR2 "$supervisor" 2>/dev/null' USR2
    trap '[ -n "$supervisor" ] && kill -TERM "$supervisor" 2>/dev/null' TERM
    "$python" -P -m "$module" "$@" & # -P: never import from the folder where sbatch was called
    supervisor=$!
    # A signal ends `wait` early. After the end of the supervisor, `wait` returns its exit code again.
    while wait "$supervisor"; kill -0 "$supervisor" 2>/dev/null; do :; done
    wait "$supervisor"
    code=$?
    if [ "$code" -eq 75 ] || [ "$code" -gt 128 ]; then
        if [[ $shown == *Requeue=1* ]]; then # as it was at the start: slurmctld may not answer now
            trap '' USR2 TERM
            "$python" -P -m launcher.job.requeue "$@" || code=1
        fi
    fi
    exit "$code"
}
