# How long waiting OpenMP threads spin before they sleep. Sourced by launch/launch.sh and launch/environment.sh.
#
# The threads of GNU OpenMP, which PyTorch uses on the CPU, spin while they wait. If other programs use the same cores,
# training becomes many times slower. Images per second of a small training (digits of 16 px) on two cores, idle / next
# to two other jobs: 203 / 10 by default, 195 / 160 with 30000 iterations, 183 / 120 with 1000 iterations, and 163 / 160
# with OMP_WAIT_POLICY=passive.
if [ -z "${OMP_WAIT_POLICY:-}" ]; then
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-30000}
fi
