"""Vision transformers for images of 32 and 8 pixels, small enough to train on a CPU.

timm's VisionTransformer (Dosovitskiy et al., 2021), with the mean of the patch tokens instead of a class token (Zhai et
al., Scaling Vision Transformers, 2022), which leaves less to learn on a small data set. Registered with timm.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer


def _cfg(in_chans: int, image_size: int) -> dict[str, object]:
    return {
        "num_classes": 10,
        "input_size": (in_chans, image_size, image_size),
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "mean": (0.5,) * in_chans,
        "std": (0.5,) * in_chans,
    }


default_cfgs = generate_default_cfgs({"vit_mini_patch4_32": _cfg(3, 32), "vit_mini_patch2_8": _cfg(1, 8)})


def vit_mini_patch4_32(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """64 patches of 4x4 pixels, 6 blocks of width 192: the width of DeiT-Tiny, half its depth."""
    shape = {"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
    return _build("vit_mini_patch4_32", pretrained=pretrained, **shape, **kwargs)


def vit_mini_patch2_8(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """16 patches of 2x2 pixels, 2 blocks of width 64."""
    shape = {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return _build("vit_mini_patch2_8", pretrained=pretrained, **shape, **kwargs)


def _build(name: str, *, pretrained: bool, **kwargs: object) -> VisionTransformer:
    return build_model_with_cfg(VisionTransformer, name, pretrained, class_token=False, global_pool="avg", **kwargs)


for entry_point in (vit_mini_patch4_32, vit_mini_patch2_8):  # not as a decorator: timm's is untyped
    register_model(entry_point)
