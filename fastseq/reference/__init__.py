"""The specification: plain PyTorch, any floating dtype, one file an op. Also the answer of last resort."""
