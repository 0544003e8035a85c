"""The image processor of DINOv2, whose name depends on the version of transformers."""

try:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as BitProcessor
except ImportError:  # before transformers 5
    from transformers import BitImageProcessor as BitProcessor

__all__ = ["BitProcessor"]
