"""The files that NetsPresso Trainer trains from: two classes of 32x32 images, a tiny network, its six configurations."""

from __future__ import annotations

from pathlib import Path

import yaml
from PIL import Image

CLASSES = ("dark", "light")
BACKBONE = {
    "name": "efficientformer",
    "params": {
        "num_attention_heads": 2,
        "attention_channels": 8,
        "attention_dropout_prob": 0.0,
        "attention_value_expansion_ratio": 2,
        "ffn_intermediate_ratio": 2,
        "ffn_dropout_prob": 0.0,
        "ffn_act_type": "gelu",
        "vit_num": 1,
    },
    "stage_params": [{"num_blocks": 1, "channels": width} for width in (8, 12, 16, 24)],
}


def write_project(folder: Path, backbone_name: str = "efficientformer") -> list[str]:
    """Write data and configurations into `folder`; returns the trainer's options for them."""
    for split, count in (("train", 8), ("valid", 4)):
        images = folder / split
        images.mkdir(parents=True)
        names = [f"{i}.png" for i in range(count)]
        for i, name in enumerate(names):
            Image.new("RGB", (32, 32), (200 * (i % 2) + i,) * 3).save(images / name)
        rows = "".join(f"{name},{i % 2}\n" for i, name in enumerate(names))
        (folder / f"{split}.csv").write_text("image_id,class\n" + rows)
    transforms = [
        {"name": "resize", "size": [32, 32], "interpolation": "bilinear", "max_size": None, "resize_criteria": None},
        {"name": "totensor", "pixel_range": 1.0},
        {"name": "normalize", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    ]
    paths = {split: {"image": split, "label": f"{split}.csv"} for split in ("train", "valid")}
    contents = {
        "data": {
            "name": "tiny",
            "task": "classification",
            "format": "local",
            "path": {"root": str(folder)} | paths | {"test": {"image": None, "label": None}},
            "id_mapping": list(CLASSES),
            "pallete": None,
        },
        "augmentation": {"train": transforms, "inference": transforms},
        "model": {
            "task": "classification",
            "name": "efficientformer_tiny",
            "checkpoint": {"use_pretrained": False, "load_head": False, "path": None, "optimizer_path": None},
            "freeze_backbone": False,
            "architecture": {
                "full": None,
                "backbone": BACKBONE | {"name": backbone_name},
                "head": {
                    "name": "fc",
                    "params": {"num_layers": 1, "intermediate_channels": None, "act_type": "relu", "dropout_prob": 0.0},
                },
            },
            "postprocessor": None,
            "losses": [{"criterion": "cross_entropy", "label_smoothing": 0.1, "weight": None}],
        },
        "training": {
            "epochs": 1,
            "mixed_precision": False,
            "ema": None,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}
            | {"no_bias_decay": False, "no_norm_weight_decay": False, "overwrite": None},
            "scheduler": {"name": "cosine_no_sgdr", "warmup_epochs": 0, "warmup_bias_lr": 0.0, "min_lr": 0.0}
            | {"end_epoch": 1},
        },
        "logging": {
            "project_id": "tiny",
            "output_dir": str(folder / "outputs"),
            "tensorboard": False,
            "mlflow": False,
            "stdout": True,
            "num_save_samples": 0,
            "model_save_options": {
                "save_optimizer_state": False,
                "save_best_only": False,
                "best_model_criterion": "loss",
                "sample_input_size": [32, 32],
                "onnx_export_opset": 18,
                "validation_epoch": 1,
                "save_checkpoint_epoch": 1,
            },
            "metrics": {"classwise_analysis": False, "metric_names": None},
        },
        "environment": {"seed": 1, "num_workers": 1, "gpus": "0, 1", "batch_size": 2, "cache_data": False},
    }
    options = []
    for name, content in contents.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({name: content}))
        options += [f"--{name}", str(path)]
    return options
