#!/bin/sh
# Trains where there is PyTorch but no network and not all packages, and leaves the run in parts that are small enough
# to be taken away. To be run in a copy of this project's files:
#
#     tests/gpu/train_bare.sh WHEELS OUT RECIPE [options of `modeling-encodec train`]
#
# WHEELS holds what the machine lacks, got where there is a network, for its Python:
#
#     pip download --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_28_x86_64 \
#         --platform manylinux2014_x86_64 --dest WHEELS transformers==5.23.0 soundfile soxr constriction cffi pycparser
#
# OUT/parts is made anew. A run of before goes on from its parts: JOIN=FOLDER. What is left out of the parts: LEAVE_OUT,
# a pattern, such as checkpoint.pt, which is more than half of a run and only wanted to go on.
set -eu
wheels=$1 out=$2
shift 2
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
# As it is installed: two of the package's folders lie beside it in the project.
cp -R modeling_encodec "$site"
cp -R processors conversion "$site/modeling_encodec"
export PYTHONPATH="$site" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1  # safe: the project, where this runs, is not whole
resume=
if [ -n "${JOIN:-}" ]; then
    python3 -m modeling_encodec parts join "$JOIN" run
    resume=--resume
fi
# Saved whatever ends it, so what there is of it is taken away too.
code=0
python3 -m modeling_encodec train "$@" --output run $resume || code=$?
rm -rf "$out/parts"
python3 -m modeling_encodec parts split run "$out/parts" ${LEAVE_OUT:+--leave-out "$LEAVE_OUT"}
exit $code
