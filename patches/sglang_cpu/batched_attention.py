"""Attention over the whole batch at once for SGLang's torch_native attention backend (0.5.21).

SGLang loops over the requests in Python; with many short requests that loop is half of a decode
step on a CPU. Here the keys and values of all requests are gathered into one padded block, B
requests x L tokens, and attended in one call. The sums are taken in another order, so results are
not bit-identical to the loop. Cross attention, sliding windows and large ragged prefills use
SGLang's code.
"""

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

MAX_SCORES = 1 << 24  # largest padded score block (floats) of a layer; above, the loop is cheaper


class BatchedTorchAttention(TorchNativeAttnBackend):
    def init_forward_metadata(self, forward_batch):
        super().init_forward_metadata(forward_batch)
        self._padded = None  # cached by _gather() for all layers of a forward pass

    def _gather(self, req_to_token, req_pool_indices, seq_lens):
        """Returns each token's cache slot (0 beyond the end) and whether it exists, both [B, L]."""
        if self._padded is None:
            length = int(seq_lens.max())
            exists = torch.arange(length) < seq_lens[:, None]
            self._padded = req_to_token[req_pool_indices, :length].long() * exists, exists
        return self._padded

    def _run_sdpa_forward_decode(
        self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
        encoder_lens=None,
        scaling=None, enable_gqa=False, causal=False, is_cross_attn=False, sliding_window_size=None,
    ):  # fmt: skip
        if encoder_lens is not None or is_cross_attn or sliding_window_size is not None:
            return super()._run_sdpa_forward_decode(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
            )  # fmt: skip
        tokens, exists = self._gather(req_to_token, req_pool_indices, seq_lens)
        output.copy_(
            _attend(query[:, None], k_cache[tokens], v_cache[tokens], exists[:, None], scaling)[
                :, 0
            ]
        )
        return output

    def _run_sdpa_forward_extend(
        self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
        extend_prefix_lens, extend_seq_lens, encoder_lens=None, scaling=None, enable_gqa=False,
        causal=False, is_cross_attn=False, sliding_window_size=None,
    ):  # fmt: skip
        batch, heads = len(seq_lens), query.shape[1]
        width = int(extend_seq_lens.max())
        too_big = batch * heads * width * int(seq_lens.max()) > MAX_SCORES
        if (
            encoder_lens is not None
            or is_cross_attn
            or sliding_window_size is not None
            or not causal
            or too_big
        ):
            return super()._run_sdpa_forward_extend(
                query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                extend_prefix_lens, extend_seq_lens, encoder_lens, scaling, enable_gqa, causal,
                is_cross_attn, sliding_window_size,
            )  # fmt: skip
        tokens, exists = self._gather(req_to_token, req_pool_indices, seq_lens)
        column = torch.arange(width)
        real = column < extend_seq_lens[:, None]  # [B, Q]: query positions that hold a token
        padded = query.new_zeros(batch, width, *query.shape[1:])
        padded[real] = query
        position = extend_prefix_lens[:, None] + column  # [B, Q]
        visible = exists[:, None] & (
            torch.arange(tokens.shape[1]) <= position[:, :, None]
        )  # [B, Q, L]
        output.copy_(_attend(padded, k_cache[tokens], v_cache[tokens], visible, scaling)[real])
        return output


def _attend(q_BQHD, k_BLKD, v_BLKD, visible_BQL, scaling):
    """Computes grouped-query attention, H = K x G query heads over K key heads: [B, Q, H, D]."""
    B, Q, H, D = q_BQHD.shape
    K = k_BLKD.shape[2]
    q = (
        q_BQHD.view(B, Q, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    )  # [B, K, G*Q, D]
    scores = torch.matmul(q * (scaling or D**-0.5), k_BLKD.permute(0, 2, 3, 1))  # [B, K, G*Q, L]
    scores = scores.view(B, K, H // K, Q, -1).masked_fill_(
        ~visible_BQL[:, None, None], float("-inf")
    )
    out = torch.matmul(scores.softmax(-1).view(B, K, -1, scores.shape[-1]), v_BLKD.transpose(1, 2))
    return out.view(B, K, H // K, Q, -1).permute(0, 3, 1, 2, 4).reshape(B, Q, H, -1)


def register():
    register_attention_backend("torch_native")(BatchedTorchAttention)
