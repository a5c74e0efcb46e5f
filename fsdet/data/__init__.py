"""Data sets, K-shot samples, supports and batches."""
