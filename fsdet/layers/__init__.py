"""Layers: tensors in, tensors out; no config and no Detectron2 structures."""
