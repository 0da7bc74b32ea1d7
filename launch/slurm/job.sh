# What the batch scripts of this folder have in common: each sources it and calls run_stage. Needs bash 4.4 or newer.
#
# One srun task is one rank. There is no launcher between SLURM and the ranks, so that a signal of SLURM reaches every
# rank (a launcher dies of USR1) and the exit codes of the ranks come back here (a launcher makes them all 1):
#   0  the stage is finished                2  a mistake in flags or data: never started again
#   75 the ranks saved and stopped early, or one of them was lost: start again        1  a bug: see the log
# A rank that was killed by a signal counts as lost. Starting again means requeueing this very job: same id, same log.
#
#   GLSD_ROOT          the checkout of glsd, the folder of submission by default
#   GLSD_PYTHON        the Python to use: by default that of .venv in the checkout, else the python of the path
#   GLSD_REQUEUE       0: end with 75 instead of requeueing; whoever submitted it starts it again (a chain)
#   GLSD_MAX_REQUEUES  at most so many requeues, 100 by default

# Runs a command of this script's own that a signal for the job must not end; the script itself hears it.
deaf() {
    trap '' TERM USR1
    "$@"
}
say() { printf 'glsd: %s\n' "$*"; }
refuse() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

GLSD_ROOT=${GLSD_ROOT:-${SLURM_SUBMIT_DIR:?error: this is a batch script, give it to sbatch}}
if [ -z "${GLSD_PYTHON:-}" ]; then
    GLSD_PYTHON=$GLSD_ROOT/.venv/bin/python
    [ -x "$GLSD_PYTHON" ] || GLSD_PYTHON=$(command -v python || command -v python3) || refuse "no python: set GLSD_PYTHON"
fi

run_stage() { # run_stage pretrain|finetune|evaluate|doctor FLAGS...
    local stage=$1 start=$((${SLURM_RESTART_COUNT:-0} + 1)) folder='' before code=75 step='' asked=''
    shift
    # What reaches only this shell (--signal=B:..., scancel --batch) is passed on, as USR1: of TERM srun kills the ranks.
    trap 'asked=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true' USR1 TERM
    # Flags that are wrong end here, before any rank starts. The doctor has its own.
    [ "$stage" = doctor ] || folder=$(deaf "$GLSD_PYTHON" "$GLSD_ROOT/launch/slurm/flags.py" "$stage" "$@") || exit $?
    before=$(deaf last_checkpoint "$folder")
    describe_world
    say "start $start of job $SLURM_JOB_ID ($stage): $nodes nodes (${hosts[*]}), $ranks ranks, ${gpus:-no} GPUs a node," \
        "$(deaf time_left) left; ${folder:-no run folder}, last checkpoint: $before"
    case $stage in
        # Ranks of a training run end together: who is left two minutes after the first has gone hangs.
        pretrain) run_ranks 120 pretrain.py "$@" --resume auto ;;
        finetune) run_ranks 120 finetune_dml.py "$@" --resume auto ;;
        evaluate) run_ranks 0 evaluate.py "$@" ;; # rank 0 measures on its own, for as long as it takes
        doctor) run_ranks 0 doctor.py "$@" ;;
    esac
    if [ "$code" -eq 0 ]; then
        exit 0
    elif [ "$code" -ne 75 ] && [ "$code" -lt 128 ]; then
        say "the ranks ended with $code: not started again"
        exit "$code"
    fi
    start_again "$folder" "$before"
}

describe_world() { # sets nodes, hosts, ranks, gpus, ends (seconds since 1970) and what ranks read from the environment
    local first
    ends=$(deaf end_time) || ends=9999999999
    nodes=$SLURM_JOB_NUM_NODES per_node=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-}
    mapfile -t hosts < <(deaf scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [ -n "$gpus" ] && [ "$gpus" -ne "$per_node" ]; then
        refuse "$gpus GPUs a node, but $per_node ranks: one rank drives one GPU, give sbatch --ntasks-per-node=$gpus"
    fi
    if [ -z "${SLURM_NTASKS_PER_NODE:-}" ] && [ "${SLURM_NTASKS:-$nodes}" -ne "$nodes" ]; then
        refuse "--ntasks=$SLURM_NTASKS does not say how many ranks a node has: give sbatch --nodes and --ntasks-per-node"
    fi
    # SLURM_NTASKS would be that of the smallest number of nodes where a job takes what it gets (--nodes=1-4).
    ranks=$((nodes * per_node)) first=${hosts[0]}
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    if [ "$ranks" -gt 1 ]; then
        # Another port at each start: what is left of the one before may still hold the last.
        export MASTER_ADDR=$first MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))
        export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$per_node
    fi
    [ -n "$gpus" ] || export ACCELERATE_USE_CPU=${ACCELERATE_USE_CPU:-true}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} PYTHONUNBUFFERED=1 GLSD_STOPPED_CODE=75
}

