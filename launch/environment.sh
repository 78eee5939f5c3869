# Sets up the Python environment of demo.sh and test.sh: installs missing packages into the active environment, or, if
# none is active, creates .venv in this folder with the tested versions. Sourced, not run.

if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ]; then
    echo "environment: ${VIRTUAL_ENV:-$CONDA_PREFIX} (active)"
    python -m pip install --quiet --requirement requirements.txt
else
    echo "environment: .venv"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    source .venv/bin/activate
    if ! cat requirements.txt constraints.txt | cmp --silent - .venv/installed; then
        python -m pip install --quiet --requirement requirements.txt --constraint constraints.txt
        cat requirements.txt constraints.txt > .venv/installed
    fi
fi
source launch/openmp.sh
