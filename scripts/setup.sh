# Sourced by the other scripts. `setup EXTRAS [FOLDER CONSTRAINTS]` makes an environment (.venv, with the versions of
# constraints.txt) and installs vlmamba with these extras, once: what is there and fits is used again.
# VLMAMBA_PYTHON names an interpreter that has vlmamba already and takes the place of .venv; then nothing is installed.

setup() {
    local extras="$1" venv="${2:-.venv}" constraints="${3:-constraints.txt}" base="${PYTHON:-python3}" stamp
    if [ -n "${VLMAMBA_PYTHON:-}" ] && [ "$venv" = .venv ]; then PATH="$(dirname "$VLMAMBA_PYTHON"):$PATH"; return; fi
    stamp="$venv/.installed-$extras-$(cat pyproject.toml "$constraints" | cksum | cut -d' ' -f1)"
    if [ ! -f "$stamp" ]; then
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "vlmamba needs Python 3.11 or newer, $base is $("$base" -V 2>&1). Name another one: PYTHON=python3.12 bash $0" >&2
            return 1
        }
        echo "Setting up $venv with vlmamba[$extras] (once; PyTorch is a download of several GB) ..."
        [ -x "$venv/bin/python" ] || "$base" -m venv "$venv" || {
            echo "could not make $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2
            return 1
        }
        "$venv/bin/python" -m pip install --disable-pip-version-check -q --upgrade "pip>=24" || return 1
        "$venv/bin/python" -m pip install --disable-pip-version-check -c "$constraints" -e ".[$extras]" |
            grep -v '^Requirement already satisfied' || [ "${PIPESTATUS[0]}" = 0 ] || return 1
        touch "$stamp"
    fi
    PATH="$PWD/$venv/bin:$PATH"
}
