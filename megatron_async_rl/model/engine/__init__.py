"""What a server stores of the weights: how its tensors are fused, split, typed and quantized."""
