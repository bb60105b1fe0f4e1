"""Will a run fit, and how fast will it be: memory counted without having it, time from a model until it is measured."""
