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

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
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
