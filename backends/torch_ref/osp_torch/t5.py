"""The T5 / mT5 text encoder: the transformers library's own, without its loader.

Shapes: B batch, L tokens, D model width. mT5's encoder is T5's (v1.1 form) with another vocabulary.
"""

from __future__ import annotations

from transformers import T5Config, T5EncoderModel

from osp_shared.specs.t5 import T5Spec

KEEP_FLOAT32 = ("wo.weight",)  # the library's rule: this product overflows float16


class T5Encoder(T5EncoderModel):
    """ids, mask (B, L) -> last hidden state (B, L, D)."""

    def __init__(self, spec: T5Spec):
        super().__init__(T5Config(**spec.to_config(), is_encoder_decoder=False, use_cache=False))
        self.encoder.embed_tokens = None  # an alias of `shared`, which then is the only name of the table

    def forward(self, ids_BL, mask_BL):
        return self.encoder(inputs_embeds=self.shared(ids_BL), attention_mask=mask_BL).last_hidden_state
