#!/usr/bin/env bash
# Your GPUs' first hour with clear-dist and the real weights; at its end an archive of results that you may send us.
#
#     benchmarks/gpu/first_hour.sh [--model FOLDER] [--clear-weights FILE] [--folder FOLDER] [--minutes N] [--small]
#
#   --model FOLDER        weights that are here already, or a hub id (black-forest-labs/FLUX.1-dev, 37 GB to download)
#   --clear-weights FILE  CLEAR's (clear_local_<radius>.safetensors in the model's folder, else Huage001/CLEAR's for 16)
#   --folder FOLDER       for the results (clear-dist-first-hour, in this folder)
#   --minutes N           for all steps together, the download aside (60; at least 10)
#   --small               toy sizes: shows that the steps work, and nothing about speed
#
# Needed first: pip install -c constraints.txt -e '.[bench]' and, for the download, FLUX.1-dev's licence accepted on its
# page and `hf auth login`. Steps, each with its share of the minutes and what earlier ones left of theirs:
#
#   ready     GPUs, packages, licence, room on the disk: if one is missing, nothing else is tried
#   verify    is this machine all right?
#   weights   downloaded and checked; how long it takes is yours to wait, and counts for nothing
#   1024      a picture on all GPUs, its plan beside it; alone: the same on one GPU, where there are more
#   large     one of 4096 px; all with what `plan` names as nearest where they would not fit
#   official  CLEAR's published way on one GPU, and ours
#   table10   the paper's Table 10 on the GPUs that are here; table7: Table 7 on one
#   suite     python -m benchmarks.gpu.suite; without 30 GB a GPU, table10 and table7 are left out
#
# A step that fails or runs out of time is noted, and the others go on. The same command goes on where it was stopped;
# steps that are done are not done again. The archive has logs, figures, versions and pictures; no tokens, and no names
# of the machine, the user and their folders.
set -uo pipefail
{ # read to its end before anything runs: a `git pull` meanwhile must not change it

WHOLE=30 # GB of a GPU that holds FLUX.1-dev's architecture and a step of it

refuse() {
    echo "first_hour.sh: $1" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
model=black-forest-labs/FLUX.1-dev clear='' folder=clear-dist-first-hour minutes=60 small=''
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit
        ;;
    --small) small=--small ;;
    --model | --clear-weights | --folder | --minutes)
        [ $# -gt 1 ] || refuse "$1 needs a value; see --help"
        case $1 in
        --model) model=$2 ;;
        --clear-weights) clear=$2 ;;
        --folder) folder=$2 ;;
        --minutes) minutes=$2 ;;
        esac
        shift
        ;;
    *) refuse "there is no $1; see --help" ;;
    esac
    shift
done
[[ $minutes =~ ^[1-9][0-9]{1,3}$ ]] || refuse "--minutes must be a whole number from 10 to 9999, got $minutes; nearest: 60"
command -v timeout > /dev/null || refuse "the command timeout (coreutils) is needed"
for python in python python3 ''; do
    [ -n "$python" ] || refuse "there is no python; nearest: activate the environment that clear-dist is installed in"
    command -v "$python" > /dev/null && break
done
mkdir -p "$folder" && [ -w "$folder" ] || refuse "--folder must be one that can be written to, got $folder"
folder=$(cd "$folder" && pwd)
[ ! -d "$model" ] || model=$(cd "$model" && pwd)
[ ! -e "$clear" ] || clear=$(cd "$(dirname "$clear")" && pwd)/$(basename "$clear")
if [ -z "$clear" ]; then
    clear=auto
    [ ! -d "$model" ] || compgen -G "$model/clear_local_*.safetensors" > /dev/null || clear=Huage001/CLEAR
fi
flags="--model $model --clear-weights $clear${small:+ $small}"
[ ! -f "$folder/flags.txt" ] || [ "$(< "$folder/flags.txt")" = "$flags" ] ||
    refuse "--folder must be a new one, or of the same flags ($(< "$folder/flags.txt")), got $folder; nearest: $folder-2"
cd "$root" || exit 1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

states=$folder/steps.tsv began=$SECONDS ends=0 running='' failures=0
touch "$states"

# `timeout` has a process group of its own, which Ctrl-C does not reach.
stop() {
    [ -z "$running" ] || { kill -TERM "$running" && wait "$running"; }
    printf '\nstopped; the same command goes on from here\n'
    exit 130
}
trap stop HUP INT TERM

# step NAME MINUTES COMMAND...: run it, its output in NAME.log. MINUTES of 60; 0: as long as it takes, uncounted.
step() {
    local name=$1 share=$2 started=$SECONDS left status state note=''
    shift 2
    ends=$((ends + share * minutes))
    left=$((share == 0 ? 0 : ends - SECONDS + began))
    if is_done "$name"; then
        printf '%-9s done before\n' "$name"
        return
    fi
    if [ "$left" -lt 10 ] && [ "$share" != 0 ]; then
        tell "$name" skipped 0 'no time is left'
        return 1
    fi
    [ ! -t 1 ] || printf '%-9s since %(%H:%M)T, %s\r' "$name" -1 "$folder/$name.log"
    timeout --kill-after=30 "$left" "$@" > "$folder/$name.log" 2>&1 &
    running=$!
    wait "$running"
    status=$? running=''
    case $status in
    0) state='done' ;;
    124 | 137) state='out of time' note='what it had measured is kept' ;;
    *) state=failed note=$(tail -n 1 "$folder/$name.log" | cut -c 1-300) ;;
    esac
    [ "$share" != 0 ] || began=$((began + SECONDS - started))
    tell "$name" "$state" $((SECONDS - started)) "$note"
    [ "$state" = 'done' ]
}

