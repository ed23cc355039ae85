#!/usr/bin/env bash
# The whole way on recipes/quickstart, by the commands that an ImageNet run uses. Every step skips or continues what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" RANKS="${RANKS:-2}"
RUN="${RUN:-runs/quickstart}"
started=$SECONDS

step() { printf '\n\033[1m[%3d s] %s\033[0m\n' $((SECONDS - started)) "$*"; "$@"; }
ranks() { step launchers/deepspeed.sh "$@"; }

# Images: real handwritten digits on procedural grounds, as shards.
step sfd encode quickstart/images
step sfd encode quickstart/reference
# Tokenizers: a closed-form texture codec, a vision encoder, and a SemVAE over its features.
step sfd fit quickstart/texture
ranks train quickstart/vision
step sfd export "$RUN/vision" --out "$RUN/vision.safetensors"
ranks train quickstart/semvae
step sfd export "$RUN/semvae" --out "$RUN/semvae.safetensors"
# Composite latents.
step sfd encode quickstart/latents
# Semantic-first diffusion: two ranks, ZeRO-1, bf16.
ranks train quickstart/sfd
step sfd export "$RUN/sfd" --out "$RUN/sfd.safetensors"
step sfd export "$RUN/sfd" --initial --out "$RUN/sfd_untrained.safetensors"
# The features that score: a classifier of its own.
ranks train quickstart/classifier
step sfd export "$RUN/classifier" --out "$RUN/classifier.safetensors"
# Generate on two ranks and score, untrained and trained.
for name in sfd_untrained sfd; do
  ranks --module eval generate quickstart/eval "checkpoint=$RUN/$name.safetensors" --out "$RUN/samples_$name"
  step python -m eval score quickstart/eval --samples "$RUN/samples_$name" --out "$RUN/samples_$name/results.json"
done
step python -m eval report --result "$RUN/samples_sfd/results.json" --result "$RUN/samples_sfd_untrained/results.json" \
  --run "$RUN/sfd" --out "$RUN/report"
printf '\nDone in %d s. Open %s\n' $((SECONDS - started)) "$RUN/report/index.html"
