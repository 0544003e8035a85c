"""The U-Net: its blocks, stages, dropout and precision."""
