#!/bin/bash
# A training run as a slurm job: megabus submit fills in megabus/slurm/job.sh. docs/cluster.md says what it does.
@{directives}

# ---- what to run

cd -- @{directory} || exit 2
export launcher=@{launcher} python=@{python} ranks_per_node=@{ranks_per_node}
arguments=(@{arguments})
case ${SLURM_ARRAY_TASK_ID:-0} in
@{members}
*) echo "slurm: no member $SLURM_ARRAY_TASK_ID in this sweep" >&2; exit 2 ;;
esac
requeue=@{requeue} max_restarts=@{max_restarts}
state=@{logs}/$SLURM_JOB_ID  # what this job remembers from start to start

# A shell that is itself inside a job may have left these.
unset MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE
export OMP_NUM_THREADS=1
@{setup}

# ---- being told to stop: by slurm some time before the limit (USR1), or for good (TERM)
# Neither launcher hands USR1 on to its ranks, so the run is told by its stop file. Who wrote it stands in it: one that
# a user has put there stays, one that a job has left is no business of the next start.

at_limit=0 ended=0 woken=0
users_stop() {
    [[ -e $run_dir/stop && $(cat -- "$run_dir/stop" 2>/dev/null) != "slurm job "* ]]
}
ask_to_save() {
    users_stop && { requeue=0; return; }
    mkdir -p -- "$run_dir" && echo "slurm job $SLURM_JOB_ID" >"$run_dir/stop"
}
forget_stop() {
    [[ $(cat -- "$run_dir/stop" 2>/dev/null) == "slurm job $SLURM_JOB_ID" ]] && rm -f -- "$run_dir/stop"
}
forget_stop_of_the_gone() {  # another job may be running here, and may just have been told to save
    local job
    job=$(cat -- "$run_dir/stop" 2>/dev/null)
    [[ $job == "slurm job "* ]] || return
    [[ $job != "slurm job $SLURM_JOB_ID" && -n $(squeue --noheader --jobs="${job#slurm job }" 2>/dev/null) ]] ||
        rm -f -- "$run_dir/stop"
}
trap 'at_limit=1 woken=1; echo "slurm: the time limit is near, telling the run to save"; ask_to_save' USR1
trap 'ended=1 woken=1; echo "slurm: the job is being ended, telling the run to save"; ask_to_save' TERM

# ---- one launcher a node, started by srun

newest_checkpoint() { cat -- "$run_dir/checkpoints/latest" 2>/dev/null; }
progress() { [[ $(newest_checkpoint) != "$before" ]]; }

on_this_node() {
    case $launcher in
    torchrun)
        exec "$python" -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" \
            --nproc-per-node="$ranks_per_node" --rdzv-backend=static \
            --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m megabus train "$@" ;;
    deepspeed)
        exec "$python" -m deepspeed.launcher.runner --hostfile="$hostfile" --no_ssh --node_rank="$SLURM_NODEID" \
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --module --no_local_rank megabus train "$@" ;;
    esac
}
export -f on_this_node

forget_stop_of_the_gone
rm -f -- "$state.outcome"
before=$(newest_checkpoint)
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
export hostfile=$state.hosts
while read -r host; do echo "$host slots=$ranks_per_node"; done <<<"$hosts" >"$hostfile"
export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
# Below the ports that systems hand out by themselves; another one at every start.
export MASTER_PORT=$((10000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 20000))
export MEGABUS_OUTCOME=$state.outcome  # rank 0 says there how the run ended: launchers lose their ranks' exit codes

echo "slurm: job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) of $run_dir on ${hosts//$'\n'/ }"
srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=@{cpus_per_node} --kill-on-bad-exit=1 \
    bash -c 'on_this_node "$@"' bash "${arguments[@]}" &
step=$! woken=1
while ((woken)); do  # a signal ends `wait` early
    woken=0
    wait "$step"
    code=$?
done
trap '' USR1
forget_stop  # the run may have ended by itself before it looked
outcome=$(cat -- "$state.outcome" 2>/dev/null)

# ---- and now?

start_again() {
    echo "slurm: $1: queued again"
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "slurm: scontrol requeue failed; submit the job again to go on"
}
count_failure() {  # one more in a row, without a new checkpoint in between
    failures=$(cat -- "$state.failures" 2>/dev/null)
    progress && failures=0
    failures=$((${failures:-0} + 1))
}
start_again_if_few() {
    ((requeue && failures <= max_restarts)) || return
    echo "$failures" >"$state.failures"
    start_again "restart $failures of at most $max_restarts"
}

case $outcome in
finished)
    rm -f -- "$state".{outcome,hosts,failures}
    exit 0 ;;
refused)
    echo "slurm: bad input, which another start would not mend"
    exit 2 ;;
stopped)
    if ((at_limit && requeue && !ended)); then
        if ! progress; then  # starting alone may take as long as there is time: it would for ever
            count_failure
            echo "slurm: the time limit came before anything new was saved, for the ${failures}. time in a row"
            start_again_if_few
            echo "slurm: give it more --time, and submit it again to go on"
            exit 1
        fi
        rm -f -- "$state.failures"
        start_again "saved before the time limit"
    fi
    rm -f -- "$state.failures"
    echo "slurm: saved, not finished; submit the job again to go on"
    exit 75 ;;
esac
((code == 0)) && code=1  # deepspeed's runner ends so when its launcher was killed
((ended)) && exit "$code"  # cancelled or preempted: what comes now is slurm's to say
count_failure
echo "slurm: the run failed ($code), for the ${failures}. time in a row without a new checkpoint in between"
start_again_if_few
exit "$code"
