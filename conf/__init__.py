"""The Hydra configuration files of megarl, shipped inside the wheel as the package ``megarl.conf``."""
