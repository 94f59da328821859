"""Operations of the interpolated forward pass."""
