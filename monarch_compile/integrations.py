"""Monarch attention in eager code, call by call, without torch.compile.

`replace_sdpa` serves any library that calls torch.nn.functional.scaled_dot_product_attention; `register_transformers`
gives transformers an attn_implementation, and `register_diffusers` gives diffusers an attention backend. Every call is
judged with the tensors it is given: by their sizes and kinds, once for all calls that agree in these, and by the mask's
values, at every call. One that cannot be lowered stays exact, and its reason is logged once. Results have the dtype
(under autocast, too) and the strides that SDPA's own would have. Code that is traced or transformed by torch.func stays
exact here: what torch.compile and torch.export trace, backend="monarch" and `lower_exported` judge.
"""

from monarch_compile.attention.doors import ReplaceSdpa, register_diffusers, register_transformers, replace_sdpa

__all__ = ["ReplaceSdpa", "register_diffusers", "register_transformers", "replace_sdpa"]
