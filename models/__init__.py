"""Networks: nn.Modules whose layers carry exact tangents. Imports nothing else of the project."""

import models.attention
import models.tangent.rules  # noqa: F401  (both register how tangents pass PyTorch's functions)
