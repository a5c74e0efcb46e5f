"""Configuration, training, sweeps and the tools' logic."""
