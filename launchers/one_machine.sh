#!/usr/bin/env bash
# One machine, all of its GPUs (or N ranks on CPU):
#
#     launchers/one_machine.sh 8 "a lighthouse at dusk" --res 2048
#
# The first argument is the number of ranks; the rest goes to `clear-dist generate`. From a checkout nothing needs to be
# installed but the requirements. `clear-dist generate --nproc 8 ...` does the same without torchrun, starts faster, and
# ends with one line and an exit status of its own (0, 1, 2 or 130) whatever happens.
# RESTARTS=3 starts all ranks anew, up to three times, where one is lost: with --resume they go on.
set -euo pipefail

if [[ ! ${1-} =~ ^[0-9]+$ ]]; then
    echo "usage: one_machine.sh RANKS [arguments of clear-dist generate], as in: one_machine.sh 2 'a lighthouse'" >&2
    exit 2
fi
ranks=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

exec torchrun --standalone --max-restarts "${RESTARTS:-0}" --nproc_per_node "$ranks" \
    -- "$root/clear-dist" generate "$@" # or torchrun reads our flags
