"""Networks: parameters in, velocity or features out."""
