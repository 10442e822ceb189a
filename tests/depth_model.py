"""A miniature of random weights that estimates depth, in transformers' format."""

from pathlib import Path

import torch
from transformers import DPTConfig, DPTForDepthEstimation
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

SIDE_PX = 32


def save_depth_model(folder: Path, seed: int = 0) -> Path:
    """Save the model; return its folder."""
    torch.manual_seed(seed)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=SIDE_PX,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
        use_auxiliary_head=False,
        head_in_index=-1,
    )
    model = DPTForDepthEstimation(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
            else:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.1)
        model.head.head[-2].weight.abs_()  # before a ReLU, which else might leave nothing
    model.save_pretrained(folder)
    DPTImageProcessorPil(size={"height": SIDE_PX, "width": SIDE_PX}).save_pretrained(folder)
    return folder
