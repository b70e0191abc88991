#!/usr/bin/env bash
# What only a GPU shows, in under eight minutes on one H100 or H200: one log a part, and a line a part at the end.
#
#   WHEELS=folder DATA=folder OUT=folder bash jobs/gpu_check.sh [PART ...]
#
# Parts:    tests loop packing rounds speed late (all by default, in this order)
# Machine:  Python 3.11 to 3.13, torch 2.10 or later with CUDA, torchvision, pyarrow. Nothing is downloaded.
# WHEELS:   of ray and what else is lacking: installed into $OUT/../site-raysubset, with no index and no dependencies. A
#           machine that has scikit-learn, scipy, pandas, rich, safetensors, pytest, pytest-timeout and requests lacks
#           ray, what Ray Train and a run's TensorBoard events need, and what these need. Here they are fetched by
#               fetch="pip download --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 -d wheels"
#               $fetch ray pydantic && $fetch --no-deps tensorboardX
#           A file too large to carry whole comes in parts, NAME.whl.aa, NAME.whl.ab (split -b 50M), joined here.
# DATA:     MNIST and CIFAR-10 in torchvision's layout; batches of CIFAR-10 may be gzipped (data_batch_1.gz).
# Time:     guessed are tests 60 s, loop 60, packing 60, rounds 90, speed 120, late 90. Each is stopped at a limit, of 60
#           to 150 s and 10 minutes in all, and said to be.
# Result:   NOT MEASURED YET: no GPU was at hand. With QUICK=1, which makes each part as small as it goes, all came to
#           their ends on a CPU, where the tests are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-$(mktemp -d)}
data=${DATA:-${RAYSUBSET_DATA:-../shared/data}}
site=$out/../site-raysubset
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"

if [ -n "${WHEELS:-}" ]; then
    mkdir -p "$site"
    for first in "$WHEELS"/*.whl.aa; do
        [ -e "$first" ] && cat "${first%.aa}".a? >"$site/$(basename "${first%.aa}")"
    done
    for wheel in "$site"/*.whl "$WHEELS"/*.whl; do
        [ -e "$wheel" ] && python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheel"
    done
    export PYTHONPATH=$site:$PYTHONPATH
fi
if compgen -G "$data/cifar-10-batches-py/*.gz" >/dev/null; then
    mkdir -p "$site/data" && cp -r "$data"/* "$site/data" && gunzip -f "$site"/data/cifar-10-batches-py/*.gz
    data=$site/data
fi
data=$(cd "$data" && pwd)
export RAYSUBSET_DATA=$data

part() { # NAME SECONDS COMMAND...: run it, with its log and how it ended
    local name=$1 limit=$2 rc
    [ -n "${QUICK:-}" ] && limit=$((limit * 10)) # a CPU's
    shift 2
    case " ${parts[*]} " in *" $name "*) ;; *) return ;; esac
    local began=$SECONDS
    timeout --kill-after=20 "$limit" "$@" >"$out/$name.log" 2>&1
    rc=$?
    [ $rc = 124 ] && rc="stopped at its limit"
    echo "== $name: $((SECONDS - began)) s, ended with $rc" | tee -a "$out/summary.log"
    tail -12 "$out/$name.log" | tee -a "$out/summary.log"
}

parts=("$@")
[ $# = 0 ] && parts=(tests loop packing rounds speed late)
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | tee "$out/summary.log"
muon=(--data.name cifar10 --data.root "$data" --model.width 16 --model.depth 3 --minimize.optimizer muon)
muon+=(--trunk.epochs 0 --fine-tuning.epochs 0 --storage-path "$out/../runs-raysubset" --fresh)
if [ -n "${QUICK:-}" ]; then
    loop=(--num-pairs 2) packing=(--members 1 2) speed=(--seeds 1 --steps 1) late=(--seeds 1 --steps 1 --members 2)
    muon+=(--subsets.num 2 --subsets.size 256 --rounds.num 2 --minimize.epochs 1)
else
    loop=(--num-pairs 7) packing=() speed=(--seeds 3) late=(--seeds 2)
    muon+=(--subsets.num 8 --subsets.per-actor 8 --rounds.num 16 --minimize.epochs 1 --rounds.evaluate-every 8)
fi
part tests 90 python3 -m pytest -v -p no:cacheprovider tests/gpu
part loop 60 python3 jobs/bench_loop.py "${loop[@]}"
part packing 60 python3 jobs/bench_packing.py "${packing[@]}"
part rounds 120 python3 -m raysubset run --name rounds "${muon[@]}"
part speed 150 python3 jobs/speed_cifar10.py --data.root "$data" "${speed[@]}"
part late 120 python3 jobs/late_averaging.py --data.root "$data" "${late[@]}"
