"""Plain torch and timm: backbones cut into blocks, mask plans, decoders, targets. Usable in a notebook; knows no Ray, no MLflow."""
