"""What several scripts share: images, models, measurements, pictures."""
