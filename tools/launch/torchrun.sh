#!/usr/bin/env bash
# A merge over several machines, without a scheduler. Start it on each machine, in the project's folder:
#
#     NODES=2 HEAD=node0 tools/launch/torchrun.sh recipes/merge.yaml
#
# NODES    how many machines
# HEAD     the name of one of them, at which all meet; any free PORT (default 29500)
# NPROC    processes on each machine (default: its GPUs, else 1)
#
# NODES x NPROC must be a multiple of tensor x pipeline of `student.parallel`. Processes are numbered machine by
# machine, and neighbours in number share a matrix: let `tensor` divide NPROC, so that this stays within a machine.
#
# Every machine needs the same installation, and must see the same files under the same paths: the project, the
# models and the run folder are on a shared file system. On one machine `mergeopd run --nproc N` does it all.
#
# SIGTERM to torchrun saves and stops, but torchrun kills processes that have not ended after 30 seconds.
# Run the same command to resume from the newest checkpoint.
set -euo pipefail

: "${NODES:?number of machines}"
: "${HEAD:?host name of the first machine}"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
# torchrun would otherwise give every process a single thread.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / nproc > 0 ? $(nproc) / nproc : 1))}

exec torchrun \
    --nnodes "$NODES" \
    --nproc-per-node "$nproc" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:${PORT:-29500}" \
    --rdzv-id "${RUN_ID:-mergeopd}" \
    -m mergeopd run "$@"
