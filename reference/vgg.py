"""VGG-11/13/16/19 with and without batch norm, and the embeddings taken from them, in one file.

Paper: "Very Deep Convolutional Networks for Large-Scale Image Recognition", K. Simonyan,
A. Zisserman, ICLR 2015, arXiv:1409.1556.

Stacks of 3x3 convolutions, each stack followed by a 2x2 max pooling that halves the side while the
width doubles up to 512; then three fully connected layers on a 7x7 map. Parameter names, shapes and
initialisation are torchvision's, so its checkpoints load unchanged:

    model = vgg16()
    model.load_state_dict(torch.load("vgg16-397923af.pth", weights_only=True))

`Embedding` turns images into the feature vectors that generative models are compared by (Naeem et
al., ICML 2020): "T4096", the activations of the second fully connected layer of a trained VGG-16,
for natural images; "R64", a randomly initialised VGG-16 whose second fully connected layer has 64
outputs, for images far from ImageNet.

>>> embed = Embedding(vgg16(fc2=64, width=4, hidden=32, side=32, seed=0), side=32)
>>> embed(torch.zeros(2, 3, 28, 28, dtype=torch.uint8)).shape
torch.Size([2, 64])
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# widths in units of the first stack's; "M" is a 2x2 max pooling
STACKS = {
    11: (1, "M", 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"),
    13: (1, 1, "M", 2, 2, "M", 4, 4, "M", 8, 8, "M", 8, 8, "M"),
    16: (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M"),
    19: (1, 1, "M", 2, 2, "M", 4, 4, 4, 4, "M", 8, 8, 8, 8, "M", 8, 8, 8, 8, "M"),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG(nn.Module):
    """Convolution stacks `features`, adaptive pooling, three linear layers `classifier`.

    Args:
        depth: 11, 13, 16 or 19 layers with weights.
        num_classes: outputs of the last layer.
        batch_norm: after every convolution.
        fc2: outputs of the second linear layer (published: 4096).
        width, hidden: channels of the first stack, outputs of the first linear layer (published:
            64 and 4096); smaller for tests and small images.
        side: of the images the linear layers are made for: they see a (side // 32)^2 map
            (published: 224, a 7x7 map). Other images are pooled to it.
        dropout: of the linear layers, in training.
        seed: of the initial weights (None: torch's global generator, as every torch layer).

    Raises ValueError for an unknown depth or a size below its minimum.
    """

    def __init__(self, depth: int = 16, num_classes: int = 1000, batch_norm: bool = False, *,
                 fc2: int = 4096, width: int = 64, hidden: int = 4096, side: int = 224,
                 dropout: float = 0.5, seed: int | None = None):
        super().__init__()
        if depth not in STACKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, STACKS))}, got {depth}")
        for name, value, least in (("num_classes", num_classes, 1), ("fc2", fc2, 1),
                                   ("width", width, 1), ("hidden", hidden, 1), ("side", side, 32)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        with torch.random.fork_rng(devices=[], enabled=seed is not None):  # torch draws too
            layers, channels = [], 3
            for entry in STACKS[depth]:
                if entry == "M":
                    layers.append(nn.MaxPool2d(2, 2))
                    continue
                layers.append(nn.Conv2d(channels, entry * width, 3, padding=1))
                channels = entry * width
                layers += [nn.BatchNorm2d(channels)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
            self.features = nn.Sequential(*layers)
            self.avgpool = nn.AdaptiveAvgPool2d(side // 32)
            self.classifier = nn.Sequential(
                nn.Linear(channels * (side // 32) ** 2, hidden), nn.ReLU(inplace=True),
                nn.Dropout(dropout), nn.Linear(hidden, fc2), nn.ReLU(inplace=True),
                nn.Dropout(dropout), nn.Linear(fc2, num_classes))
        self.reset_parameters(None if seed is None else torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Convolutions N(0, 2 / fan_out), linear layers N(0, 0.01^2), biases 0, batch norm 1."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu",
                                        generator=generator)
                module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, 0.01, generator=generator)
                module.bias.zero_()

    def forward_features(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to the last map ``(B, 8 * width, H // 32, W // 32)``."""
        return self.features(x)

    def embed(self, x: Tensor) -> Tensor:
        """Activations ``(B, fc2)`` of the second linear layer, after its ReLU."""
        return self.classifier[:5](self.avgpool(self.features(x)).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def vgg11(num_classes: int = 1000, **options) -> VGG:
    """132,863,336 parameters at 1000 classes. ``options`` are those of :class:`VGG`."""
    return VGG(11, num_classes, **options)


def vgg13(num_classes: int = 1000, **options) -> VGG:
    """133,047,848 parameters at 1000 classes."""
    return VGG(13, num_classes, **options)


def vgg16(num_classes: int = 1000, **options) -> VGG:
    """138,357,544 parameters at 1000 classes."""
    return VGG(16, num_classes, **options)


def vgg19(num_classes: int = 1000, **options) -> VGG:
    """143,667,240 parameters at 1000 classes."""
    return VGG(19, num_classes, **options)


class Embedding(nn.Module):
    """uint8 images of any size to feature vectors, in eval mode and without gradients.

    ``(B, 3, H, W)`` uint8 -> resized to `side` with antialiasing, normalised with ImageNet's mean
    and standard deviation -> ``(B, fc2)`` of the weights' type. TypeError for other images.
    """

    def __init__(self, model: VGG, side: int = 224):
        super().__init__()
        self.model, self.side = model.eval(), side
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            value = torch.tensor(value).view(1, 3, 1, 1).to(next(model.parameters()))
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise TypeError(f"images must be (B, 3, H, W) uint8 tensors, got {tuple(images.shape)} "
                            f"{type(images).__name__} {images.dtype}")
        x = images.to(self.mean.device).float() / 255
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bilinear", antialias=True)
        return self.model.eval().embed(((x - self.mean) / self.std).to(self.mean.dtype))


def r64(seed: int = 0, side: int = 224, **options) -> Embedding:
    """The random embedding: VGG-16 with `fc2` = 64 (or as `options` say) and stated weights."""
    return Embedding(vgg16(seed=seed, side=side, **{"fc2": 64} | options), side)


if __name__ == "__main__":
    published = {vgg11: 132_863_336, vgg13: 133_047_848, vgg16: 138_357_544, vgg19: 143_667_240}
    print(f"{'network':<8} {'parameters':>12} {'published':>12} {'with batch norm':>16}")
    for factory, expected in published.items():
        with torch.device("meta"):
            counts = [sum(p.numel() for p in factory(batch_norm=b).parameters()) for b in (0, 1)]
        print(f"{factory.__name__:<8} {counts[0]:>12,} {expected:>12,} {counts[1]:>16,}")
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    print("R64 of four 32-pixel images:", tuple(r64(side=32, width=16, hidden=256)(images).shape))
