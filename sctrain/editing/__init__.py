"""Zero-shot editing with a consistency model (Song et al. 2023, algorithm 4)."""
