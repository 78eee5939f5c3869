# Sets up the Python environment of demo.sh and test.sh: installs missing packages into the active environment, or, if
# none is active, creates .venv in this folder with the tested versions. The base environment of conda, which conda
# itself needs, counts as none. Sourced, not run.

ACTIVE=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -z "${VIRTUAL_ENV:-}" ] && [ -n "$ACTIVE" ]; then
    # The folder condabin exists only in the root of an installation.
    if [ "${CONDA_DEFAULT_ENV:-}" = base ] || [ -d "$ACTIVE/condabin" ]; then
        echo "environment: conda's base environment is active; it is left unchanged"
        ACTIVE=
    fi
fi
if [ -n "$ACTIVE" ]; then
    echo "environment: $ACTIVE (active)"
    python -m pip install --quiet --requirement requirements.txt
else
    echo "environment: .venv"
    [ -f .venv/bin/activate ] || "${PYTHON:-python3}" -m venv .venv
    source .venv/bin/activate
    if ! cat requirements.txt constraints.txt | cmp --silent - .venv/installed; then
        python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
        cat requirements.txt constraints.txt > .venv/installed
    fi
fi
source launch/openmp.sh
