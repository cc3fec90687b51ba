"""Writes quantized checkpoints as other tools do, from the definitions of their formats.

Every writer packs the integers of a matrix one by one in plain Python, without the package under
test. It returns the tensors of one matrix by suffix, and the exact matrix in float32.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from tests.support.tiny_checkpoint import write_checkpoint

GROUP = 16  # does not divide the columns of all matrices of tiny_checkpoint
MATRICES = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.", ".gate_proj.", ".up_proj.", ".down_")


def write_foreign(
    path: Path, quantization_config: dict | None, matrix, *, plain=(), head=False, **config
):
    """Writes a tiny checkpoint whose matrices are written by `matrix(rng, num_out, num_in)`.

    Those with a name that contains an entry of `plain` stay as they are. `head` quantizes the LM
    head, too. Returns the exact quantized matrices by name.
    """
    weights = write_checkpoint(path, **({"dtype": "float16"} | config))
    rng = np.random.default_rng(0)
    stored, exact = {}, {}
    for name, weight in weights.items():
        quantized = any(part in name for part in MATRICES) or (head and "lm_head" in name)
        if quantized and not any(part in name for part in plain):
            tensors, exact[name] = matrix(rng, *weight.shape)
            module = name.removesuffix(".weight")
            stored |= {module + suffix: tensor for suffix, tensor in tensors.items()}
        else:
            stored[name] = weight
    safetensors.torch.save_file(stored, path / "model.safetensors")
    if quantization_config is not None:
        change_config(path, quantization_config=quantization_config)
    return exact


def change_config(path: Path, **changes):
    """Sets keys of config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(path: Path, change):
    """Applies `change` to the dictionary of stored tensors."""
    file = path / "model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, file)


# --- one scale per row or per matrix -------------------------------------------------------------


def fp8(rng, num_out, num_in, *, scale_shape="channel", scale_dtype=torch.bfloat16, extra=()):
    """`weight` in e4m3 and `weight_scale`; `extra` are suffixes of more scalars."""
    codes = rng.integers(0, 256, (num_out, num_in), dtype=np.uint8)
    codes[codes & 127 == 127] = 0  # NaN
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    exact = [[decode_e4m3(int(code)) for code in row] for row in codes]
    return scaled(rng, values, exact, scale_shape, scale_dtype, extra)


def int8(rng, num_out, num_in, *, scale_shape="channel", scale_dtype=torch.bfloat16, extra=()):
    """`weight` in int8 and `weight_scale`."""
    values = rng.integers(-128, 128, (num_out, num_in), dtype=np.int8)
    return scaled(rng, torch.from_numpy(values), values, scale_shape, scale_dtype, extra)


def scaled(rng, values, exact, scale_shape, scale_dtype, extra):
    num_out = len(values)
    shape = {"channel": (num_out, 1), "vector": (num_out,), "tensor": (1,), "scalar": ()}
    scale = torch.from_numpy(rng.uniform(1e-4, 1e-3, shape[scale_shape]).astype(np.float32))
    scale = scale.to(scale_dtype)
    rows = scale.float().numpy().reshape(-1, 1)
    tensors = {".weight": values, ".weight_scale": scale}
    tensors |= {suffix: torch.tensor(0.37) for suffix in extra}
    return tensors, np.array(exact, np.float32) * rows


