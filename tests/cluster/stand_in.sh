#!/bin/bash
# Stands in for python where only what job.sh makes of its ranks is looked at ($GLSD_PYTHON). $STAND_IN has one word for each
# start of the job: an exit code; "CODE+" for one behind a new checkpoint; KILL for an end by
# kill -9; "wait" for 75 once it is asked to stop.
set -eu
[[ $1 != */flags.py || $2 != line ]] || exit 0 # a task of a sweep without flags
if [[ $1 == */flags.py ]]; then
    for word in "$@"; do [[ $word != --out=* ]] || echo "${word#--out=}"; done
    exit
fi
asked=
trap 'asked=USR1' USR1
trap 'asked=TERM' TERM
echo "rank ${RANK:-none} of ${WORLD_SIZE:-none}, local ${LOCAL_RANK:-none} of ${LOCAL_WORLD_SIZE:-none} on $(hostname):" \
    "at ${MASTER_ADDR:-none}, cpu ${ACCELERATE_USE_CPU:-no}, gpus ${CUDA_VISIBLE_DEVICES:-none}, threads $OMP_NUM_THREADS"
read -ra words <<<"$STAND_IN"
word=${words[${SLURM_RESTART_COUNT:-0}]}
for _ in {1..9000}; do
    [[ $word == wait && -z $asked ]] || break
    sleep 0.1 & wait $! || true
done
[[ $word != wait ]] || { echo "rank ${RANK:-none} got $asked"; exit 75; }
for folder in "$@"; do
    [[ $word != *+ || $folder != --out=* ]] || ln -sfn "step_$SECONDS$RANDOM" "${folder#--out=}/checkpoints/latest"
done
[[ $word != KILL ]] || kill -KILL $$
exit "${word%+}"
