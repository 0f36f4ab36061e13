"""Ray and torchrun: they place the ranks and call them."""
