"""Plain torch and timm: backbones cut into blocks, mask plans, decoders, targets and local losses."""
