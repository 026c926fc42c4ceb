#!/usr/bin/env bash
# Run the tests, after making the environment they need: bash tools/test.sh [--oracle | --tpu] [pytest arguments]
#
# --oracle installs torch (CPU), diffusers, transformers and torchmetrics besides and runs the comparisons with them too.
# --tpu makes a second environment with XLA's TPU compiler (no TPU needed) and runs only what compiles for TPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
extras=test
if [ "${1:-}" = "--oracle" ]; then extras=test,oracle; shift; fi
if [ "${1:-}" = "--tpu" ]; then
  shift
  VENV="$PWD/.venv-tpu" setup_env test,plan
  exec "$PWD/.venv-tpu/bin/python" -m pytest -q tests/test_tpu.py "$@"
fi
setup_env "$extras"
# Compiles already use both cores of a small machine; a second worker fills the gaps. One file stays in one worker; tests/conftest.py orders the files.
exec "$VENV/bin/python" -m pytest -q -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=15 "$@"
