"""The PyTorch reference: the plainest correct statement of each model."""
