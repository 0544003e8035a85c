#!/usr/bin/env bash
# A quarter of an hour on a GPU: see README.md beside this file.
#   DATA=path/to/cifar10 OUT=out bash benchmarks/gpu/visit.sh measure
#   DATA=path/to/cifar10 OUT=out bash benchmarks/gpu/visit.sh train
# DRY=1 rehearses both on a CPU. Each stage has its own limit and log, and none stops the next.
set -uo pipefail
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 TQDM_MININTERVAL=20 PYTHONPATH=$PWD:${PYTHONPATH:-}
: "${DATA:?a folder of CIFAR-10}" "${OUT:?a folder for the results}"
HERE=$(dirname "$0"); WORK=${WORK:-/tmp/visit}; mkdir -p "$WORK" "$OUT"
if [ -n "${DRY:-}" ]; then
  NET="--block_out_channels 32 32 --attention_resolutions 16 --norm_num_groups 8 --max_train_samples 512"
  BATCH=8; PRECISION=no; ROUNDS=1; SECONDS_OF_TRAINING=60; IMAGES=64
else
  NET=""; BATCH=128; PRECISION=bf16; ROUNDS=3; SECONDS_OF_TRAINING=${TRAIN_SECONDS:-210}; IMAGES=5000
fi
stage() { # name limit command...
  local name=$1 limit=$2 start=$SECONDS; shift 2
  timeout -k 5 "$limit" "$@" >"$WORK/$name.log" 2>&1; local code=$?
  echo "== $name: exit code $code, $((SECONDS - start)) s"; tail -n 12 "$WORK/$name.log" | cut -c1-220
}
case ${1:-} in
measure)
  stage versions 60 python -c "
import torch, diffusers, datasets, transformers, accelerate, hf_ddpm.training.loop, benchmarks.run
print(torch.__version__, torch.version.cuda, diffusers.__version__, datasets.__version__, transformers.__version__, accelerate.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu', torch.backends.cudnn.version())"
  grep -q Error "$WORK/versions.log" && exit 1
  stage gpu-tests 150 python -m pytest -m gpu -q -p no:cacheprovider tests/gpu
  COMMON="--preset cifar10 --dataset $DATA --horizontal_flip true $NET --train_batch_size $BATCH --mixed_precision $PRECISION --max_train_samples 4096 --rounds $ROUNDS --steps_per_turn 10 --num_inference_steps 20"
  stage eager 90 python -m benchmarks $COMMON --tasks forward,train_step,sampling --json "$WORK/eager.json"
  # One compilation of one network, which the cache keeps for the training.
  stage compiled 150 python -m benchmarks $COMMON --tasks train_step --compile true --memory false --check false --against none --json "$WORK/compiled.json"
  cp "$WORK"/*.json "$WORK"/*.md "$OUT"/ 2>/dev/null; tar czf "$OUT/logs.tgz" -C "$WORK" . ;;
train)
  rm -rf "$WORK/run" "$WORK/extractor"
  stage extractor 60 python "$HERE/features.py" "$DATA" "$WORK/extractor" ${DRY:+2}
  # As many steps as fit, by the speed that was measured, so that the cosine ends at zero.
  STEPS=$(python - "$WORK" "$BATCH" "$SECONDS_OF_TRAINING" <<'PY'
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
  stage train $((SECONDS_OF_TRAINING + 90)) python -m hf_ddpm train --preset cifar10 --dataset "$DATA" --horizontal_flip true $NET \
    --train_batch_size "$BATCH" --mixed_precision "$PRECISION" --compile "$COMPILE" --max_train_steps "$STEPS" --warmup_steps $((STEPS / 20 + 1)) \
    --lr_schedule cosine --learning_rate 4e-4 --ema_decay 0.999 --dropout 0.0 --checkpointing_steps "$STEPS" --num_samples 64 \
    --num_inference_steps 100 --log_steps 100 --output_dir "$WORK/run"
  stage evaluate 140 python -m hf_ddpm evaluate --model "$WORK/run" --dataset "$DATA" --metrics fd,kid,pr,nll --extractor "$WORK/extractor" \
    --num_images "$IMAGES" --num_inference_steps 50 --scheduler ddim --eta 1 --mixed_precision "$PRECISION" --steps_per_image 20 \
    --batch_size 256 --output "$WORK/run/results.json"
  stage pack 30 python "$HERE/weights_in_parts.py" pack "$WORK/run/unet" "$OUT"
  cp "$WORK/run/samples.png" "$OUT"/; rm -rf "$WORK/run/checkpoints" "$WORK/run/unet"
  tar czf "$OUT/run.tgz" -C "$WORK" --exclude='*.npy' --exclude=extractor . ;;
*) sed -n '2,5p' "$0"; exit 2 ;;
esac
ls -la "$OUT"
