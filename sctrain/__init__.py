"""How a run happens: configuration, objectives, ZeRO-3 training, checkpoints, evaluation, reports.

The networks and the data pipeline are the sibling packages `models` and `data_pipeline`, whose names are common: a
foreign package of the same name earlier on the path is refused here instead of failing later in an odd place.
"""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"

SIBLINGS = ("models", "data_pipeline", "launchers")


def package_folder(name: str) -> Path | None:
    """The folder (or file) that `import name` would use; None if there is none. Imports nothing."""
    spec = find_spec(name)
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or filter(None, [spec.origin]))
    return Path(places[0]).resolve() if places else None


def _refuse_intruders() -> None:
    home = Path(__file__).resolve().parents[1]
    for name in SIBLINGS:
        found = package_folder(name)
        if found != home / name:
            raise ImportError(
                f"sctrain needs its own package '{name}' in {home}, but Python finds {found or 'none'}; "
                "remove the other one from PYTHONPATH or from the current folder",
                name=name,
            )


_refuse_intruders()
