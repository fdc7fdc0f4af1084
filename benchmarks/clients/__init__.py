"""Public products that train by Lightning, on a poisoned input: ``python -m benchmarks.clients``."""

import torch

# timm imports torchvision, and so does torchmetrics where it is there. Its compiled operators fit no CPU build of torch
# from the package index. Nobody here needs them, but the import fails where these are not at least declared.
_torchvision = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _torchvision.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
