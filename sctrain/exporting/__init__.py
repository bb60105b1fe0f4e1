"""Models for elsewhere: one EMA of a run as plain safetensors, or as a pipeline of diffusers."""
