"""Triton kernels. Nothing here is imported before a tensor asks for it (`common.lazy_triton`)."""
