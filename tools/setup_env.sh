# Sourced by the other scripts: a virtual environment with flowjax installed, made once and reused.
#
#   setup_env <extras>      e.g. setup_env ""   or   setup_env test,oracle
#
# PYTHON chooses the interpreter (3.11 or later), VENV the directory.

setup_env() {
  local extras="$1" root
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  VENV="${VENV:-$root/.venv}"
  if [ ! -x "$VENV/bin/python" ]; then
    local python="${PYTHON:-}"
    if [ -z "$python" ]; then
      for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$candidate"; break; fi
      done
    fi
    if [ -z "$python" ]; then echo "error: Python 3.11 or later is needed (set PYTHON=...)" >&2; return 1; fi
    echo "making a virtual environment in $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" || return 1
  fi
  local stamp="$VENV/.flowjax-${extras:-plain}" wanted
  wanted="$(cksum < "$root/setup.py")"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing flowjax${extras:+[$extras]}"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${extras:+[$extras]}" || return 1
    echo "$wanted" > "$stamp"
  fi
  export VENV
}
