#!/bin/sh
# Rehearses training on a machine that has PyTorch and no network (train_bare.sh), on this one: an empty folder gets this
# project's files, clips and wheels, and an environment without the packages that such a machine lacks trains there for
# one update, which is all that --max-minutes lets it. From the parts that it leaves another one goes on, and what that
# leaves is joined and compared with the run.
#
#     tests/gpu/rehearse.sh [WHEELS [CLIPS]]
#
# WHEELS: a folder of wheels for this Python (train_bare.sh says how they are got; without it those of the packages
# installed here are packed again). CLIPS: a folder made by modeling_encodec.training.packed_corpora (without it, one of
# the clips that come with the package). What travels may take 64 MiB. About a minute and a half.
set -eu
most=$((64 * 1024 * 1024))
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-python3}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
tree=$place/tree out=$place/out
mkdir "$tree" "$out" "$tree/carried"

git -C "$root" ls-files -z | tar -C "$root" --null --files-from - --create | tar -C "$tree" --extract
if [ -n "${1:-}" ]; then cp -R "$1" "$tree/carried/wheels"; else
    "$python" "$root/tests/gpu/bare_machine.py" wheels "$tree/carried/wheels"
fi
if [ -n "${2:-}" ]; then cp -R "$2" "$tree/carried/clips"; else
    "$python" -m modeling_encodec.training.packed_corpora \
        "$root/modeling_encodec/demo/audio" "$tree/carried/clips" --megabytes 2
fi
size=$(find "$tree" -type f -exec cat {} + | wc -c)
echo "what travels: $((size / 1024)) KiB of $((most / 1024))"
if [ "$size" -gt "$most" ]; then
    echo "too much by $(((size - most) / 1024)) KiB" >&2
    exit 1
fi
if [ -n "${ONLY_SIZE:-}" ]; then exit 0; fi

"$python" "$root/tests/gpu/bare_machine.py" environment "$place/bare"
clips=$(cd "$tree" && ls carried/clips/*.jsonl | head -n 1)
train() { # options
    cd "$tree"
    env -i PATH="$place/bare/bin:/usr/bin:/bin" HOME="$place" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 JOIN="${join:-}" \
        sh tests/gpu/train_bare.sh carried/wheels "$out" --data "speech=$clips" --architecture c16 --batch-size 2 \
        --segment-seconds 0.5 --epochs 1 --updates-per-epoch 2 --kmeans-iterations 1 --discriminators single \
        --discriminator-filters 4 --log-every 1 --data-in-memory --workers 1 --device cpu "$@"
}
(train --max-minutes 0.001) # over after one update
mv "$out/parts" "$tree/carried/parts"
rm -r "$tree/run"
(join=carried/parts train --max-minutes 5) # on another machine
"$python" -m modeling_encodec parts join "$out/parts" "$place/joined"
diff -r --exclude ".*" "$tree/run" "$place/joined"
test "$(find "$out/parts" -type f -size +16000000c | wc -l)" = 0
"$python" -c "import sys, modeling_encodec as m; m.EncodecModel.from_pretrained(sys.argv[1])" "$place/joined/model"
test "$(grep -c train/mel "$place/joined/log.jsonl")" = 2
echo "rehearsed: two updates on two machines, $(ls "$out/parts" | wc -l) files leave"
