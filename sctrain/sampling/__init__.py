"""Samplers as free functions of one signature: (network, noise, conditions, sigma_data, ...) -> images in model space.

`network` is TrigFlow's F(u, t, *conditions), `noise` (B, C, H, W) of standard deviation sigma_d the state at the first
time, `conditions` what the network takes after (u, t), as (labels,) or (labels, guidance). All randomness is keyed by
(seed, index of the image), so images do not depend on how a batch is split.
"""

from sctrain.sampling.consistency import consistency_sample, jump_sample
from sctrain.sampling.noise import initial_noise, noised
from sctrain.sampling.ode import OdeSolver, edm_sample, ode_sample, trigflow_network
from sctrain.sampling.search import greedy_times, ternary_search
from sctrain.sampling.times import even_times, karras_times, lcm_times, nearest_times, step_times

__all__ = [
    "OdeSolver",
    "consistency_sample",
    "edm_sample",
    "even_times",
    "greedy_times",
    "initial_noise",
    "jump_sample",
    "karras_times",
    "lcm_times",
    "nearest_times",
    "noised",
    "ode_sample",
    "step_times",
    "ternary_search",
    "trigflow_network",
]
