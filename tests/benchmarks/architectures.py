"""Which published architectures become IRs that compute what torch simulates, and what runs in int8.

Run from the repository root: ``python tests/benchmarks/architectures.py [NAME ...] [--bits 8]
[--isa vnni]``. Small networks of BasicSR's and spandrel's classes with random weights, all layers
quantized, nothing reconditioned. Prints a table in Markdown.
"""

import argparse
import logging
import warnings
from collections import Counter

import nncf
import torch
from torch import nn

import condiquant_basicsr as basicsr_host
import condiquant_nncf as nncf_host
from condiquant_openvino import check_parity, convert, layer_executions
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_plugin import InputError

_RGB = {"num_in_ch": 3, "num_out_ch": 3}
_WINDOWS = {
    "img_size": 16, "depths": [2], "embed_dim": 24, "num_heads": [2], "window_size": 8, "mlp_ratio": 2,
}  # fmt: skip
SECTIONS = {
    "SRVGGNetCompact": {"num_feat": 16, "num_conv": 3, "upscale": 2},
    "EDSR": {**_RGB, "num_feat": 16, "num_block": 2, "upscale": 2, "res_scale": 0.1},
    "MSRResNet": {"num_feat": 16, "num_block": 2, "upscale": 4},
    "RRDBNet": {**_RGB, "num_feat": 16, "num_block": 1, "num_grow_ch": 8},
    "RCAN": {
        **_RGB, "num_feat": 16, "num_group": 2, "num_block": 2, "squeeze_factor": 4, "upscale": 2,
        "res_scale": 0.5,
    },
    "ECBSR": {
        **_RGB, "num_block": 2, "num_channel": 16, "with_idt": True, "act_type": "prelu", "scale": 2,
    },
    "SPAN": {**_RGB, "feature_channels": 16, "upscale": 2},
    "SwinIR": {**_WINDOWS, "upscale": 4, "upsampler": "nearest+conv", "resi_connection": "3conv"},
    "HAT": {
        **_WINDOWS, "upscale": 2, "upsampler": "pixelshuffle", "compress_ratio": 3, "squeeze_factor": 6,
    },
    "DAT": {
        "upscale": 2, "img_size": 32, "depth": [2], "embed_dim": 32, "num_heads": [2], "split_size": [8, 8],
        "upsampler": "pixelshuffledirect",
    },
    "OmniSR": {"num_feat": 16, "block_num": 1, "res_num": 1, "up_scale": 2, "window_size": 8, "pe": True},
    "PLKSR": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "RealPLKSR": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "SAFMN": {"dim": 16, "n_blocks": 2, "upscaling_factor": 2},
    "MoSR": {"dim": 16, "n_block": 2, "upscale": 2},
    "SeemoRe": {"scale": 2, "embedding_dim": 16, "num_layers": 2, "num_experts": 2},
    "DITN": {
        "dim": 16, "ITL_blocks": 1, "SAL_blocks": 1, "UFONE_blocks": 1, "patch_size": 8, "upscale": 2,
    },
    "NAFNet": {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "UpCunet2x": {},
    "DnCNN": {"in_nc": 3, "out_nc": 3, "nc": 16, "nb": 4, "act_mode": "BR"},
}  # fmt: skip


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = basicsr_host.folded(basicsr_host.build_network({"type": name, **SECTIONS[name]}))
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter.ndim > 1 and "table" not in parameter_name:
                nn.init.kaiming_normal_(parameter, nonlinearity="linear")
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return network


def row(name: str, bits: int, isa: str) -> str:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    config = nncf_host.QuantizationConfig(bits, bits, "all", recondition=None, other_bits=8)
    try:
        model = nncf_host.quantize_network(built(name), images, config).model
        ir = convert(model, images, isa=isa)
    except InputError as error:
        return f"| {name} | – | – | refused: {error} |"
    layers = layer_executions(ir, compile_ir(ir))
    in_float = Counter(layer.reason for layer in layers if layer.runs_as != "int8")
    parity = check_parity(model, ir, [images[:1]])
    notes = [f"{count}: {reason}" for reason, count in in_float.items()]
    try:
        parity.raise_if_broken()
    except RuntimeError as error:
        notes.append(f"**refused**: {error}")
    error = max((layer.error for layer in parity.layers), default=0.0)
    in_int8 = len(layers) - in_float.total()
    return f"| {name} | {in_int8} of {len(layers)} | {error:.0e} | {'; '.join(notes)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(SECTIONS))
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--isa", default="vnni")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    nncf.set_log_level(logging.ERROR)
    print("| network | int8 | largest error of a layer | in float, and why |\n|---|---|---|---|")
    for name in given.names:
        print(row(name, given.bits, given.isa), flush=True)


if __name__ == "__main__":
    main()
