#!/usr/bin/env bash
# The whole pipeline on recipes/quickstart, with the commands of an ImageNet run. Finished steps are skipped or resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" RANKS="${RANKS:-2}"
RUN="${RUN:-runs/quickstart}"
started=$SECONDS

step() { printf '\n\033[1m[%3d s] %s\033[0m\n' $((SECONDS - started)) "$*"; "$@"; }
ranks() { step launchers/deepspeed.sh "$@"; }
# Independent one-process commands run in parallel, on one core each.
parallel() { step "$@" 2>&1 | cat & pids+=($!); }
wait_all() { for pid in "${pids[@]}"; do wait "$pid"; done; pids=(); }

# Images: handwritten digits on procedural backgrounds, as shards.
parallel sfd encode quickstart/images
parallel sfd encode quickstart/reference
wait_all
# The vision encoder, whose features are the semantics; and another classifier, whose features compute the scores.
# These small models use one process each; the diffusion model below uses two ranks of the deepspeed launcher.
parallel sfd train quickstart/vision
parallel sfd train quickstart/classifier
wait_all
parallel sfd export "$RUN/vision" --out "$RUN/vision.safetensors"
parallel sfd export "$RUN/classifier" --out "$RUN/classifier.safetensors"
wait_all
# Tokenizers: a semantic VAE of the encoder's features, and a closed-form texture codec.
parallel sfd train quickstart/semvae
parallel sfd fit quickstart/texture
wait_all
step sfd export "$RUN/semvae" --out "$RUN/semvae.safetensors"
# Composite latents.
step sfd encode quickstart/latents
# Semantic-first diffusion: two ranks, ZeRO-1, bf16.
ranks train quickstart/sfd
parallel sfd export "$RUN/sfd" --out "$RUN/sfd.safetensors"
parallel sfd export "$RUN/sfd" --initial --out "$RUN/sfd_untrained.safetensors"
wait_all
# Generate on two ranks and score. In parallel: the same recipe with the untrained weights, in one process.
ranks --module eval generate quickstart/eval "checkpoint=$RUN/sfd.safetensors" --out "$RUN/samples_sfd"
untrained() {
  python -m eval generate quickstart/eval "checkpoint=$RUN/sfd_untrained.safetensors" --out "$RUN/samples_sfd_untrained"
  python -m eval score quickstart/eval --samples "$RUN/samples_sfd_untrained"
}
parallel untrained
parallel python -m eval score quickstart/eval --samples "$RUN/samples_sfd"
wait_all
step python -m eval report --result "$RUN/samples_sfd/results.json" --result "$RUN/samples_sfd_untrained/results.json" \
  --run "$RUN/sfd" --out "$RUN/report"
printf '\nDone in %d s. Open %s\n' $((SECONDS - started)) "$RUN/report/index.html"
