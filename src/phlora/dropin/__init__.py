"""The front for scripts: TRL's trainer and configurations under Phlora's name, for which one import is changed."""
