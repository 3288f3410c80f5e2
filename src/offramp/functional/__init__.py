"""Pure functions on tensors: no ``nn.Module``, no files, no clocks."""
