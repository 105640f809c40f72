"""Networks under torch.compile and torch.export, with the batch size left free."""

import pytest
import torch
from torch import nn

from reference import attribution, nha, pcme, pit, pyramidnet, video_resnet, wsol

STAGES = (32, 8, 4, (8,) * 3, (1, 1, 1), (1, 2, 4), 2)
THAT_DRAW = {
    "pit": lambda: pit.PoolingTransformer(*STAGES, num_classes=5, drop_path_rate=0.3),
    "pyramidnet": lambda: pyramidnet.PyramidNet(11, 6, 5, shakedrop=0.5),
    "inception's dropout": wsol._Dropout,
    "pcme": lambda: pcme.EncoderImage(nn.Conv2d(3, 16, 3, 4, 1), 16, 12),
    "smooth_grad": lambda: lambda x: attribution.smooth_grad(LINEAR, x, 0, samples=2),
    "wsol's smooth_grad": lambda: lambda x: wsol.smooth_grad(LINEAR, x, x[:, 0, 0, 0].long(), n=2),
    "nha": lambda: lambda x: EVENTS.sample(x[:, 0, 0, 0].long())[0],
}
LINEAR, EVENTS = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), nha.EventModule(2)
EXPORTED = {
    "pit": lambda: pit.PoolingTransformer(*STAGES, num_classes=5),
    "vit": lambda: pit.VisionTransformer(32, 8, 16, 1, 2, num_classes=5),
    "tsm": lambda: video_resnet.tsm18(5, width=8),
    "acol": lambda: wsol.build_network("vgg16", "acol", 5),
}


@pytest.mark.parametrize("name", THAT_DRAW)
def test_networks_that_draw_compile_for_any_batch_size(name):
    torch._dynamo.reset()
    network = torch.compile(THAT_DRAW[name](), backend="eager")
    for size in (2, 3, 5):                                    # from the second on it is left free
        out = network(torch.rand(size, 3, 32, 32))
        assert len(out["embedding"] if name == "pcme" else out) == size


@pytest.mark.parametrize("name", EXPORTED)
def test_networks_export_with_a_free_batch_size(name):
    network = EXPORTED[name]().eval()
    frames = (4,) if name == "tsm" else ()
    two, three = (torch.rand(size, 3, *frames, 32, 32) for size in (2, 3))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(network, (two,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(three), network(three), rtol=1e-4, atol=1e-5)
