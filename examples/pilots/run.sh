#!/usr/bin/env bash
# The pilots of docs/results.md: run.sh SET FOLDER [OUTPUT], where SET is youcook2, flickr8k or docstrings and FOLDER has
# its files (docstrings needs none: give any). Both losses, four tables, all controls, eight seeds.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
set_name=$1 folder=$2 output=${3:-pilots/$1}
mkdir -p "$output"
encoder=$(python "$here/prepare.py" encoder)

case $set_name in
youcook2)
    for part in train test; do
        python "$here/prepare.py" youcook2 "$folder/descs_cap_$part.json" -o "$output/$part.tsv"
    done
    captions=("$output/train.tsv" --column caption)
    sides=(--other speech --encoder "$encoder" --test "$output/test.tsv" --epochs 8 --batch-size 256)
    ;;
flickr8k)
    for part in train test; do
        [ -e "$output/$part-images.npy" ] || python "$here/prepare.py" images "$folder/$part.tsv" -o "$output/$part-images.npy"
    done
    captions=("$folder/train.tsv" --column title)
    sides=(--group image_id --encoder "$encoder" --others "$output/train-images.npy" --test "$folder/test.tsv"
        --test-others "$output/test-images.npy" --epochs 12 --batch-size 512)
    ;;
docstrings)
    python "$here/../sentence_transformers_docstrings/train.py" --write "$output/train.csv"
    captions=("$output/train.csv" --separator , --column text)
    sides=(--other name --encoder "$encoder" --epochs 8 --batch-size 256)
    ;;
esac

table() { mmts cluster "${captions[@]}" --encoder "$encoder" "${@:2}" -o "$output/$1.parquet" --force; }
table k20
table k1 --runs 1
table radius --estimator radius
table knn --estimator knn
tables=()
for name in k20 k1 radius knn; do tables+=(--table "$name=$output/$name.parquet"); done

pilot() { # loss, and two constants to try beside
    local own="--loss $1 --mmts-no-shifts" fixed="--mmts-no-schedule --mmts-shift-min"
    mmts pilot "${captions[@]}" "${sides[@]}" "${tables[@]}" --loss "$1" --budget 120 -o "$output/$1" \
        --variant "TS 1 period=$own --mmts-num-oscillations 1" \
        --variant "TS ends low=$own --mmts-num-oscillations 0.5" \
        --variant "constant $2=$own $fixed $2 --mmts-shift-max $2" \
        --variant "constant $3=$own $fixed $3 --mmts-shift-max $3"
}
pilot mmts-infonce 0.05 0.10
pilot mmts-max-margin 0.17 0.30
