"""PEFT's own tests, with another class in the place of `peft.RoadConfig`."""
