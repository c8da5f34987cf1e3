"""Writers of checkpoint formats, one file each, and the verifier that reads back what they wrote."""
