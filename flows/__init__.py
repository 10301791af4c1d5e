"""The mathematics of flow matching and MeanFlow; imports nothing of ours."""
