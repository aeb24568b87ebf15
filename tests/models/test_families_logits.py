"""Scale and cap of logits, by the config, against the models' own logits; and configs that have such a field unused."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.models import families
from distill.models.backbone import capped

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
CASES: dict[str, dict[str, Any]] = {
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0} | MOE,
    "granitemoeshared": {"logits_scaling": 4.0, "shared_intermediate_size": 32} | MOE,
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "hyperclovax": {"logits_scaling": 0.5},
    "minicpm3": {
        "dim_model_base": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "vaultgemma": {"final_logit_softcapping": 0.5},
    "llama": {"final_logit_softcapping": 0.5, "logits_scaling": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_scale_and_cap_give_the_models_own_logits(kind: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | CASES[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        product = model.base_model(input_ids=ids).last_hidden_state @ model.get_output_embeddings().weight.T
    found = capped(families.logit_scale(config) * product, families.logit_cap(config))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(product, expected, atol=1e-3) == (kind == "llama"), "the case scales or caps visibly"


def test_a_field_that_the_family_does_not_use() -> None:
    """Gemma 3 with images does not cap its logits, although its text config has the field."""
    config = AutoConfig.for_model("gemma3", text_config={"final_logit_softcapping": 30.0})
    assert families.logit_cap(config) is None and families.logit_scale(config) == 1.0
