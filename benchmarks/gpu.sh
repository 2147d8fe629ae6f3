#!/usr/bin/env bash
# All that is worth doing on a machine with a GPU, in one go:
#
#     bash benchmarks/gpu.sh [tests] [record] [speed]        all three if none is named
#
# It needs what pyproject.toml names first (dependencies), pytest, hypothesis, peft and timm, and no Jupyter; it takes PYTHON
# (python3 if it is not set). What it writes is committed as it is:
#
#     benchmarks/gpu_tests.txt       the tests of helpers and checks, on the GPU
#     grader/golden/                 records of CPU and GPU, deviations
#     benchmarks/gpu_verify.txt      a second run beside these records
#     benchmarks/gpu_speed.md        LoRA and exported models, beside their peers
#
# REHEARSE=1 tries the steps without a GPU: its texts stay in a temporary folder, and `record` records the CPU.
# ARCHIVE=FILE packs what was written after each step, to carry it to another machine.
set -uo pipefail
[ -z "${ARCHIVE:-}" ] || ARCHIVE=$(realpath "$ARCHIVE")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
device=cuda texts=benchmarks
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    if [ -z "${REHEARSE:-}" ]; then
        echo "gpu.sh needs a CUDA GPU, and torch sees none here. Run it on a machine with one, or REHEARSE=1 to try the steps." >&2
        exit 1
    fi
    device=cpu texts=$(mktemp -d)
    echo "rehearsing without a GPU: see $texts"
fi
steps=${*:-tests record speed}
failed=0

about() { # what ran on
    "$python" -c 'import platform, torch, torchvision, transformers
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"{gpu}, torch {torch.__version__}, torchvision {torchvision.__version__}, transformers {transformers.__version__},",
      f"Python {platform.python_version()}")'
    date +%F
}

pack() { # what was written so far
    [ -z "${ARCHIVE:-}" ] || tar --create --gzip --file "$ARCHIVE" grader/golden $(ls -d benchmarks/gpu_* 2>/dev/null) || failed=1
}

for step in $steps; do
    case $step in
    tests)
        { about; "$python" -m pytest -q -p no:cacheprovider --durations=5 -k "not proven" \
            tests/test_{lora,adapters,batchnorm,features,finetune,training,backbones,text,data,export}.py \
            tests/test_{fake_gpu,on_gpu,golden,check,verdict,proof}.py; } 2>&1 |
            tee "$texts/gpu_tests.txt" || failed=1
        ;;
    record)
        "$python" -m grader.golden record || failed=1
        { about; "$python" -m grader.golden verify; } 2>&1 | tee "$texts/gpu_verify.txt" || failed=1
        ;;
    speed)
        { echo "# Speed on a GPU"; echo; "$python" -m benchmarks lora export --device "$device"; } 2>&1 |
            tee "$texts/gpu_speed.md" || failed=1
        ;;
    *)
        echo "no step $step: choose from tests, record, speed." >&2
        exit 2
        ;;
    esac
    pack
done
exit $failed
