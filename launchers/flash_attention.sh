#!/usr/bin/env bash
# Install flash-attention 2 for the PyTorch of the active python: launchers/flash_attention.sh
#
# The published source compiles as C++17, and the headers of PyTorch 2.15 need C++20. So this fetches the source with its
# hash, changes that flag and builds. The build takes about an hour on 8 cores and needs nvcc of PyTorch's CUDA.
# It is optional: without it `attention: auto` takes cuDNN's kernel on Hopper and Blackwell.
#   FLASH_ATTN_CUDA_ARCHS   GPUs to build for, as in "80;90;100"; by default those of this machine, or these three
#   MAX_JOBS                compilers at once, each with about 5 GB of memory
#   launchers/flash_attention.sh --fetch FOLDER     only fetch the source and change it
#   launchers/flash_attention.sh --syntax FOLDER    check flash_api.cpp of that folder against PyTorch; needs no nvcc,
#       but the headers of CUDA: of a toolkit, or of the package nvidia-cuda-crt (its folder include in CPATH)
#   launchers/flash_attention.sh --kernels FOLDER NAME...    compile these of its kernels for H100; needs nvcc and no GPU
set -euo pipefail
version=2.8.3.post2
sha256=d0f9f0b08a986cdeadbffcf5ec8b3a8f514366c68ad1853d3ab061bc83cc340b
python=${PYTHON:-python}

fetch() { # FOLDER
    mkdir -p "$1"
    FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation --no-binary flash-attn --dest "$1" "flash-attn==$version"
    echo "$sha256  $1/flash_attn-$version.tar.gz" | sha256sum --check --quiet
    tar --extract --gzip --file "$1/flash_attn-$version.tar.gz" --directory "$1" --strip-components 1
    sed -i 's/-std=c++17/-std=c++20/g' "$1/setup.py"
}

includes() { # FOLDER: the -I options of its sources
    "$python" - "$1" <<'PYTHON'
import sys, sysconfig
from pathlib import Path
import torch.utils.cpp_extension as extension
folder = Path(sys.argv[1], "csrc")
paths = [folder / "flash_attn", folder / "flash_attn/src", folder / "cutlass/include", sysconfig.get_paths()["include"]]
paths += extension.include_paths()
# The CUDA headers of PyTorch's own packages, where no toolkit is installed.
packages = Path(sysconfig.get_paths()["purelib"], "nvidia/cu13/include")
paths += [packages, packages / "cccl"]
print(*(f"-I{path}" for path in paths))
PYTHON
}

case "${1:-}" in
    --fetch)
        fetch "$2" ;;
    --syntax)
        # shellcheck disable=SC2046  # one word for each path
        g++ -std=c++20 -fsyntax-only $(includes "$2") "$2/csrc/flash_attn/flash_api.cpp" ;;
    --kernels)
        folder=$2; shift 2
        for name in "$@"; do
            # The flags of its setup.py, for one GPU.
            # shellcheck disable=SC2046
            "${NVCC:-nvcc}" -O3 -std=c++20 -U__CUDA_NO_HALF_OPERATORS__ -U__CUDA_NO_HALF_CONVERSIONS__ \
                -U__CUDA_NO_HALF2_OPERATORS__ -U__CUDA_NO_BFLOAT16_CONVERSIONS__ --expt-relaxed-constexpr \
                --expt-extended-lambda --use_fast_math -gencode arch=compute_90,code=sm_90 $(includes "$folder") \
                --compiler-options -fPIC -c "$folder/csrc/flash_attn/src/$name.cu" -o "$folder/$name.o"
        done ;;
    "")
        command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || {
            echo "nvcc: not found; install the CUDA toolkit of PyTorch's release, or go without flash-attention" >&2
            exit 1
        }
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        fetch "$folder"
        if [ -z "${FLASH_ATTN_CUDA_ARCHS:-}" ]; then
            FLASH_ATTN_CUDA_ARCHS=$("$python" -c 'import torch
print(";".join(sorted({f"{m}0" for m, _ in map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))}) or ["80;90;100"]))')
        fi
        echo "building flash-attention $version for $FLASH_ATTN_CUDA_ARCHS; this takes long"
        FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS=$FLASH_ATTN_CUDA_ARCHS \
            "$python" -m pip install --disable-pip-version-check --no-deps --no-build-isolation "$folder" ;;
    *)
        echo "usage: launchers/flash_attention.sh [--fetch FOLDER | --syntax FOLDER | --kernels FOLDER NAME...]" >&2
        exit 2 ;;
esac
