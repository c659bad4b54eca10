"""The matrices of Qwen2.5-7B, which is too large to build in a test."""

from rbfast.models.linears import Shape

QWEN_7B = {
    f"{layer}.{name}": Shape(out_features, in_features, 4 * layer + group)
    for layer in range(28)
    for name, out_features, in_features, group in (
        ("q", 3584, 3584, 0),
        ("k", 512, 3584, 0),
        ("v", 512, 3584, 0),
        ("o", 3584, 3584, 1),
        ("gate", 18944, 3584, 2),
        ("up", 18944, 3584, 2),
        ("down", 3584, 18944, 3),
    )
}
QWEN_7B_PARAMETERS = 7_615_616_512
