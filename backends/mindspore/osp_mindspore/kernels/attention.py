"""Scaled dot-product attention.

B batch, N heads, S queries, K keys, D head width. Masks are per key (one row for all queries), so nothing of size
S x K exists unless the hardware operator itself asks for it.
"""

from osp_mindspore.kernels.precision import raised

import mindspore as ms
from mindspore import ops
from mindspore.ops.operations import nn_ops

_scores, _mix = ops.BatchMatMul(transpose_b=True), ops.BatchMatMul()
_LOGITS = 1 << 24  # logits held at once on CPU: 64 MiB in float32


@raised
def attention_cpu(q_BNSD, k_BNKD, v_BNKD, scale, key_bias_B11K=None, bias_1NSK=None):
    """softmax(scale * q k^T + biases) v, a block of queries at a time.

    key_bias_B11K: added to every query's logits; None means that every key is visible.
    bias_1NSK: a bias for each pair (T5's relative positions).
    """
    B, N, S, D = q_BNSD.shape
    K = k_BNKD.shape[2]
    q, k, v = (t.reshape(B * N, t.shape[2], D) for t in (q_BNSD * scale, k_BNKD, v_BNKD))
    rows = max(1, _LOGITS // (B * N * K))
    blocks = []
    for start in range(0, S, rows):
        stop = min(start + rows, S)
        logits = _scores(q if stop - start == S else q[:, start:stop], k)
        if key_bias_B11K is not None or bias_1NSK is not None:
            logits = logits.reshape(B, N, stop - start, K)
            if key_bias_B11K is not None:
                logits = logits + key_bias_B11K
            if bias_1NSK is not None:
                logits = logits + bias_1NSK[:, :, start:stop]
            logits = logits.reshape(B * N, stop - start, K)
        blocks.append(_mix(ops.softmax(logits, -1), v))
    out = blocks[0] if len(blocks) == 1 else ops.cat(blocks, 1)
    return out.reshape(B, N, S, D)


FLASH_HEAD_WIDTH = 16, 512  # FlashAttentionScore takes head widths that are multiples of 16, up to 512
_HIDDEN = 10.0  # a key whose bias is this far below the row's largest has no weight left (e^-10 per key at most)


def attention_ascend(q_BNSD, k_BNKD, v_BNKD, scale, key_bias_B11K=None, bias_1NSK=None):
    """FlashAttentionScore, layout BNSD, half types; a float32 call is computed in bfloat16 and returned as float32.

    The operator's mask is uint8 with 1 = hidden and needs a row for every query; it is built only when a bias is given.
    A key is hidden when its bias lies far below the largest of its row: so -9980 wins over -10000, and a row whose keys
    all carry the same bias attends to all of them, as the additive form does. Pair biases (T5) and heads wider than the
    operator allows take the plain form.

    Raises:
        ValueError: operands whose shapes do not fit together (the operator itself does not check key and value length).
    """
    B, N, S, D = q_BNSD.shape
    K = k_BNKD.shape[2]
    if k_BNKD.shape != (B, N, K, D) or v_BNKD.shape != (B, N, K, D):
        raise ValueError(f"attention: q {q_BNSD.shape}, k {k_BNKD.shape}, v {v_BNKD.shape} do not fit together")
    multiple, widest = FLASH_HEAD_WIDTH
    if bias_1NSK is not None or D > widest:
        return attention_cpu(q_BNSD, k_BNKD, v_BNKD, scale, key_bias_B11K, bias_1NSK)
    mask = None
    if key_bias_B11K is not None:
        if key_bias_B11K.shape != (B, 1, 1, K):
            raise ValueError(f"attention: key bias {key_bias_B11K.shape}, expected {(B, 1, 1, K)}")
        below = key_bias_B11K.max(axis=-1, keepdims=True) - key_bias_B11K
        mask = (below > _HIDDEN).astype(ms.uint8).broadcast_to((B, 1, S, K))
    dtype = q_BNSD.dtype
    q, k, v = (_fused_operand(t, dtype, -D % multiple) for t in (q_BNSD, k_BNKD, v_BNKD))
    fused = nn_ops.FlashAttentionScore(head_num=N, scale_value=scale, input_layout="BNSD")
    out = fused(q, k, v, None, None, None, mask, None)[3]
    return (out if D % multiple == 0 else out[..., :D]).astype(dtype)


def _fused_operand(x_BNSD, dtype, padding):
    """Half type, head width padded with zeros (which add nothing to a dot product)."""
    x = x_BNSD.astype(ms.bfloat16) if dtype == ms.float32 else x_BNSD
    if padding == 0:
        return x
    return ops.cat((x, ops.zeros(x.shape[:3] + (padding,), x.dtype)), -1)
