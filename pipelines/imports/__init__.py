"""Other people's weights as our networks: file → tensors (read, pickles) → parameters (formats,
convert) → a folder of our own (folder).
"""
