"""What a model looked at: hidden attention of Mamba layers, gradients, cross-attention, and their pictures."""
