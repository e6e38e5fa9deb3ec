"""An OpenAI-compatible server in which the `model` of a request names an adapter.

    python -m road_peft.serve MODEL --adapters DIR

A thin application over `RoadBank` and `AdapterBatching`, for one model on one machine. Needs the
extra: pip install 'road-apiq-peft[serve]'.
"""

try:
    import fastapi as _fastapi  # noqa: F401 - only whether it is there
    import prometheus_client as _prometheus_client  # noqa: F401 - the same
    import uvicorn as _uvicorn  # noqa: F401 - the same
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"road_peft.serve needs {error.name}; pip install 'road-apiq-peft[serve]'", name=error.name
    ) from error

from road_peft.serve.app import create_app
from road_peft.serve.engine import Engine
from road_peft.serve.options import ServeOptions

__all__ = ["Engine", "ServeOptions", "create_app"]
