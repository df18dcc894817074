from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
from sglang.srt.models.deepseek_common.attention_forward_methods import AttnForwardMethod
from sglang.srt.models.deepseek_v2 import EntryClass  # noqa: F401

# The backend attends to its cache, which holds latents: SGLang would prefill with whole keys and
# take the latents for them, without an error.
AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)
