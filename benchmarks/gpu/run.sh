#!/usr/bin/env bash
# One job on one card: bash benchmarks/gpu/run.sh JOB [--smoke] [options of the job]. README.md beside this file lists the jobs.
# Results go to $OUT, or else to benchmarks/gpu/out. Wheels in .whl/ are installed first; nothing is fetched.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
job=${1:-}
if [[ ! " check step kernel heads profile " == *" $job "* ]]; then
    echo "job: got '$job', expected one of check, step, kernel, heads, profile. See $here/README.md." >&2
    exit 2
fi
shift
export OUT=${OUT:-$here/out} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
export PYTHONPATH=$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "$root/.whl/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$root"/.whl/*.whl
    export PYTHONPATH=$site:$PYTHONPATH
fi
if [ "$job" = heads ] && [[ " $* " != *" --smoke "* ]]; then
    store=$("$python" -m gpu.join)
    export PYTHONPATH=$store:$PYTHONPATH PEFT_CAFT_CACHE=$store
fi
exec "$python" -m "gpu.$job" "$@"
