"""What things cost, as ratios within one run: interleaved rounds, medians and spread."""
