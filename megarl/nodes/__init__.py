"""The nodes of a run: they answer a roll call, start torchrun or Ray, watch each other, and end together."""
