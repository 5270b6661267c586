"""Attention: its schedules, its kernels and how they are launched."""
