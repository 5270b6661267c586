"""Attention: its anchors and spellings, its checks, and its lowering."""
