"""Weights in and out: safe reading, atomic writing, predictor surgery by class names, official names."""
