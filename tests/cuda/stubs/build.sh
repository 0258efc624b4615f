#!/bin/sh
# build.sh FOLDER: the stubs, for the torch and the Triton of the `python` in use.
set -e
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
folder_of() { python -c "from importlib.util import find_spec; print(*find_spec('$1').submodule_search_locations)"; }
compile() { gcc -O2 -fPIC -shared -fvisibility=hidden -w -I"$(folder_of triton)/backends/nvidia/include" "$@" -ldl; }
runtime="$here/services.c $here/runtime.c $here/graphs.c $here/kernels.c $here/libraries.c $here/nccl.c"
# shellcheck disable=SC2086
compile -o own.so $runtime
# Whatever else torch wants of CUDA's libraries succeeds and does nothing.
nm -D --defined-only own.so | awk '{ print $3 }' | sort > own.txt
nm -D --undefined-only "$(folder_of torch)"/lib/*.so | grep -oE '\b(__cuda|cuda|cublas|cudnn|nccl)[A-Z]\w*' | sort -u |
    comm -23 - own.txt | sed 's/.*/__attribute__((visibility("default"))) int &() { return 0; }/' > others.c
# shellcheck disable=SC2086
compile -o libnullrt.so $runtime others.c
compile -Wl,-soname,libcuda.so.1 -o libcuda.so.1 "$here"/driver.c
compile -Wl,-soname,libnvidia-ml.so.1 -o libnvidia-ml.so.1 "$here"/nvml.c
ln -sf libcuda.so.1 libcuda.so
