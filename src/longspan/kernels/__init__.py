"""Operations with a plain PyTorch reference each, and faster versions of the same signature."""
