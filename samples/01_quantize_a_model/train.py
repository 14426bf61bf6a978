"""Train the network of this sample, and write digits.onnx, calibration.npz and evaluation.npz beside this file.

Only needed to change them. Beside qdqtool it takes `pip install torch scikit-learn`, and a minute or two of one core.

The network is small, but made of what makes quantization worth care: residual additions, depthwise convolutions, ReLU
and ReLU6. Its BatchNormalization nodes stay in the file, not folded into the convolutions, for the quantizer to fold.
"""

# Where torch is not installed, mypy takes its classes for Any.
# mypy: allow-subclassing-any

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

HERE = Path(__file__).parent
SEED = 0
EPOCHS = 30
BATCH = 50
EVALUATION_SAMPLES = 497
CALIBRATION_SAMPLES = 100


class Residual(nn.Module):
    """y = act(x + body(x))."""

    def __init__(self, body: nn.Module, act: nn.Module) -> None:
        """Keep both as children, which name their nodes in the ONNX file."""
        super().__init__()
        self.body = body
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return [N, channels, height, width]."""
        y: torch.Tensor = self.act(x + self.body(x))
        return y


def named(**layers: nn.Module) -> nn.Module:
    """Chain layers under the names that their nodes get in the ONNX file."""
    return nn.Sequential(OrderedDict(layers))


def normalized(conv: nn.Conv2d, act: type[nn.Module]) -> nn.Module:
    """Follow `conv` by batch normalization and an activation."""
    return named(conv=conv, bn=nn.BatchNorm2d(conv.out_channels), act=act())


def full(inputs: int, outputs: int, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Ordinary 3x3 convolution."""
    return normalized(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), act)


def depthwise(channels: int, *, stride: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    """3x3 convolution of each channel by itself."""
    return normalized(nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False), act)


def pointwise(inputs: int, outputs: int, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    """1x1 convolution."""
    return normalized(nn.Conv2d(inputs, outputs, 1, bias=False), act)


def separable(inputs: int, outputs: int, *, stride: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Depthwise separable convolution (MobileNet, arXiv:1704.04861)."""
    return named(depthwise=depthwise(inputs, stride=stride), pointwise=pointwise(inputs, outputs, act))


def inverted(channels: int, hidden: int) -> nn.Module:
    """Inverted residual with a linear bottleneck and ReLU6 (MobileNetV2, arXiv:1801.04381)."""
    body = named(
        expand=pointwise(channels, hidden, nn.ReLU6),
        depthwise=depthwise(hidden, act=nn.ReLU6),
        project=pointwise(hidden, channels, nn.Identity),
    )
    return Residual(body, nn.Identity())


def network() -> nn.Module:
    """Make the untrained network: image [N, 1, 16, 16] to logits [N, 10]; names end in the size of their output."""
    return named(
        stem=full(1, 24),
        residual16=Residual(named(first=full(24, 24), second=full(24, 24, nn.Identity)), nn.ReLU()),
        down8=separable(24, 48, stride=2),
        residual8=Residual(named(first=separable(48, 48), second=separable(48, 48, act=nn.Identity)), nn.ReLU()),
        down4=separable(48, 96, stride=2),
        inverted4=inverted(96, 192),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=nn.Linear(96, 10),
    )


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images, float32 [1797, 1, 16, 16] in 0 to 1, and their labels, int64 [1797]."""
    digits = load_digits()
    images = torch.from_numpy(digits.images[:, None].astype(np.float32)) / 16
    images = nn.functional.interpolate(images, scale_factor=2, mode="bilinear")
    return images, torch.from_numpy(digits.target.astype(np.int64))


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Fit `model` in place and leave it in evaluation mode."""
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=EPOCHS * steps)
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(images))[: steps * BATCH].reshape(steps, BATCH):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total / steps:.4f}")
    model.eval()


def export(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    """Write `model` as ONNX; TrainingMode.PRESERVE keeps the exporter from folding batch normalization away."""
    torch.onnx.export(
        model,
        (example,),
        str(path),
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        opset_version=17,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        dynamo=False,  # the newer exporter folds batch normalization too, and writes opset 18 or later
    )


def main() -> None:
    """Train, write the three files, and print the accuracy in torch and in ONNX Runtime."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)

    images, labels = data()
    training, evaluation = train_test_split(
        np.arange(len(images)), test_size=EVALUATION_SAMPLES, stratify=labels, random_state=SEED
    )
    calibration, _ = train_test_split(
        training, train_size=CALIBRATION_SAMPLES, stratify=labels[training], random_state=SEED
    )

    model = network()
    train(model, images[training], labels[training])
    export(model, images[:2], HERE / "digits.onnx")
    np.savez_compressed(HERE / "calibration.npz", image=images[calibration].numpy())
    expected = labels[evaluation].numpy()
    np.savez_compressed(HERE / "evaluation.npz", image=images[evaluation].numpy(), labels=expected)

    with torch.no_grad():
        in_torch = model(images[evaluation]).argmax(1).numpy()
    session = onnxruntime.InferenceSession(HERE / "digits.onnx", providers=["CPUExecutionProvider"])
    in_onnx = np.asarray(session.run(["logits"], {"image": images[evaluation].numpy()})[0]).argmax(1)
    for where, predicted in (("torch", in_torch), ("ONNX Runtime", in_onnx)):
        print(f"top-1 accuracy in {where}: {np.mean(predicted == expected):.4f}")


if __name__ == "__main__":
    main()
