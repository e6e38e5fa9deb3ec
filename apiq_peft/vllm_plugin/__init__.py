"""ApiQ inside vLLM: models with `quant_method: apiq`, by our operator on packed codes.

vLLM finds `register` by the entry point `apiq_peft` of the group `vllm.general_plugins` and calls
it in each of its processes. Nothing else imports this package.
"""

from __future__ import annotations

import logging

SUPPORTED = "0.32"  # of vLLM, whose inner classes are extended

_LOG = logging.getLogger("vllm.apiq_peft")  # vLLM shows its own namespace


def register() -> None:
    """Teach the vLLM of this process ApiQ; called again it does nothing.

    With another version of vLLM than `SUPPORTED` it changes nothing and says so in the log.
    """
    import vllm

    if not vllm.__version__.startswith(f"{SUPPORTED}."):
        _LOG.error(
            "vLLM is %s, but ApiQ models are served by vLLM %s.* only: they stay off. Install the"
            " extra road-apiq-peft[vllm], or set VLLM_PLUGINS without apiq_peft",
            vllm.__version__,
            SUPPORTED,
        )
        return
    from apiq_peft.vllm_plugin import quantization

    quantization.install()
