"""Where images come from: folders, arrays, tables, CIFAR, CelebA, LSUN."""
