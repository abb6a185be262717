#!/usr/bin/env bash
# A real Slurm for the tests: two nodes, n1 and n2, of 4 pretended CPUs, all on this machine.
#
#   tests/slurm/cluster.sh start    install Debian's packages if they are missing, start what does not run, wait for it
#   tests/slurm/cluster.sh stop     cancel all jobs, end the daemons
#
# Needs root; no systemd, no database. Everything lies in $BEIT_SLURM (/tmp/beit-slurm), but for a line in /etc/hosts.
# By hand: export SLURM_CONF=/tmp/beit-slurm/slurm.conf PATH=/tmp/beit-slurm/bin:$PATH, then srun, sbatch, squeue.
set -euo pipefail

dir=${BEIT_SLURM:-/tmp/beit-slurm}
export SLURM_CONF=$dir/slurm.conf
hosts="127.0.0.1 n1 n2 # $dir"
# What a surrounding job has set must not reach the commands below.
for name in $(compgen -e | grep -E '^(SLURM|SBATCH|SRUN)_' | grep -vx SLURM_CONF); do unset "$name"; done

# The pid of a daemon of ours, if it runs; a file of pids outlives its process, and others may run Slurm here too.
pid_of() {
    local pid
    pid=$(cat "$dir/run/$1.pid" 2>/dev/null) && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$dir" && echo "$pid"
}

install() {
    local missing=()
    for package in slurmctld slurmd slurm-client munge; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    # Debian would start the daemons with its own configuration.
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    {
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}"
    } >"$dir/log/apt.log" 2>&1 || { tail -5 "$dir/log/apt.log" >&2; exit 1; }
}

configure() {
    local tracking=linuxproc # loses a process whose parent has died; a cluster with cgroups does not
    if grep -q ' /sys/fs/cgroup/freezer cgroup rw' /proc/mounts; then
        tracking=cgroup
        printf '%s\n' CgroupPlugin=cgroup/v1 CgroupAutomount=no ConstrainCores=no ConstrainRAMSpace=no >"$dir/cgroup.conf"
    fi
    cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=17810
SlurmUser=root
SlurmdUser=root
# A job that goes back into the queue waits until its old credential has expired: 120 s by default.
AuthInfo=socket=$dir/munge/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdSpoolDir=$dir/spool/%n
SlurmdPidFile=$dir/run/%n.pid
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/$tracking
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
# seconds between SIGTERM and SIGKILL
KillWait=5
# Jobs that have ended stay known this long: without a database nothing else tells of them.
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# At preemption a job gets the signal that it asked for with --signal, else SIGTERM; GraceTime seconds later it is ended.
SlurmctldParameters=preempt_send_user_signal
# 4 CPUs and 64 GB each, whatever the machine has
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[17811-17812] CPUs=4 RealMemory=64000
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 PriorityTier=5 PreemptMode=OFF
PartitionName=preemptible Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF
END
    # What submitit asks about a job: sacct itself needs a database.
    cat >"$dir/bin/sacct" <<'END'
#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in -j) jobs="${jobs:+$jobs,}$2"; shift ;; esac
    shift
done
echo 'JobID|State|NodeList'
squeue --noheader --array --states=all --jobs="$jobs" --format='%i|%T|%N'
END
    chmod +x "$dir/bin/sacct"
    # The first node's name is where the ranks of a job meet.
    grep -qxF "$hosts" /etc/hosts || printf "%s\n" "$hosts" >>/etc/hosts
}

start() {
    [ "$(id -u)" = 0 ] || { echo "cluster.sh: starting Slurm needs root" >&2; exit 1; }
    mkdir -p "$dir"/{bin,log,munge,run,state,spool/n1,spool/n2}
    chmod 755 "$dir" "$dir/munge"
    install
    pid_of slurmctld >/dev/null || configure
    if ! pid_of munged >/dev/null; then
        [ -s "$dir/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$dir/munge/key")
        rm -f "$dir/munge/munge.sock"
        munged --key-file="$dir/munge/key" --socket="$dir/munge/munge.sock" --pid-file="$dir/run/munged.pid" \
            --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
    fi
    pid_of slurmctld >/dev/null || slurmctld -f "$SLURM_CONF"
    for node in n1 n2; do
        # In a name space of its own, so that `hostname` in a job says n1 or n2.
        pid_of $node >/dev/null \
            || unshare --uts sh -c 'hostname "$1" && exec slurmd -N "$1" -f "$2"' sh $node "$SLURM_CONF"
    done
    # After a start old states are shown at first; a step on both nodes is the proof.
    for _ in $(seq 50); do
        timeout 10 srun --quiet --immediate=5 -p urgent -N 2 true 2>/dev/null && return
        scontrol update nodename=n[1-2] state=resume 2>/dev/null || true # a node that was down in an earlier life
        sleep 0.2
    done
    tail -n 5 "$dir"/log/*.log >&2
    exit 1
}

stop() {
    local pid
    if pid_of slurmctld >/dev/null; then
        timeout 10 scancel --user="$(id -un)" || true
        for _ in $(seq 60); do [ -z "$(timeout 5 squeue --noheader)" ] && break || sleep 0.2; done
    fi
    for daemon in n1 n2 slurmctld munged; do
        pid=$(pid_of $daemon) || continue
        # munged takes seconds to end by itself, and has nothing to save.
        kill "-$([ $daemon = munged ] && echo KILL || echo TERM)" "$pid"
        while pid_of $daemon >/dev/null; do sleep 0.1; done
    done
    rm -f "$dir"/run/*.pid
    grep -vxF "$hosts" /etc/hosts >"$dir/hosts" || true
    cat "$dir/hosts" >/etc/hosts # a container's /etc/hosts can be written, not replaced
}

case ${1:-} in
    start | stop) "$1" ;;
    *) sed -n '2,8s/^# \?//p' "$0" && exit 2 ;;
esac
