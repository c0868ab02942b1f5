"""What architectures look like, as data: tensor names, config fields, shapes and the pairs between families."""
