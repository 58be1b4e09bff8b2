"""The training step and its mathematics: tensors in, tensors and metrics out; no sockets, no devices chosen."""
