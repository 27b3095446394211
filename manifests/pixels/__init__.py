"""Makes arrays of images: the one guarded decoder, the rules by which labels are cropped, and raw labels (.npy)."""
