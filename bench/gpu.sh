#!/usr/bin/env bash
# One command for a machine with a GPU: tests, sanitizer, benchmarks, whole blocks, counters, within nine minutes: what
# still runs then is ended, whatever it does. LIMIT names other seconds (for --seconds of more than 530).
#
#   bench/gpu.sh                          every stage
#   bench/gpu.sh build tests              these stages
#   bench/gpu.sh --dry                    the same on a CPU, small: a rehearsal, whose records verify nothing
#   bench/gpu.sh --list                   the stages
#
# Nothing is installed and nothing downloaded: PYTHON names an interpreter that has torch (default .venv, then python3),
# and the package is used from this tree. docs/gpu_run.md tells what comes back.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ] && .venv/bin/python -c 'import torch' 2>/dev/null; then PYTHON=.venv/bin/python; fi
fi
export PYTHONUNBUFFERED=1
limit=540
for argument in "$@"; do
    if [ "$argument" = --dry ]; then limit=2160; fi  # a rehearsal's boxes are four times as long
done
exec timeout --foreground -k 5 $((${LIMIT:-$limit} - SECONDS)) "$PYTHON" bench/gpu_run.py "$@"
