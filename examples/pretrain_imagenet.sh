#!/usr/bin/env bash
# Pretrain ViTAE by a published recipe on all GPUs of this machine, and publish it.
#
#     bash examples/pretrain_imagenet.sh vitae-s --dataset FOLDER --hub_model_id org/vitae-s
#     LAUNCHER=accelerate PROCESSES=4 bash examples/pretrain_imagenet.sh vitaev2-s --dataset FOLDER --push_to_hub false
#
# The first word names the recipe. What follows goes to vitae train and overrides what stands here. FOLDER has the
# pictures as train/CLASS/… and val/CLASS/…. The model, its checkpoints and TensorBoard's files go to outputs/RECIPE.
#
# Whatever ends the run, start it again by the same line: it goes on from the newest whole checkpoint. SIGTERM to torchrun
# saves one first (accelerate passes the signal on to several processes, but not to one). `kill -9` leaves a launcher's
# processes running, which must end before the next start. Publishing needs `hf auth login`, and is refused before the
# training if that is missing. On GPUs that have bfloat16, it is on. Without a GPU one process trains;
# `--use_cpu true --bf16 true` rehearses bfloat16 there. docs/pretraining-cost.md says how long it takes.
set -euo pipefail

recipe=${1:-}
if [[ -z $recipe || $recipe == -* ]]; then
    echo "error: the name of a recipe comes first, such as vitae-s, then arguments of vitae train; got '$recipe'" >&2
    exit 2
fi
shift
processes=${PROCESSES:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
case ${LAUNCHER:=torchrun} in
    torchrun) launch=(torchrun --standalone --nproc_per_node "$processes") ;;
    accelerate)
        config=$(dirname "$0")/distributed/ddp.yaml
        launch=(accelerate launch --config_file "$config" --num_processes "$processes")
        ;;
    *)
        echo "error: LAUNCHER must be torchrun or accelerate, got $LAUNCHER" >&2
        exit 2
        ;;
esac
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170 # seconds to save a checkpoint after SIGTERM
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

exec "${launch[@]}" -m vitae_hf train --config "$recipe" --output_dir "outputs/$recipe" \
    --resume_from_checkpoint last --push_to_hub true "$@"
