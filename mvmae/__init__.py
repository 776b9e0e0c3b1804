"""Multi-View Masked Autoencoder: timm-compatible encoders and their pretraining."""

__version__ = "0.1.0.dev0"
