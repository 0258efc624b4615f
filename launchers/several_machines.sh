#!/usr/bin/env bash
# Several machines: run the same line on each of them.
#
#     RENDEZVOUS=node0:29500 MACHINES=2 RANKS=8 launchers/several_machines.sh "a lighthouse at dusk" --res 4096 --seed 1
#
# RENDEZVOUS  host:port on one of the machines that all others reach (node0 in the example)
# MACHINES    how many
# RANKS       ranks on each machine, usually its GPUs
# RESTARTS    how often all ranks start anew where one is lost (0); with --resume they go on
# RUN         any word that is equal on the machines of one run and different between runs (clear-dist)
#
# The picture is written on the machine that gets rank 0, which torchrun decides: let --output lie on a shared file
# system. Without one, the model's folder must exist on every machine under the same name.
# To try it on one machine, start it twice with RENDEZVOUS=localhost:29500 MACHINES=2 RANKS=2, on GPUs with a
# CUDA_VISIBLE_DEVICES of its own each time.
set -euo pipefail

: "${RENDEZVOUS:?host:port that all machines reach}" "${MACHINES:?number of machines}" "${RANKS:?ranks on each machine}"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

exec torchrun --nnodes "$MACHINES" --nproc_per_node "$RANKS" --max-restarts "${RESTARTS:-0}" \
    --rdzv_backend c10d --rdzv_endpoint "$RENDEZVOUS" --rdzv_id "${RUN:-clear-dist}" -- "$root/clear-dist" generate "$@"
