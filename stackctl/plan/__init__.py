"""What a stack is, module by module, and all that stands in its way. Pure: no disk, no tensors."""
