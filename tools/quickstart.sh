#!/usr/bin/env bash
# From nothing to pictures: environment, digits, training, samples, evaluation, export. A few minutes on two cores.
#
#   bash tools/quickstart.sh [workdir]        default: runs/quickstart
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
setup_env ""
run="${1:-runs/quickstart}"
python="$VENV/bin/python"
# The same on every machine; unset to use an accelerator.
export JAX_PLATFORMS="${JAX_PLATFORMS-cpu}"

echo "== 1/5 data: scikit-learn's digits as a TFDS data set"
"$python" -m tools.prepare_data --door=digits --out="${FLOWJAX_DATA:-$HOME/.cache/flowjax}"
echo "== 2/5 training (interrupt it whenever you like; the same command resumes)"
"$python" -m experiments.train --config=configs/digits.py --workdir="$run"
echo "== 3/5 samples with guidance"
"$python" -m experiments.sample --checkpoint="$run" --out="$run/guided"
echo "== 4/5 evaluation against held-out digits"
"$python" -m experiments.evaluate --checkpoint="$run"
echo "== 5/5 export"
"$python" -m experiments.export --workdir="$run" --out="$run/export"
cat <<EOF

Look at
  $run/guided/grid.png      100 samples, a column a class
  $run/samples/             what the model drew while it trained
  $run/curves.png           loss, learning rate, speed
  $run/card.txt             what was run
  $run/evaluation-*.json    the numbers, with everything that makes them comparable
  $run/export/              the averaged weights (orbax and safetensors) with their config
EOF
