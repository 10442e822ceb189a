"""Options that `python -m train` does not have, and where each belongs."""

AT_PRECOMPUTE = "belongs to python -m precompute: it is settled when the cache is made."
PRECOMPUTE_OPTIONS = (
    "--source",
    "--train-data-dir",
    "--dataset-name",
    "--dataset-config-name",
    "--dataset-revision",
    "--image-column",
    "--conditioning-image-column",
    "--caption-column",
    "--conditioning-from",
    "--max-train-samples",
    "--random-flip",
    "--dry-run",
    "--cache-dtype",
    "--posterior",
    "--shard-mb",
    "--resolution",
    "--buckets",
    "--background",
    "--conditioning-range",
    "--max-sequence-length",
    "--validation-prompt",
    "--validation-image",
    "--validation-rows",
    "--vae-batch-size",
    "--text-batch-size",
    "--vae-dtype",
    "--text-dtype",
    "--max-bad-fraction",
    "--strict",
    "--part",
)
MISPLACED = {
    **dict.fromkeys(PRECOMPUTE_OPTIONS, AT_PRECOMPUTE),
    "--device": "accelerate chooses it; see CUDA_VISIBLE_DEVICES and accelerate launch --cpu.",
    "--dataset-preprocess-batch-size": "see python -m precompute --text-batch-size.",
    "--upcast-vae": "see python -m precompute --vae-dtype, float32 by default.",
    "--num-extra-conditioning-channels": "further channels, a mask's for instance, need data that "
    "neither the reference nor this cache has; leave it out.",
    "--set-grads-to-none": "gradients are always set to None; leave it out.",
}
