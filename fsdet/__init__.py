"""fsdet: few-shot object detection on Detectron2."""

__version__ = "0.1.0"
