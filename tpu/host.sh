#!/usr/bin/env bash
# What happens on one host of a run. Started by tpu/launch.py; by hand:
#
#   host.sh check RUN               exit 3, with the reason, if RUN cannot start here
#   host.sh start RUN COMMAND...    check, then run COMMAND detached
#   host.sh exec RUN COMMAND...     check, then run COMMAND in the foreground, its output on stdout
#   host.sh status RUN              one line: host, state, exit code, time it ended, pid
#   host.sh logs RUN LINES          that line, then the end of the log
#   host.sh stop RUN SECONDS        SIGTERM, so that the run saves; after SECONDS, SIGKILL
#
# Everything lies in $HNET_HOME (default ~/hnet-launch): code/ and venv/ from setup.sh, and
# runs/RUN/host-<id>.{log,pid,exit,stop}.
#
# HNET_CODE_HASH   what the launcher shipped: code/CODE_HASH must be equal
# HNET_STAGGER     seconds that host i waits times i, so that not all read the bucket at once
# HNET_HOST_ID     number of this host; default: that of Slurm, of the pod, of the TPU slice
# HNET_DEVICES     device files whose holder makes a start impossible (extended regular expression)
set -euo pipefail

home=${HNET_HOME:-$HOME/hnet-launch}
action=${1:?action: check, start, exec, status, logs or stop}
run=${2:?name of the run}
shift 2
folder=$home/runs/$run

fail() {
  echo "host ${id:-?} ($(hostname)): $1" >&2
  exit 3
}

host_id() {
  local of_slice name
  of_slice=http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance/attributes
  name=${HNET_HOST_ID:-${SLURM_PROCID:-${JOB_COMPLETION_INDEX:-}}}
  if [[ -z $name ]]; then
    name=$(curl -sf -m 5 -H 'Metadata-Flavor: Google' "$of_slice/agent-worker-number" || true)
  fi
  if [[ -z $name && $(hostname) =~ -w-([0-9]+)$ ]]; then name=${BASH_REMATCH[1]}; fi
  echo "${name:-0}"
}

# The run's process, if it lives. Its start time is compared: numbers of processes are used again.
running_pid() {
  local pid started
  read -r pid started 2>/dev/null <"$folder/host-$id.pid" || return 1
  [[ $pid =~ ^[0-9]+$ && -n $started && $started == "$(start_time "$pid")" ]] || return 1
  echo "$pid"
}