def decode_e4m3(code: int) -> float:
    """Sign, four bits of exponent (bias 7), three of mantissa: https://arxiv.org/abs/2209.05433."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    number = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -number if sign else number


def fp8_blocks(rng, num_out, num_in, *, rows, columns, suffix=".weight_scale_inv"):
    """`weight` in e4m3, and one scale per block."""
    tensors, exact = fp8(rng, num_out, num_in, scale_shape="scalar")
    exact /= tensors[".weight_scale"].float().numpy()
    shape = (-(-num_out // rows), -(-num_in // columns))
    scale = rng.uniform(1e-4, 1e-3, shape).astype(np.float32)
    for o in range(num_out):
        for i in range(num_in):
            exact[o, i] *= scale[o // rows, i // columns]
    return {".weight": tensors[".weight"], suffix: torch.from_numpy(scale)}, exact


def int8_groups(rng, num_out, num_in, *, symmetric, group=GROUP):
    """`weight` in int8, and one scale and zero point per group."""
    q, zero, scale, exact = numbers(
        rng, num_out, num_in, (128, 128) if symmetric else (0, 255), group or num_in, bits=8
    )
    tensors = {
        ".weight": torch.from_numpy((q - 128).astype(np.int8)),
        ".weight_scale": torch.from_numpy(scale),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = torch.from_numpy((zero - 128).astype(np.int8))
    return tensors, exact


# --- four and eight bits in groups ---------------------------------------------------------------


def numbers(rng, num_out, num_in, zeros, group=GROUP, bits=4, order=None):
    """Integers [out][in], zero points and scales [out][group], and the matrix.

    Column i belongs to group `order[i]`, by default i // group.
    """
    groups = -(-num_in // group)
    order = [i // group for i in range(num_in)] if order is None else order
    q = rng.integers(0, 1 << bits, (num_out, num_in))
    zero = rng.integers(zeros[0], zeros[1] + 1, (num_out, groups))
    scale = rng.uniform(1e-3, 1e-2, (num_out, groups)).astype(np.float16)
    exact = np.empty((num_out, num_in), np.float32)
    for o in range(num_out):
        for i in range(num_in):
            steps = np.float32(q[o, i] - zero[o, order[i]])
            exact[o, i] = steps * np.float32(scale[o, order[i]])
    return q, zero, scale, exact


def words(rows: list[list[int]]) -> torch.Tensor:
    """Unsigned 32-bit numbers as int32."""
    return torch.tensor([[n - (n >> 31 << 32) for n in row] for row in rows], dtype=torch.int32)


def gptq(
    rng,
    num_out,
    num_in,
    *,
    bits=4,
    v2=False,
    group=GROUP,
    zeros=None,
    g_idx=True,
    bias=False,
    act_order=False,
):
    """GPTQ: word w has 32 / bits input columns from 32 w / bits on, and output channels for zeros.

    With `act_order`, the columns of a group are those that a permutation puts side by side.
    """
    n, group = 32 // bits, group or num_in
    order = [i // group for i in (rng.permutation(num_in) if act_order else range(num_in))]
    zeros = zeros or (0 if v2 else 1, (1 << bits) - 1)
    q, zero, scale, exact = numbers(rng, num_out, num_in, zeros, group, bits, order)
    less = 0 if v2 else 1
    qweight = [
        [sum(int(q[o, n * w + k]) << bits * k for k in range(n)) for o in range(num_out)]
        for w in range(num_in // n)
    ]
    qzeros = [
        [
            sum(int(zero[n * w + k, g]) - less << bits * k for k in range(n))
            for w in range(num_out // n)
        ]
        for g in range(zero.shape[1])
    ]
    tensors = {
        ".qweight": words(qweight),
        ".qzeros": words(qzeros),
        ".scales": torch.from_numpy(scale.T.copy()),
    }
    if g_idx:
        tensors[".g_idx"] = torch.tensor(order, dtype=torch.int32)
    if bias:
        tensors[".bias"] = torch.zeros(num_out, dtype=torch.float16)
    return tensors, exact


def awq(rng, num_out, num_in):
    """AWQ: nibble k of word w is output channel 8 w + ORDER[k]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    q, zero, scale, exact = numbers(rng, num_out, num_in, (0, 15))

    def pack(table, column):
        return [
            sum(int(table[8 * w + order[k], column]) << 4 * k for k in range(8))
            for w in range(num_out // 8)
        ]

    tensors = {
        ".qweight": words([pack(q, i) for i in range(num_in)]),
        ".qzeros": words([pack(zero, g) for g in range(zero.shape[1])]),
        ".scales": torch.from_numpy(scale.T.copy()),
    }
    return tensors, exact


def packed(rng, num_out, num_in, *, bits=4, symmetric=True, group=GROUP, act_order=False):
    """compressed-tensors: signed numbers plus half their range, columns in words along the rows.

    `group` None is one group per row.
    """
    n, group, half = 32 // bits, group or num_in, 1 << bits - 1
    zeros = (half, half) if symmetric else (0, 2 * half - 1)
    order = [i // group for i in (rng.permutation(num_in) if act_order else range(num_in))]
    q, zero, scale, exact = numbers(rng, num_out, num_in, zeros, group, bits, order)
    tensors = {
        ".weight_packed": words(
            [
                [
                    sum(int(q[o, n * w + k]) << bits * k for k in range(n))
                    for w in range(num_in // n)
                ]
                for o in range(num_out)
            ]
        ),
        ".weight_scale": torch.from_numpy(scale),
        ".weight_shape": torch.tensor([num_out, num_in]),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = words(
            [
                [
                    sum(int(zero[n * w + k, g]) << bits * k for k in range(n))
                    for g in range(len(zero[0]))
                ]
                for w in range(num_out // n)
            ]
        )
    if act_order:
        tensors[".weight_g_idx"] = torch.tensor(order, dtype=torch.int32)
    return tensors, exact


# --- quantization_config of the tools ------------------------------------------------------------


def compressed_tensors(format, **weights):
    """As llm-compressor writes it, for an 8B model of Llama 3.1."""
    weights = {
        "num_bits": 8,
        "type": "float",
        "strategy": "channel",
        "symmetric": True,
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    } | weights
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.46,
        "sparsity_config": {},
    }


def packed_config(**weights):
    """As llm-compressor writes it for weights in groups of 16."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16} | weights
    return compressed_tensors("pack-quantized", **weights)


FBGEMM = {
    "quant_method": "fbgemm_fp8",
    "activation_scale_ub": 1200.0,
    "modules_to_not_convert": ["lm_head"],
}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
    "ignore": ["lm_head"],
    "producer": {"name": "modelopt", "version": "0.33.0"},
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 16,
    "desc_act": False,
    "sym": False,
    "lm_head": False,
    "damp_percent": 0.01,
    "static_groups": False,
    "true_sequential": True,
    "model_name_or_path": None,
    "meta": {"quantizer": ["gptqmodel:2.0.0"]},
    "pack_dtype": "int32",
    "dynamic": None,
}
GPTQ_V2 = GPTQ | {"checkpoint_format": "gptq_v2"}
AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "data_type": "int",
    "group_size": 16,
    "sym": True,
    "autoround_version": "0.15.1",
    "block_name_to_quantize": "model.layers",
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 16,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
