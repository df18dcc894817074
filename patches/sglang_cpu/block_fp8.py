"""Block-scaled fp8 layers in plain torch, for models with weight_block_size (SGLang 0.5.21).

SGLang's kernels for them need CUDA, triton or AMX. Linear layers quantize their input per token and
group of 128 elements, as the CUDA path does, and multiply in float32; the sums are taken in another
order. Experts do the same with each expert's tokens.
"""

import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

GROUP = 128
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
MIN_MAGNITUDE = 1e-10  # of a group, as in SGLang's per_token_group_quant_fp8


def linear(input, weight, block_size, weight_scale, input_scale=None, bias=None):
    """Returns input @ weight.T: [..., n] for [..., k], in the input's element type."""
    assert input_scale is None
    groups = input.float().unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=MIN_MAGNITUDE) / FP8_MAX
    rounded = (groups / scale).to(torch.float8_e4m3fn).float() * scale
    dequantized = block_quant_dequant(weight, weight_scale, block_size, torch.float32)
    output = F.linear(rounded.flatten(-2), dequantized)
    return (output if bias is None else output + bias).to(input.dtype)


def experts(self, layer, dispatch_output):
    """Fp8MoEMethod.apply: the weighted sum of each token's experts."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    config, x = self.moe_runner_config, dispatch_output.hidden_states
    assert config.activation == "silu" and not config.apply_router_weight_on_input
    weights, chosen, _ = dispatch_output.topk_output
    output = torch.zeros_like(x, dtype=torch.float32)
    for expert in chosen.unique().tolist():
        token, rank = (chosen == expert).nonzero(as_tuple=True)
        w13, w2 = (
            (getattr(layer, name)[expert], self.weight_block_size, getattr(layer, scale)[expert])
            for name, scale in (
                ("w13_weight", "w13_weight_scale_inv"),
                ("w2_weight", "w2_weight_scale_inv"),
            )
        )
        gate, up = linear(x[token], *w13).chunk(2, -1)
        output.index_add_(
            0, token, linear(F.silu(gate) * up, *w2).float() * weights[token, rank, None]
        )
    return StandardCombineInput(hidden_states=output.to(x.dtype))


def install():
    """Replaces the methods for layers of fp8 blocks, and allows float32 activations."""
    fp8.dispatch_w8a8_block_fp8_linear = lambda **_: linear
    for method in (fp8.Fp8LinearMethod, fp8.Fp8MoEMethod):
        # packs weights for AMX
        method.process_weights_after_loading_block_quant = lambda self, layer: None
    fp8.Fp8MoEMethod.apply = experts
    fp8.Fp8Config.get_supported_act_dtypes = lambda self: [
        torch.bfloat16, torch.half, torch.float32
    ]  # fmt: skip