run_ranks() { # run_ranks SECONDS SCRIPT FLAGS...: sets step, and code to the highest exit code of the ranks
    local patience=$1 script=$2 options
    shift 2
    options=(--nodes="$nodes" --ntasks="$ranks" --ntasks-per-node="$per_node" --distribution=block --export=ALL --mpi=none)
    # A rank that says why it ends must not kill those that still save.
    options+=(--kill-on-bad-exit=0 --wait="$patience")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it
    # Every rank sees all GPUs of its node, LOCAL_RANK says which is its own. (--gpu-bind=none would hide them all.)
    unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_TRES_BIND SLURM_TRES_PER_TASK
    [ -z "$asked" ] || return 0 # no rank has started: code is still 75
    # shellcheck disable=SC2016  # the variables are those of the task
    srun "${options[@]}" bash -c '
        if [ -n "${WORLD_SIZE:-}" ]; then export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; fi
        exec "$@"' rank "$GLSD_PYTHON" "$GLSD_ROOT/launch/$script" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true # a signal ends the waiting, not srun
    done
    code=0
    wait "$step" || code=$?
}

start_again() { # start_again FOLDER CHECKPOINT_BEFORE: requeue the job, unless something speaks against it
    local folder=$1 before=$2 after stuck=0 file
    trap '' TERM USR1 # at a time limit every process of the job gets TERM, and those that this needs must not die of it
    after=$(last_checkpoint "$folder")
    if [ "$(job_state)" != RUNNING ] && [ "$(date +%s)" -lt "$ends" ]; then
        say "the ranks ended with $code at checkpoint $after;" \
            "SLURM has ended this job itself (scancel, preemption, a dead node)"
        exit 75
    fi
    if [ -d "$folder" ]; then
        file=$folder/slurm.txt
        echo "job $SLURM_JOB_ID start $start ended with $code: $before -> $after" >>"$file" || true
        # How many of its last starts brought no new checkpoint.
        stuck=$(awk -v job="$SLURM_JOB_ID" '$2 == job { n = $(NF - 2) == $NF ? n + 1 : 0 } END { print n + 0 }' "$file") ||
            stuck=0
    fi
    if [ "${GLSD_REQUEUE:-1}" = 0 ]; then
        say "the ranks ended with $code at checkpoint $after: this job is not requeued, the next one goes on"
        exit 75
    elif [ "$stuck" -ge 3 ]; then
        say "the ranks ended with $code, the third time without a new checkpoint after $after: not started again"
        exit "$code"
    elif [ "${SLURM_RESTART_COUNT:=0}" -ge "${GLSD_MAX_REQUEUES:-100}" ]; then
        say "the ranks ended with $code at checkpoint $after," \
            "after $SLURM_RESTART_COUNT requeues (GLSD_MAX_REQUEUES): not started again"
        exit "$code"
    fi
    say "the ranks ended with $code at checkpoint $after: requeued"
    trap 'exit 75' TERM # what SLURM says next
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "SLURM does not requeue this job (submitted with --no-requeue?): submit it again, it goes on at $after"
        exit 75
    fi
    sleep 60 &
    wait $! || true
    exit 75
}

last_checkpoint() { # the name of the last checkpoint in a run folder, or "none"
    { [ -n "$1" ] && readlink "$1/checkpoints/latest"; } || echo none
}

job_state() {
    scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.*\bJobState=\([A-Z_]*\).*/\1/p'
}

end_time() { # of the job by its limit, in seconds since 1970
    date --date="$(squeue --noheader --job="$SLURM_JOB_ID" --format=%e)" +%s 2>/dev/null
}

time_left() { # as squeue shows it
    squeue --noheader --job="$SLURM_JOB_ID" --format=%L || echo 'unknown time'
}
