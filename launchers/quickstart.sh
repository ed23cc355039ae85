#!/usr/bin/env bash
# The whole way on recipes/quickstart, by the commands that an ImageNet run uses. Every step skips or continues what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" RANKS="${RANKS:-2}"
RUN="${RUN:-runs/quickstart}"
started=$SECONDS

step() { printf '\n\033[1m[%3d s] %s\033[0m\n' $((SECONDS - started)) "$*"; "$@"; }
ranks() { step launchers/deepspeed.sh "$@"; }
# One-process commands that do not need each other, each on a core of its own.
beside() { step "$@" 2>&1 | cat & pids+=($!); }
joined() { for pid in "${pids[@]}"; do wait "$pid"; done; pids=(); }

# Images: real handwritten digits on procedural grounds, as shards.
beside sfd encode quickstart/images
beside sfd encode quickstart/reference
joined
# The vision encoder whose features are the semantics, and the features that score: a classifier of its own.
# Small models take one process each; the diffusion model below takes two ranks of the deepspeed launcher.
beside sfd train quickstart/vision
beside sfd train quickstart/classifier
joined
beside sfd export "$RUN/vision" --out "$RUN/vision.safetensors"
beside sfd export "$RUN/classifier" --out "$RUN/classifier.safetensors"
joined
# Tokenizers: a SemVAE over the encoder's features, and a closed-form texture codec.
beside sfd train quickstart/semvae
beside sfd fit quickstart/texture
joined
step sfd export "$RUN/semvae" --out "$RUN/semvae.safetensors"
# Composite latents.
step sfd encode quickstart/latents
# Semantic-first diffusion: two ranks, ZeRO-1, bf16.
ranks train quickstart/sfd
beside sfd export "$RUN/sfd" --out "$RUN/sfd.safetensors"
beside sfd export "$RUN/sfd" --initial --out "$RUN/sfd_untrained.safetensors"
joined
# Generate on two ranks and score; beside the score, the untrained weights by the same recipe in one process.
ranks --module eval generate quickstart/eval "checkpoint=$RUN/sfd.safetensors" --out "$RUN/samples_sfd"
untrained() {
  python -m eval generate quickstart/eval "checkpoint=$RUN/sfd_untrained.safetensors" --out "$RUN/samples_sfd_untrained"
  python -m eval score quickstart/eval --samples "$RUN/samples_sfd_untrained"
}
beside untrained
beside python -m eval score quickstart/eval --samples "$RUN/samples_sfd"
joined
step python -m eval report --result "$RUN/samples_sfd/results.json" --result "$RUN/samples_sfd_untrained/results.json" \
  --run "$RUN/sfd" --out "$RUN/report"
printf '\nDone in %d s. Open %s\n' $((SECONDS - started)) "$RUN/report/index.html"
