#!/usr/bin/env bash
# Runs the demo's checkpoints on an emulated aarch64 processor and compares their logits with this machine's.
# Takes about 20 minutes and 2 GB, most of it the emulation; not part of CI.  Needs root for apt-get, and the network.
#
#   bash tests/emulated/aarch64.sh [DIRECTORY]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"/{debs,root,site,checkpoints}
cd "$work"

command -v qemu-aarch64-static > /dev/null || apt-get install --yes qemu-user-static
if [ ! -x root/usr/bin/python3.11 ]; then
    dpkg --add-architecture arm64
    trap 'dpkg --remove-architecture arm64' EXIT
    apt-get update
    packages=(libc6 libcrypt1 libexpat1 libffi8 libgcc-s1 libgomp1 libssl3 libstdc++6 libsqlite3-0 libuuid1 zlib1g
        libbz2-1.0 liblzma5 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal python3.11)
    (cd debs && apt-get download "${packages[@]/%/:arm64}")
    for package in debs/*.deb; do dpkg -x "$package" root; done
fi
# The oldest PyTorch that dfq takes: its aarch64 wheel is for CPUs alone.
pip install --quiet --target site --upgrade --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
    --platform manylinux2014_aarch64 \
    torch==2.9.1 torchvision==0.24.1 timm numpy safetensors pillow pydantic pydantic-core annotated-types \
    typing-extensions typing-inspection rich markdown-it-py mdurl pygments typer click shellingham annotated-doc \
    huggingface-hub hf-xet httpx2 httpcore2 anyio h11 idna truststore filelock fsspec packaging pyyaml tqdm \
    sympy mpmath networkx jinja2 markupsafe

# Limited to AVX2, this machine multiplies float attention in float32, as the emulated one does.
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python "$here/aarch64_check.py" write checkpoints
qemu-aarch64-static -L root -E PYTHONDONTWRITEBYTECODE=1 -E HF_HUB_OFFLINE=1 \
    -E PYTHONPATH="$work/site:$(dirname "$(dirname "$here")")" \
    root/usr/bin/python3.11 "$here/aarch64_check.py" compare checkpoints
