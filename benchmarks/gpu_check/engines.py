"""Whether vLLM can be used here."""

import torch


def missing_engine(device: torch.device) -> str | None:
    """Why there is no engine for the device; None when there is one."""
    try:
        from vllm.platforms import current_platform
    except (ImportError, OSError) as error:  # not there, or for other libraries than there are
        return f"vLLM cannot be imported here ({type(error).__name__}: {error})"
    is_fitting = current_platform.is_cuda() if device.type == "cuda" else current_platform.is_cpu()
    found = current_platform.device_type or "a device that is not here"
    return None if is_fitting else f"the vLLM here was built for {found}, not for {device.type}"
