"""Everything that is decided before a tensor touches a device. Imports neither torch nor mindspore."""
