import torch


class Pixels:
    """Random images in memory, accessed by index."""

    def __init__(self, count, shape=(1, 8, 8), seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
        self.shape = shape

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, indices):
        return self.pixels[indices]
