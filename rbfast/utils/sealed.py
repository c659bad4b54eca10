"""Safetensors files with a digest of their content in the metadata.

    file.write(seal(save(tensors, metadata)))
    tensors, metadata = load(data), check_seal(data)      # SafetensorError if a bit has changed since

Without a digest a flipped bit in a weight goes unnoticed. A file without a digest, from another writer, passes.
"""

import json
from hashlib import blake2b
from typing import Any

from safetensors import SafetensorError

_METADATA, _DIGEST = "__metadata__", "blake2b"


def seal(data: bytes) -> bytes:
    """The same safetensors file with a digest added."""
    header, body = _split(data)
    header.setdefault(_METADATA, {})[_DIGEST] = _digest(header, body)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return len(text).to_bytes(8, "little") + text + body


def check_seal(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file. Raises SafetensorError if its digest does not match its content."""
    header, body = _split(data)
    metadata = header.get(_METADATA) or {}
    if _DIGEST in metadata and metadata[_DIGEST] != _digest(header, body):
        raise SafetensorError("its content has changed since it was written")
    return {name: value for name, value in metadata.items() if name != _DIGEST}


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the tensor bytes of a valid safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _digest(header: dict[str, Any], body: bytes) -> str:
    metadata = {name: value for name, value in header.get(_METADATA, {}).items() if name != _DIGEST}
    about = json.dumps(header | {_METADATA: metadata}, sort_keys=True).encode()
    digest = blake2b(about, digest_size=16)
    digest.update(body)
    return digest.hexdigest()
