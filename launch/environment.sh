# Sets up the Python environment of demo.sh and test.sh: installs missing packages into the active environment, or, if
# none is active, creates .venv in this folder with the tested versions. Conda's base environment is never changed: there
# .venv is used as well. Sourced, not run.

ACTIVE=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
# Only the root of a conda installation, its base environment, contains the folder condabin.
if [ -z "${VIRTUAL_ENV:-}" ] && { [ "${CONDA_DEFAULT_ENV:-}" = base ] || [ -d "$ACTIVE/condabin" ]; }; then
    echo "environment: conda's base environment is active; it is not changed"
    ACTIVE=
fi
if [ -n "$ACTIVE" ]; then
    echo "environment: $ACTIVE (active)"
    python -m pip install --quiet --requirement requirements.txt
else
    echo "environment: .venv"
    PYTHON=${PYTHON:-python3}
    if [ ! -f .venv/bin/activate ]; then
        if ! "$PYTHON" -c "import sys; sys.exit(sys.version_info < (3, 10))"; then
            echo "environment: $PYTHON is older than Python 3.10; name a newer one: PYTHON=python3.12 bash $0" >&2
            exit 1
        fi
        "$PYTHON" -m venv .venv
    fi
    source .venv/bin/activate
    if ! cat requirements.txt constraints.txt | cmp --silent - .venv/installed; then
        python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
        cat requirements.txt constraints.txt > .venv/installed
    fi
fi
source launch/openmp.sh
