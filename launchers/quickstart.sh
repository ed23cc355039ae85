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
# Small networks, one process each. The vision encoder's features are the semantics, which a semantic VAE compresses.
# The texture VAE compresses the pixels. The features of another classifier compute the scores.
trained() {
  for name in "$@"; do
    sfd train "quickstart/$name"
    sfd export "$RUN/$name" --out "$RUN/$name.safetensors"
  done
}
parallel trained vision semvae
parallel trained texture
parallel trained classifier
wait_all
# Composite latents.
step sfd encode quickstart/latents
# Semantic-first diffusion: two ranks, ZeRO-1.
ranks train quickstart/sfd
step sfd export "$RUN/sfd" --out "$RUN/sfd.safetensors"
# Generate on two ranks, score, and write the pages.
ranks --module eval generate quickstart/eval --out "$RUN/samples_sfd"
step python -m eval score quickstart/eval --samples "$RUN/samples_sfd"
step python -m eval report --result "$RUN/samples_sfd/results.json" --run "$RUN/sfd" --out "$RUN/report"
printf '\nDone in %d s. Open %s\n' $((SECONDS - started)) "$RUN/report/index.html"
