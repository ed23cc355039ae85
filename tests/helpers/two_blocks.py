"""A model of two blocks with round numbers, for the closed forms of the planner."""

from sfd_scale.planning.footprint import Activations, Footprint

MODEL = Footprint((((1000, 1000),), ((1000, 1000),)), (), 0, Activations(10**9, 10**8, 10**7), 1.0)
P = MODEL.parameters
