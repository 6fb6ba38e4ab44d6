"""Plain torch and timm: backbones cut into blocks, mask plans, decoders, targets, local losses. Knows no Ray, no MLflow."""
