"""What every layer-wise method needs: moments of inputs, problems, sharding; knows no method."""
