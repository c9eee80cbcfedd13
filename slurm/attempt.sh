# What the scripts of the stages share. They set $project, and $shown to what `scontrol show job` shows. Then:
#
#     source "$project/slurm/attempt.sh"
#     run_attempt launcher.job.supervisor STAGE RECIPE [key=value ...]
#
# Python is that of a virtual environment: $TUNESMITH_PYTHON, or .venv/bin/python in the folder where sbatch was called,
# or in the project.

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
