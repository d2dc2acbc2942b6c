"""SoundNet for HEAR, which wants the name of one importable module; see `soundnet_port.interop.hear`."""

from soundnet_port.interop.hear import get_scene_embeddings, get_timestamp_embeddings, load_model

__all__ = ["get_scene_embeddings", "get_timestamp_embeddings", "load_model"]
