"""RoAd inside vLLM: adapters per request, through vLLM's own LoRA requests and slots.

vLLM finds `register` by the entry point `road_peft` of the group `vllm.general_plugins` and calls
it in each of its processes. Nothing else imports this package.
"""

from __future__ import annotations

import logging

SUPPORTED = "0.32"  # of vLLM, whose inner classes are extended

_LOG = logging.getLogger("vllm.road_peft")  # vLLM shows its own namespace


def register() -> None:
    """Teach the vLLM of this process RoAd; called again it does nothing.

    With another version of vLLM than `SUPPORTED` it changes nothing and says so in the log, so that
    whoever serves no RoAd is not disturbed.
    """
    import vllm

    if not vllm.__version__.startswith(f"{SUPPORTED}."):
        _LOG.error(
            "vLLM is %s, but RoAd adapters are served by vLLM %s.* only: they stay off. Install the"
            " extra road-apiq-peft[vllm], or set VLLM_PLUGINS without road_peft",
            vllm.__version__,
            SUPPORTED,
        )
        return
    from road_peft.vllm_plugin import manager, resolver

    manager.install()
    resolver.install()