start_time() {
  local line
  line=$(cat "/proc/$1/stat" 2>/dev/null) || return 0
  line=${line##*) } # the name of a program may hold blanks and brackets
  cut -d ' ' -f 20 <<<"$line"
}

device_holder() {
  local devices=${HNET_DEVICES:-/dev/(accel|vfio/)[0-9]+} find=(find)
  if [[ $(id -u) != 0 ]] && sudo -n true 2>/dev/null; then find=(sudo -n find); fi
  "${find[@]}" /proc/[0-9]*/fd -type l -printf '%p %l\n' 2>/dev/null |
    grep -E " $devices\$" | head -n 1 | cut -d / -f 3 || true
}

check() {
  local pid holder comm LC_ALL=C
  if pid=$(running_pid); then
    fail "run $run is running already (pid $pid): stop it first"
  fi
  holder=$(device_holder)
  if [[ -n $holder ]]; then
    comm=$(cat "/proc/$holder/comm" 2>/dev/null || true)
    fail "pid $holder (${comm//[^[:graph:]]/?}) holds the accelerator: end it first"
  fi
  if [[ -n ${HNET_CODE_HASH:-} ]]; then
    local here
    here=$(cat "$home/code/CODE_HASH" 2>/dev/null || echo none)
    [[ $here == "$HNET_CODE_HASH" ]] ||
      fail "the code here is $here, the launcher's is $HNET_CODE_HASH: run setup again"
  fi
}

# Nobody holds the device, so a lock that a killed process left behind protects nothing.
prepare() {
  rm -f "${HNET_LOCKFILE:-/tmp/libtpu_lockfile}" || true
  mkdir -p "$folder"
  rm -f "$folder/host-$id".{exit,stop,pid}
}

supervise() {
  local child code
  echo "$$ $(start_time $$)" >"$folder/host-$id.pid"
  cd "$home/code"
  export PATH="$home/venv/bin:$PATH" PYTHONUNBUFFERED=1 HNET_RUN=$run
  echo "== $(date -u +%FT%TZ) host $id starts, code ${HNET_CODE_HASH:-?}," \
    "configuration ${HNET_CONFIG_HASH:-?}: $*"
  child='' asked=''
  trap 'asked=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM INT
  sleep "$(awk -v a="${HNET_STAGGER:-0}" -v b="$id" 'BEGIN { print a * b }')" &
  wait $! || true
  if [[ -n $asked ]]; then
    code=75 # nothing has started, so nothing is lost
  else
    "$@" &
    child=$! code=0
    wait "$child" || code=$?
    while [[ -n $asked ]]; do # a trapped signal ended that wait, not the child
      asked='' code=0
      wait "$child" || code=$?
    done
  fi
  echo "== $(date -u +%FT%TZ) host $id ends with exit code $code"
  echo "$code $(date +%s.%N)" >"$folder/host-$id.exit.tmp"
  mv "$folder/host-$id.exit.tmp" "$folder/host-$id.exit"
  return "$code"
}

status() {
  local pid code at stopped=no ending='^[0-9]{1,3} [0-9]{1,12}([.][0-9]*)?$'
  [[ ! -e $folder/host-$id.stop ]] || stopped=yes
  if pid=$(running_pid); then
    echo "HNET host=$id name=$(hostname) state=running code=- at=- pid=$pid stopped=$stopped"
  elif read -r code at 2>/dev/null <"$folder/host-$id.exit" && [[ "$code $at" =~ $ending ]]; then
    echo "HNET host=$id name=$(hostname) state=ended code=$code at=$at pid=- stopped=$stopped"
  elif [[ -e $folder/host-$id.pid ]]; then # killed with its supervisor, or a damaged file
    at=$(stat -c %Y "$folder/host-$id.pid")
    echo "HNET host=$id name=$(hostname) state=ended code=137 at=$at pid=- stopped=$stopped"
  else
    echo "HNET host=$id name=$(hostname) state=absent code=- at=- pid=- stopped=$stopped"
  fi
}

stop() {
  local pid left=$(($1 * 5))
  if [[ ! -e $folder ]]; then return; fi
  touch "$folder/host-$id.stop"
  pid=$(running_pid) || return 0
  kill -TERM "$pid"
  while ((left-- > 0)) && running_pid >/dev/null; do sleep 0.2; done
  if pid=$(running_pid); then
    echo "host $id still runs after $1 s: killed" >&2
    if ((pid == 1)); then kill -KILL 1; else kill -KILL -- "-$pid"; fi # -1 would be all there are
  fi
}

id=$(host_id)
case $action in
  check) check ;;
  start)
    check
    prepare
    setsid nohup "$BASH" "$0" supervise "$run" "$@" >>"$folder/host-$id.log" 2>&1 </dev/null &
    for _ in {1..50}; do # until it has written its number, so that status knows it
      if running_pid >/dev/null || [[ -e $folder/host-$id.exit ]]; then break; fi
      sleep 0.1
    done
    status
    ;;
  supervise) supervise "$@" ;;
  exec)
    check
    prepare
    supervise "$@"
    ;;
  status) status ;;
  logs)
    status
    tail -n "$1" "$folder/host-$id.log" 2>/dev/null || echo "(no log)"
    ;;
  stop)
    stop "$1"
    status
    ;;
  *) fail "unknown action $action" ;;
esac
