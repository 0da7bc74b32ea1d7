# Shared by the batch scripts of this folder, which source it and call run_stage. Needs bash 4.4 or newer.
#
# One srun task is one rank. Without a launcher between SLURM and the ranks a signal of SLURM reaches every rank (a launcher
# would die of USR1), and the exit codes of the ranks come back here (a launcher turns them all into 1):
#   0  the stage is finished                2  a mistake in flags or data: never started again
#   75 the ranks saved and stopped early, or one of them was lost: start again        1  a bug: see the log
# A rank that was killed by a signal counts as lost. To start again this job is requeued: same id, same log.
#
#   GLSD_ROOT          the checkout of glsd, the folder of submission by default
#   GLSD_PYTHON        the Python to use: by default .venv/bin/python of the checkout, else python in PATH
#   GLSD_REQUEUE       0: exit with 75 instead of requeueing, as in a chain of jobs
#   GLSD_MAX_REQUEUES  the most requeues, 100 by default

# Runs a command of this script that a signal for the job must not end; the script itself still gets the signal.
deaf() {
    trap '' TERM USR1
    "$@"
}
say() { printf 'glsd: %s\n' "$*"; }
refuse() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

[ -n "${SLURM_JOB_ID:-}" ] || refuse "this is a batch script: give it to sbatch"
GLSD_ROOT=${GLSD_ROOT:-$SLURM_SUBMIT_DIR}
if [ -z "${GLSD_PYTHON:-}" ]; then
    GLSD_PYTHON=$GLSD_ROOT/.venv/bin/python
    [ -x "$GLSD_PYTHON" ] || GLSD_PYTHON=$(command -v python || command -v python3) || refuse "no python: set GLSD_PYTHON"
fi
command -v "$GLSD_PYTHON" >/dev/null || refuse "GLSD_PYTHON is $GLSD_PYTHON: no such program on $(hostname)"
# In an array SLURM_JOB_ID of the last task is the id of the whole array: commands to SLURM must name the task.
id=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

run_stage() { # run_stage pretrain|finetune|evaluate|doctor FLAGS...
    local stage=$1 start=$((${SLURM_RESTART_COUNT:-0} + 1)) folder='' before code=75 step='' asked='' saves=yes
    shift
    # A signal that reaches only this shell (--signal=B:..., scancel --batch) is passed on as USR1: on TERM srun kills the ranks.
    trap 'asked=yes; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null || true' USR1 TERM
    [ "$stage" = pretrain ] || [ "$stage" = finetune ] || saves=''
    # A mistake in the flags ends the job here, before any rank starts. The doctor checks its own.
    [ "$stage" = doctor ] || folder=$(deaf "$GLSD_PYTHON" "$GLSD_ROOT/launch/slurm/flags.py" "$stage" "$@") || exit $?
    before=$(deaf last_checkpoint "$folder")
    describe_world
    say "start $start of job $id ($stage): $nodes nodes (${hosts[*]}), $ranks ranks, ${gpus:-no} GPUs a node," \
        "$(deaf time_left) left; ${folder:-no run folder}, last checkpoint: $before"
    case $stage in
        # Ranks of a training run end together: a rank that is left two minutes after the first one hangs.
        pretrain) run_ranks 120 pretrain.py "$@" --resume auto ;;
        finetune) run_ranks 120 finetune_dml.py "$@" --resume auto ;;
        evaluate) run_ranks 0 evaluate.py "$@" ;; # rank 0 measures alone, for as long as it takes
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

describe_world() { # sets nodes, hosts, ranks, gpus and the environment of the ranks
    local first
    nodes=$SLURM_JOB_NUM_NODES per_node=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-}
    mapfile -t hosts < <(deaf scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [ -n "$gpus" ] && [ "$gpus" -ne "$per_node" ]; then
        refuse "$gpus GPUs a node, but $per_node ranks: one rank drives one GPU, give sbatch --ntasks-per-node=$gpus"
    fi
    if [ -z "${SLURM_NTASKS_PER_NODE:-}" ] && [ "${SLURM_NTASKS:-$nodes}" -ne "$nodes" ]; then
        refuse "--ntasks=$SLURM_NTASKS does not say how many ranks a node has: give sbatch --nodes and --ntasks-per-node"
    fi
    # For a range of nodes (--nodes=1-4) SLURM_NTASKS would count the smallest number of nodes.
    ranks=$((nodes * per_node)) first=${hosts[0]}
    unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    if [ "$ranks" -gt 1 ]; then
        # Another port at each start: a process of the start before may still hold its port.
        export MASTER_ADDR=$first MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))
        export WORLD_SIZE=$ranks LOCAL_WORLD_SIZE=$per_node
    fi
    [ -n "$gpus" ] || export ACCELERATE_USE_CPU=${ACCELERATE_USE_CPU:-true}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_GPU:-1}}} PYTHONUNBUFFERED=1 GLSD_STOPPED_CODE=75
}

