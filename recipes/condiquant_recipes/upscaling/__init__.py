"""``condiquant upscale``: needs OpenVINO, numpy and an image library, nothing of torch."""
