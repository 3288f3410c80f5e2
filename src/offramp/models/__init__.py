"""Networks that no library ships, and the resolver that finds everybody's networks by name."""

from offramp.models.cifar_resnet import (
    CifarResNet,
    cifar_resnet20,
    cifar_resnet32,
    cifar_resnet44,
    cifar_resnet56,
    cifar_resnet110,
)
from offramp.models.deeplab import DeepLabV3Plus, deeplabv3plus_mobilenetv2, deeplabv3plus_resnet50
from offramp.models.dfnet import DFNet
from offramp.models.hrnet import (
    HRNet,
    HRNetPose,
    hrnet_w18,
    hrnet_w18_small,
    hrnet_w32,
    hrnet_w32_pose,
    hrnet_w48,
)
from offramp.models.mdeq import MDEQ, mdeq_small
from offramp.models.resolve import load_model
from offramp.models.scene_nets import SceneClassifier, SceneSegmenter, scenes_classify, scenes_dense
from offramp.models.sfnet import SFNet, sfnet_dfnetv1, sfnet_dfnetv2, sfnet_resnet18, sfnet_resnet50
from offramp.models.weights import load_weights_, read_weights

__all__ = [
    "CifarResNet", "DFNet", "DeepLabV3Plus", "HRNet", "HRNetPose", "MDEQ", "SFNet", "SceneClassifier", "SceneSegmenter",
    "cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56", "cifar_resnet110",
    "deeplabv3plus_mobilenetv2", "deeplabv3plus_resnet50", "hrnet_w18", "hrnet_w18_small", "hrnet_w32",
    "hrnet_w32_pose", "hrnet_w48", "load_model", "load_weights_", "mdeq_small", "read_weights",
    "scenes_classify", "scenes_dense", "sfnet_dfnetv1", "sfnet_dfnetv2", "sfnet_resnet18", "sfnet_resnet50",
]