is_done() { [ "$1" != ready ] && grep -q "^$1	done" "$states"; }

# tell NAME STATE SECONDS NOTE: how a step has ended, on the screen and for the next time.
tell() {
    [ "$2" = 'done' ] || failures=$((failures + 1))
    [ ! -t 1 ] || printf '\033[K'
    printf '%-9s %-11s %5d s  %s\n' "$@"
    { grep -v "^$1	" "$states"; printf '%s\t%s\t%s\t%s\n' "$@"; } > "$states.new"
    mv "$states.new" "$states"
}

# plan NAME FLAGS...: its plan; fails where it does not fit.
plan() {
    local name=$1
    shift
    "$python" -P -m clear_dist plan --json "${weights[@]}" "$@" > "$folder/$name.plan.json" 2> "$folder/$name.plan.log"
}

# picture NAME MINUTES FLAGS...: one picture, with the nearest flags that a plan names where it would not fit.
picture() {
    local name=$1 share=$2 nearest=''
    shift 2
    if ! is_done "$name" && ! plan "$name" "$@"; then
        nearest=$("$python" -c 'import json, sys; print(json.load(sys.stdin)["nearest"] or "")' \
            < "$folder/$name.plan.json" 2> /dev/null)
        # shellcheck disable=SC2086
        [ -z "$nearest" ] || plan "$name" "$@" $nearest
    fi
    # shellcheck disable=SC2086
    step "$name" "$share" "$python" -P -m clear_dist generate "$prompt" "${weights[@]}" --device cuda --seed 0 "$@" \
        $nearest --no-metadata --output "$folder/$name.png" --report "$folder/$name.report.json" \
        --latents-out "$folder/$name.safetensors"
}

prompt='a lighthouse on a rocky coast at dusk, waves, a small boat, photograph'
weights=(--model "$model" --clear-weights "$clear")
sizes=(1024 4096) drawing=(--text-attention exact) official=(--sides 1024 2048)
tables=(--device cuda --repetitions 1 --sides 1024 2048 4096 8192)
seconds=(--cell-seconds 30 --cell-seconds 200)
if [ -n "$small" ]; then
    sizes=(256 512) official=(--sides 256 --steps 3)
    tables=(--device cuda --repetitions 1 --model small --sides 256 --radii 8) drawing+=(--steps 2)
fi

echo "results are in $folder; what a step says is in its .log there"
{
    timeout 20 nvidia-smi | sed '/Processes:/,$d'
    timeout 20 nvidia-smi topo -m
    env | grep -E '^(NCCL|CUDA|TORCH|PYTORCH|OMP)_' | sort
} > "$folder/nvidia-smi.txt" 2>&1

step ready 0 "$python" -m benchmarks.gpu.ready "${weights[@]}" --folder "$folder" || exit 1
read -r gpus gigabytes <<< "$(sed -n 's/^gpus=\([0-9]*\) gigabytes=\([0-9]*\) .*/\1 \2/p' "$folder/ready.log")"
echo "$flags" > "$folder/flags.txt"
echo "GPUs: $gpus, of $gigabytes GB or more"
step verify 4 "$python" -P -m clear_dist verify --device cuda --json "$folder/verify.json"
if step weights 0 "$python" -m benchmarks.gpu.ready --fetch "${weights[@]}" --folder "$folder"; then
    picture 1024 4 --nproc "$gpus" --res "${sizes[0]}" "${drawing[@]}"
    [ "$gpus" = 1 ] || picture alone 4 --nproc 1 --res "${sizes[0]}" "${drawing[@]}"
    picture large 8 --nproc "$gpus" --res "${sizes[1]}" "${drawing[@]}"
    step official 10 "$python" -m benchmarks.gpu.official "${weights[@]}" --folder "$folder" "${official[@]}"
else
    ends=$((ends + 26 * minutes))
fi
parts=()
if [ -n "$small" ] || [ "$gigabytes" -ge "$WHOLE" ]; then
    step table10 12 "$python" -m benchmarks.speed.table10 "${tables[@]}" "${seconds[@]:0:2}" --folder "$folder"
    step table7 9 "$python" -m benchmarks.speed.table7 "${tables[@]}" "${seconds[@]:2:2}" --folder "$folder"
else
    echo "table10, table7 and the suite's whole steps need $WHOLE GB, got $gigabytes: left out"
    parts=(--parts correctness ranks kernels tuning)
fi
printf -v suite_minutes '%d.%02d' $((9 * minutes * 95 / 6000)) $((9 * minutes * 95 / 60 % 100))
step suite 9 "$python" -m benchmarks.gpu.suite $small "${parts[@]}" --minutes "$suite_minutes" --folder "$folder/suite"

"$python" -m benchmarks.gpu.archive "$folder" "$model" "$clear" || exit 1
[ "$failures" = 0 ] || echo "steps that were not done: $failures; the same command tries them again"
[ "$failures" = 0 ]
exit
}
