#!/usr/bin/env bash
# A 15-minute check on a GPU; see README.md in this folder.
#   DATA=path/to/cifar10 OUT=out bash benchmarks/gpu/visit.sh measure
#   DATA=path/to/cifar10 OUT=out bash benchmarks/gpu/visit.sh train
# DRY=1 tests both on a CPU. Each stage has its own time limit and log; if one fails, the next still runs.
# WHEELS=folder installs wheels on a machine with torch but without network access; PYTHON is the interpreter.
set -uo pipefail
: "${DATA:?a folder of CIFAR-10}" "${OUT:?a folder for the results}"
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
HERE=$(dirname "$0"); WORK=${WORK:-/tmp/visit}; mkdir -p "$WORK" "$OUT"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_MININTERVAL=20 \
  TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor} PYTHONPATH=$WORK/site:$PWD:${PYTHONPATH:-}
if [ -n "${WHEELS:-}" ] && ! [ -d "$WORK/site" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$WHEELS"/*.whl || exit 1
fi
if [ -n "${DRY:-}" ]; then
  NET="--block_out_channels 32 32 --attention_resolutions 16 --norm_num_groups 8 --max_train_samples 512"
  BATCH=16; PRECISION=no; ROUNDS=1; SECONDS_OF_TRAINING=60; IMAGES=64; SLOWER=4
  SAMPLES="--num_samples 16 --num_inference_steps 20"; SPLITS="--reference_split test --split train"
else
  NET=""; BATCH=128; PRECISION=bf16; ROUNDS=3; SECONDS_OF_TRAINING=${TRAIN_SECONDS:-210}; IMAGES=5000; SLOWER=1
  SAMPLES="--num_samples 64 --num_inference_steps 100"; SPLITS=""
fi
stage() { # name limit command...
  local name=$1 limit=$(($2 * SLOWER)) start=$SECONDS; shift 2
  timeout -k 5 "$limit" "$@" >"$WORK/$name.log" 2>&1; local code=$?
  echo "== $name: exit code $code, $((SECONDS - start)) s"; tr '\r' '\n' <"$WORK/$name.log" | tail -n 12 | cut -c1-220
}
case ${1:-} in
measure)
  stage versions 60 "$PYTHON" -c "
import torch, diffusers, datasets, transformers, accelerate, hf_ddpm.training.loop, benchmarks.run
print(torch.__version__, torch.version.cuda, diffusers.__version__, datasets.__version__, transformers.__version__, accelerate.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu', torch.backends.cudnn.version())"
  grep -q Error "$WORK/versions.log" && exit 1
  stage gpu-tests 150 "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider tests/gpu
  COMMON="--preset cifar10 --dataset $DATA --horizontal_flip true --max_train_samples 4096 $NET --train_batch_size $BATCH"
  COMMON="$COMMON --mixed_precision $PRECISION --rounds $ROUNDS --steps_per_turn 10 --num_inference_steps 20"
  COMPILED="--compile true --memory false --check false --against none"
  stage eager 120 "$PYTHON" -m benchmarks $COMMON --tasks forward,train_step,sampling --profile "$WORK/eager-trace.json.gz" --json "$WORK/eager.json"
  # Only this package: one compilation, cached for `train`; then one for a batch and one for a single image.
  stage compiled 150 "$PYTHON" -m benchmarks $COMMON $COMPILED --tasks train_step --profile "$WORK/compiled-trace.json.gz" --json "$WORK/compiled.json"
  stage compiled-sampling 150 "$PYTHON" -m benchmarks $COMMON $COMPILED --tasks forward,sampling --profile "$WORK/compiled-trace.json.gz" --json "$WORK/compiled-sampling.json"
  cp "$WORK"/*.json "$WORK"/*.md "$WORK"/*.json.gz "$OUT"/ 2>/dev/null
  tar czf "$OUT/logs.tgz" -C "$WORK" --exclude=./site --exclude=./inductor --exclude='*.json.gz' . ;;
train)
  rm -rf "$WORK/run" "$WORK/extractor"
  stage extractor 60 "$PYTHON" "$HERE/features.py" "$DATA" "$WORK/extractor" ${DRY:+test}
  # The number of steps that fits into the time at the measured speed, so that the cosine schedule ends at zero.
  STEPS=$("$PYTHON" - "$WORK" "$BATCH" "$SECONDS_OF_TRAINING" <<'PY'
import json, sys
from pathlib import Path
rows = [row for name in ("compiled", "eager") if (file := Path(sys.argv[1], name + ".json")).exists()
        for row in json.loads(file.read_text())["rows"]]
rates = [row["images_per_second"] for row in rows
         if row["task"] == "train_step" and row["subject"] == "hf_ddpm" and not row["error"]]
print(max(20, int(0.9 * max([*rates, 3000 if not rates else 0]) / int(sys.argv[2]) * int(sys.argv[3]))))
PY
)
  COMPILE=$(grep -q '"error": null' "$WORK/compiled.json" 2>/dev/null && echo true || echo false)
  [ -n "${DRY:-}" ] && STEPS=20 COMPILE=false
  echo "steps $STEPS, compile $COMPILE"
  stage train $((SECONDS_OF_TRAINING + 90)) "$PYTHON" -m hf_ddpm train --preset cifar10 --dataset "$DATA" --horizontal_flip true $NET \
    --train_batch_size "$BATCH" --mixed_precision "$PRECISION" --compile "$COMPILE" --max_train_steps "$STEPS" --warmup_steps $((STEPS / 20 + 1)) \
    --lr_schedule cosine --learning_rate 4e-4 --ema_decay 0.999 --dropout 0.0 --checkpointing_steps "$STEPS" $SAMPLES --log_steps 100 --output_dir "$WORK/run"
  stage evaluate 140 "$PYTHON" -m hf_ddpm evaluate --model "$WORK/run" --dataset "$DATA" --metrics fd,kid,pr,nll --extractor "$WORK/extractor" \
    --num_images "$IMAGES" $SPLITS --num_inference_steps 50 --scheduler ddim --eta 1 --mixed_precision "$PRECISION" --steps_per_image 20 \
    --batch_size 256 --output "$WORK/run/results.json"
  stage pack 30 "$PYTHON" "$HERE/weights_in_parts.py" pack "$WORK/run/unet" "$OUT"
  cp "$WORK/run/samples.png" "$OUT"/; rm -rf "$WORK/run/checkpoints" "$WORK/run/unet"
  tar czf "$OUT/run.tgz" -C "$WORK" --exclude='*.npy' --exclude='*.json.gz' --exclude=./extractor --exclude=./site --exclude=./inductor . ;;
*) sed -n '2,5p' "$0"; exit 2 ;;
esac
ls -la "$OUT"
