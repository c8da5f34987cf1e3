"""Calibration data: where text comes from, how it is cut into tokens, and text sampled from the model itself."""

from compress.calibration.self_generated import generate
from compress.calibration.sources import Document, Documents, file_digest, is_file, texts, whole_text
from compress.calibration.tokens import TokenSet, build, eval_stream

__all__ = [
    "Document",
    "Documents",
    "TokenSet",
    "build",
    "eval_stream",
    "file_digest",
    "generate",
    "is_file",
    "texts",
    "whole_text",
]
