"""The kernels of Qwen3-Next that SGLang 0.5.21 calls on a CPU, in plain torch.

SGLang imports this module with its backend of gated delta nets. Formulas: Yang et al., Gated
Delta Networks (arXiv 2412.06464), with keys and queries of length 1.

Suffixes: N requests, T tokens of all, L tokens of the longest, C channels, W width of the
convolution, H key heads, J value heads, K and V sizes of a key and a value, S slots of the pools.
"""

import torch
import torch.nn.functional as F
from sglang.kernels.ops.attention.fla import fused_norm_gate
from sglang.kernels.ops.elementwise import elementwise


def causal_conv1d_fn_cpu(
    x_CT, weight_CW, bias, activation, conv_states, has_initial_state, cache_indices,
    query_start_loc, seq_lens_cpu,
):  # fmt: skip
    """Convolves the new tokens of each request, which begin with its state of W - 1 tokens."""
    out, first = torch.empty_like(x_CT), 0
    for length, slot, known in zip(
        seq_lens_cpu, cache_indices.tolist(), has_initial_state.tolist(), strict=True
    ):
        state = conv_states[slot] if known else torch.zeros_like(conv_states[slot])
        inputs = torch.cat([state.to(x_CT.dtype), x_CT[:, first : first + length]], 1)
        y = F.conv1d(inputs, weight_CW[:, None], bias, groups=len(inputs))
        out[:, first : first + length] = F.silu(y) if activation else y
        conv_states[slot] = inputs[:, inputs.size(1) - state.size(1) :].to(state.dtype)
        first += length
    return out


def causal_conv1d_update_cpu(x_NC, conv_state, weight_CW, bias, activation, conv_state_indices):
    """Convolves one new token of each request and moves it into the request's state."""
    slots_N = conv_state_indices.long()
    window_NCW = torch.cat([conv_state[slots_N].to(x_NC.dtype), x_NC[:, :, None]], 2)
    conv_state[slots_N] = window_NCW[:, :, 1:].to(conv_state.dtype)
    y_NC = (window_NCW * weight_CW).sum(2)
    if bias is not None:
        y_NC += bias
    return F.silu(y_NC) if activation else y_NC


def fused_gdn_gating_cpu(A_log, a_TJ, b_TJ, dt_bias):
    """Returns the logarithm of the decay and the strength of the update, [1, T, J] in float32."""
    decay = -A_log.float().exp() * F.softplus(a_TJ.float() + dt_bias.float())
    return decay[None], b_TJ.float().sigmoid()[None]


def chunk_gated_delta_rule_cpu(
    q, k, v, g, beta, initial_state, cu_seqlens, head_first, use_qk_l2norm_in_kernel,
    initial_state_indices,
):  # fmt: skip
    """Returns the outputs [1, T, J, V] of the new tokens of each request; updates its state."""
    assert use_qk_l2norm_in_kernel and not head_first
    lengths_N = cu_seqlens.diff().long()
    exists_NL = torch.arange(int(lengths_N.max())) < lengths_N[:, None]

    def padded(x):
        rows = x[0].float()
        out = rows.new_zeros(*exists_NL.shape, *rows.shape[1:])
        out[exists_NL] = rows
        return out

    # a padded token has no decay and no update, so it leaves the state as it is
    out_NLJV = _delta_rule(*map(padded, (q, k, v, g, beta)), initial_state, initial_state_indices)
    return out_NLJV[exists_NL][None].to(v.dtype), None, None


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log, dt_bias, q, k, v, a, b, initial_state_source, initial_state_indices, cu_seqlens,
    use_qk_l2norm_in_kernel, softplus_beta, softplus_threshold,
):  # fmt: skip
    """Returns the outputs [1, N, J, V] of one new token of each request; updates its state."""
    assert use_qk_l2norm_in_kernel and softplus_beta == 1
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    new = (x[0].float()[:, None] for x in (q, k, v, g, beta))
    out_NLJV = _delta_rule(*new, initial_state_source, initial_state_indices)
    return out_NLJV[:, 0][None].to(v.dtype)


def _delta_rule(q_NLHK, k_NLHK, v_NLJV, g_NLJ, beta_NLJ, states, slots_N):
    """Returns [N, L, J, V]; updates `states` [S, J, V, K] at the slots.

    S_t = exp(g_t) S_(t-1) (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  o_t = S_t q_t / sqrt(K)
    """
    slots_N = slots_N.long()
    repeats = v_NLJV.size(2) // q_NLHK.size(2)
    q, k = (_normalized(x).repeat_interleave(repeats, 2) for x in (q_NLHK, k_NLHK))
    state = states[slots_N].float()
    out = []
    for t in range(q.size(1)):
        state = state * g_NLJ[:, t, :, None, None].exp()
        known = (state * k[:, t, :, None]).sum(-1)
        change = (v_NLJV[:, t] - known) * beta_NLJ[:, t, :, None]
        state = state + change[..., None] * k[:, t, :, None]
        out.append((state * q[:, t, :, None]).sum(-1))
    states[slots_N] = state.to(states.dtype)
    return torch.stack(out, 1) * q.size(-1) ** -0.5


def _normalized(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def fused_rmsnorm_gated_cpu(x, weight, gate, eps):
    """Returns RMSNorm(x) * weight * silu(gate)."""
    wide = x.float()
    normed = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (normed * F.silu(gate.float())).to(x.dtype)


def _gate_shared_expert(hidden_states, gate_weight, shared_output, output, *, do_add):
    """Replaces a kernel of triton, which SGLang calls on a CPU without AMX too."""
    gated = shared_output * (hidden_states @ gate_weight).sigmoid()[:, None]
    output.copy_(output + gated if do_add else gated)


elementwise._launch_fused_gate_sigmoid_mul = _gate_shared_expert
for _function in (
    fused_gdn_gating_cpu,
    fused_rmsnorm_gated_cpu,
    fused_sigmoid_gating_delta_rule_update_cpu,
):
    setattr(torch.ops.sgl_kernel, _function.__name__, _function)
fused_norm_gate._use_cpu = True  # False on a CPU without AMX: it would call a kernel of triton