run_ranks() { # run_ranks SECONDS SCRIPT FLAGS...: sets step, and code to the highest exit code of the ranks
    local patience=$1 script=$2 options memory
    shift 2
    options=(--nodes="$nodes" --ntasks="$ranks" --ntasks-per-node="$per_node" --distribution=block --export=ALL --mpi=none)
    # A rank that ends must not kill the ranks that still save.
    options+=(--kill-on-bad-exit=0 --wait="$patience")
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # srun does not inherit it
    # Every rank sees all GPUs of its node, and LOCAL_RANK picks its own. (--gpu-bind=none would hide all of them.)
    unset SLURM_GPUS_PER_TASK SLURM_GPU_BIND SLURM_TRES_BIND SLURM_TRES_PER_TASK
    # These variables may come from a shell of srun or salloc: they are about the CPUs and memory of that shell's job.
    unset "${!SLURM_CPU_BIND@}"
    memory=("${!SLURM_MEM_PER_@}")
    if [ ${#memory[@]} -gt 1 ]; then # srun refuses two of them; 0 is all memory of this job
        unset "${memory[@]}"
        options+=(--mem=0)
    fi
    [ -z "$asked" ] || return 0 # no rank has started: code is still 75
    # shellcheck disable=SC2016  # the variables are those of the task
    srun "${options[@]}" bash -c '
        if [ -n "${WORLD_SIZE:-}" ]; then export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; fi
        exec "$@"' rank "$GLSD_PYTHON" "$GLSD_ROOT/launch/$script" "$@" &
    step=$!
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true # a signal ends the wait, not srun
    done
    code=0
    wait "$step" || code=$?
}

start_again() { # start_again FOLDER CHECKPOINT_BEFORE: requeue the job, unless something speaks against it
    local folder=$1 before=$2 after state stuck=0 file ended
    trap '' TERM USR1 # at a time limit every process of the job gets TERM; the commands below must survive it
    after=$(last_checkpoint "$folder")
    ended="the ranks ended with $code at checkpoint $after"
    if ! state=$(persist job_state); then
        say "$ended; nobody knows whether to start again: submit it again, it goes on there"
        exit 75
    fi
    case $state in
        RUNNING*) ;;
        *TimeLimit)
            [ -n "$saves" ] || refuse "$stage has reached its time limit and saves nothing on the way: give more --time"
            ;;
        *)
            say "$ended; SLURM has ended this job itself (scancel, preemption, a dead node)"
            exit 75
            ;;
    esac
    if [ -n "$saves" ]; then
        file=$folder/slurm.txt
        # The ranks may have ended before they made the folder.
        if mkdir -p "$folder" && echo "job $id start $start ended with $code: $before -> $after" >>"$file"; then
            # The number of starts in a row without a new checkpoint.
            stuck=$(awk -v job="$id" '$2 == job { n = $(NF - 2) == $NF ? n + 1 : 0 } END { print n + 0 }' "$file") ||
                stuck=0
        else
            say "cannot write $file: ends without a new checkpoint are not counted"
        fi
    fi
    if [ "${GLSD_REQUEUE:-1}" = 0 ]; then
        say "$ended: this job is not requeued (GLSD_REQUEUE=0)${saves:+, the next one of this folder goes on there}"
        exit 75
    elif [ "$stuck" -ge 3 ]; then
        say "the ranks ended with $code, the third time without a new checkpoint after $after: not started again"
        exit "$code"
    elif [ "${SLURM_RESTART_COUNT:=0}" -ge "${GLSD_MAX_REQUEUES:-100}" ]; then
        say "$ended, after $SLURM_RESTART_COUNT requeues (GLSD_MAX_REQUEUES): not started again"
        exit "$code"
    fi
    say "$ended: requeued"
    trap 'exit 75' TERM # which SLURM sends next
    if ! persist requeue; then
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

persist() { # persist COMMAND: repeat it for some minutes until it succeeds or ends with 2: a busy controller does not answer
    local pause code
    for pause in 1 2 4 8 15 30 30 30 30 0; do
        "$@" && return 0
        code=$?
        [ "$code" -ne 2 ] || return 2
        [ "$pause" -eq 0 ] || say "no answer of SLURM ($1), asked again in $pause s" >&2
        sleep "$pause" &
        wait $! || true
    done
    say "no answer of SLURM ($1) for minutes" >&2
    return 1
}

job_state() { # the state of this job and SLURM's reason; fails where they cannot be read
    scontrol --oneliner show job "$id" | sed -n 's/.*\bJobState=\([A-Z_]\+\) Reason=\([A-Za-z]*\).*/\1 \2/p' | grep .
}

requeue() { # 2 if SLURM answers and refuses
    local said
    said=$(scontrol requeue "$id" 2>&1) && return 0
    printf '%s\n' "$said" >&2
    case $said in *disabled* | *denied* | *nvalid*) return 2 ;; esac
    return 1
}

time_left() { # the time left, as squeue prints it
    squeue --noheader --job="$id" --format=%L | grep . || echo 'unknown time'
}
