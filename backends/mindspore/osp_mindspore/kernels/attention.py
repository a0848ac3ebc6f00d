"""Scaled dot-product attention.

B batch, N heads, S queries, K keys, D head width. Masks are per key (one row for all queries), so nothing of size
S x K exists unless the hardware operator itself asks for it.
"""

import mindspore as ms
from mindspore import ops

from osp_mindspore.kernels.precision import raised

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
        logits = ops.BatchMatMul(transpose_b=True)(q if stop - start == S else q[:, start:stop], k)
        if key_bias_B11K is not None or bias_1NSK is not None:
            logits = logits.reshape(B, N, stop - start, K)
            if key_bias_B11K is not None:
                logits = logits + key_bias_B11K
            if bias_1NSK is not None:
                logits = logits + bias_1NSK[:, :, start:stop]
            logits = logits.reshape(B * N, stop - start, K)
        blocks.append(ops.BatchMatMul()(ops.softmax(logits, -1), v))
    out = blocks[0] if len(blocks) == 1 else ops.cat(blocks, 1)
    return out.reshape(B, N, S, D)


FLASH_HEAD_LIMIT = 512  # FlashAttentionScore: head width up to 512, a multiple of 16
_MASKED = -1000.0  # key biases below this mean "not visible" (released masks use -9980 and -10000)


def attention_ascend(q_BNSD, k_BNKD, v_BNKD, scale, key_bias_B11K=None, bias_1NSK=None):
    """FlashAttentionScore, layout BNSD, half types; a float32 call is computed in bfloat16 and returned as float32.

    The operator's mask is uint8 with 1 = hidden and must have a row for every query; it is built only when a key is
    hidden. Pair biases (T5) have no fused form: they take the plain one.

    Raises:
        ValueError: operands whose shapes do not fit together (the operator itself checks neither key nor value length).
    """
    B, N, S, D = q_BNSD.shape
    K = k_BNKD.shape[2]
    if k_BNKD.shape != (B, N, K, D) or v_BNKD.shape != (B, N, K, D):
        raise ValueError(f"attention: q {q_BNSD.shape}, k {k_BNKD.shape}, v {v_BNKD.shape} do not fit together")
    if bias_1NSK is not None:
        return attention_cpu(q_BNSD, k_BNKD, v_BNKD, scale, key_bias_B11K, bias_1NSK)
    mask = None
    if key_bias_B11K is not None:
        if key_bias_B11K.shape != (B, 1, 1, K):
            raise ValueError(f"attention: key bias {key_bias_B11K.shape}, expected {(B, 1, 1, K)}")
        mask = (key_bias_B11K < _MASKED).astype(ms.uint8).broadcast_to((B, 1, S, K))
    dtype = q_BNSD.dtype
    half = ms.bfloat16 if dtype == ms.float32 else dtype
    q, k, v = (t.astype(half) for t in (q_BNSD, k_BNKD, v_BNKD))
    fused = ops.operations.nn_ops.FlashAttentionScore(head_num=N, scale_value=scale, input_layout="BNSD")
    return fused(q, k, v, None, None, None, mask, None)[3].astype(dtype)
