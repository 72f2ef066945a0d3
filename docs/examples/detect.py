"""torchvision's RetinaNet on an EfficientFormer-L1: some training steps on a photograph of 512x640.

    python docs/examples/detect.py --steps 10

Needs scikit-learn, which ships the photograph, and a torchvision whose operators load.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn import functional as F

import effformer

# In pixels of the photograph at 512x640: left, top, right, bottom.
BOXES = {"tower": (63, 36, 372, 500), "island": (424, 272, 501, 291), "tree": (546, 163, 640, 512)}


def photograph() -> Tensor:
    """A pagoda over a lake, [3, 512, 640], from 0 to 1."""
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(image, (512, 640), mode="bilinear", antialias=True)[0]


def detector(network: effformer.EfficientFormer) -> nn.Module:
    """RetinaNet (arXiv 1708.02002) on a pyramid of strides 8 to 128, of 64 channels instead of 256: a CPU is slow."""
    from torchvision.models.detection import RetinaNet
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    from effformer.torchvision import BackboneWithFPN

    backbone = BackboneWithFPN(network, (1, 2, 3), out_channels=64, extra_blocks=LastLevelP6P7(64, 64))
    return RetinaNet(backbone, num_classes=1 + len(BOXES), min_size=512, max_size=640)


def main(argv: list[str] | None = None) -> list[float]:
    """Train; returns the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pretrained", action="store_true", help="begin with timm's ImageNet weights")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = effformer.create_model("efficientformer_l1", pretrained=arguments.pretrained, layer_scale_init_value=0.1)
    model = detector(network).to(device).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the statistics of one image say little
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)  # the loss jumps with three times that
    image = photograph().to(device)
    target = {
        "boxes": torch.tensor(list(BOXES.values()), dtype=torch.float32, device=device),
        "labels": torch.arange(1, 1 + len(BOXES), device=device),
    }

    history = []
    for step in range(arguments.steps):
        losses = model([image], [target])
        loss = sum(losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
        print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    without = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()
    ]
    if without:
        raise SystemExit("parameters without a finite gradient: " + ", ".join(without))
    return history


if __name__ == "__main__":
    main()
