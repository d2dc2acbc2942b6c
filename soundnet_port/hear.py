"""The module for HEAR's programs, `soundnet_port.hear`; see `soundnet_port.interop.hear`."""

from soundnet_port.interop.hear import get_scene_embeddings, get_timestamp_embeddings, load_model

__all__ = ["get_scene_embeddings", "get_timestamp_embeddings", "load_model"]
