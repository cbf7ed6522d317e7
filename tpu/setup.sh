#!/usr/bin/env bash
# Prepare one host, or a shared file system: code, Python environment, bucket. Safe to repeat.
#
#   setup.sh --accelerator tpu|cuda|cpu [--bundle FILE] [--bucket NAME] [--mount DIR]
#
# --accelerator  which jax to install
# --bundle       archive from tpu/launch.py; its content replaces $HNET_HOME/code, and the code that
#                was there is kept as code.old
# --bucket       mount this Cloud Storage bucket, so that all hosts share one folder
# --mount        where (default /mnt/hnet)
#
# HNET_HOME      default ~/hnet-launch
# HNET_PYTHON    version of Python (default 3.12; that of the machine may be too old)
set -euo pipefail

home=${HNET_HOME:-$HOME/hnet-launch}
accelerator='' bundle='' bucket='' mount=/mnt/hnet

fail() {
  echo "setup ($(hostname)): $1" >&2
  exit 2
}

while (($#)); do
  [[ $# -ge 2 ]] || fail "$1 needs a value"
  case $1 in
    --accelerator) accelerator=$2 ;;
    --bundle) bundle=$2 ;;
    --bucket) bucket=$2 ;;
    --mount) mount=$2 ;;
    *) fail "unknown option $1" ;;
  esac
  shift 2
done

case $accelerator in
  tpu) packages=(-e "$home/code[tpu,mirror]") ;;
  cuda) packages=(-e "$home/code[mirror]" "jax[cuda12]") ;;
  cpu) packages=(-e "$home/code[mirror]") ;;
  *) fail "--accelerator '$accelerator': use tpu, cuda or cpu" ;;
esac

unpack() {
  for pid_file in "$home"/runs/*/host-*.pid; do
    [[ -e $pid_file ]] || continue
    read -r pid _ <"$pid_file" && [[ $pid =~ ^[0-9]+$ ]] || continue
    if [[ ! -e ${pid_file%.pid}.exit && -d /proc/$pid ]]; then
      fail "$(basename "$(dirname "$pid_file")") runs here (pid $pid): stop it before its code changes"
    fi
  done
  rm -rf "$home/code.new"
  mkdir -p "$home/code.new"
  tar -xzf "$bundle" -C "$home/code.new"
  if [[ -e $home/code ]]; then
    rm -rf "$home/code.old"
    mv "$home/code" "$home/code.old"
  fi
  mv "$home/code.new" "$home/code"
}

install_python() {
  export PATH="$HOME/.local/bin:$PATH"
  if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --user uv ||
      python3 -m pip install --quiet --user --break-system-packages uv
  fi
  [[ -x $home/venv/bin/python ]] || uv venv --python "${HNET_PYTHON:-3.12}" "$home/venv"
  uv pip install --python "$home/venv/bin/python" "${packages[@]}"
}

mount_bucket() {
  if mountpoint -q "$mount"; then return; fi
  command -v gcsfuse >/dev/null || sudo apt-get install -y gcsfuse ||
    fail "gcsfuse is missing: install it as its page in the Cloud Storage documentation says"
  sudo mkdir -p "$mount"
  sudo chown "$(id -u):$(id -g)" "$mount"
  # A checkpoint becomes visible by renaming its folder, which gcsfuse refuses without a limit
  # unless the bucket has a hierarchical namespace.
  # Hosts must see each other's files at once, so nothing about files is remembered.
  gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 \
    --metadata-cache-negative-ttl-secs=0 "$bucket" "$mount"
}

[[ -z $bundle ]] || unpack
[[ -d $home/code ]] || fail "$home/code does not exist: give --bundle"
install_python
[[ -z $bucket ]] || mount_bucket
"$home/venv/bin/python" -c '
import jax, jaxlib, sys
import hnet
print(f"ready: python {sys.version.split()[0]}, jax {jax.__version__}, jaxlib {jaxlib.__version__}")'
