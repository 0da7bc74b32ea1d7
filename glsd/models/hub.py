"""Whether the Hugging Face hub answers, asked before timm waits for it through all its retries."""

import os
import threading

import timm
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from glsd.errors import UserError, one_line

PATIENCE = 5.0  # seconds; HF_HUB_ETAG_TIMEOUT, the hub's own setting, replaces it
_PATIENCE_VARIABLE = "HF_HUB_ETAG_TIMEOUT"
_FILES = ("model.safetensors", "pytorch_model.bin")  # that timm looks for


def check_hub(backbone: str) -> None:
    """Raise UserError, within seconds, if timm's weights of a network are not in the cache and the hub does not answer."""
    known = timm.get_pretrained_cfg(backbone)
    if known is None or not known.hf_hub_id:
        return
    repository, _, revision = known.hf_hub_id.partition("@")
    files = (known.hf_hub_filename,) if known.hf_hub_filename else _FILES
    if any(
        isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in files
    ):
        return
    problem = _silence(hf_hub_url(repository, files[0], revision=revision or None))
    if problem:
        raise UserError(
            f"the weights of {backbone!r} are not in {constants.HF_HUB_CACHE} and {constants.ENDPOINT} does not answer "
            f"({problem}): check the connection (a proxy: HTTPS_PROXY, a mirror: HF_ENDPOINT, a slow line: {_PATIENCE_VARIABLE}), "
            "copy the cache from a machine that has it, or give a weights file"
        )


def _silence(url: str) -> str:
    """Return why the hub does not answer, "" if it does, whatever it says."""
    patience = float(os.environ.get(_PATIENCE_VARIABLE) or PATIENCE)
    answer = [f"nothing within {patience:g} s"]

    def ask() -> None:
        try:
            get_hf_file_metadata(url, timeout=patience)
            answer[0] = ""
        except HfHubHTTPError:
            answer[0] = ""  # timm asks again, and says what is wrong
        except Exception as error:  # noqa: BLE001 - of the HTTP client, another one in each version of huggingface_hub
            answer[0] = one_line(error)

    # A thread, because looking up the name of a host knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return answer[0]
