"""What operators took on a GPU, value and gradients; written by `python -m experiments.tables`."""

from typing import Any

# Fields of `kernels.dispatch.Measured`.
ROWS: tuple[tuple[Any, ...], ...] = (
    (
        "ssd",
        "tfloat32",
        {"b": 2048, "l": 50, "h": 4, "p": 32, "n": 32},
        {"pallas_triton": 787, "xla": 865},
        "gpu_h100_ops",
    ),
    (
        "ssd",
        "bfloat16",
        {"b": 2048, "l": 50, "h": 4, "p": 32, "n": 32},
        {"pallas_triton": 433, "xla": 585},
        "gpu_h100_ops",
    ),
    (
        "ssd",
        "tfloat32",
        {"b": 1024, "l": 200, "h": 4, "p": 32, "n": 32},
        {"pallas_triton": 1433, "xla": 3631},
        "gpu_h100_ops",
    ),
    (
        "ssd",
        "bfloat16",
        {"b": 1024, "l": 200, "h": 4, "p": 32, "n": 32},
        {"pallas_triton": 885, "xla": 2679},
        "gpu_h100_ops",
    ),
    (
        "ssd",
        "tfloat32",
        {"b": 256, "l": 200, "h": 4, "p": 128, "n": 64},
        {"pallas_triton": 2551, "xla": 3707},
        "gpu_h100_ops",
    ),
    (
        "ssd",
        "bfloat16",
        {"b": 256, "l": 200, "h": 4, "p": 128, "n": 64},
        {"pallas_triton": 1625, "xla": 2788},
        "gpu_h100_ops",
    ),
    (
        "causal_conv1d",
        "float32",
        {"b": 2048, "l": 50, "c": 192},
        {"pallas_triton": 164, "xla": 395},
        "gpu_h100_ops",
    ),
    (
        "causal_conv1d",
        "bfloat16",
        {"b": 2048, "l": 50, "c": 192},
        {"pallas_triton": 100, "xla": 177},
        "gpu_h100_ops",
    ),
    (
        "causal_conv1d",
        "float32",
        {"b": 1024, "l": 200, "c": 192},
        {"pallas_triton": 302, "xla": 713},
        "gpu_h100_ops",
    ),
    (
        "causal_conv1d",
        "bfloat16",
        {"b": 1024, "l": 200, "c": 192},
        {"pallas_triton": 178, "xla": 338},
        "gpu_h100_ops",
    ),
    (
        "selective_scan",
        "float32",
        {"b": 512, "l": 200, "e": 128, "n": 32},
        {"pallas_triton": 1487, "xla": 20266},
        "gpu_h100_ops",
    ),
    (
        "selective_scan",
        "bfloat16",
        {"b": 512, "l": 200, "e": 128, "n": 32},
        {"pallas_triton": 1353, "xla": 18586},
        "gpu_h100_ops",
    ),
    (
        "softmax_cross_entropy",
        "tfloat32",
        {"t": 2048, "v": 12102, "d": 64},
        {"pallas_triton": 301, "xla": 412},
        "gpu_h100_ops",
    ),
    (
        "softmax_cross_entropy",
        "bfloat16",
        {"t": 2048, "v": 12102, "d": 64},
        {"pallas_triton": 141, "xla": 300},
        "gpu_h100_ops",
    ),
)
