"""SGLang: how a server stores weights (fused, split, typed, quantized), and needed versions."""
