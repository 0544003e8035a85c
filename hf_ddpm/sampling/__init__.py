"""Sample many images into a folder, resumable with identical results."""
