"""What the algorithms need of a framework, for torch and for OpenVINO."""
